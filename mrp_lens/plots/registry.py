"""Which figures there are: a report draws a stored frame by the name that it is stored under."""

from collections.abc import Callable, Iterator
from typing import TypeVar

import plotly.graph_objects as go
from typing_extensions import override

from mrp_lens.utils.registry import Registry

Figure = Callable[..., go.Figure]
Draw = TypeVar("Draw", bound=Figure)


class Figures(Registry[Figure]):
    """Figures by name, in the order of their names: the order of the report page, whatever is imported first."""

    @override
    def __iter__(self) -> Iterator[str]:
        return iter(sorted(super().__iter__()))


FIGURES = Figures("figure", "mrp_lens.plots")


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
