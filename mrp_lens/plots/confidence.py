"""How sure a model is of what it says, method by method."""

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from mrp_lens.plots.facets import GAP, Panels
from mrp_lens.plots.frames import Frame, facets, groups, known, methods_of, tidy, varying
from mrp_lens.plots.registry import register
from mrp_lens.plots.theme import LEFT, RIGHT, WIDTH, Axis, Look, fits, group_colours, literal

MEASURES = {
    "max_logit": "largest logit",
    "max_probability": "largest probability",
    "entropy": "entropy (nats)",
    "margin": "margin (nats)",
    "probability": "probability",
}
SPREAD = 0.36  # of a category's width, over which its groups are placed side by side
WIDEST_VIOLIN = 0.12  # of the panel
MOST_VALUES = 500  # that a violin carries; more are replaced by as many of their quantiles


@register("confidence_by_method")
def confidence_by_method(frame: Frame) -> go.Figure:
    """How sure the model is by several measures, before and after each method, beside a uniform guess in grey.

    Args:
        frame: of `mrp_lens.metrics.confidence`: `group`, `mode`, `measure`, `mean`, `low`, `high`, `uniform`, and a
            column `method` where several frames are put together. Each measure (and mode) is a panel with its own
            scale; `seed` makes faint points around a mean.

    Raises:
        TypeError, ValueError: not such a frame, no rows, or rows that nothing tells apart.
    """
    picture = "confidence_by_method"
    table = tidy(
        frame,
        ["group", "mode", "measure", "mean", "low", "high", "uniform"],
        picture=picture,
        metric="mrp_lens.metrics.confidence",
    )
    methods = methods_of(table)
    table = _placed(table, methods)
    modes = varying(table, "mode")
    parts = facets(table, ["measure", *modes])
    columns = next((n for n in ([table["mode"].nunique()] if modes else [3, 2]) if _room(methods, n)), 1)
    panels = Panels(
        [", ".join(part[name].iloc[0] for name in modes) for _, part in parts],
        x=Axis("method", "category", categories=methods),
        y=[Axis(MEASURES.get(part["measure"].iloc[0], part["measure"].iloc[0])) for _, part in parts],
        title="Confidence token by token",
        note="Mean over tokens. Bars: 95% over questions. Grey: what a uniform distribution over the vocabulary has.",
        picture=picture,
        columns=min(columns, len(parts)),
        height=170 if columns == 1 and len(parts) > 1 else None,
    )
    colours = group_colours(table["group"])
    for panel, (_, part) in enumerate(parts):
        for group, rows in groups(part):
            panels.series(
                panel, rows, "place", "mean", Look(group, colours[group], mode="markers"), interval=("low", "high")
            )
        for value in part["uniform"].unique():
            panels.level(panel, float(value), name="uniform")
    return panels.figure()


@register("confidence_distribution")
def confidence_distribution(frame: Frame, measure: str = "max_logit") -> go.Figure:
    """Spread of one measure of confidence over tokens, before and after each method (RMU narrows the largest logit).

    A violin of more than 500 tokens is drawn from 500 evenly spaced quantiles of them.

    Args:
        frame: of `mrp_lens.metrics.token_confidence`: `group`, `mode`, the measure, and a column `method` where several
            frames are put together. Each mode is a panel.
        measure: the column to draw: max_logit, max_probability, entropy, margin or probability.

    Raises:
        TypeError, ValueError: not such a frame, or no rows.
    """
    picture = "confidence_distribution"
    table = tidy(frame, ["group", "mode", measure], picture=picture, metric="mrp_lens.metrics.token_confidence")
    table = known(table, measure, picture)
    methods = methods_of(table)
    colours = group_colours(table["group"])
    parts = facets(table, varying(table, "mode"))
    panels = Panels(
        [label for label, _ in parts],
        x=Axis("method", "category", categories=methods),
        y=Axis(MEASURES.get(measure, measure)),
        title=f"Distribution over tokens: {MEASURES.get(measure, measure)}",
        note="Width: density of tokens. Box: quartiles, with a line at the median.",
        picture=picture,
        columns=1,
    )
    width = min(2 * SPREAD / table["group"].nunique(), WIDEST_VIOLIN * len(methods))
    for panel, (_, part) in enumerate(parts):
        for (place, group), rows in _placed(part, methods).groupby(["place", "group"], sort=False):
            panels.trace(
                panel,
                go.Violin(
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
                ),
            )
    return panels.figure()


def _room(methods: list[str], columns: int) -> bool:
    """Whether the names of the methods stand side by side under panels of so many columns."""
    return fits(methods, (WIDTH - LEFT - RIGHT - GAP * (columns - 1)) / columns)


def _placed(table: pd.DataFrame, methods: list[str]) -> pd.DataFrame:
    """With `place`: the number of the method, a little to the side for each group."""
    names = [name for name, _ in groups(table)]
    offsets = dict(zip(names, SPREAD * (2 * np.arange(len(names)) + 1 - len(names)) / len(names), strict=True))
    method = table["method"] if "method" in table else pd.Series(methods[0], index=table.index)
    numbers = method.map({name: number for number, name in enumerate(methods)})
    return table.assign(place=numbers + table["group"].map(offsets))


def _thinned(values: np.ndarray) -> np.ndarray:
    if len(values) <= MOST_VALUES:
        return values
    return np.quantile(values, (np.arange(MOST_VALUES) + 0.5) / MOST_VALUES)
