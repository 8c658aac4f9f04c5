"""What an axis shows: its title, its kind of scale, and ticks that can be read in the room there is."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from mrp_lens.plots.style import CHARACTER, shortened

Scale = Literal["linear", "log", "auto", "layer", "category"]

WIDE = 10.0  # positive values whose largest is this many times the smallest are shown on a log scale
FARTHEST_END = 10.0  # an interval that reaches towards 0 does not stretch a log scale by more than this factor
LAYER_STEPS = (1, 2, 4, 5, 8, 10, 20, 40)


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
        shown = np.array([value for value in values if math.isfinite(value)])
        if self.scale == "category":
            return self._categories()
        if self.scale == "layer" and len(shown):
            return _layers(shown, pixels)
        reached = np.array([end for end in ends if math.isfinite(end)])
        if self._is_log(shown):
            return _logarithmic(shown[shown > 0], reached, pixels)
        options: dict[str, Any] = {"nticks": max(4, int(pixels // 32))}
        limits = self.limits or _limits(np.array([*shown, *reached]))
        return options | ({"range": list(limits)} if limits else {})

    def _is_log(self, shown: Any) -> bool:
        if self.scale == "auto":
            return bool(len(shown) and shown.min() > 0 and shown.max() > WIDE * shown.min())
        return self.scale == "log" and bool((shown > 0).any())

    def _categories(self) -> dict[str, Any]:
        return {
            "tickmode": "array",
            "tickvals": list(range(len(self.categories))),
            "ticktext": [shortened(name) for name in self.categories],
            "range": [-0.5, len(self.categories) - 0.5][:: -1 if self.downwards else 1],
            "showgrid": False,
        }


def fits(labels: Sequence[str], pixels: float) -> bool:
    """Whether such labels stand side by side along so many pixels."""
    return max(map(len, labels)) * CHARACTER + 8 <= pixels / len(labels)


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
    every = math.ceil(len(ticks) / room)
    ticks = ticks[::every]
    return {
        "type": "log",
        "range": [low, high],
        "tickmode": "array",
        "tickvals": [factor * 10.0**power for power, factor in ticks],
        "ticktext": [f"{float(f'{factor}e{power}'):g}" for power, factor in ticks],
    }
