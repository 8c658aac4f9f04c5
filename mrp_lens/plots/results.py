"""What runs and sweeps found: what each method, layer and coefficient forgets and keeps, and the losses of a fit."""

from typing import Literal

import pandas as pd
import plotly.graph_objects as go

from mrp_lens.methods.budget import LOGGED
from mrp_lens.plots.facets import Panels
from mrp_lens.plots.frames import TEXT_COLUMNS, Frame, facets, figure_of, known, layer_facets, methods_of
from mrp_lens.plots.theme import (
    FORGET,
    INK,
    OTHERS,
    RETAIN,
    SYMBOLS,
    UNIT,
    WIDE,
    Axis,
    Look,
    Scale,
    control_dash,
    room_for,
)
from mrp_lens.utils.validation import check_one_of

SWEEP = "mrp-lens sweep (table.csv)"
SIDES = {"forget": FORGET, "retain": RETAIN}
ASIDE = 0.15  # of a method's row: forget is drawn above, retain below
NOT_LOSSES = TEXT_COLUMNS | {*LOGGED, *"step seconds seed layer coefficient relative_coefficient".split()}
Measure = Literal["accuracy", "cosine", "max_probability"]
TITLES: dict[Measure, str] = {
    "accuracy": "accuracy",
    "cosine": "mean cosine with u",
    "max_probability": "largest probability",
}


def _asked(frame: Frame) -> str:
    """Accuracy, or the probability of the forget texts where there was no quiz."""
    return (
        "forget_probability" if "forget_probability" in frame and "forget_accuracy" not in frame else "forget_accuracy"
    )


@figure_of("mrp-lens demo, unlearn and the like (table.csv)", lambda frame: f"method {_asked(frame)}")
def accuracies(frame: pd.DataFrame) -> go.Figure:
    """What each method forgot and what it kept: accuracies with their intervals, and beside them the cost for text.

    Args:
        frame: the table of a run: `method`, and `forget_accuracy` or, where there was no quiz, `forget_probability`;
            intervals are `forget_low` and `forget_high`, or `forget_probability_low` and `..._high`. Drawn if there:
            `retain_accuracy` (with `retain_low`, `retain_high`), `worst_topic_accuracy`, `text_perplexity_ratio`, and
            in grey `untaught_accuracy`, else `forget_chance` or `chance`. `seed` makes faint points around a mean.
    """
    measured = _asked(frame)
    quiz, text, methods = measured == "forget_accuracy", "text_perplexity_ratio" in frame, methods_of(frame)
    place = frame["method"].map({name: number for number, name in enumerate(methods)})
    frame = frame.assign(above=place - ASIDE, below=place + ASIDE)
    titles = ["answers" if quiz else "forget documents", "ordinary text"] if text else [""]
    retained = ", accuracy of retain" if "retain_accuracy" in frame else ""
    axes = [Axis("accuracy (share of questions)" if quiz else f"probability per token{retained}", limits=UNIT)]
    panels = Panels(
        [(title, frame) for title in titles],
        x=[*axes, Axis("perplexity after / before", "auto")][: len(titles)],
        y=Axis("method", "category", categories=methods, downwards=True),
        title="What was forgotten and what was kept",
        bars="Bars: 95%.",
        note="{bars}",
        height=40 + 40 * len(methods),
        left=room_for(methods),
    )
    ends = ("forget_low", "forget_high") if quiz else ("forget_probability_low", "forget_probability_high")
    for panel, column, row, look, interval in (
        (0, measured, "above", Look("forget", FORGET, mode="markers"), ends),
        (0, "retain_accuracy", "below", Look("retain", RETAIN, mode="markers"), ("retain_low", "retain_high")),
        (
            0,
            "worst_topic_accuracy",
            "below",
            Look("retain, worst topic", RETAIN, "solid", "diamond-open", "markers"),
            None,
        ),
        (1, "text_perplexity_ratio", "below", Look("text", RETAIN, "solid", "square", "markers"), None),
    ):
        if column in frame:
            panels.series(panel, frame, column, row, look, interval=interval, along="x")
    controls = (name for name in ("untaught_accuracy", "forget_chance", "chance") if quiz and name in frame)
    control = next((name for name in controls if frame[name].notna().any()), None)
    for value in [] if control is None else frame[control].dropna().unique():
        panels.level(0, float(value), name="never taught" if control == "untaught_accuracy" else "chance", along="y")
    if text:
        panels.level(1, 1.0, name="unchanged", along="y", dash="dot")
    return panels.figure()


@figure_of("the log of a fit (fit.log, log.csv)", "step loss")
def training(frame: pd.DataFrame) -> go.Figure:
    """The loss and its parts at each step of a fit.

    Args:
        frame: `fit.log` or `log.csv`: `step`, `loss` and its parts, one column each. A panel with a scale of its own for
            each `method`, `layer` and `coefficient`, if it has those columns; `seed` makes faint points around a mean.
    """
    numeric = (str(name) for name in frame.select_dtypes("number"))
    losses = sorted((name for name in numeric if name not in NOT_LOSSES), key="loss".__eq__)  # the sum lies on top
    parts = facets(frame, ["method", "layer", "coefficient"])
    scales = [_scale(part[losses]) for _, part in parts]
    panels = Panels(
        parts,
        x=Axis("step"),
        y=[Axis("loss", scale) for scale in scales],
        title="Loss of the fit",
        note="Each panel has its own scale; where that is logarithmic, parts that are 0 are left out.",
    )
    for panel, part in panels:
        shown = part if scales[panel] == "linear" else part.assign(**part[losses].where(part[losses] > 0))
        for name in losses:
            panels.series(panel, shown, "step", name, _look(name, losses))
    return panels.figure()


def _look(name: str, losses: list[str]) -> Look:
    """Parts of the loss that are about forgetting or retaining have the colours of these groups."""
    label = name.replace("_", " ")
    for group, colour in SIDES.items():
        if name.startswith(group):
            return Look(label, colour, "solid" if name == group else "dot", mode="lines")
    if name == "loss":
        return Look(label, INK, mode="lines")
    return Look(label, OTHERS[losses.index(name) % len(OTHERS)], "dash", mode="lines")


def _scale(values: pd.DataFrame) -> Scale:
    positive = values.where(values > 0).stack()
    wide = len(positive) > 0 and bool((values.fillna(0) >= 0).all(axis=None)) and positive.max() > WIDE * positive.min()
    return "log" if wide else "linear"


def _measured(frame: Frame, measure: Measure = "accuracy") -> str:
    check_one_of(Measure, measure=measure)
    return f"method layer forget_{measure} retain_{measure}"


@figure_of(SWEEP, _measured)
def layer_effects(frame: pd.DataFrame, measure: Measure = "accuracy") -> go.Figure:
    """What forget and retain come to, by the layer that a method edits.

    Args:
        frame: of a sweep: `method`, `layer`, `forget_<measure>`, `retain_<measure>`. A panel for each method and
            `coefficient`; `forget_low` and `forget_high` are the interval of the accuracy, `seed` makes faint points
            around a mean. Grey: `untaught_accuracy` (accuracy), `null_mean` with `null_low` and `null_high` (cosine),
            and rows without a layer, which are the unedited model's.
        measure: "accuracy", "cosine" or "max_probability".
    """
    unedited = frame[frame["layer"].isna()]
    frame = known(frame, "layer")
    panels = Panels(
        layer_facets(frame),
        x=Axis("edited layer", "layer"),
        y=Axis(TITLES[measure], limits=None if measure == "cosine" else UNIT),
        title=f"Effect of the edited layer: {TITLES[measure]}",
        bars="Bars: 95%." if measure == "accuracy" else "",
        note="{bars}",
    )
    for panel, part in panels:
        if measure == "accuracy":
            _draw_untaught(panels, panel, part)
        if measure == "cosine" and "null_mean" in part:
            panels.control(panel, part, "layer", "null_mean", "unrelated directions", dash="dashdot")
            if {"null_low", "null_high"} <= set(part):
                panels.band(panel, part, "layer", "null_low", "null_high", name="unrelated directions")
        for group, colour in SIDES.items():
            column, ends = f"{group}_{measure}", (f"{group}_low", f"{group}_high")
            for value in unedited[column]:
                panels.level(panel, float(value), name=f"unedited ({group})", dash=control_dash(group))
            interval = ends if measure == "accuracy" else None
            panels.series(panel, part, "layer", column, Look(group, colour), interval=interval)
    return panels.figure()


@figure_of(SWEEP, "method layer relative_coefficient forget_accuracy retain_accuracy")
def coefficient_effects(frame: pd.DataFrame) -> go.Figure:
    """Forget and retain accuracy by the steering coefficient over the norm of the states, a symbol for each layer.

    RMU is said to fail where the norm exceeds the coefficient (arXiv 2408.06223): left of the grey line at 1. Rows
    without a coefficient (MRP, the unedited model) have no place on the axis and are left out.

    Args:
        frame: of a sweep: `method`, `layer`, `relative_coefficient`, `forget_accuracy`, `retain_accuracy`. A panel for
            each method; `forget_low` and `forget_high` are the interval, `seed` makes faint points around a mean.
            Grey: `untaught_accuracy`, if it has that.
    """
    frame = known(frame, "relative_coefficient")
    layers = sorted(frame["layer"].unique())
    symbols = {layer: SYMBOLS[number % len(SYMBOLS)] for number, layer in enumerate(layers)}
    panels = Panels(
        facets(frame, ["method"]),
        x=Axis("coefficient c / norm of the states", "log"),
        y=Axis("accuracy", limits=UNIT),
        title="Effect of the steering coefficient",
        bars="Bars: 95%.",
        note="{bars}",
    )
    for panel, part in panels:
        panels.level(panel, 1.0, name="c = norm", along="y", dash="dot")
        _draw_untaught(panels, panel, part)
        for group, colour in SIDES.items():
            for layer, rows in part.groupby("layer"):
                look, ends = Look(group, colour, symbol=symbols[layer]), (f"{group}_low", f"{group}_high")
                x, y = "relative_coefficient", f"{group}_accuracy"
                panels.series(panel, rows, x, y, look, interval=ends, about=f"layer {layer:g}")
    for layer, symbol in symbols.items():
        panels.explain(f"layer {layer:g}", symbol)
    return panels.figure()


def _draw_untaught(panels: Panels, panel: int, table: pd.DataFrame) -> None:
    if "untaught_accuracy" in table:
        for value in table["untaught_accuracy"].dropna().unique():
            panels.level(panel, float(value), name="never taught", dash="dashdot")
