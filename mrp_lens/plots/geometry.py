"""What an edit does to the cloud of states: how far they move, how many directions they use, what was taken of them."""

from itertools import cycle
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from mrp_lens.plots.facets import Panels
from mrp_lens.plots.frames import Frame, facets, figure_of, known, layer_facets, varying
from mrp_lens.plots.theme import GREY, GRID, SYMBOLS, Axis, Look, literal, sequential

METRIC = "mrp_lens.metrics.geometry"
LAYER = Axis("layer", "layer")
TIMES = {"before": "dot", "after": "solid"}
RANDOM = "Grey: what a random subspace of the same rank holds on average, rank / d_model."
MOST_ANGLES = 4  # of which a panel shows the course; the smallest and the largest are among them
OF_VARIANCE = " of variance)"
SPACE_AXIS = {"nticks": 5, "tickfont": {"size": 10}, "backgroundcolor": "white", "gridcolor": GRID}
MOST_SPACES = 8  # browsers keep about 16 views in three dimensions on a page, and drop the oldest beyond that


@figure_of(METRIC, "group when layer displacement")
def displacement(frame: pd.DataFrame) -> go.Figure:
    """How far an edit moves the states at each layer, as a share of their norm without it.

    Args:
        frame: of `mrp_lens.metrics.geometry` with an edit: `group`, `when`, `layer`, `displacement`, of which the rows
            "after" are drawn. `method` and `coefficient` make panels, `seed` faint points around a mean.
    """
    panels = Panels(
        layer_facets(_at(frame, "after")),
        x=LAYER,
        y=Axis("displacement / norm"),
        title="How far the edit moves the states",
        note="Root mean square distance of the states with the edit from those without, over the latter's norm.",
    )
    for panel, group, rows, colour in panels.by_group():
        panels.series(panel, rows, "layer", "displacement", Look(group, colour))
    return panels.figure()


@figure_of(METRIC, "group when layer effective_rank")
def effective_rank(frame: pd.DataFrame) -> go.Figure:
    """Over how many directions the states spread at each layer, before (dotted) and after an edit (solid).

    Args:
        frame: of `mrp_lens.metrics.geometry`: `group`, `when`, `layer`, `effective_rank`. `method` and `coefficient`
            make panels, `seed` faint points around a mean.
    """
    panels = Panels(
        layer_facets(frame),
        x=LAYER,
        y=Axis("effective rank (directions)", "auto"),
        title="Effective rank of the states",
        note="exp of the entropy of the covariance's normalised eigenvalues, from 1 to d_model.",
    )
    return _before_and_after(panels, "effective_rank")


@figure_of(METRIC, "group when layer removed_rank removed_energy removed_energy_null")
def removed_energy(frame: pd.DataFrame) -> go.Figure:
    """How much of the states lies in what a projection removes, before and after it, beside a random subspace in grey.

    Args:
        frame: of `mrp_lens.metrics.geometry`: `group`, `when`, `layer`, `removed_rank`, `removed_energy`,
            `removed_energy_null`; layers at which nothing is removed are left out, and there must be one at which
            something is. `method` makes panels, `seed` faint points around a mean.
    """
    frame = frame[frame["removed_rank"] > 0]
    if frame.empty:
        raise ValueError(
            "removed_rank is 0 in every row: the edit makes no projection at these layers; make the frame with a "
            f"projection (MRP) and the layers that it edits, by {METRIC}"
        )
    panels = Panels(
        layer_facets(frame),
        x=Axis("layer of the projection", "layer"),
        y=Axis("share of the squared norm"),
        title="Energy of the states inside the removed subspace",
        note=RANDOM,
    )
    for panel, _, rows, _ in panels.by_group():
        random = Look("random subspace", GREY, symbol="line-ew", mode="markers")
        panels.means(panel, rows, "layer", "removed_energy_null", random)
    return _before_and_after(panels, "removed_energy", mode="markers")


@figure_of("mrp_lens.metrics.propagation", "group source layer before after null")
def propagation(frame: pd.DataFrame) -> go.Figure:
    """Whether what a projection removes at one layer comes back above: its share before (dotted) and after (solid).

    Args:
        frame: of `mrp_lens.metrics.propagation`: `group`, `source`, `layer`, `before`, `after`, `null`. A panel for each
            `method`, source and, where it takes several, `hook`; `seed` makes faint points around a mean.
    """
    hooks = frame.groupby("source")["hook"].nunique().max() if "hook" in frame else 1
    both = pd.concat([frame.assign(when=when, share=frame[when]) for when in TIMES], ignore_index=True)
    panels = Panels(
        facets(both, ["method", "source", *(["hook"] if hooks > 1 else [])]),
        x=LAYER,
        y=Axis("share of the squared norm"),
        title="What comes back of the removed subspace",
        note=RANDOM,
    )
    for panel, _, rows, _ in panels.by_group():
        for value in rows["null"].unique():
            panels.level(panel, float(value), name="random subspace")
    return _before_and_after(panels, "share")


def _before_and_after(panels: Panels, column: str, *, mode: str = "lines+markers") -> go.Figure:
    for panel, group, rows, colour in panels.by_group():
        for when, dash in TIMES.items():
            symbol = "circle-open" if when == "before" else "circle"
            look = Look(f"{group}, {when}", colour, dash, symbol, mode)
            panels.series(panel, rows[rows["when"] == when], "layer", column, look)
    return panels.figure()


@figure_of("mrp_lens.metrics.principal_angles", "layer when pair number degrees null_degrees")
def principal_angles(frame: pd.DataFrame, when: str = "before") -> go.Figure:
    """Angles between the principal subspaces of the groups and the removed one, at each layer, a panel for each pair.

    At most four of the angles are drawn, dark to light from the smallest to the largest; each has its own symbol, which
    its control, the same angle between random subspaces, has in grey.

    Args:
        frame: of `mrp_lens.metrics.principal_angles`: `layer`, `when`, `pair`, `number`, `degrees`, `null_degrees`.
            `method` makes panels, `seed` faint points around a mean.
        when: "before" or "after" the edit.
    """
    frame = _at(frame, when)
    parts = facets(frame, ["method", "pair"])
    every = sorted({number for _, part in parts for number in _angles(part)})
    looks = dict(zip(every, zip(sequential(len(every)), cycle(SYMBOLS), strict=False), strict=True))
    panels = Panels(
        parts,
        x=LAYER,
        y=Axis("principal angle (degrees)", limits=(-3, 93)),
        title=f"Principal angles {when} the edit",
        note="Angle 1 is the smallest. Grey: the same angle between random subspaces of the same ranks.",
    )
    for panel, part in panels:
        for number in _angles(part):
            colour, symbol = looks[number]
            rows = part[part["number"] == number]
            panels.means(panel, rows, "layer", "null_degrees", Look("random subspaces", GREY, "dot", f"{symbol}-open"))
            panels.series(panel, rows, "layer", "degrees", Look(f"angle {number:g}", colour, symbol=symbol))
    return panels.figure()


def _angles(part: pd.DataFrame) -> list[float]:
    """The numbers of those that a panel shows."""
    numbers = np.sort(part["number"].unique())
    places = np.linspace(0, len(numbers) - 1, min(MOST_ANGLES, len(numbers))).round().astype(int)
    return [float(number) for number in numbers[places]]


def _at(frame: pd.DataFrame, when: str) -> pd.DataFrame:
    rows = frame[frame["when"] == when]
    if rows.empty:
        raise ValueError(
            f"no rows with when = {when!r}, there is {', '.join(map(repr, frame['when'].unique()))}; "
            "rows 'after' come from measuring with an edit"
        )
    return rows


def _names(frame: Frame) -> list[str]:
    return ["x", "y", *(["z"] if "z" in frame else [])]


def _columns(frame: Frame) -> str:
    return " ".join(["group when document token", *(f"{name} share_{name}" for name in _names(frame))])


@figure_of("mrp_lens.metrics.principal_plane", _columns)
def principal_plane(frame: pd.DataFrame) -> go.Figure:
    """States of each group along the principal directions of the unedited states, before and after an edit.

    All panels have the same axes. Hovering over a point shows the token at which the state was read.

    Args:
        frame: of `mrp_lens.metrics.principal_plane`: `group`, `when`, `document`, `token`, `x`, `y`, `share_x`,
            `share_y`, and `z`, `share_z` for three dimensions, with 8 panels at most. A row of panels for each `method` and
            `seed`, whose directions are each its own.
    """
    names = _names(frame)
    for name in names:
        frame = known(frame, name)
    parts, space = facets(frame, ["method", *varying(frame, "seed"), "when"]), len(names) == 3
    if space and len(parts) > MOST_SPACES:
        raise ValueError(
            f"{len(parts)} panels in three dimensions are more than a page can show, {MOST_SPACES}; "
            "draw fewer methods at a time, or two dimensions (leave out the column z)"
        )
    axes = {name: _axis(frame, name, number) for number, name in enumerate(names, start=1)}
    panels = Panels(
        parts,
        x=axes["x"],
        y=axes["y"],
        title="States along their principal directions",
        note="Directions of the unedited states of all groups together; percent: their share of the variance. A point is a state.",
        columns=min(2, frame["when"].nunique()),
        height=400 if space or len(parts) <= 2 else 300,
        space=space,
    )
    for panel, group, rows, colour in panels.by_group():
        panels.trace(panel, _states(rows, names, group, colour))
    figure = panels.figure()
    if space:
        settings = {
            f"{name}axis": SPACE_AXIS
            | {"range": axis.limits}
            | {"title": {"text": axis.title.removesuffix(OF_VARIANCE) + ")", "font": {"size": 11}}}
            for name, axis in axes.items()
        }
        camera = {"eye": {"x": 1.85, "y": 1.85, "z": 0.9}, "center": {"x": 0, "y": 0, "z": -0.15}}
        figure.update_scenes(**settings, aspectmode="cube", camera=camera)
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
    told = zip(rows["token"], rows["document"], strict=True)
    return kind(
        **{name: rows[name].to_numpy(float) for name in names},
        name=literal(group),
        mode="markers",
        opacity=0.65,
        marker={"color": colour, "size": 3 if len(names) == 3 else 6},
        text=[literal(f"{token!r}, document {document}") for token, document in told],
        hovertemplate="%{text}<extra>%{fullData.name}</extra>",
    )
