"""States in the plane, or the space, of their principal directions, before and after an edit."""

from typing import Any

import pandas as pd
import plotly.graph_objects as go

from mrp_lens.plots.axes import Axis
from mrp_lens.plots.panels import Panels
from mrp_lens.plots.style import GRID, group_colours, literal
from mrp_lens.plots.tables import Frame, facets, groups, known, tidy

OF_VARIANCE = " of variance)"
SPACE_AXIS = {"nticks": 5, "tickfont": {"size": 10}, "backgroundcolor": "white", "gridcolor": GRID}
MOST_SPACES = 8  # browsers keep about 16 views in three dimensions on a page, and drop the oldest beyond that


def principal_plane(frame: Frame) -> go.Figure:
    """States of each group along the principal directions of the unedited states, before and after an edit.

    All panels have the same axes. Hovering over a point shows the token at which the state was read.

    Args:
        frame: of `mrp_lens.metrics.principal_plane`: `group`, `when`, `document`, `token`, `x`, `y`, `share_x`,
            `share_y`, and `z`, `share_z` for three dimensions. A row of panels for each `method`.

    Raises:
        TypeError, ValueError: not such a frame, no rows, or in three dimensions more than 8 panels.
    """
    picture = "principal_plane"
    names = ["x", "y", *(["z"] if "z" in frame else [])]
    columns = ["group", "when", "document", "token", *names, *(f"share_{name}" for name in names)]
    table = tidy(frame, columns, picture=picture, metric="mrp_lens.metrics.principal_plane")
    for name in names:
        table = known(table, name, picture)
    parts = facets(table, ["method", "when"])
    space = len(names) == 3
    if space and len(parts) > MOST_SPACES:
        raise ValueError(
            f"{picture}: {len(parts)} panels in three dimensions are more than a page can show, {MOST_SPACES}; "
            "draw fewer methods at a time, or two dimensions (leave out the column z)"
        )
    axes = {name: _axis(table, name, number) for number, name in enumerate(names, start=1)}
    panels = Panels(
        [label for label, _ in parts],
        x=axes["x"],
        y=axes["y"],
        title="States along their principal directions",
        note="Directions of the unedited states of all groups together; percent: their share of the variance. A point is a state.",
        picture=picture,
        columns=min(2, table["when"].nunique()),
        height=400 if space or len(parts) <= 2 else 300,
        space=space,
    )
    colours = group_colours(table["group"])
    for panel, (_, part) in enumerate(parts):
        for group, rows in groups(part):
            panels.trace(panel, _states(rows, names, group, colours[group]))
    figure = panels.figure()
    if space:
        settings = {f"{name}axis": SPACE_AXIS | {"range": axes[name].limits} for name in names}
        for name, axis in axes.items():
            settings[f"{name}axis"]["title"] = {
                "text": axis.title.removesuffix(OF_VARIANCE) + ")",
                "font": {"size": 11},
            }
        figure.update_scenes(
            **settings,
            aspectmode="cube",
            camera={"eye": {"x": 1.85, "y": 1.85, "z": 0.9}, "center": {"x": 0, "y": 0, "z": -0.15}},
        )
        figure.update_layout(legend_itemsizing="constant")
    return figure


def _axis(table: pd.DataFrame, name: str, number: int) -> Axis:
    """With the share of variance, and room for every state at both ends."""
    low, high = table[name].min(), table[name].max()
    margin = 0.05 * (high - low) or 1.0
    ends = (f"{share:.0%}" for share in table[f"share_{name}"].agg(["min", "max"]))
    shares = " to ".join(dict.fromkeys(ends))
    return Axis(f"component {number} ({shares}{OF_VARIANCE}", limits=(low - margin, high + margin))


def _states(rows: pd.DataFrame, names: list[str], group: str, colour: str) -> Any:
    kind = go.Scatter3d if len(names) == 3 else go.Scatter
    return kind(
        **{name: rows[name].to_numpy(float) for name in names},
        name=literal(group),
        mode="markers",
        opacity=0.65,
        marker={"color": colour, "size": 3 if len(names) == 3 else 6},
        text=[
            literal(f"{token!r}, document {document}")
            for token, document in zip(rows["token"], rows["document"], strict=True)
        ],
        hovertemplate="%{text}<extra>%{fullData.name}</extra>",
    )
