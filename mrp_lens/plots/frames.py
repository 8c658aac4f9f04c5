"""The frames that figures take: read, checked, and cut into facets, groups and seeds."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import wraps
from inspect import cleandoc
from typing import Any, Concatenate, ParamSpec

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from torch import Tensor

from mrp_lens.methods import METHODS
from mrp_lens.metrics.controls import UNEDITED
from mrp_lens.plots.registry import register

P = ParamSpec("P")
Draw = Callable[Concatenate[pd.DataFrame, P], go.Figure]

Frame = pd.DataFrame | Mapping[str, Any]
"""A table, or its columns by name: lists, arrays or tensors of any dtype on any device."""

Parts = list[tuple[str, pd.DataFrame]]
"""Of a frame: the label and the rows of each panel."""

RAISES = """Raises:
    TypeError: not a frame.
    ValueError: not such a frame, no rows, no number to draw, or rows that nothing tells apart; it says what is missing."""

TEXT_COLUMNS = frozenset(
    "group hook into measure method mode pair positions prompt question request statistic token unit when".split()
)
KEYS = ("group", "when", "pair", "number", "layer", "seed")  # what tells rows apart within a panel
COEFFICIENTS = ("coefficient", "relative_coefficient")  # of RMU, or what another method has in its place
FACET_LABELS = {
    "layer": "layer {:g}",
    "source": "removed at layer {:g}",
    "coefficient": "c = {:.3g}",
    "relative_coefficient": "c = {:.3g} x norm",
    "noise": "noise of variance {:.3g}",
    "seed": "seed {:g}",
}


class NothingToDraw(ValueError):
    """A frame as it should be, without a number that its figure shows."""


def figure_of(
    metric: str, columns: str | Callable[..., str]
) -> Callable[[Draw[P]], Callable[Concatenate[Frame, P], go.Figure]]:
    """Register a figure under its function's name. The function gets the frame as plain columns, and its errors name it.

    Args:
        metric: what makes such a frame, for the errors.
        columns: what the figure cannot do without, separated by spaces; or a function that tells, of the figure's
            arguments.
    """
    source = f"Such a frame comes from {metric}"

    def decorated(draw: Draw[P]) -> Callable[Concatenate[Frame, P], go.Figure]:
        name = draw.__name__

        @wraps(draw)
        def drawn(frame: Frame, *args: P.args, **kwargs: P.kwargs) -> go.Figure:
            if not isinstance(frame, pd.DataFrame | Mapping):
                raise TypeError(f"{name} takes a DataFrame or a mapping of columns, got {type(frame).__name__}")
            needed = (columns if isinstance(columns, str) else columns(frame, *args, **kwargs)).split()
            there = [str(column) for column in frame]
            if missing := [column for column in needed if column not in there]:
                raise ValueError(
                    f"{name} needs the columns {', '.join(missing)}; the frame has {', '.join(there) or 'none'}. {source}"
                )
            try:
                return draw(tidy(frame, needed, source), *args, **kwargs)
            except NothingToDraw as error:
                raise NothingToDraw(f"{name}: {error}") from error
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error

        drawn.__doc__ = f"{cleandoc(draw.__doc__ or '')}\n\n{RAISES}"
        return register(name)(drawn)  # type: ignore[return-value]  # `frame=` works, too

    return decorated


def tidy(frame: Frame, needed: Sequence[str], source: str) -> pd.DataFrame:
    """The frame as plain columns of numbers and text, with a new index.

    Raises:
        ValueError: a column is given twice, not one-dimensional, of another length than the rest, or text where numbers
            are needed; or there are no rows. It ends with the source.
    """
    names = [str(name) for name in frame]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"the frame has the column {', '.join(twice)} more than once. {source}")
    plain = {str(name): _plain(column, str(name)) for name, column in frame.items()}
    lengths = {name: len(column) for name, column in plain.items() if isinstance(column, list)}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"the columns differ in length: {lengths}. {source}")
    rows = next(iter(lengths.values()), 1)
    if not rows:
        raise ValueError(f"the frame has no rows. {source}")
    table = pd.DataFrame(
        {name: column if isinstance(column, list) else [column] * rows for name, column in plain.items()}
    )
    for name in {"group", "method"} & set(names):
        table[name] = table[name].astype(str)
    for name in needed:
        if name not in TEXT_COLUMNS and not pd.api.types.is_numeric_dtype(table[name]):
            raise ValueError(f"the column {name} must hold numbers, got {table[name].iloc[0]!r}. {source}")
    return table


def _plain(column: Any, name: str) -> Any:
    """A list of numbers and text; a scalar as it is."""
    if isinstance(column, Tensor):
        column = _numbers(column)
    if isinstance(column, np.ndarray) and column.ndim == 0:
        return column.item()
    if isinstance(column, str) or not isinstance(column, Iterable):
        return float("nan") if column is None else column
    values = [_numbers(value).tolist() if isinstance(value, Tensor) else value for value in column]
    if any(isinstance(value, list | tuple | np.ndarray) and np.ndim(value) > 0 for value in values):
        raise ValueError(f"the column {name} must hold one value a row, got {values[0]!r}")
    plain = (value.item() if isinstance(value, np.generic) else value for value in values)
    return [float("nan") if value is None else value for value in plain]


def _numbers(tensor: Tensor) -> Any:
    """As an array; numpy has no bf16, and float64 holds every other floating type exactly."""
    tensor = tensor.detach().cpu()
    return (tensor.double() if tensor.is_floating_point() else tensor).numpy()


def known(table: pd.DataFrame, column: str) -> pd.DataFrame:
    """The rows that have a number in this column.

    Raises:
        NothingToDraw: none has.
    """
    rows = table[np.isfinite(table[column].astype(float))]
    if rows.empty:
        raise NothingToDraw(f"nothing to draw, the column {column} holds no number in any of {len(table)} rows")
    return rows


def facets(table: pd.DataFrame, columns: Sequence[str], labels: Mapping[str, str] = FACET_LABELS) -> Parts:
    """The table cut by the columns that it has, each part with its label: text as it comes, numbers in order.

    A number that is the same everywhere, or NaN, is not mentioned in the label.
    """
    parts = [("", table)]
    for column in (column for column in columns if column in table):
        numeric = pd.api.types.is_numeric_dtype(table[column])
        mentioned = not numeric or table[column].nunique() > 1
        cut = []
        for label, part in parts:
            values = part[column].unique()
            for value in np.sort(values) if numeric else values:
                rows = part[part[column].isna()] if pd.isna(value) else part[part[column] == value]
                own = labels.get(column, "{}").format(value) if mentioned and not pd.isna(value) else ""
                cut.append((", ".join(filter(None, (label, own))), rows))
        parts = cut
    return parts


def varying(table: pd.DataFrame, *columns: str) -> list[str]:
    """Those columns that the table has, with several values."""
    return [column for column in columns if column in table and table[column].nunique() > 1]


def layer_facets(table: pd.DataFrame, settings: Sequence[str] = COEFFICIENTS) -> Parts:
    """A part for each method, to be drawn against the layer, and for each value of a setting where that is needed.

    It is not where each layer has one value, as where c is derived from the layer's norm. Of several settings that
    would do, the one with the fewest values is taken.
    """
    keys = [name for name in KEYS if name in table]
    parts = []
    for label, of_method in facets(table, ["method"]):
        needed = sorted(varying(of_method, *settings), key=lambda name: of_method[name].nunique())
        if not needed or not of_method.duplicated(keys).any():
            parts.append((label, of_method))
            continue
        column, labels = needed[0], FACET_LABELS
        swept = METHODS[label].swept if label in METHODS else None
        if column in COEFFICIENTS and swept and swept.strength not in (None, "steering_coeff"):
            # such as Adaptive RMU's beta, which is no length
            labels = labels | {column: f"{swept.strength} = {{:.3g}}"}
        own_parts = facets(of_method, [column], labels)
        parts += [(", ".join(filter(None, (label, own))), part) for own, part in own_parts]
    return parts


def groups(table: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame]]:
    """The groups with their rows, forget first, then retain, then the rest as they come."""
    names = list(table["group"].unique())
    for name in sorted(names, key=lambda name: (("forget", "retain", name).index(name), names.index(name))):
        yield str(name), table[table["group"] == name]


def methods_of(table: pd.DataFrame) -> list[str]:
    """The methods in order; a table without that column is about the unedited model."""
    return [str(name) for name in table["method"].unique()] if "method" in table else [UNEDITED]


def beside(table: pd.DataFrame, spread: float, methods: Sequence[str] | None = None) -> pd.DataFrame:
    """With `place`: the number of the method, and a little to the side of it for each group.

    Args:
        table: with `group`, and `method` if there are several.
        spread: of a method's width, over which its groups stand side by side.
        methods: None: those of the table.
    """
    methods = methods or methods_of(table)
    names = [name for name, _ in groups(table)]
    aside = {name: spread * ((place + 0.5) / len(names) - 0.5) for place, name in enumerate(names)}
    method = table["method"] if "method" in table else pd.Series(methods[0], index=table.index)
    numbers = method.map({name: number for number, name in enumerate(methods)})
    return table.assign(place=numbers + table["group"].map(aside))


def single_rows(table: pd.DataFrame, keys: Sequence[str]) -> bool:
    """Whether each combination of the keys has one row (True), or one a seed (False).

    Raises:
        ValueError: rows that nothing tells apart.
    """
    if not table.duplicated(list(keys)).any():
        return True
    if "seed" not in table or table.duplicated([*keys, "seed"]).any():
        first = table[table.duplicated([*keys, *(["seed"] if "seed" in table else [])])].iloc[0]
        place = ", ".join(f"{key} {first[key]}" for key in keys)
        raise ValueError(
            f"several rows for {place}; add a column method, coefficient or seed that tells them apart, "
            "or draw one of them at a time"
        )
    return False
