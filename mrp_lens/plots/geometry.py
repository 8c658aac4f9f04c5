"""What an edit does to the cloud of states: how far they move, how many directions they use, what was taken of them."""

from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from mrp_lens.plots.facets import Panels, by_group
from mrp_lens.plots.frames import Frame, facets, groups, known, layer_facets, tidy
from mrp_lens.plots.registry import register
from mrp_lens.plots.theme import GREY, GRID, SYMBOLS, Axis, Look, group_colours, literal, sequential

OF_VARIANCE = " of variance)"
SPACE_AXIS = {"nticks": 5, "tickfont": {"size": 10}, "backgroundcolor": "white", "gridcolor": GRID}
MOST_SPACES = 8  # browsers keep about 16 views in three dimensions on a page, and drop the oldest beyond that


METRIC = "mrp_lens.metrics.geometry"
LAYER = Axis("layer", "layer")
TIMES = {"before": "dot", "after": "solid"}
MOST_ANGLES = 4  # of which a panel shows the course; the smallest and the largest are among them


@register("principal_plane")
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


@register("displacement")
def displacement(frame: Frame) -> go.Figure:
    """How far an edit moves the states at each layer, as a share of their norm without it.

    Args:
        frame: of `mrp_lens.metrics.geometry` with an edit: `group`, `when`, `layer`, `displacement`, of which the rows
            "after" are drawn. `method` and `coefficient` make panels, `seed` faint points around a mean.

    Raises:
        TypeError, ValueError: not such a frame, no rows "after", or rows that nothing tells apart.
    """
    table = tidy(frame, ["group", "when", "layer", "displacement"], picture="displacement", metric=METRIC)
    table = _at(table, "after", "displacement")

    def draw(panels: Panels, panel: int, group: str, rows: pd.DataFrame, colour: str) -> None:
        panels.series(panel, rows, "layer", "displacement", Look(group, colour))

    return by_group(
        layer_facets(table),
        draw,
        x=LAYER,
        y=Axis("displacement / norm"),
        title="How far the edit moves the states",
        note="Root mean square distance of the states with the edit from those without, over the latter's norm.",
        picture="displacement",
    )


@register("effective_rank")
def effective_rank(frame: Frame) -> go.Figure:
    """Over how many directions the states spread at each layer, before (dotted) and after an edit (solid).

    Args:
        frame: of `mrp_lens.metrics.geometry`: `group`, `when`, `layer`, `effective_rank`. `method` and `coefficient`
            make panels, `seed` faint points around a mean.

    Raises:
        TypeError, ValueError: not such a frame, no rows, or rows that nothing tells apart.
    """
    table = tidy(frame, ["group", "when", "layer", "effective_rank"], picture="effective_rank", metric=METRIC)

    def draw(panels: Panels, panel: int, group: str, rows: pd.DataFrame, colour: str) -> None:
        _before_and_after(panels, panel, group, rows, "effective_rank", colour)

    return by_group(
        layer_facets(table),
        draw,
        x=LAYER,
        y=Axis("effective rank (directions)", "auto"),
        title="Effective rank of the states",
        note="exp of the entropy of the covariance's normalised eigenvalues, from 1 to d_model.",
        picture="effective_rank",
    )


@register("removed_energy")
def removed_energy(frame: Frame) -> go.Figure:
    """How much of the states lies in what a projection removes, before and after it, beside a random subspace in grey.

    Args:
        frame: of `mrp_lens.metrics.geometry`: `group`, `when`, `layer`, `removed_rank`, `removed_energy`,
            `removed_energy_null`; layers at which nothing is removed are left out. `method` makes panels, `seed`
            faint points around a mean.

    Raises:
        TypeError, ValueError: not such a frame, no layer at which something is removed, or rows that nothing tells apart.
    """
    columns = ["group", "when", "layer", "removed_rank", "removed_energy", "removed_energy_null"]
    table = tidy(frame, columns, picture="removed_energy", metric=METRIC)
    table = table[table["removed_rank"] > 0]
    if table.empty:
        raise ValueError(
            "removed_energy: removed_rank is 0 in every row: the edit makes no projection at these layers; "
            f"make the frame with a projection (MRP) and the layers that it edits, by {METRIC}"
        )

    def draw(panels: Panels, panel: int, group: str, rows: pd.DataFrame, colour: str) -> None:
        null = rows.groupby("layer")["removed_energy_null"].mean()
        panels.points(panel, null.index, null, Look("random subspace", GREY, symbol="line-ew", mode="markers"))
        _before_and_after(panels, panel, group, rows, "removed_energy", colour, mode="markers")

    return by_group(
        layer_facets(table),
        draw,
        x=Axis("layer of the projection", "layer"),
        y=Axis("share of the squared norm"),
        title="Energy of the states inside the removed subspace",
        note="Grey: what a random subspace of the same rank holds on average, rank / d_model.",
        picture="removed_energy",
    )


@register("propagation")
def propagation(frame: Frame) -> go.Figure:
    """Whether what a projection removes at one layer comes back above: its share before (dotted) and after (solid).

    Args:
        frame: of `mrp_lens.metrics.propagation`: `group`, `source`, `layer`, `before`, `after`, `null`. A panel for each
            `method`, source and, where it takes several, `hook`; `seed` makes faint points around a mean.

    Raises:
        TypeError, ValueError: not such a frame, no rows, or rows that nothing tells apart.
    """
    columns = ["group", "source", "layer", "before", "after", "null"]
    table = tidy(frame, columns, picture="propagation", metric="mrp_lens.metrics.propagation")
    hooks = table.groupby("source")["hook"].nunique().max() if "hook" in table else 1
    both = [table.assign(when=when, share=table[when]) for when in TIMES]

    def draw(panels: Panels, panel: int, group: str, rows: pd.DataFrame, colour: str) -> None:
        for value in rows["null"].unique():
            panels.level(panel, float(value), name="random subspace")
        _before_and_after(panels, panel, group, rows, "share", colour)

    return by_group(
        facets(pd.concat(both, ignore_index=True), ["method", "source", *(["hook"] if hooks > 1 else [])]),
        draw,
        x=LAYER,
        y=Axis("share of the squared norm"),
        title="What comes back of the removed subspace",
        note="Grey: what a random subspace of the same rank holds on average, rank / d_model.",
        picture="propagation",
    )


@register("principal_angles")
def principal_angles(frame: Frame, when: str = "before") -> go.Figure:
    """Angles between the principal subspaces of the groups and the removed one, at each layer, a panel for each pair.

    At most four of the angles are drawn, dark to light from the smallest to the largest; each has its own symbol, which
    its control, the same angle between random subspaces, has in grey.

    Args:
        frame: of `mrp_lens.metrics.principal_angles`: `layer`, `when`, `pair`, `number`, `degrees`, `null_degrees`.
            `method` makes panels, `seed` faint points around a mean.
        when: "before" or "after" the edit.

    Raises:
        TypeError, ValueError: not such a frame, no rows of that `when`, or rows that nothing tells apart.
    """
    picture = "principal_angles"
    columns = ["layer", "when", "pair", "number", "degrees", "null_degrees"]
    table = _at(tidy(frame, columns, picture=picture, metric="mrp_lens.metrics.principal_angles"), when, picture)
    parts = facets(table, ["method", "pair"])
    numbers = np.sort(table["number"].unique())
    places = np.linspace(0, len(numbers) - 1, min(MOST_ANGLES, len(numbers))).round().astype(int)
    panels = Panels(
        [label for label, _ in parts],
        x=LAYER,
        y=Axis("principal angle (degrees)", limits=(-3, 93)),
        title=f"Principal angles {when} the edit",
        note="Angle 1 is the smallest. Grey: the same angle between random subspaces of the same ranks.",
        picture=picture,
    )
    for panel, (_, part) in enumerate(parts):
        for number, colour, symbol in zip(numbers[places], sequential(len(places)), SYMBOLS, strict=False):
            rows = part[part["number"] == number]
            null = rows.groupby("layer")["null_degrees"].mean()
            panels.points(panel, null.index, null, Look("random subspaces", GREY, "dot", f"{symbol}-open"))
            panels.series(panel, rows, "layer", "degrees", Look(f"angle {number:g}", colour, symbol=symbol))
    return panels.figure()


def _at(table: pd.DataFrame, when: str, picture: str) -> pd.DataFrame:
    rows = table[table["when"] == when]
    if rows.empty:
        raise ValueError(
            f"{picture}: no rows with when = {when!r}, there is {', '.join(map(repr, table['when'].unique()))}; "
            "rows 'after' come from measuring with an edit"
        )
    return rows


def _before_and_after(
    panels: Panels, panel: int, group: str, rows: pd.DataFrame, column: str, colour: str, *, mode: str = "lines+markers"
) -> None:
    for when, dash in TIMES.items():
        part = rows[rows["when"] == when]
        symbol = "circle-open" if when == "before" else "circle"
        panels.series(panel, part, "layer", column, Look(f"{group}, {when}", colour, dash, symbol, mode))
