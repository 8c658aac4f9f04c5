"""A grid of panels under one title and one legend, and what is drawn in them."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from mrp_lens.plots import theme
from mrp_lens.plots.frames import groups, single_rows
from mrp_lens.plots.theme import (
    CHARACTER,
    GREY,
    GREY_BAND,
    INK,
    LEFT,
    PANEL_TITLE,
    RIGHT,
    WIDTH,
    Along,
    Axis,
    Look,
    dress,
    group_colours,
    literal,
    shortened,
)

GAP, GAP_SHARED = 78, 22  # pixels between columns; a panel with a y axis of its own needs room for its labels
ROW_GAP, ROW_GAP_SHARED = 84, 22  # pixels between rows, likewise; titles of panels come on top
ASIDE = 2.5  # pixels
CONTROLS_RANK, SYMBOLS_RANK = 1001, 1002  # in the legend, after everything else (plotly's 1000)


class Panels:
    """A figure in the making: draw into its panels by number, then ask for `figure()`.

    Args:
        titles: one a panel; a single "" for a figure without facets.
        x: the axis below all panels, or one a panel.
        y: the axis left of all panels, or one a panel.
        title: what the picture shows.
        note: what its bars, bands and dashes mean.
        picture: the function's name, for errors.
        columns: panels side by side. None: as suits their number.
        height: of a panel in pixels. None: as suits their number.
        left: of the first panel, in pixels, which its tick labels and title fill.
        space: panels are views in three dimensions, whose axes are left to the caller.
    """

    def __init__(
        self,
        titles: Sequence[str],
        *,
        x: Axis | Sequence[Axis],
        y: Axis | Sequence[Axis],
        title: str,
        note: str,
        picture: str,
        columns: int | None = None,
        height: int | None = None,
        left: int = LEFT,
        space: bool = False,
    ) -> None:
        count = len(titles)
        self.title, self.note, self.picture, self.left, self.space = title, note, picture, left, space
        self.xs, self.ys = ([axis] * count if isinstance(axis, Axis) else list(axis) for axis in (x, y))
        self.shared_x, self.shared_y = isinstance(x, Axis), isinstance(y, Axis)
        self.columns = columns or (2 if count == 4 else min(count, 3))
        rows = math.ceil(count / self.columns)
        self.height = height or (330 if rows == 1 else 220)
        self.titled = any(titles)
        row_gap = (ROW_GAP_SHARED if self.shared_x else ROW_GAP) + (PANEL_TITLE if self.titled else 0)
        self.all_height = rows * self.height + (rows - 1) * row_gap
        gap, inner = GAP_SHARED if self.shared_y else GAP, WIDTH - left - RIGHT
        self.panel_width = (inner - gap * (self.columns - 1)) / self.columns
        kinds = [{"type": "scene" if space else "xy"}] * count + [None] * (rows * self.columns - count)
        self.grid = make_subplots(
            rows,
            self.columns,
            specs=[kinds[start : start + self.columns] for start in range(0, len(kinds), self.columns)],
            subplot_titles=[shortened(name, int(self.panel_width / CHARACTER / 1.1)) for name in titles],
            horizontal_spacing=gap / inner,
            vertical_spacing=row_gap / self.all_height,
        )
        self.legend: dict[str, None] = {}  # names in order
        self.levels: dict[tuple[int, str, float], tuple[Along, Any]] = {}
        self.asides: list[tuple[int, int, Any]] = []  # panel, side and trace
        self.shown: list[dict[str, list[float]]] = [{"x": [], "y": [], "ends": []} for _ in titles]

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
    ) -> None:
        """A value along y (or x) for each place: its interval or, where there is a row a seed, every seed and the mean."""
        place, value = (x, y) if along == "y" else (y, x)
        if single_rows(table, [place], picture=self.picture):
            rows = table.sort_values(place)
            low, high = (rows[column] for column in interval) if interval else (None, None)
            self.points(panel, rows[x], rows[y], look, low=low, high=high, along=along)
            return
        self.points(panel, table[x], table[y], replace(look, mode="markers"), opacity=0.35, legend=False)
        mean = table.groupby(place)[value].mean().reset_index()
        self.points(panel, mean[x], mean[y], look)

    def points(
        self,
        panel: int,
        x: Iterable[float],
        y: Iterable[float],
        look: Look,
        *,
        low: Iterable[float] | None = None,
        high: Iterable[float] | None = None,
        along: Along = "y",
        opacity: float = 1.0,
        legend: bool = True,
    ) -> None:
        """Points, joined or not, with intervals along y (or x); without any number there is nothing to draw."""
        xs, ys = theme.floats(x), theme.floats(y)
        if not (np.isfinite(xs) & np.isfinite(ys)).any():
            return
        ends = None if low is None or high is None else (theme.floats(low), theme.floats(high))
        self.shown[panel]["x"].extend(xs)
        self.shown[panel]["y"].extend(ys)
        self.shown[panel]["ends"].extend(end for part in ends or () for end in part)
        trace = theme.points(xs, ys, look, ends=ends, along=along, opacity=opacity)
        self.trace(panel, trace, legend=legend, rank=CONTROLS_RANK if look.colour == GREY else None)
        if look.side and self.xs[panel].scale not in ("category", "linear"):
            self.asides.append((panel, look.side, self.grid.data[-1]))

    def control(self, panel: int, rows: pd.DataFrame, x: str, column: str, name: str, *, dash: str = "dash") -> None:
        """The grey line of a control that changes with x, the mean of the rows at each place."""
        mean = rows.groupby(x)[column].mean()
        if len(mean) == 1:
            self.level(panel, float(mean.iloc[0]), name=name, dash=dash)
            return
        self.points(panel, mean.index, mean, Look(name, GREY, dash, mode="lines"))

    def band(self, panel: int, x: Iterable[float], low: Iterable[float], high: Iterable[float], *, name: str) -> None:
        """The grey band of a control; at a single place it is as wide as the panel."""
        values = np.stack([theme.floats(x), theme.floats(low), theme.floats(high)])
        values = values[:, np.isfinite(values).all(axis=0)]
        xs, lows, highs = values[:, np.argsort(values[0])]
        self.shown[panel]["ends"].extend([*lows, *highs])
        if len(xs) > 1:
            self.trace(panel, theme.band(xs, lows, highs, name=name), rank=CONTROLS_RANK)
        elif len(xs):
            row, column = self._place(panel)
            self.grid.add_hrect(
                *(lows[0], highs[0]),
                row=row,
                col=column,
                fillcolor=GREY_BAND,
                line_width=0,
                layer="below",
                exclude_empty_subplots=False,
            )

    def level(self, panel: int, value: float, *, name: str, along: Along = "x", dash: str = "dash") -> None:
        """The grey line of a control that is one number: along x, all across the panel, or up along y."""
        if not math.isfinite(value) or (panel, name, value) in self.levels:
            return
        self.shown[panel]["y" if along == "x" else "x"].append(value)
        self.trace(panel, theme.level(value, Look(name, GREY, dash, mode="lines"), along), rank=CONTROLS_RANK)
        self.levels[panel, name, value] = (along, self.grid.data[-1])

    def explain(self, name: str, symbol: str) -> None:
        """An entry of the legend for a symbol, whatever the colour: it draws nothing."""
        if name not in self.legend:
            look = Look(name, INK, symbol=symbol)
            empty = go.Scatter(x=[None], y=[None], name=name, mode="markers", marker=look.marker)
            self.trace(0, empty, rank=SYMBOLS_RANK)

    def trace(self, panel: int, trace: Any, *, legend: bool = True, rank: int | None = None) -> None:
        """A trace of any kind; the first of its name gets the entry in the legend, in the order of ranks."""
        row, column = self._place(panel)
        trace.legendgroup, trace.legendrank = trace.name, rank
        trace.showlegend = legend and trace.name not in self.legend
        if legend:
            self.legend[trace.name] = None
        self.grid.add_trace(trace, row=row, col=column)

    def figure(self) -> go.Figure:
        """The figure, with axes, legend and height that suit what was drawn.

        Raises:
            ValueError: nothing was drawn.
        """
        if all(trace.legendrank for trace in self.grid.data):  # controls and symbols alone
            raise ValueError(f"{self.picture}: nothing to draw, the frame holds no number where the picture needs one")
        for panel in range(0 if self.space else len(self.shown)):
            self._axes(panel)
        self._stretch_levels()
        self._step_aside()
        self.grid.data = sorted(self.grid.data, key=lambda trace: trace.legendrank != CONTROLS_RANK)  # controls below
        dress(
            self.grid,
            title=self.title,
            note=self.note,
            legend=self.legend,
            height=self.all_height,
            left=self.left,
            titled=self.titled,
        )
        return self.grid

    def _axes(self, panel: int) -> None:
        row, column = self._place(panel)
        own = [self.shown[panel]]
        seen_x, seen_y = self.shown if self.shared_x else own, self.shown if self.shared_y else own
        lowest, first = panel + self.columns >= len(self.shown), column == 1
        self.grid.update_xaxes(
            row=row,
            col=column,
            title_text=literal(self.xs[panel].title) if lowest or not self.shared_x else None,
            showticklabels=lowest or not self.shared_x,
            matches="x" if self.shared_x and panel else None,
            **self.xs[panel].options([value for part in seen_x for value in part["x"]], self.panel_width),
        )
        values, ends = ([value for part in seen_y for value in part[key]] for key in ("y", "ends"))
        self.grid.update_yaxes(
            row=row,
            col=column,
            title_text=literal(self.ys[panel].title) if first or not self.shared_y else None,
            matches="y" if self.shared_y and panel else None,
            showticklabels=first or not self.shared_y,
            ticks="outside" if first or not self.shared_y else "",
            **self.ys[panel].options(values, self.height, ends=ends),
        )

    def _axis(self, panel: int, along: Along) -> Any:
        row, column = self._place(panel)
        return next((self.grid.select_xaxes if along == "x" else self.grid.select_yaxes)(row=row, col=column))

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

    def _place(self, panel: int) -> tuple[int, int]:
        return panel // self.columns + 1, panel % self.columns + 1


Draw = Callable[[Panels, int, str, pd.DataFrame, str], None]


def by_group(
    parts: Sequence[tuple[str, pd.DataFrame]], draw: Draw, *, x: Axis, y: Axis, title: str, note: str, picture: str
) -> go.Figure:
    """A panel for each part; `draw(panels, panel, group, rows, colour)` fills it group by group."""
    panels = Panels([label for label, _ in parts], x=x, y=y, title=title, note=note, picture=picture)
    colours = group_colours(group for _, part in parts for group in part["group"])
    for panel, (_, part) in enumerate(parts):
        for group, rows in groups(part):
            draw(panels, panel, group, rows, colours[group])
    return panels.figure()
