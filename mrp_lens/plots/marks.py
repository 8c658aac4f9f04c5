"""What is drawn into a panel: points with their intervals, and the bands of controls."""

import math
from collections.abc import Iterable
from typing import Any, Literal

import numpy as np
import plotly.graph_objects as go
from numpy.typing import NDArray

from mrp_lens.plots.style import GREY, GREY_BAND, Look, literal, shortened

Along = Literal["x", "y"]
Values = NDArray[np.float64]


def points(
    x: Values,
    y: Values,
    look: Look,
    *,
    ends: tuple[Values, Values] | None = None,
    along: Along = "y",
    opacity: float = 1.0,
) -> go.Scatter:
    """Points, joined or not, with intervals along y (or x). Hovering tells their own x and y, wherever they are drawn."""
    told, hover = [x, y], "%{fullData.name}<br>%{customdata[0]:.4g}: %{customdata[1]:.4g}"
    bars: dict[str, Any] = {}
    if ends:
        told += ends
        hover += " [%{customdata[2]:.4g}, %{customdata[3]:.4g}]"
        bars[f"error_{along}"] = _bars(ends[0], y if along == "y" else x, ends[1], look)
    drawn = np.isfinite(x) & np.isfinite(y)
    return go.Scatter(
        x=_or_none(x),
        y=_or_none(y),
        name=shortened(look.name),
        mode="markers" if drawn.sum() == 1 else look.mode,  # one point makes no line
        line=look.line,
        marker=look.marker,
        opacity=opacity,
        customdata=[_or_none(row) for row in np.stack(told, axis=1)],
        hovertemplate=hover + "<extra></extra>",
        **bars,
    )


def band(x: Values, low: Values, high: Values, *, name: str) -> go.Scatter:
    """A grey band over places in order."""
    return go.Scatter(
        x=np.concatenate([x, x[::-1]]),
        y=np.concatenate([low, high[::-1]]),
        name=literal(name),
        fill="toself",
        fillcolor=GREY_BAND,
        line={"width": 0, "color": GREY},
        mode="lines",
        hoverinfo="skip",
    )


def level(value: float, look: Look, along: Along) -> go.Scatter:
    """A line at one value, whose ends are still to be set."""
    places = {along: [None, None], "y" if along == "x" else "x": [value, value]}
    hover = f"%{{fullData.name}}: {value:.4g}<extra></extra>"
    return go.Scatter(**places, name=literal(look.name), mode="lines", line=look.line, hovertemplate=hover)


def floats(values: Iterable[float]) -> Values:
    """As an array of float64."""
    return np.asarray(list(values), dtype=float)


def _bars(low: Values, middle: Values, high: Values, look: Look) -> dict[str, Any]:
    return {
        "array": _or_none(high - middle),
        "arrayminus": _or_none(middle - low),
        "thickness": look.width,
        "width": 3,
        "color": look.colour,
    }


def _or_none(values: Values) -> list[float | None]:
    """NaN as the gap that JSON knows."""
    return [float(value) if math.isfinite(value) else None for value in values]
