"""A grid of panels under one title and one legend, and what is drawn in them."""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from numpy.typing import NDArray
from plotly.subplots import make_subplots

from mrp_lens.plots.frames import NothingToDraw, Parts, groups, single_rows
from mrp_lens.plots.theme import (
    BOTTOM,
    CHARACTER,
    GREY,
    GREY_BAND,
    INK,
    LEFT,
    RIGHT,
    TEMPLATE,
    WIDTH,
    Along,
    Axis,
    Look,
    group_colours,
    literal,
    shortened,
    shortened_apart,
)

Values = NDArray[np.float64]

TITLE, NOTE, LEGEND_ROW, PANEL_TITLE = 34, 26, 21, 24  # pixels
GAP, GAP_SHARED = 78, 22  # pixels between columns; a panel with a y axis of its own needs room for its labels
ROW_GAP, ROW_GAP_SHARED = 84, 22  # pixels between rows, likewise; titles of panels come on top
ASIDE = 2.5  # pixels
CONTROLS_RANK, SYMBOLS_RANK = 1001, 1002  # in the legend, after everything else (plotly's 1000)


class Panels:
    """A figure in the making: draw into its panels by number, then ask for `figure()`.

    Args:
        parts: the label and rows of each panel; a single label "" for a figure without facets.
        x: the axis below all panels, or one a panel.
        y: the axis left of all panels, or one a panel.
        title: what the picture shows.
        note: what its bands and dashes mean, with "{bars}" where it says what its bars are.
        bars: what these are, where `series` draws intervals; of several seeds there are none, and the figure says so in its place.
        columns: panels side by side. None: as suits their number.
        height: of a panel in pixels. None: as suits their number.
        left: of the first panel, in pixels, which its tick labels and title fill.
        space: panels are views in three dimensions, whose axes are left to the caller.
    """

    def __init__(
        self,
        parts: Parts,
        *,
        x: Axis | Sequence[Axis],
        y: Axis | Sequence[Axis],
        title: str,
        note: str,
        bars: str = "",
        columns: int | None = None,
        height: int | None = None,
        left: int = LEFT,
        space: bool = False,
    ) -> None:
        labels, count = [label for label, _ in parts], len(parts)
        self.parts, self.title, self.left, self.space = [part for _, part in parts], title, left, space
        self.note, self.bars, self.seeds, self.without_zero = note, bars, 0, False
        self.xs, self.ys = ([axis] * count if isinstance(axis, Axis) else list(axis) for axis in (x, y))
        self.shared_x, self.shared_y = isinstance(x, Axis), isinstance(y, Axis)
        self.columns = columns or (2 if count == 4 else min(count, 3))
        rows = math.ceil(count / self.columns)
        self.height = height or (330 if rows == 1 else 220)
        self.titled = any(labels)
        row_gap = (ROW_GAP_SHARED if self.shared_x else ROW_GAP) + (PANEL_TITLE if self.titled else 0)
        self.all_height = rows * self.height + (rows - 1) * row_gap
        gap, inner = GAP_SHARED if self.shared_y else GAP, WIDTH - left - RIGHT
        self.panel_width = (inner - gap * (self.columns - 1)) / self.columns
        kinds = [{"type": "scene" if space else "xy"}] * count + [None] * (rows * self.columns - count)
        self.grid = make_subplots(
            rows,
            self.columns,
            specs=[kinds[start : start + self.columns] for start in range(0, len(kinds), self.columns)],
            subplot_titles=shortened_apart(labels, int(self.panel_width / CHARACTER / 1.1)),
            horizontal_spacing=gap / inner,
            vertical_spacing=row_gap / self.all_height if rows > 1 else 0.0,
        )
        self.legend: dict[str, None] = {}  # names in order
        self.entries: dict[str, str] = {}  # of a series as it is shown -> its whole name
        self.levels: dict[tuple[int, str, float], tuple[Along, Any]] = {}
        self.asides: list[tuple[int, int, Any]] = []  # panel, side and trace
        self.shown: list[dict[str, list[float]]] = [{"x": [], "y": [], "ends": []} for _ in parts]

    def __iter__(self) -> Iterator[tuple[int, pd.DataFrame]]:
        """Each panel's number and rows."""
        return iter(enumerate(self.parts))

    def by_group(self) -> Iterator[tuple[int, str, pd.DataFrame, str]]:
        """Panel by panel each group: the panel's number, the group's name, its rows and its colour."""
        colours = group_colours(group for part in self.parts for group in part["group"])
        for panel, part in self:
            for group, rows in groups(part):
                yield panel, group, rows, colours[group]

    def series(
        self,
        panel: int,
        table: pd.DataFrame,
        x: str,
        y: str,
        look: Look,
        *,
        interval: tuple[str, str] | None = None,
        along: Along = "y",
        about: str = "",
    ) -> None:
        """A value along y (or x) for each place: its interval, if the table has that, or, where there is a row a seed, every
        seed and the mean. `about`: told on hovering, besides the look's name."""
        place, value = (x, y) if along == "y" else (y, x)
        if single_rows(table, [place]):
            rows = table.sort_values(place)
            ends = [rows[end] for end in interval] if interval and set(interval) <= set(table) else None
            self.points(panel, rows[x], rows[y], look, ends=ends, along=along, about=about)
            return
        self.seeds = max(self.seeds, table["seed"].nunique())
        self.points(panel, table[x], table[y], replace(look, mode="markers"), opacity=0.35, legend=False, about=about)
        mean = table.groupby(place)[value].mean().reset_index()
        self.points(panel, mean[x], mean[y], look, about=about)

    def means(self, panel: int, table: pd.DataFrame, x: str, column: str, look: Look, *, legend: bool = True) -> None:
        """The mean of the rows at each place."""
        mean = table.groupby(x)[column].mean()
        self.points(panel, mean.index, mean, look, legend=legend)

    def points(
        self,
        panel: int,
        x: Iterable[float],
        y: Iterable[float],
        look: Look,
        *,
        ends: Sequence[Iterable[float]] | None = None,
        along: Along = "y",
        opacity: float = 1.0,
        legend: bool = True,
        about: str = "",
    ) -> None:
        """Points, joined or not, with intervals along y (or x); hovering tells their own x and y, wherever they are drawn.

        Without any number there is nothing to draw.
        """
        told = [_floats(values) for values in (x, y, *(ends or ()))]
        xs, ys, *limits = told
        drawn = np.isfinite(xs) & np.isfinite(ys)
        if not drawn.any():
            return
        self.shown[panel]["x"].extend(xs)
        self.shown[panel]["y"].extend(ys)
        self.shown[panel]["ends"].extend(end for part in limits for end in part)
        named = ", ".join(filter(None, ("%{fullData.name}", literal(about))))
        hover, bars = f"{named}<br>%{{customdata[0]:.4g}}: %{{customdata[1]:.4g}}", {}
        if limits:
            hover += " [%{customdata[2]:.4g}, %{customdata[3]:.4g}]"
            middle = ys if along == "y" else xs
            bars[f"error_{along}"] = {
                "array": _or_none(limits[1] - middle),
                "arrayminus": _or_none(middle - limits[0]),
                "thickness": look.width,
                "width": 3,
                "color": look.colour,
            }
        trace = go.Scatter(
            x=_or_none(xs),
            y=_or_none(ys),
            name=self._entry(look.name),
            mode="markers" if drawn.sum() == 1 else look.mode,  # one point makes no line
            line=look.line,
            marker=look.marker,
            opacity=opacity,
            customdata=[_or_none(row) for row in np.stack(told, axis=1)],
            hovertemplate=hover + "<extra></extra>",
            **bars,
        )
        self.trace(panel, trace, legend=legend, rank=CONTROLS_RANK if look.colour == GREY else None)
        if look.side and self.xs[panel].scale not in ("category", "linear"):
            self.asides.append((panel, look.side, self.grid.data[-1]))

    def control(self, panel: int, rows: pd.DataFrame, x: str, column: str, name: str, *, dash: str = "dash") -> None:
        """The grey line of a control that changes with x, the mean of the rows at each place."""
        mean = rows.groupby(x)[column].mean()
        if len(mean) == 1:
            self.level(panel, float(mean.iloc[0]), name=name, dash=dash)
        else:
            self.points(panel, mean.index, mean, Look(name, GREY, dash, mode="lines"))

    def band(self, panel: int, rows: pd.DataFrame, x: str, low: str, high: str, *, name: str) -> None:
        """The grey band of a control, the means of the rows at each place; at a single place it is as wide as the panel."""
        mean = rows.groupby(x)[[low, high]].mean()
        xs, lows, highs = (_floats(values) for values in (mean.index, mean[low], mean[high]))
        known = np.isfinite(lows) & np.isfinite(highs)
        xs, lows, highs = xs[known], lows[known], highs[known]
        self.shown[panel]["ends"].extend([*lows, *highs])
        if len(xs) > 1:
            trace = go.Scatter(
                x=np.concatenate([xs, xs[::-1]]),
                y=np.concatenate([lows, highs[::-1]]),
                name=literal(name),
                fill="toself",
                fillcolor=GREY_BAND,
                line={"width": 0, "color": GREY},
                mode="lines",
                hoverinfo="skip",
            )
            self.trace(panel, trace, rank=CONTROLS_RANK)
        elif len(xs):
            look = {"fillcolor": GREY_BAND, "line_width": 0, "layer": "below"}
            self.grid.add_hrect(lows[0], highs[0], exclude_empty_subplots=False, **look, **self._place(panel))

    def level(self, panel: int, value: float, *, name: str, along: Along = "x", dash: str = "dash") -> None:
        """The grey line of a control that is one number: along x, all across the panel, or up along y."""
        if not math.isfinite(value) or (panel, name, value) in self.levels:
            return
        across: Along = "y" if along == "x" else "x"
        self.shown[panel][across].append(value)
        trace = go.Scatter(
            **{along: [None, None], across: [value, value]},  # the ends are still to be set
            name=literal(name),
            mode="lines",
            line=Look(name, GREY, dash).line,
            hovertemplate=f"%{{fullData.name}}: {value:.4g}<extra></extra>",
        )
        self.trace(panel, trace, rank=CONTROLS_RANK)
        self.levels[panel, name, value] = (along, self.grid.data[-1])

    def explain(self, name: str, symbol: str) -> None:
        """An entry of the legend for a symbol, whatever the colour: it draws nothing."""
        if name not in self.legend:
            marker = Look(name, INK, symbol=symbol).marker
            empty = go.Scatter(x=[None], y=[None], name=name, mode="markers", marker=marker)
            self.trace(0, empty, rank=SYMBOLS_RANK)

    def trace(self, panel: int, trace: Any, *, legend: bool = True, rank: int | None = None) -> None:
        """A trace of any kind; the first of its name gets the entry in the legend, in the order of ranks."""
        trace.legendgroup, trace.legendrank = trace.name, rank
        trace.showlegend = legend and trace.name not in self.legend
        if legend:
            self.legend[trace.name] = None
        self.grid.add_trace(trace, **self._place(panel))

    def _entry(self, name: str) -> str:
        """A series's name for the legend; cut in another place where another one would be the same."""
        shown = [shortened(name), shortened(name, middle=True), *(f"{shortened(name)} {n}" for n in range(2, 100))]
        return next((entry for entry in shown if self.entries.setdefault(entry, name) == name), shown[-1])

    def figure(self) -> go.Figure:
        """The figure, with axes, legend and height that suit what was drawn.

        Raises:
            NothingToDraw: nothing but controls was drawn.
        """
        if all(trace.legendrank for trace in self.grid.data):  # controls and symbols alone
            raise NothingToDraw(
                "nothing to draw, the frame holds no number, but of controls, where the picture needs one"
            )
        for panel in range(0 if self.space else len(self.parts)):
            self._axes(panel)
        self._stretch_levels()
        self._step_aside()
        self.grid.data = sorted(self.grid.data, key=lambda trace: trace.legendrank != CONTROLS_RANK)  # controls below
        self._dress()
        return self.grid

    def _axes(self, panel: int) -> None:
        own = [self.shown[panel]]
        seen_x, seen_y = self.shown if self.shared_x else own, self.shown if self.shared_y else own
        outer_x = not self.shared_x or panel + self.columns >= len(self.shown)
        outer_y = not self.shared_y or panel % self.columns == 0
        across = self.xs[panel].options([value for part in seen_x for value in part["x"]], self.panel_width)
        values, ends = ([value for part in seen_y for value in part[key]] for key in ("y", "ends"))
        upwards = self.ys[panel].options(values, self.height, ends=ends)
        for axis, shown in ((across, own[0]["x"]), (upwards, own[0]["y"])):
            self.without_zero |= axis.get("type") == "log" and any(value <= 0 for value in shown)
        self.grid.update_xaxes(
            title_text=literal(self.xs[panel].title) if outer_x else None,
            showticklabels=outer_x,
            matches="x" if self.shared_x and panel else None,
            **across,
            **self._place(panel),
        )
        self.grid.update_yaxes(
            title_text=literal(self.ys[panel].title) if outer_y else None,
            showticklabels=outer_y,
            ticks="outside" if outer_y else "",
            matches="y" if self.shared_y and panel else None,
            **upwards,
            **self._place(panel),
        )

    def _dress(self) -> None:
        """Put title, note and legend above the panels, with as much room as they fill."""
        rows, used, room = 1, 0.0, WIDTH - self.left - RIGHT
        for name in self.legend:
            width = CHARACTER * len(name) + 44
            rows, used = (rows + 1, width) if used + width > room else (rows, used + width)
        top = TITLE + NOTE + LEGEND_ROW * rows + (PANEL_TITLE if self.titled else 0) + 8
        height = top + self.all_height + BOTTOM
        bars = self.bars if not self.seeds else f"Faint points: {self.seeds} seeds; lines: their mean."
        zeros = "Zeros have no place on a logarithmic axis." if self.without_zero else ""
        note = " ".join(f"{self.note.replace('{bars}', bars)} {zeros}".split())
        self.grid.update_layout(
            template=TEMPLATE,
            width=WIDTH,
            height=height,
            margin={"l": self.left, "r": RIGHT, "t": top, "b": BOTTOM},
            title={"text": self.title, "subtitle": {"text": note}, "y": 1 - 12 / height},
            legend={"y": 1 - (TITLE + NOTE) / height},
            showlegend=True,
        )
        self.grid.update_annotations(font_size=13)

    def _axis(self, panel: int, along: Along) -> Any:
        return next((self.grid.select_xaxes if along == "x" else self.grid.select_yaxes)(**self._place(panel)))

    def _stretch_levels(self) -> None:
        """Levels run from end to end of their axis, which is known only when everything is drawn."""
        for (panel, _, _), (along, trace) in self.levels.items():
            axis = self._axis(panel, along)
            trace[along] = [10**end if axis.type == "log" else end for end in axis.range]

    def _step_aside(self) -> None:
        """Move the points of two groups a few pixels apart; what hovering tells is the true place."""
        if len({side for _, side, _ in self.asides}) < 2:
            return
        for panel, side, trace in self.asides:
            axis = self._axis(panel, "x")
            step = side * ASIDE * (axis.range[1] - axis.range[0]) / self.panel_width
            trace.x = [None if x is None else x * 10**step if axis.type == "log" else x + step for x in trace.x]

    def _place(self, panel: int) -> dict[str, int]:
        return {"row": panel // self.columns + 1, "col": panel % self.columns + 1}


def _floats(values: Iterable[float]) -> Values:
    return np.asarray(list(values), dtype=float)


def _or_none(values: Values) -> list[float | None]:
    """NaN as the gap that JSON knows."""
    return [float(value) if math.isfinite(value) else None for value in values]
