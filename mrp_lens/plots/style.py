"""The look of every picture: colours, fonts, and where title, note and legend stand at the width of a notebook."""

from collections.abc import Iterable
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np
import plotly.graph_objects as go

# Okabe and Ito's palette, which colour-blind readers can tell apart. The two groups own their colours in every picture.
FORGET = "#D55E00"
RETAIN = "#0072B2"
OTHERS = ("#009E73", "#CC79A7", "#000000", "#56B4E9", "#E69F00")
INK = "#222222"
GREY = "#767676"  # controls, and only they
GREY_BAND = "rgba(118, 118, 118, 0.22)"
GRID = "#E6E6E6"
DARK_GREEN, LIGHT_GREEN = (0, 68, 50), (150, 214, 190)  # ends of the scale for ordered quantities

FILLED = ("circle", "square", "diamond", "triangle-up", "x", "star", "cross", "triangle-down")
SYMBOLS = (*FILLED, *(f"{symbol}-open" for symbol in FILLED))

WIDTH = 900  # pixels, of a notebook's cell and of the report's column
LEFT, RIGHT, BOTTOM = 80, 24, 58
TITLE, NOTE, LEGEND_ROW, PANEL_TITLE = 34, 26, 21, 24
CHARACTER = 6.6  # pixels, of a tick label or a legend entry
LONGEST_LABEL = 40  # characters of a prompt that a legend can show

FONT = {"family": "Helvetica, Arial, sans-serif", "size": 12, "color": INK}
AXIS = {
    "showline": True,
    "linecolor": INK,
    "gridcolor": GRID,
    "zeroline": False,
    "ticks": "outside",
    "tickangle": 0,
    "title": {"standoff": 10},
}
TEMPLATE = go.layout.Template(
    layout={"font": FONT, "paper_bgcolor": "white", "plot_bgcolor": "white", "xaxis": AXIS, "yaxis": AXIS}
)


@dataclass(frozen=True)
class Look:
    """How points are drawn, and what the legend calls them; points of one name share an entry.

    Attributes:
        name: in the legend.
        colour: of line, marker and interval.
        dash: of the line.
        symbol: of the marker.
        mode: "lines", "markers" or "lines+markers".
    """

    name: str
    colour: str
    dash: str = "solid"
    symbol: str = "circle"
    mode: str = "lines+markers"

    @property
    def width(self) -> float:
        """Of lines and bars in pixels: forget is drawn first and wider, so that it shows where retain lies upon it."""
        return 2.6 if self.colour == FORGET else 1.6

    @property
    def side(self) -> int:
        """Where the group stands beside the true place: its points and bars would otherwise hide the other group's."""
        return {FORGET: -1, RETAIN: 1}.get(self.colour, 0)

    @property
    def line(self) -> dict[str, Any]:
        """In plotly's words."""
        return {"color": self.colour, "dash": self.dash, "width": self.width}

    @property
    def marker(self) -> dict[str, Any]:
        """In plotly's words; symbols such as "line-ew" are nothing but their outline."""
        return {
            "color": self.colour,
            "symbol": self.symbol,
            "size": 20 if self.symbol == "line-ew" else 4 + 2 * self.width,
            "line": {"color": self.colour, "width": 1.4},
        }


def control_dash(group: str) -> str:
    """Tells apart the controls of the groups, which are all grey."""
    return {"forget": "dash", "retain": "dot"}.get(group, "dashdot")


def group_colours(names: Iterable[str]) -> dict[str, str]:
    """Group -> colour: forget and retain have theirs always, others one each in order of appearance."""
    rest = [name for name in dict.fromkeys(names) if name not in ("forget", "retain")]
    return {"forget": FORGET, "retain": RETAIN} | {name: OTHERS[i % len(OTHERS)] for i, name in enumerate(rest)}


def sequential(count: int) -> list[str]:
    """Colours from dark to light, for things that come in an order."""
    shares = np.linspace(0, 1, count) if count > 1 else np.zeros(1)
    mixed = [np.array(DARK_GREEN) * (1 - share) + np.array(LIGHT_GREEN) * share for share in shares]
    return ["rgb({:.0f}, {:.0f}, {:.0f})".format(*colour) for colour in mixed]


def shortened(text: str, longest: int = LONGEST_LABEL) -> str:
    """Cut to what there is room for, and taken literally."""
    flat = " ".join(str(text).split())
    return literal(flat if len(flat) <= longest else f"{flat[: longest - 1].rstrip()}…")


def literal(text: object) -> str:
    """A text such as "<s>" must not be taken for markup, which plotly would draw, links included."""
    return escape(str(text), quote=False)


def dress(
    figure: go.Figure, *, title: str, note: str, legend: Iterable[str], height: float, left: float, titled: bool
) -> None:
    """Put title, note and legend above panels of this joint height, with as much room as they fill."""
    rows = _legend_rows((CHARACTER * len(name) + 44 for name in legend), WIDTH - left - RIGHT)
    top = TITLE + NOTE + LEGEND_ROW * rows + (PANEL_TITLE if titled else 0) + 8
    whole = top + height + BOTTOM
    figure.update_layout(
        template=TEMPLATE,
        width=WIDTH,
        height=whole,
        margin={"l": left, "r": RIGHT, "t": top, "b": BOTTOM},
        title={
            "text": title,
            "subtitle": {"text": note, "font": {"size": 12}},
            "font": {"size": 16},
            "x": 12 / WIDTH,
            "y": 1 - 12 / whole,
            "yanchor": "top",
        },
        legend={
            "orientation": "h",
            "x": 0,
            "y": 1 - (TITLE + NOTE) / whole,
            "yref": "container",
            "yanchor": "top",
            "itemsizing": "trace",
            "tracegroupgap": 0,
        },
        showlegend=True,
        hovermode="closest",
    )
    figure.update_annotations(font_size=13)


def _legend_rows(widths: Iterable[float], room: float) -> int:
    """How many rows entries of these widths fill, one after another."""
    rows, used = 1, 0.0
    for width in widths:
        rows, used = (rows + 1, width) if used + width > room else (rows, used + width)
    return rows
