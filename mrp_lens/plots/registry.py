"""Which figures there are: a report draws a stored frame by the name that it is stored under."""

from collections.abc import Callable
from typing import TypeVar

import plotly.graph_objects as go

from mrp_lens.utils.registry import Registry

Draw = TypeVar("Draw", bound=Callable[..., go.Figure])

FIGURES: Registry[Callable[..., go.Figure]] = Registry("figure", "mrp_lens.plots")


def register(name: str) -> Callable[[Draw], Draw]:
    """Make a figure known by the name of the frame that it takes; the first line of its docstring is its caption.

        @register("mine")
        def mine(frame: Frame) -> go.Figure: ...

    Raises:
        ValueError: the name is taken or ill-formed.
    """

    def registered(draw: Draw) -> Draw:
        FIGURES.add(name, draw)
        return draw

    return registered
