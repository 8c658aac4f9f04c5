"""Which metrics there are, and what each adds to the rows of a table and to the report page."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import pandas as pd
from jaxtyping import Float
from torch import Tensor

from mrp_lens.data import Corpus
from mrp_lens.data.task import UnlearningTask
from mrp_lens.edits import Edit, edit_on
from mrp_lens.models import LensModel
from mrp_lens.utils.registry import Registry
from mrp_lens.utils.torch_state import ordinary_torch

TABLES = frozenset({"unlearn", "sweep", "leaderboard", "benchmark"})


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What registered metrics look at: a model, an edit, and the data of a task.

    Attributes:
        model: as `rows_for` and `frames_for` take it, without the edit, which they put on.
        task: its data.
        edit: the one to look at; None: the model as it is.
        direction: u of the fit; None: an unrelated one.
        limit: at most this many questions a side; None: all.
        documents: at most this many documents a side; None: all.
        reference: a model that never saw the forget set; None: there is none, and what compares with it is left out.
        judge: the model that says how likely written answers are; None: `model`.
        unseen: text like the forget set that the model never saw, for membership inference; None: there is none.
        seed: of every random choice.
        progress: show progress bars.
    """

    model: LensModel = field(repr=False)
    task: UnlearningTask
    edit: Edit | None = None
    direction: Float[Tensor, " d_model"] | None = None
    limit: int | None = None
    documents: int | None = None
    reference: LensModel | None = field(default=None, repr=False)
    judge: LensModel | None = field(default=None, repr=False)
    unseen: Corpus | None = None
    seed: int = 0
    progress: bool = True


Measure = Callable[[Measured], pd.DataFrame | None]
Row = Callable[[pd.DataFrame], Mapping[str, float]]


@dataclass(frozen=True, kw_only=True)
class Metric:
    """A registered metric.

    Attributes:
        name: that tables and commands use.
        summary: one line on what it says.
        source: paper and equation; "": there is none.
        measure: the tidy frame of a model and task; None where it does not apply (no quiz, no projection).
        row: what the frame adds to a row of a table; None: nothing.
        headings: key of a row -> heading of its column, for people.
        figures: names of the figures that draw the frame on the report page.
        tables: of which commands its row is part.
        compares: `measure` gets the model without the edit, and puts it on and off to read states before and after.
            Otherwise the edit is on when it is called.
    """

    name: str
    summary: str
    source: str
    measure: Measure
    row: Row | None
    headings: Mapping[str, str] = field(default_factory=dict)
    figures: tuple[str, ...] = ()
    tables: frozenset[str] = TABLES
    compares: bool = False

    def __post_init__(self) -> None:
        if unknown := self.tables - TABLES:
            raise ValueError(
                f"the metric {self.name!r} names the tables {', '.join(sorted(unknown))}; choose among "
                f"{', '.join(sorted(TABLES))}"
            )
        # By where it was defined the registry knows a metric again whose module is imported twice.
        vars(self).update(__module__=self.measure.__module__, __qualname__=self.measure.__qualname__)


METRICS: Registry[Metric] = Registry("metric", "mrp_lens.metrics")

Function = TypeVar("Function", bound=Measure)


def register(
    name: str,
    *,
    summary: str,
    source: str = "",
    row: Row | None = None,
    headings: Mapping[str, str] | None = None,
    figures: Iterable[str] = (),
    tables: Iterable[str] = TABLES,
    compares: bool = False,
) -> Callable[[Function], Function]:
    """Make a metric known by its name; what the arguments mean stands at `Metric`.

        @register("mine", summary="Says what I want.", source="arXiv 0000.00000", row=lambda frame: {"mine": frame["mine"].mean()})
        def mine(measured: Measured) -> pd.DataFrame: ...

    Raises:
        ValueError: the name is taken or ill-formed, or there is no such table.
    """

    def registered(measure: Function) -> Function:
        metric = Metric(
            name=name,
            summary=summary,
            source=source,
            measure=measure,
            row=row,
            headings=headings or {},
            figures=tuple(figures),
            tables=frozenset(tables),
            compares=compares,
        )
        METRICS.add(name, metric)
        return measure

    return registered


def rows_for(table: str | Sequence[str], measured: Measured) -> dict[str, float]:
    """What the metrics add to the row of an edit in a table, in the order in which they were registered.

    Args:
        table: "unlearn", "sweep", "leaderboard", or "benchmark": the field's measures, of which some take minutes; or several.
        measured: the edit, the model without it, and the data.

    Raises:
        TypeError: `measured` is none.
        ValueError: there is no such table, or two metrics give the same key.
    """
    return rows_and_frames_for(table, measured)[0]


@ordinary_torch(gradients=False)
def rows_and_frames_for(
    table: str | Sequence[str], measured: Measured
) -> tuple[dict[str, float], dict[str, pd.DataFrame]]:
    """`rows_for`, and of the metrics that have figures the frames that these draw, by the figure's name.

    Raises:
        TypeError, ValueError: as `rows_for`, or two metrics give a frame for the same figure.
    """
    if not isinstance(measured, Measured):
        raise TypeError(
            f"rows are taken of a Measured, got {type(measured).__name__}; write rows_for('unlearn', Measured(model=..., task=...))"
        )
    tables = [table] if isinstance(table, str) else list(table)
    if unknown := [name for name in tables if name not in TABLES]:
        raise ValueError(f"unknown table {unknown[0]!r}; choose one of {', '.join(sorted(TABLES))}")
    chosen = [metric for metric in METRICS.values() if metric.row is not None and not metric.tables.isdisjoint(tables)]
    found: dict[str, float] = {}
    frames: dict[str, pd.DataFrame] = {}
    for metric, frame in _measured(chosen, measured):
        row = _row_of(metric, frame)
        _refuse_twins(metric, "key", row, found)
        _refuse_twins(metric, "figure", metric.figures, frames)
        found |= row
        frames |= dict.fromkeys(metric.figures, frame)
    return found, frames


@ordinary_torch(gradients=False)
def frames_for(measured: Measured) -> dict[str, pd.DataFrame]:
    """Name of a figure -> the frame that it draws of an edit, for all metrics that have figures on the report page.

    Args:
        measured: the edit, the model without it, and the data.

    Raises:
        ValueError: two metrics give a frame for the same figure.
    """
    found: dict[str, pd.DataFrame] = {}
    for metric, frame in _measured([metric for metric in METRICS.values() if metric.figures], measured):
        _refuse_twins(metric, "figure", metric.figures, found)
        found |= dict.fromkeys(metric.figures, frame)
    return found


def headings() -> dict[str, str]:
    """Key of a row -> heading of its column, as all metrics say."""
    return {key: heading for metric in METRICS.values() for key, heading in metric.headings.items()}


def _measured(metrics: list[Metric], measured: Measured) -> list[tuple[Metric, pd.DataFrame]]:
    """Each metric that applies, with its frame; the edit is put on once for all that want it on."""
    frames: dict[str, pd.DataFrame | None] = {}
    for compares in (False, True):
        with edit_on(measured.model, None if compares else measured.edit):
            frames |= {metric.name: metric.measure(measured) for metric in metrics if metric.compares is compares}
    return [(metric, frame) for metric in metrics if (frame := frames[metric.name]) is not None]


def _row_of(metric: Metric, frame: pd.DataFrame) -> dict[str, float]:
    assert metric.row is not None
    try:
        return {key: float(value) for key, value in metric.row(frame).items()}
    except Exception as error:
        raise ValueError(
            f"the row of the metric {metric.name!r} ({metric.__module__}) cannot be made: {type(error).__name__}: {error}; its frame has "
            f"the columns {', '.join(map(str, frame.columns))}"
        ) from error


def _refuse_twins(metric: Metric, noun: str, names: Iterable[str], known: Iterable[str]) -> None:
    if twins := set(names) & set(known):
        raise ValueError(
            f"the metric {metric.name!r} gives the {noun} {', '.join(sorted(twins))}, which another metric gives too; "
            f"give it another {noun}"
        )
