"""How a fit went: what it left of the forget set, what damage it did, and how hard it held on to the retain set."""

import pandas as pd
import plotly.graph_objects as go

from mrp_lens.methods.budget import LOGGED
from mrp_lens.plots.facets import Panels
from mrp_lens.plots.frames import facets, figure_of, known
from mrp_lens.plots.theme import FORGET, INK, RETAIN, UNIT, Axis, Look

COURSES = (  # a panel each: column, title, axis, look, the column of its control
    (
        "left",
        "answered",
        Axis("accuracy", limits=UNIT),
        Look("forget questions", FORGET, mode="lines"),
        "target",
    ),
    ("damage", "damage", Axis("KL, nats a token", "auto"), Look("retain text", RETAIN, mode="lines"), "budget"),
    (
        "retain_factor",
        "retain weight",
        Axis("factor", "auto"),
        Look("factor on the retain loss", INK, mode="lines"),
        None,
    ),
)


@figure_of("the log of a fit with a budget (fit.log, log.csv)", f"step {' '.join(LOGGED)}")
def budget(frame: pd.DataFrame) -> go.Figure:
    """What a fit with a budget had left of the forget set, and the damage it had done, update by update.

    A fit whose damage lies on its budget while much is left could not forget more for that price; one with little damage and
    much left had too few updates, or did not find what to remove.

    Args:
        frame: `fit.log` or `log.csv` of a fit with a budget: `step`, `left` (accuracy on the control questions), `target`,
            `damage`, `allowed` and `budget` (nats a token), `retain_factor` (on the weight of the retain loss). Three panels for
            each `method`, `layer` and `coefficient`, if it has those columns; rows without a budget are left out.
    """
    parts = facets(known(frame, "budget"), ["method", "layer", "coefficient"])
    panels = Panels(
        [(", ".join(filter(None, (label, title))), rows) for label, rows in parts for _, title, *_ in COURSES],
        x=Axis("step"),
        y=[axis for _ in parts for _, _, axis, *_ in COURSES],
        title="The fit: towards its target, within its budget",
        note="As last looked at: damage every 5 updates, questions every 20. Damage: on retain text that no update saw.",
        columns=len(COURSES),
    )
    for panel, rows in panels:
        column, _, axis, look, control = COURSES[panel % len(COURSES)]
        shown = rows.assign(**{column: rows[column].where(rows[column] > 0)}) if axis.scale == "auto" else rows
        panels.series(panel, shown, "step", column, look)
        if column == "damage":
            panels.control(panel, rows, "step", "allowed", "budget so far", dash="dot")
        if control is not None:
            panels.level(panel, float(rows[control].iloc[-1]), name=control)
    return panels.figure()
