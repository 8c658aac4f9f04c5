"""What a sweep found: which layer and which coefficient forget, and which of them keep the rest."""

from typing import Literal, get_args

import pandas as pd
import plotly.graph_objects as go

from mrp_lens.plots.facets import Panels
from mrp_lens.plots.frames import TEXT_COLUMNS, Frame, facets, known, layer_facets, methods_of, tidy
from mrp_lens.plots.registry import register
from mrp_lens.plots.theme import (
    CHARACTER,
    FORGET,
    INK,
    OTHERS,
    RETAIN,
    SYMBOLS,
    WIDE,
    Axis,
    Look,
    Scale,
    control_dash,
    shortened,
)

RUN = "mrp-lens demo, unlearn and the like (table.csv)"
UNIT = (-0.03, 1.04)
ASIDE = 0.15  # of a method's row: forget is drawn above, retain below
NOT_LOSSES = TEXT_COLUMNS | set("step seconds seed layer coefficient relative_coefficient".split())


SWEEP = "mrp-lens sweep (table.csv)"
Measure = Literal["accuracy", "cosine", "max_probability"]
TITLES: dict[Measure, str] = {
    "accuracy": "accuracy",
    "cosine": "mean cosine with u",
    "max_probability": "largest probability",
}
COLOURS = {"forget": FORGET, "retain": RETAIN}


@register("accuracies")
def accuracies(frame: Frame) -> go.Figure:
    """What each method forgot and what it kept: accuracies with their intervals, and beside them the cost for text.

    Args:
        frame: the table of a run: `method`, and `forget_accuracy` or, where there was no quiz, `forget_probability`;
            intervals are `forget_low` and `forget_high`, or `forget_probability_low` and `..._high`. Drawn if there:
            `retain_accuracy` (with `retain_low`, `retain_high`), `worst_topic_accuracy`, `text_perplexity_ratio`, and
            in grey `untaught_accuracy`, else `forget_chance` or `chance`. `seed` makes faint points around a mean.

    Raises:
        TypeError, ValueError: not such a frame, no rows, or several rows of a method without a seed.
    """
    quiz = "forget_accuracy" in frame or "forget_probability" not in frame
    measured = "forget_accuracy" if quiz else "forget_probability"
    table = tidy(frame, ["method", measured], picture="accuracies", metric=RUN)
    methods = methods_of(table)
    text = "text_perplexity_ratio" in table
    rows = Axis("method", "category", categories=methods, downwards=True)
    panels = Panels(
        ["answers" if quiz else "forget documents", "ordinary text"] if text else [""],
        x=[
            Axis("accuracy (share of questions)" if quiz else "probability per token", limits=UNIT),
            *([Axis("perplexity after / before")] if text else []),
        ],
        y=rows,
        title="What was forgotten and what was kept",
        note="Bars: 95%, bootstrap over questions or documents.",
        picture="accuracies",
        height=40 + 40 * len(methods),
        left=int(CHARACTER * max(len(shortened(name)) for name in methods)) + 52,
    )
    place = table["method"].map({name: number for number, name in enumerate(methods)})
    table = table.assign(above=place - ASIDE, below=place + ASIDE)
    ends = ("forget_low", "forget_high") if quiz else ("forget_probability_low", "forget_probability_high")
    forget, retain = Look("forget", FORGET, mode="markers"), Look("retain", RETAIN, mode="markers")
    worst = Look("retain, worst topic", RETAIN, symbol="diamond-open", mode="markers")
    _draw(panels, 0, table, measured, "above", forget, ends)
    _draw(panels, 0, table, "retain_accuracy", "below", retain, ("retain_low", "retain_high"))
    _draw(panels, 0, table, "worst_topic_accuracy", "below", worst)
    for column in ("untaught_accuracy", "forget_chance", "chance") if quiz else ():
        if column in table:
            name = "never taught" if column == "untaught_accuracy" else "chance"
            for value in table[column].dropna().unique():
                panels.level(0, float(value), name=name, along="y")
            break
    if text:
        _draw(panels, 1, table, "text_perplexity_ratio", "below", Look("text", RETAIN, symbol="square", mode="markers"))
        panels.level(1, 1.0, name="unchanged", along="y", dash="dot")
    return panels.figure()


def _draw(
    panels: Panels,
    panel: int,
    table: pd.DataFrame,
    column: str,
    place: str,
    look: Look,
    ends: tuple[str, str] | None = None,
) -> None:
    """Points of a column along x, if the table has it, with their interval, if it has that."""
    if column in table:
        interval = ends if ends and set(ends) <= set(table) else None
        panels.series(panel, table, column, place, look, interval=interval, along="x")


@register("training")
def training(frame: Frame) -> go.Figure:
    """The loss and its parts at each step of a fit.

    Args:
        frame: `fit.log` or `log.csv`: `step`, `loss` and its parts, one column each. A panel with a scale of its own for
            each `method`, `layer` and `coefficient`, if it has those columns; `seed` makes faint points around a mean.

    Raises:
        TypeError, ValueError: not such a frame, no rows, or rows that nothing tells apart.
    """
    table = tidy(frame, ["step", "loss"], picture="training", metric="the log of a fit (fit.log, log.csv)")
    numeric = (str(name) for name in table.select_dtypes("number"))
    losses = sorted((name for name in numeric if name not in NOT_LOSSES), key="loss".__eq__)  # the sum lies on top
    parts = facets(table, ["method", "layer", "coefficient"])
    scales = [_scale(part[losses]) for _, part in parts]
    panels = Panels(
        [label for label, _ in parts],
        x=Axis("step"),
        y=[Axis("loss", scale) for scale in scales],
        title="Loss of the fit",
        note="Each panel has its own scale; where that is logarithmic, parts that are 0 are left out.",
        picture="training",
    )
    for panel, (_, part) in enumerate(parts):
        shown = part if scales[panel] == "linear" else part.assign(**part[losses].where(part[losses] > 0))
        for name in losses:
            panels.series(panel, shown, "step", name, _look(name, losses))
    return panels.figure()


def _look(name: str, losses: list[str]) -> Look:
    """Parts of the loss that are about forgetting or retaining have the colours of these groups."""
    label = name.replace("_", " ")
    for group, colour in (("forget", FORGET), ("retain", RETAIN)):
        if name.startswith(group):
            return Look(label, colour, "solid" if name == group else "dot", mode="lines")
    if name == "loss":
        return Look(label, INK, mode="lines")
    return Look(label, OTHERS[losses.index(name) % len(OTHERS)], "dash", mode="lines")


def _scale(values: pd.DataFrame) -> Scale:
    positive = values.where(values > 0).stack()
    wide = len(positive) > 0 and bool((values.fillna(0) >= 0).all(axis=None)) and positive.max() > WIDE * positive.min()
    return "log" if wide else "linear"


@register("layer_effects")
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


@register("coefficient_effects")
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
