"""What a sweep found: which layer and which coefficient forget, and which of them keep the rest."""

from typing import Literal, get_args

import pandas as pd
import plotly.graph_objects as go

from mrp_lens.plots.axes import Axis
from mrp_lens.plots.panels import Panels
from mrp_lens.plots.style import FORGET, RETAIN, SYMBOLS, Look, control_dash
from mrp_lens.plots.tables import Frame, facets, known, layer_facets, tidy

SWEEP = "mrp-lens sweep (table.csv)"
Measure = Literal["accuracy", "cosine", "max_probability"]
TITLES: dict[Measure, str] = {
    "accuracy": "accuracy",
    "cosine": "mean cosine with u",
    "max_probability": "largest probability",
}
COLOURS = {"forget": FORGET, "retain": RETAIN}


def layer_effects(frame: Frame, measure: Measure = "accuracy") -> go.Figure:
    """What forget and retain come to, by the layer that a method edits.

    Args:
        frame: of a sweep: `method`, `layer`, `forget_<measure>`, `retain_<measure>`. A panel for each method and
            `coefficient`; `forget_low` and `forget_high` are the interval of the accuracy, `seed` makes faint points
            around a mean. Grey: `untaught_accuracy` (accuracy), `null_mean` with
            `null_low` and `null_high` (cosine), and rows without a layer, which
            are the unedited model's.
        measure: "accuracy", "cosine" or "max_probability".

    Raises:
        TypeError, ValueError: not such a frame, no rows, an unknown measure, or rows that nothing tells apart.
    """
    if measure not in get_args(Measure):
        raise ValueError(f"unknown measure {measure!r}; choose one of {', '.join(get_args(Measure))}")
    columns = {group: f"{group}_{measure}" for group in COLOURS}
    table = tidy(frame, ["method", "layer", *columns.values()], picture="layer_effects", metric=SWEEP)
    unedited = table[table["layer"].isna()]
    table = known(table, "layer", "layer_effects")
    parts = layer_facets(table)
    panels = Panels(
        [label for label, _ in parts],
        x=Axis("edited layer", "layer"),
        y=Axis(TITLES[measure], limits=None if measure == "cosine" else (-0.03, 1.04)),
        title=f"Effect of the edited layer: {TITLES[measure]}",
        note=_note(table, "Bars: 95% over questions." if measure == "accuracy" else ""),
        picture="layer_effects",
    )
    for panel, (_, part) in enumerate(parts):
        if measure == "accuracy":
            _draw_untaught(panels, panel, part)
        if measure == "cosine" and "null_mean" in part:
            panels.control(panel, part, "layer", "null_mean", "unrelated directions", dash="dashdot")
            if {"null_low", "null_high"} <= set(part):
                null = part.groupby("layer")[["null_low", "null_high"]].mean()
                panels.band(panel, null.index, null["null_low"], null["null_high"], name="unrelated directions")
        for group, column in columns.items():
            for value in unedited[column]:
                panels.level(panel, float(value), name=f"unedited ({group})", dash=control_dash(group))
            interval = _interval(part, group) if measure == "accuracy" else None
            panels.series(panel, part, "layer", column, Look(group, COLOURS[group]), interval=interval)
    return panels.figure()


def coefficient_effects(frame: Frame) -> go.Figure:
    """Forget and retain accuracy by the steering coefficient over the norm of the states, a symbol for each layer.

    RMU is said to fail where the norm exceeds the coefficient (arXiv 2408.06223): left of the grey line at 1. Rows
    without a coefficient (MRP, the unedited model) have no place on the axis and are left out.

    Args:
        frame: of a sweep: `method`, `layer`, `relative_coefficient`, `forget_accuracy`, `retain_accuracy`. A panel for
            each method; `forget_low` and `forget_high` are the interval, `seed` makes faint points around a mean.
            Grey: `untaught_accuracy`, if it has that.

    Raises:
        TypeError, ValueError: not such a frame, no rows, no coefficient, or rows that nothing tells apart.
    """
    picture = "coefficient_effects"
    columns = ["method", "layer", "relative_coefficient", "forget_accuracy", "retain_accuracy"]
    table = known(tidy(frame, columns, picture=picture, metric=SWEEP), "relative_coefficient", picture)
    layers = sorted(table["layer"].unique())
    symbols = {layer: SYMBOLS[number % len(SYMBOLS)] for number, layer in enumerate(layers)}
    parts = facets(table, ["method"])
    panels = Panels(
        [label for label, _ in parts],
        x=Axis("coefficient c / norm of the states", "log"),
        y=Axis("accuracy", limits=(-0.03, 1.04)),
        title="Effect of the steering coefficient",
        note=_note(table, "Bars: 95% over questions."),
        picture=picture,
    )
    for panel, (_, part) in enumerate(parts):
        panels.level(panel, 1.0, name="c = norm", along="y", dash="dot")
        _draw_untaught(panels, panel, part)
        for group, colour in COLOURS.items():
            for _, rows in part.groupby("layer"):
                look = Look(group, colour, symbol=symbols[rows["layer"].iloc[0]])
                interval = _interval(rows, group)
                panels.series(panel, rows, "relative_coefficient", f"{group}_accuracy", look, interval=interval)
    for layer, symbol in symbols.items():
        panels.explain(f"layer {layer:g}", symbol)
    return panels.figure()


def _interval(table: pd.DataFrame, group: str) -> tuple[str, str] | None:
    low, high = f"{group}_low", f"{group}_high"
    return (low, high) if {low, high} <= set(table) else None


def _note(table: pd.DataFrame, bars: str) -> str:
    seeds = table["seed"].nunique() if "seed" in table else 1
    return f"Faint points: {seeds} seeds; lines: their mean." if seeds > 1 else bars


def _draw_untaught(panels: Panels, panel: int, table: pd.DataFrame) -> None:
    if "untaught_accuracy" in table:
        for value in table["untaught_accuracy"].dropna().unique():
            panels.level(panel, float(value), name="never taught", dash="dashdot")
