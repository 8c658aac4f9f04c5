"""What a search found: forgetting against damage."""

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from mrp_lens.plots.facets import Panels
from mrp_lens.plots.frames import facets, figure_of, known
from mrp_lens.plots.theme import OTHERS, UNIT, Along, Axis, Look, literal

TOLD = ("method", "trial", "forget_accuracy", "retain_accuracy", "damage")
LEVELS: tuple[tuple[str, str, Along], ...] = (
    ("chance", "chance", "x"),
    ("unedited_accuracy", "unedited", "x"),
    ("budget", "budget", "y"),
)
UNTOLD = ("on_front", "chosen", *(column for column, _, _ in LEVELS))


@figure_of("mrp-lens tune (frames/pareto.csv)", "forget_accuracy damage on_front")
def pareto(frame: pd.DataFrame) -> go.Figure:
    """What each trial of a search left of the forget set, and what it cost: the front is what none beats in both.

    Args:
        frame: of `mrp-lens tune`: `forget_accuracy`, `damage` (nats a token), `on_front`; `chosen` marks one. All other columns,
            such as the settings, are told on hovering. Grey: `chance`, `unedited_accuracy` and `budget`, if it has them.
    """
    frame = known(known(frame, "damage"), "forget_accuracy")
    panels = Panels(
        facets(frame, ["method"]),
        x=Axis("damage: KL(unedited || edited), nats a token", "auto"),
        y=Axis("accuracy on the forget questions", limits=UNIT),
        title="Forgetting against damage",
        note="Lower left is better; the line joins those that no other one beats in both.",
    )
    for panel, part in panels:
        front = part["on_front"].eq(True)
        chosen = part["chosen"].eq(True) if "chosen" in part else pd.Series(False, index=part.index)
        for rows, look in (
            (part[~front], Look("beaten", OTHERS[3], mode="markers")),
            (part[front].sort_values("damage"), Look("front", OTHERS[0])),
            (part[chosen], Look("chosen", OTHERS[2], symbol="star", mode="markers")),
        ):
            if len(rows):
                _draw(panels, panel, rows, look)
        for column, name, along in LEVELS:
            for value in part[column].dropna().unique() if column in part else ():
                panels.level(panel, float(value), name=name, along=along)
    return panels.figure()


def _draw(panels: Panels, panel: int, rows: pd.DataFrame, look: Look) -> None:
    panels.points(panel, rows["damage"], rows["forget_accuracy"], look)
    panels.grid.data[-1].update(
        text=[_told(row) for _, row in rows.iterrows()], hovertemplate="%{fullData.name}<br>%{text}<extra></extra>"
    )


def _told(row: pd.Series) -> str:
    """All that is known of a trial, a line each: first what it is about, then its settings."""
    keys = [key for key in TOLD if key in row] + [key for key in row.index if key not in (*TOLD, *UNTOLD)]
    values = {key: row[key] for key in keys}
    return "<br>".join(f"{literal(key)}: {_short(value)}" for key, value in values.items() if value == value)


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float | np.floating) else literal(value)
