"""What survived an edit: curves of retraining and of trigger searches, recoveries, what probes and the logit lens read."""

import pandas as pd
import plotly.graph_objects as go

from mrp_lens.metrics.controls import CONTROL_METHODS, NEVER_TAUGHT, UNEDITED
from mrp_lens.metrics.recovery import FORM_TITLES, best
from mrp_lens.plots.facets import Panels
from mrp_lens.plots.frames import NothingToDraw, beside, facets, figure_of, groups, methods_of, varying
from mrp_lens.plots.theme import FORGET, GREY, OTHERS, UNIT, Axis, Look, group_colours, room_for

ACCURACY = Axis("accuracy", limits=UNIT)
HELD_OUT, TRAINED, NEW = Look("forget, held out", FORGET), Look("trained on", OTHERS[0]), Look("new facts", OTHERS[3])
FLOOR, CEILING = "never taught (floor)", "unedited (ceiling)"
NARROWEST = (-0.15, 1.12)  # what an axis of recovery shows at least
SPREAD = 0.3  # of a method's width, over which its groups are placed side by side
MEASURES = {
    "mean": "norm (nats / unit)",
    "relative": "norm x input (nats)",
    "loss": "loss (nats / token)",
}


@figure_of("mrp_lens.attacks.relearn", "step held_out_accuracy train_accuracy floor ceiling")
def relearning_curves(frame: pd.DataFrame) -> go.Figure:
    """What retraining on some of the forgotten facts does to the others, beside facts that were never taught.

    Args:
        frame: of `mrp_lens.attacks.relearn`: `step`, `held_out_accuracy`, `train_accuracy`, `floor`, `ceiling`;
            `new_accuracy` is drawn where there is one. Of several rates (`lr`, with `counts`) the attacker's best after
            each number of updates is shown. A panel for each `method`, and for each `form` and choice of `parameters`;
            `seed` makes faint points around a mean.
    """
    if {"lr", "counts"} <= set(frame):
        frame = best(frame)
    if "form" in frame:
        form = frame["form"].replace(FORM_TITLES)
        edited = frame["method"] != UNEDITED if "method" in frame else form.notna()
        frame = frame.assign(form=form.where(edited))  # there is no edit to keep or strip
    panels = Panels(
        facets(frame, ["method", *varying(frame, "form", "parameters", "samples")]),
        x=Axis("updates"),
        y=ACCURACY,
        title="Retraining on some of the forgotten facts",
        note="At the attacker's best rate. Floor: never-taught facts (guessing, where there are none), same attack.",
    )
    for panel, part in panels:
        panels.control(panel, part, "step", "floor", FLOOR)
        panels.control(panel, part, "step", "ceiling", CEILING, dash="dot")
        for column, look in (("train_accuracy", TRAINED), ("new_accuracy", NEW), ("held_out_accuracy", HELD_OUT)):
            if column in part and part[column].notna().any():
                panels.series(panel, part, "step", column, look)
    return panels.figure()


@figure_of("mrp-lens attack (table.csv)", "recovery recovery_low recovery_high")
def recoveries(frame: pd.DataFrame) -> go.Figure:
    """The share of what was removed that each attack brings back: 0 as if never taught, 1 as before the edit.

    Args:
        frame: the table of `mrp-lens attack`, or of `mrp_lens.attacks.bypass`: `recovery`, `recovery_low`,
            `recovery_high`, and `variant` or `attack`, which name the rows of a method. Rows without a recovery are left
            out. A panel for each `method`; rows of the methods "unedited", "never-taught" and "random-trigger" are
            controls.
    """
    label = next((column for column in ("variant", "attack") if column in frame), None)
    if label is None:
        raise ValueError("needs the columns attack or variant, which name the rows")
    frame = frame[frame["recovery"].notna()]
    control = frame["method"].isin(CONTROL_METHODS) if "method" in frame else pd.Series(False, index=frame.index)
    if control.all():
        raise NothingToDraw("no row of an edit has a recovery: the unedited model answers no more than the floor")
    names = frame[label].astype(str)
    if "method" in frame:
        names = names.where(~control, frame["method"].astype(str) + ": " + names)
    rows = list(dict.fromkeys(names))
    frame = frame.assign(place=names.map({name: number for number, name in enumerate(rows)}))
    least, most = frame["recovery"].min() - 0.05, frame["recovery"].max() + 0.05
    panels = Panels(
        facets(frame[~control], ["method"]),
        x=Axis("recovery", limits=(min(NARROWEST[0], least), max(NARROWEST[1], most))),
        y=Axis("attack", "category", categories=rows, downwards=True),
        title="What comes back of what was removed",
        bars="Bars: 95%; they may reach beyond the axis where next to nothing was removed.",
        note="{bars}",
        height=60 + 24 * len(rows),
        left=room_for(rows),
    )
    attacked = Look("forget", FORGET, mode="markers")
    others = Look("unedited and other controls", GREY, mode="markers", symbol="diamond")
    for panel, part in panels:
        panels.level(panel, 0.0, name="never taught", along="y")
        panels.level(panel, 1.0, name="unedited", along="y", dash="dot")
        for shown, look in ((part, attacked), (frame[control], others)):
            ends = ("recovery_low", "recovery_high")
            panels.series(panel, shown, "recovery", "place", look, interval=ends, along="x")
    return panels.figure()


@figure_of("mrp_lens.attacks.probe", "layer group bits low high")
def probe_bits(frame: pd.DataFrame) -> go.Figure:
    """Bits about the right answer that a probe reads off each layer, on facts that it was not trained on.

    Args:
        frame: of `mrp_lens.attacks.probe`: `layer`, `group`, `bits`, `low`, `high`; with `entropy`, a line shows how
            many bits there are to be had. A panel for each `method` (such as "unedited" and "mrp"), and for each `kind`
            and `target`.
    """
    looks = {
        "held-out": HELD_OUT,
        "shuffled": Look("random labels", GREY, "dot"),
        NEVER_TAUGHT: Look("never taught", GREY, "dash"),
    }
    colours = group_colours(group for group in frame["group"] if group not in looks)
    panels = Panels(
        facets(frame, ["method", *varying(frame, "kind", "target")]),
        x=Axis("layer", "layer"),
        y=Axis("usable information (bits)"),
        title="What a probe still reads off the states",
        bars="Bars: 95%.",
        note="{bars} Grey: probes of random labels and of never-taught facts, and all there is to know.",
    )
    for panel, part in panels:
        if "entropy" in part:
            panels.level(panel, float(part["entropy"].max()), name="exactly known", dash="dashdot")
        for group, rows in groups(part):
            look = looks.get(group) or Look(group, colours[group])
            panels.series(panel, rows, "layer", "bits", look, interval=("low", "high"))
    return panels.figure()


@figure_of("mrp_lens.metrics.logit_lens", "layer group accuracy low high chance")
def logit_lens(frame: pd.DataFrame) -> go.Figure:
    """How often each layer's state, unembedded as it is, gives the right answer (the logit lens).

    Args:
        frame: of `mrp_lens.metrics.logit_lens`: `layer`, `group`, `accuracy`, `low`, `high`, `chance`. A panel for each
            `method`; the group "never-taught" is grey; `seed` makes faint points around a mean.
    """
    colours = group_colours(group for group in frame["group"] if group != NEVER_TAUGHT)
    panels = Panels(
        facets(frame, ["method"]),
        x=Axis("layer", "layer"),
        y=ACCURACY,
        title="What each layer would answer if it were the last (logit lens)",
        bars="Bars: 95%.",
        note="Among the choices. {bars} Grey: never-taught facts, and guessing.",
    )
    for panel, part in panels:
        for chance in part["chance"].dropna().unique():
            panels.level(panel, float(chance), name="uniform guess", dash="dot")
        for group, rows in groups(part):
            look = Look("never taught", GREY, "dash") if group == NEVER_TAUGHT else Look(group, colours[group])
            panels.series(panel, rows, "layer", "accuracy", look, interval=("low", "high"))
    return panels.figure()


@figure_of("mrp_lens.attacks.input_gradients", "group mean low high relative loss")
def input_gradients(frame: pd.DataFrame) -> go.Figure:
    """How steep the loss is towards the input, before and after the edit: what an attack by gradients has to go by.

    Args:
        frame: of `mrp_lens.attacks.input_gradients`: `group`, `mean`, `low`, `high`, `relative`, `loss`; `model` says
            "unedited" or "edited". Several frames are told apart by `method`, on the axis.
    """
    keys = ["group", *(["seed"] if "seed" in frame else [])]
    if "model" in frame and "method" in frame:
        frame = frame.assign(method=frame["method"].where(frame["model"] != UNEDITED, UNEDITED))
        again = frame["method"].eq(UNEDITED) & frame.duplicated(["method", *keys])  # it stands beside each edit
        frame = frame[~again]
    elif "model" in frame:
        frame = frame.assign(method=frame["model"])
    panels = Panels(
        [("", beside(frame, SPREAD))] * len(MEASURES),
        x=Axis("method", "category", categories=methods_of(frame)),
        y=[Axis(title, "auto") for title in MEASURES.values()],
        title="Gradient of the right answer's loss towards the input",
        bars="Bars: 95%, bootstrap over questions.",
        note="{bars} A gradient also vanishes where the model is sure: see the loss.",
        columns=1,
        height=150,
    )
    for panel, group, rows, colour in panels.by_group():
        measure = list(MEASURES)[panel]
        ends = {"mean": ("low", "high"), "relative": ("relative_low", "relative_high")}.get(measure)
        panels.series(panel, rows, "place", measure, Look(group, colour, mode="markers"), interval=ends)
    return panels.figure()


@figure_of("mrp_lens.attacks.jailbreak", "step held_out_accuracy train_accuracy untaught_accuracy accuracy_before")
def jailbreak_curve(frame: pd.DataFrame) -> go.Figure:
    """What a trigger brings back as the search for it goes on, on questions that it was not optimised on.

    Args:
        frame: of `mrp_lens.attacks.jailbreak`: `step`, `held_out_accuracy`, `train_accuracy`, `untaught_accuracy`,
            `accuracy_before`; `kind` tells the row without a trigger ("none") from the search. A panel for each `method`
            and `objective` (of several searches).
    """
    panels = Panels(
        facets(frame, ["method", "objective"]),
        x=Axis("steps of the search (0: a random trigger)"),
        y=ACCURACY,
        title="A trigger put into every prompt",
        note="Cross: without a trigger. Grey: never-taught questions (guessing, where there are none) with it.",
    )
    for panel, part in panels:
        without = part["kind"] == "none" if "kind" in part else pd.Series(False, index=part.index)
        searched = part[~without]
        panels.control(panel, searched, "step", "untaught_accuracy", FLOOR)
        panels.control(panel, part, "step", "accuracy_before", CEILING, dash="dot")
        panels.series(panel, searched, "step", "train_accuracy", TRAINED)
        panels.series(panel, searched, "step", "held_out_accuracy", HELD_OUT)
        plain = Look("forget, no trigger", FORGET, symbol="x", mode="markers")
        panels.points(panel, part["step"][without], part["held_out_accuracy"][without], plain)
    return panels.figure()
