"""Which metrics there are, and what each adds to the rows of a table and to the report page."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

import pandas as pd

from mrp_lens.utils.registry import Registry

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from mrp_lens.data.task import UnlearningTask
    from mrp_lens.edits import Edit
    from mrp_lens.models import LensModel

TABLES = frozenset({"unlearn", "sweep", "leaderboard"})


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What a registered metric looks at: a model with an edit on it, and the data of a task.

    Attributes:
        model: with the edit on.
        task: its data.
        edit: that is on; None: the unedited model.
        direction: u of the fit, or an unrelated one.
        limit: at most this many questions a side; None: all.
        documents: at most this many documents a side; None: all.
        seed: of every random choice.
        progress: show progress bars.
    """

    model: "LensModel"
    task: "UnlearningTask"
    edit: "Edit | None" = None
    direction: "Float[Tensor, ' d_model'] | None" = None
    limit: int | None = None
    documents: int | None = None
    seed: int = 0
    progress: bool = False


@dataclass(frozen=True, kw_only=True)
class Metric:
    """A registered metric.

    Attributes:
        name: that tables and commands use.
        summary: one line on what it says.
        source: paper and equation.
        measure: the tidy frame of a model and task; None where it does not apply (no quiz, no projection).
        row: what the frame adds to a row of a table; None: nothing.
        headings: key of `row` -> heading of its column, for people.
        figures: names of figures that draw the frame on the report page.
        tables: of which commands its row is part.
    """

    name: str
    summary: str
    source: str
    measure: Callable[[Measured], pd.DataFrame | None]
    row: Callable[[pd.DataFrame], Mapping[str, float]] | None = None
    headings: Mapping[str, str] = field(default_factory=dict)
    figures: tuple[str, ...] = ()
    tables: frozenset[str] = TABLES

    @property
    def __qualname__(self) -> str:
        return self.measure.__qualname__


METRICS: Registry[Metric] = Registry("metric", "mrp_lens.metrics")

Measure = TypeVar("Measure", bound=Callable[[Measured], pd.DataFrame | None])


def register(
    name: str,
    *,
    summary: str,
    source: str,
    row: Callable[[pd.DataFrame], Mapping[str, float]] | None = None,
    headings: Mapping[str, str] | None = None,
    figures: tuple[str, ...] = (),
    tables: frozenset[str] = TABLES,
) -> Callable[[Measure], Measure]:
    """Make a metric known by its name.

        @register("mine", summary="Says what I want.", source="arXiv 0000.00000", row=lambda frame: {"mine": frame["mine"].mean()})
        def mine(measured: Measured) -> pd.DataFrame: ...

    Raises:
        ValueError: the name is taken or ill-formed.
    """

    def registered(measure: Measure) -> Measure:
        METRICS.add(
            name,
            Metric(
                name=name,
                summary=summary,
                source=source,
                measure=measure,
                row=row,
                headings=headings or {},
                figures=figures,
                tables=tables,
            ),
        )
        return measure

    return registered
