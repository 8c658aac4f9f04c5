"""What a figure looks like: colours, the template "mrp_lens" of plotly, marks, and axes whose ticks can be read in the room there is."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any, Literal

import numpy as np
import plotly.graph_objects as go
import plotly.io

# Okabe and Ito's palette, which colour-blind readers can tell apart. The two groups own their colours in every picture.
FORGET = "#D55E00"
RETAIN = "#0072B2"
OTHERS = (
    *("#009E73", "#CC79A7", "#000000", "#56B4E9", "#E69F00"),
    *("#882255", "#999933", "#332288", "#DDCC77", "#44AA99"),  # of Tol's muted palette, for pictures with more groups
)
LIGHTER = (
    "#80CFB9",
    "#E6BCD3",
    "#AADAF4",
    "#F2CF80",
    "#C390AA",
    "#CCCC99",
    "#9990C3",
    "#EEE6BB",
    "#A1D4CC",
)  # the same, half white
INK = "#222222"
GREY = "#767676"  # controls, and only they
GREY_BAND = "rgba(118, 118, 118, 0.22)"
GRID = "#E6E6E6"
DARK_GREEN, LIGHT_GREEN = (0, 68, 50), (150, 214, 190)  # ends of the scale for ordered quantities

FILLED = ("circle", "square", "diamond", "triangle-up", "x", "star", "cross", "triangle-down")
SYMBOLS = (*FILLED, *(f"{symbol}-open" for symbol in FILLED))

WIDTH = 900  # pixels, of a notebook's cell and of the report's column
LEFT, RIGHT, BOTTOM = 80, 24, 58
CHARACTER = 6.6  # pixels, of a tick label or a legend entry
LONGEST_LABEL = 40  # characters of a prompt that a legend can show

UNIT = (-0.03, 1.04)  # an axis of shares
WIDE = 10.0  # positive values whose largest is this many times the smallest are shown on a log scale
FARTHEST_END = 10.0  # an interval that reaches towards 0 does not stretch a log scale by more than this factor
LAYER_STEPS = (1, 2, 4, 5, 8, 10, 20, 40)

Along = Literal["x", "y"]
Scale = Literal["linear", "log", "auto", "layer", "category"]

TEMPLATE = "mrp_lens"
_AXIS = {
    "showline": True,
    "linecolor": INK,
    "gridcolor": GRID,
    "zeroline": False,
    "ticks": "outside",
    "tickangle": 0,
    "title": {"standoff": 10},
}
plotly.io.templates[TEMPLATE] = go.layout.Template(
    layout={
        "font": {"family": "Helvetica, Arial, sans-serif", "size": 12, "color": INK},
        "paper_bgcolor": "white",
        "plot_bgcolor": "white",
        "hovermode": "closest",
        "title": {"font": {"size": 16}, "subtitle": {"font": {"size": 12}}, "x": 12 / WIDTH, "yanchor": "top"},
        "legend": {
            "orientation": "h",
            "x": 0,
            "yref": "container",
            "yanchor": "top",
            "itemsizing": "trace",
            "tracegroupgap": 0,
        },
        "xaxis": _AXIS,
        "yaxis": _AXIS,
    }
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
    colours = (*OTHERS, *LIGHTER)
    return {"forget": FORGET, "retain": RETAIN} | {name: colours[i % len(colours)] for i, name in enumerate(rest)}


def sequential(count: int) -> list[str]:
    """Colours from dark to light, for things that come in an order."""
    shares = np.linspace(0, 1, count) if count > 1 else np.zeros(1)
    mixed = [np.array(DARK_GREEN) * (1 - share) + np.array(LIGHT_GREEN) * share for share in shares]
    return ["rgb({:.0f}, {:.0f}, {:.0f})".format(*colour) for colour in mixed]


def shortened(text: str, longest: int = LONGEST_LABEL, *, middle: bool = False) -> str:
    """Cut at its end, or in its middle, to what there is room for, and taken literally."""
    flat = " ".join(str(text).split())
    if len(flat) <= longest:
        return literal(flat)
    behind = (longest - 1) // 2 if middle else 0
    return literal(f"{flat[: longest - 1 - behind].rstrip()}…{flat[len(flat) - behind :].lstrip()}")


def shortened_apart(texts: Sequence[str], longest: int) -> list[str]:
    """Each cut at its end, or all in their middle where different ones would become the same."""
    cut = [shortened(text, longest) for text in texts]
    return cut if len(set(cut)) == len(set(texts)) else [shortened(text, longest, middle=True) for text in texts]


def literal(text: object) -> str:
    """A text such as "<s>" must not be taken for markup, which plotly would draw, links included."""
    return escape(str(text), quote=False)


def fits(labels: Sequence[str], pixels: float) -> bool:
    """Whether such labels stand side by side along so many pixels."""
    return max(map(len, labels)) * CHARACTER + 8 <= pixels / len(labels)


def room_for(labels: Iterable[str]) -> int:
    """Pixels that tick labels and the title of an axis fill left of a panel."""
    return int(CHARACTER * max((len(shortened(label)) for label in labels), default=0)) + 52


@dataclass(frozen=True)
class Axis:
    """One axis of a panel.

    Attributes:
        title: what it shows, with the unit.
        scale: "auto" is a log scale where all values are positive and far apart, else linear; "layer" has integer
            ticks; "category" places the categories at 0, 1, 2, ...
        limits: of a linear axis. None: as the values need.
        categories: the labels of a "category" axis.
        downwards: the first category is on top.
    """

    title: str
    scale: Scale = "linear"
    limits: tuple[float, float] | None = None
    categories: Sequence[str] = ()
    downwards: bool = False

    def options(self, values: Iterable[float], pixels: float, *, ends: Iterable[float] = ()) -> dict[str, Any]:
        """Plotly's settings for an axis that long which shows these values, and the ends of their intervals."""
        shown, reached = (np.array([value for value in part if math.isfinite(value)]) for part in (values, ends))
        if self.scale == "category":
            return self._categories()
        if self.scale == "layer" and len(shown):
            return _layers(shown, pixels)
        if self._is_log(shown):
            return _logarithmic(shown[shown > 0], reached, pixels)
        limits = self.limits or _limits(np.array([*shown, *reached]))
        return {"nticks": max(4, int(pixels // 32))} | ({"range": list(limits)} if limits else {})

    def _is_log(self, shown: Any) -> bool:
        if self.scale == "auto":
            return bool(len(shown) and shown.min() > 0 and shown.max() > WIDE * shown.min())
        return self.scale == "log" and bool((shown > 0).any())

    def _categories(self) -> dict[str, Any]:
        return {
            "tickmode": "array",
            "tickvals": list(range(len(self.categories))),
            "ticktext": shortened_apart(self.categories, LONGEST_LABEL),
            "range": [-0.5, len(self.categories) - 0.5][:: -1 if self.downwards else 1],
            "showgrid": False,
        }


def _limits(values: Any) -> tuple[float, float] | None:
    """Of a linear axis: a little beyond the values; None leaves it to plotly."""
    if not len(values):
        return None
    margin = 0.06 * (values.max() - values.min()) or 0.1 * abs(values[0]) or 1.0
    return values.min() - margin, values.max() + margin


def _layers(shown: Any, pixels: float) -> dict[str, Any]:
    first, last = int(shown.min()), int(shown.max())
    step = next((step for step in LAYER_STEPS if (last - first) / step * 30 <= pixels), LAYER_STEPS[-1])
    margin = max(0.4, 0.03 * (last - first))
    return {"tickmode": "linear", "tick0": 0, "dtick": step, "range": [first - margin, last + margin]}


def _logarithmic(shown: Any, ends: Any, pixels: float) -> dict[str, Any]:
    """With as many round numbers as there is room for; plotly labels either decades alone or digits without them."""
    lowest, highest = shown.min(), shown.max()
    ends = ends[ends > 0].clip(lowest / FARTHEST_END, highest * FARTHEST_END)
    low, high = math.log10(min([lowest, *ends])), math.log10(max([highest, *ends]))
    margin = max(0.06 * (high - low), 0.08)
    low, high = low - margin, high + margin
    decades = range(math.floor(low), math.ceil(high) + 1)
    room = max(3, int(pixels // 45))
    for factors in (*([(1, 2, 3, 4, 5, 6, 8)] if high - low < 1 else []), (1, 2, 5), (1, 3), (1,)):
        exact = [(power, factor) for power in decades for factor in factors]
        ticks = [(p, f) for p, f in exact if low <= p + math.log10(f) <= high]
        if len(ticks) <= room:
            break
    ticks = ticks[:: math.ceil(len(ticks) / room)]
    return {
        "type": "log",
        "range": [low, high],
        "tickmode": "array",
        "tickvals": [factor * 10.0**power for power, factor in ticks],
        "ticktext": [f"{float(f'{factor}e{power}'):g}" for power, factor in ticks],
    }
