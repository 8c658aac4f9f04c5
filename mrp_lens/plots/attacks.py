"""What survived an edit: curves of retraining and of trigger searches, recoveries, what probes and the logit lens read."""

import pandas as pd
import plotly.graph_objects as go

from mrp_lens.metrics.recovery import CONTROL_METHODS, FORM_TITLES, best
from mrp_lens.plots.facets import Panels
from mrp_lens.plots.frames import Frame, facets, groups, methods_of, tidy, varying
from mrp_lens.plots.registry import register
from mrp_lens.plots.theme import CHARACTER, FORGET, GREY, OTHERS, Axis, Look, group_colours, shortened

UNIT = (-0.03, 1.04)
ACCURACY = Axis("accuracy", limits=UNIT)
HELD_OUT, TRAINED, NEW = Look("forget, held out", FORGET), Look("trained on", OTHERS[0]), Look("new facts", OTHERS[3])
FLOOR, CEILING = "never taught (floor)", "unedited (ceiling)"
NARROWEST = (-0.15, 1.12)  # what an axis of recovery shows at least
MEASURES = {
    "mean": "norm (nats / unit)",
    "relative": "norm x input (nats)",
    "loss": "loss (nats / token)",
}


@register("relearning_curves")
def relearning_curves(frame: Frame) -> go.Figure:
    """What retraining on some of the forgotten facts does to the others, beside facts that were never taught.

    Args:
        frame: of `mrp_lens.attacks.relearn`: `step`, `held_out_accuracy`, `train_accuracy`, `floor`, `ceiling`;
            `new_accuracy` is drawn where there is one. Of several rates (`lr`, with `counts`) the attacker's best after
            each number of updates is shown. A panel for each `method`, and for each `form` and choice of `parameters`;
            `seed` makes faint points around a mean.

    Raises:
        TypeError, ValueError: not such a frame, no rows, or rows that nothing tells apart.
    """
    picture = "relearning_curves"
    columns = ["step", "held_out_accuracy", "train_accuracy", "floor", "ceiling"]
    table = tidy(frame, columns, picture=picture, metric="mrp_lens.attacks.relearn")
    if {"lr", "counts"} <= set(table):
        table = best(table)
    if "form" in table:
        form = table["form"].replace(FORM_TITLES)
        edited = table["method"] != "unedited" if "method" in table else form.notna()
        table = table.assign(form=form.where(edited))  # there is no edit to keep or strip
    parts = facets(table, ["method", *varying(table, "form", "parameters", "samples")])
    panels = Panels(
        [label for label, _ in parts],
        x=Axis("updates"),
        y=ACCURACY,
        title="Retraining on some of the forgotten facts",
        note="At the attacker's best rate. Floor: never-taught facts (guessing, where there are none), same attack.",
        picture=picture,
    )
    for panel, (_, part) in enumerate(parts):
        panels.control(panel, part, "step", "floor", FLOOR)
        panels.control(panel, part, "step", "ceiling", CEILING, dash="dot")
        for column, look in (("train_accuracy", TRAINED), ("new_accuracy", NEW), ("held_out_accuracy", HELD_OUT)):
            if column in part and part[column].notna().any():
                panels.series(panel, part, "step", column, look)
    return panels.figure()


@register("recoveries")
def recoveries(frame: Frame) -> go.Figure:
    """The share of what was removed that each attack brings back: 0 as if never taught, 1 as before the edit.

    Args:
        frame: the table of `mrp-lens attack`, or of `mrp_lens.attacks.bypass`: `recovery`, `recovery_low`,
            `recovery_high`, and `variant` or `attack`, which name the row. Rows without a recovery are left out. A panel
            for each `method`; rows of the methods "unedited", "never-taught" and "random-trigger" are controls.

    Raises:
        TypeError, ValueError: not such a frame, no rows, no recovery, or two rows of a method with one name.
    """
    picture = "recoveries"
    ends = ("recovery_low", "recovery_high")
    table = tidy(frame, ["recovery", *ends], picture=picture, metric="mrp-lens attack (table.csv)")
    label = next((column for column in ("variant", "attack") if column in table), None)
    if label is None:
        raise ValueError(f"{picture} needs the columns attack or variant, which name the rows")
    table = table[table["recovery"].notna()]
    control = table["method"].isin(CONTROL_METHODS) if "method" in table else pd.Series(False, index=table.index)
    names = table[label].astype(str)
    if "method" in table:
        names = names.where(~control, table["method"].astype(str) + ": " + names)
    rows = list(dict.fromkeys(names))
    table = table.assign(place=names.map({name: number for number, name in enumerate(rows)}))
    parts = facets(table[~control], ["method"])
    seen = table["recovery"]
    panels = Panels(
        [title for title, _ in parts],
        x=Axis("recovery", limits=(min(NARROWEST[0], seen.min() - 0.05), max(NARROWEST[1], seen.max() + 0.05))),
        y=Axis("attack", "category", categories=rows, downwards=True),
        title="What comes back of what was removed",
        note="Bars: 95%, bootstrap over questions; they may reach beyond the axis where next to nothing was removed.",
        picture=picture,
        height=60 + 24 * len(rows),
        left=int(CHARACTER * max((len(shortened(name)) for name in rows), default=0)) + 52,
    )
    for panel, (_, part) in enumerate(parts):
        panels.level(panel, 0.0, name="never taught", along="y")
        panels.level(panel, 1.0, name="unedited", along="y", dash="dot")
        attacked = Look("forget", FORGET, mode="markers")
        panels.series(panel, part, "recovery", "place", attacked, interval=ends, along="x")
        if control.any():
            shown = Look("unedited and other controls", GREY, mode="markers", symbol="diamond")
            panels.series(panel, table[control], "recovery", "place", shown, interval=ends, along="x")
    return panels.figure()


@register("probe_bits")
def probe_bits(frame: Frame) -> go.Figure:
    """Bits about the right answer that a probe reads off each layer, on facts that it was not trained on.

    Args:
        frame: of `mrp_lens.attacks.probe`: `layer`, `group`, `bits`, `low`, `high`; with `entropy`, a line shows how
            many bits there are to be had. A panel for each `method` (such as "unedited" and "mrp"), and for each `kind`
            and `target`.

    Raises:
        TypeError, ValueError: not such a frame, no rows, or rows that nothing tells apart.
    """
    table = tidy(
        frame, ["layer", "group", "bits", "low", "high"], picture="probe_bits", metric="mrp_lens.attacks.probe"
    )
    looks = {
        "held-out": HELD_OUT,
        "shuffled": Look("random labels", GREY, "dot"),
        "never-taught": Look("never taught", GREY, "dash"),
    }
    colours = group_colours(group for group in table["group"] if group not in looks)
    parts = facets(table, ["method", *varying(table, "kind", "target")])
    panels = Panels(
        [label for label, _ in parts],
        x=Axis("layer", "layer"),
        y=Axis("usable information (bits)"),
        title="What a probe still reads off the states",
        note="Bars: 95% over questions. Grey: probes of random labels and of never-taught facts, and all there is to know.",
        picture="probe_bits",
    )
    for panel, (_, part) in enumerate(parts):
        if "entropy" in part:
            panels.level(panel, float(part["entropy"].max()), name="exactly known", dash="dashdot")
        for group, rows in groups(part):
            look = looks.get(group) or Look(group, colours[group])
            panels.series(panel, rows, "layer", "bits", look, interval=("low", "high"))
    return panels.figure()


@register("logit_lens")
def logit_lens(frame: Frame) -> go.Figure:
    """How often each layer's state, unembedded as it is, gives the right answer (the logit lens).

    Args:
        frame: of `mrp_lens.metrics.logit_lens`: `layer`, `group`, `accuracy`, `low`, `high`, `chance`. A panel for each
            `method`; the group "never-taught" is grey; `seed` makes faint points around a mean.

    Raises:
        TypeError, ValueError: not such a frame, no rows, or rows that nothing tells apart.
    """
    columns = ["layer", "group", "accuracy", "low", "high", "chance"]
    table = tidy(frame, columns, picture="logit_lens", metric="mrp_lens.metrics.logit_lens")
    colours = group_colours(group for group in table["group"] if group != "never-taught")
    parts = facets(table, ["method"])
    panels = Panels(
        [label for label, _ in parts],
        x=Axis("layer", "layer"),
        y=ACCURACY,
        title="What each layer would answer if it were the last (logit lens)",
        note="Among the choices. Bars: 95% over questions. Grey: never-taught facts, and guessing.",
        picture="logit_lens",
    )
    for panel, (_, part) in enumerate(parts):
        panels.level(panel, float(part["chance"].mean()), name="uniform guess", dash="dot")
        for group, rows in groups(part):
            look = Look("never taught", GREY, "dash") if group == "never-taught" else Look(group, colours[group])
            panels.series(panel, rows, "layer", "accuracy", look, interval=("low", "high"))
    return panels.figure()


@register("input_gradients")
def input_gradients(frame: Frame) -> go.Figure:
    """How steep the loss is towards the input, before and after the edit: what an attack by gradients has to go by.

    Args:
        frame: of `mrp_lens.attacks.input_gradients`: `group`, `mean`, `low`, `high`, `relative`, `loss`; `model` says
            "unedited" or "edited". Several frames are told apart by `method`, on the axis.

    Raises:
        TypeError, ValueError: not such a frame, no rows, or rows that nothing tells apart.
    """
    picture = "input_gradients"
    table = tidy(
        frame,
        ["group", "mean", "low", "high", "relative", "loss"],
        picture=picture,
        metric="mrp_lens.attacks.input_gradients",
    )
    keys = ["group", *(["seed"] if "seed" in table else [])]
    if "model" in table and "method" in table:
        table = table.assign(method=table["method"].where(table["model"] != "unedited", "unedited"))
        again = table["method"].eq("unedited") & table.duplicated(["method", *keys])  # it stands beside each edit
        table = table[~again]
    elif "model" in table:
        table = table.assign(method=table["model"])
    methods = methods_of(table)
    number = table["method"].map({name: place for place, name in enumerate(methods)}) if "method" in table else 0
    names = [name for name, _ in groups(table)]
    aside = {name: 0.3 * ((place + 0.5) / len(names) - 0.5) for place, name in enumerate(names)}
    table = table.assign(place=number + table["group"].map(aside))
    colours = group_colours(table["group"])
    panels = Panels(
        [""] * len(MEASURES),
        x=Axis("method", "category", categories=methods),
        y=[Axis(title, "auto") for title in MEASURES.values()],
        title="Gradient of the right answer's loss towards the input",
        note="Bars: 95%, bootstrap over questions. A gradient also vanishes where the model is sure: see the loss.",
        picture=picture,
        columns=1,
        height=150,
    )
    for panel, measure in enumerate(MEASURES):
        ends = {"mean": ("low", "high"), "relative": ("relative_low", "relative_high")}.get(measure)
        for group, rows in groups(table):
            look = Look(group, colours[group], mode="markers")
            interval = ends if ends and set(ends) <= set(rows) else None
            panels.series(panel, rows, "place", measure, look, interval=interval)
    return panels.figure()


@register("jailbreak_curve")
def jailbreak_curve(frame: Frame) -> go.Figure:
    """What a trigger brings back as the search for it goes on, on questions that it was not optimised on.

    Args:
        frame: of `mrp_lens.attacks.gcg`: `step`, `held_out_accuracy`, `train_accuracy`, `untaught_accuracy`,
            `accuracy_before`; `kind` tells the row without a trigger ("none") from the search. A panel for each `method`
            and `objective` (of several searches).

    Raises:
        TypeError, ValueError: not such a frame, no rows, or rows that nothing tells apart.
    """
    picture = "jailbreak_curve"
    columns = ["step", "held_out_accuracy", "train_accuracy", "untaught_accuracy", "accuracy_before"]
    table = tidy(frame, columns, picture=picture, metric="mrp_lens.attacks.gcg")
    parts = facets(table, ["method", "objective"])
    panels = Panels(
        [label for label, _ in parts],
        x=Axis("steps of the search (0: a random trigger)"),
        y=ACCURACY,
        title="A trigger put into every prompt",
        note="Cross: without a trigger. Grey: never-taught questions (guessing, where there are none) with it.",
        picture=picture,
    )
    for panel, (_, part) in enumerate(parts):
        without = part["kind"] == "none" if "kind" in part else pd.Series(False, index=part.index)
        searched = part[~without]
        panels.control(panel, searched, "step", "untaught_accuracy", FLOOR)
        panels.control(panel, part, "step", "accuracy_before", CEILING, dash="dot")
        panels.series(panel, searched, "step", "train_accuracy", TRAINED)
        panels.series(panel, searched, "step", "held_out_accuracy", HELD_OUT)
        plain = Look("forget, no trigger", FORGET, symbol="x", mode="markers")
        panels.points(panel, part["step"][without], part["held_out_accuracy"][without], plain)
    return panels.figure()
