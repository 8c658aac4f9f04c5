"""How sure a model is of what it says, method by method."""

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from mrp_lens.plots.facets import GAP, Panels
from mrp_lens.plots.frames import Frame, beside, facets, figure_of, known, methods_of, varying
from mrp_lens.plots.theme import LEFT, RIGHT, WIDTH, Axis, Look, fits, group_colours, literal

MEASURES = {
    "max_logit": "largest logit",
    "max_probability": "largest probability",
    "entropy": "entropy (nats)",
    "margin": "margin (nats)",
    "probability": "probability",
}
SPREAD = 0.72  # of a category's width, over which its groups are placed side by side
WIDEST_VIOLIN = 0.12  # of the panel
MOST_VALUES = 500  # that a violin carries; more are replaced by as many of their quantiles


@figure_of("mrp_lens.metrics.confidence", "group mode measure mean low high uniform")
def confidence_by_method(frame: pd.DataFrame) -> go.Figure:
    """How sure the model is by several measures, before and after each method, beside a uniform guess in grey.

    Args:
        frame: of `mrp_lens.metrics.confidence`: `group`, `mode`, `measure`, `mean`, `low`, `high`, `uniform`, and a
            column `method` where several frames are put together. Each measure (and mode) is a panel with its own
            scale; `seed` makes faint points around a mean.
    """
    methods = methods_of(frame)
    modes = varying(frame, "mode")
    parts = facets(beside(frame, SPREAD), ["measure", *modes])
    columns = next((n for n in ([frame["mode"].nunique()] if modes else [3, 2]) if _room(methods, n)), 1)
    panels = Panels(
        [(", ".join(part[name].iloc[0] for name in modes), part) for _, part in parts],
        x=Axis("method", "category", categories=methods),
        y=[Axis(MEASURES.get(part["measure"].iloc[0], part["measure"].iloc[0])) for _, part in parts],
        title="Confidence token by token",
        bars="Bars: 95% over questions.",
        note="Mean over tokens. {bars} Grey: what a uniform distribution over the vocabulary has.",
        columns=min(columns, len(parts)),
        height=170 if columns == 1 and len(parts) > 1 else None,
    )
    for panel, group, rows, colour in panels.by_group():
        look = Look(group, colour, mode="markers")
        panels.series(panel, rows, "place", "mean", look, interval=("low", "high"))
    for panel, part in panels:
        for value in part["uniform"].unique():
            panels.level(panel, float(value), name="uniform")
    return panels.figure()


def _columns(frame: Frame, measure: str = "max_logit") -> str:
    return f"group mode {measure}"


@figure_of("mrp_lens.metrics.token_confidence", _columns)
def confidence_distribution(frame: pd.DataFrame, measure: str = "max_logit") -> go.Figure:
    """Spread of one measure of confidence over tokens, before and after each method (RMU narrows the largest logit).

    A violin of more than 500 tokens is drawn from 500 evenly spaced quantiles of them.

    Args:
        frame: of `mrp_lens.metrics.token_confidence`: `group`, `mode`, the measure, and a column `method` where several
            frames are put together. Each mode is a panel.
        measure: the column to draw: max_logit, max_probability, entropy, margin or probability.
    """
    frame = known(frame, measure)
    methods, colours = methods_of(frame), group_colours(frame["group"])
    seeds = f" of {frame['seed'].nunique()} seeds together" if varying(frame, "seed") else ""
    panels = Panels(
        facets(frame, varying(frame, "mode")),
        x=Axis("method", "category", categories=methods),
        y=Axis(MEASURES.get(measure, measure)),
        title=f"Distribution over tokens: {MEASURES.get(measure, measure)}",
        note=f"Width: density of tokens{seeds}. Box: quartiles, with a line at the median.",
        columns=1,
    )
    width = min(SPREAD / frame["group"].nunique(), WIDEST_VIOLIN * len(methods))
    for panel, part in panels:
        for (place, group), rows in beside(part, SPREAD, methods).groupby(["place", "group"], sort=False):
            violin = go.Violin(
                x0=place,
                y=_thinned(rows[measure].to_numpy(float)),
                name=literal(group),
                width=width,
                spanmode="hard",
                scalemode="width",
                points=False,
                box={"visible": True, "width": 0.25},
                line={"color": colours[str(group)], "width": 1.4},
                hoveron="violins",
            )
            panels.trace(panel, violin)
    return panels.figure()


def _room(methods: list[str], columns: int) -> bool:
    """Whether the names of the methods stand side by side under panels of so many columns."""
    return fits(methods, (WIDTH - LEFT - RIGHT - GAP * (columns - 1)) / columns)


def _thinned(values: np.ndarray) -> np.ndarray:
    if len(values) <= MOST_VALUES:
        return values
    return np.quantile(values, (np.arange(MOST_VALUES) + 0.5) / MOST_VALUES)
