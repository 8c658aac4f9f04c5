"""Rows of tables: their columns as text, templates of columns, and tables of other libraries as rows."""

import hashlib
import json
import math
import re
import reprlib
import string
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from decimal import Decimal
from numbers import Real
from typing import Any, TypeVar

import numpy as np
import pandas as pd

from mrp_lens.data.schemas import template_fields

Row = Mapping[str, Any]
Item = TypeVar("Item")

MOST_LISTED = 20

SURROGATE = re.compile("[\ud800-\udfff]")

_short = reprlib.Repr()
_short.maxlist = _short.maxtuple = 10
_short.maxstring = _short.maxother = 80
shown = _short.repr  # a value in a message: on one line, however long or deep it is


def listing(names: Iterable[object]) -> str:
    """Names in a message, which a damaged file can make long and many."""
    several = list(names)
    more = f" and {len(several) - MOST_LISTED} more" if len(several) > MOST_LISTED else ""
    return ", ".join(map(shown, several[:MOST_LISTED])) + more


class Untyped(dict[str, Any]):
    """A row of a file that does not tell numbers from texts, such as .csv: all values are text, or None."""


def column(row: Row, field: str, number: int, name: str) -> Any:
    """The value of a column.

    Raises:
        ValueError: the row has no such column (those that it has get listed).
    """
    if field not in row:
        raise ValueError(f"{name}, row {number}: no field {field!r}; the row has {listing(row)}")
    return row[field]


def text(row: Row, field: str, number: int, name: str) -> str:
    """The value of a column as text.

    Raises:
        ValueError: as `column`, or the value is missing, or neither text nor a finite number.
    """
    value = column(row, field, number, name)
    try:
        return words(value)
    except ValueError as error:
        raise ValueError(f"{name}, row {number}: field {field!r} {error}") from error


def label(row: Row, field: str, number: int, name: str) -> str:
    """The value of a column that only tells rows apart, which may also be True or False; else as `text`."""
    value = column(row, field, number, name)
    return str(value) if isinstance(value, bool | np.bool_) else text(row, field, number, name)


def words(value: object) -> str:
    """A text, or a number as it is written.

    Raises:
        ValueError: the value is missing, something else, not finite, or text that cannot be encoded; the message
            goes on after the name of the value.
    """
    if isinstance(value, str):
        if not value.isascii() and (found := SURROGATE.search(value)):
            raise ValueError(f"holds half a character, {found[0]!r}, and cannot be encoded; write the whole character")
        return str(value)
    if missing(value):
        raise ValueError("has no value; leave the row out or fill it in")
    if isinstance(value, bool | np.bool_) or not isinstance(value, Real | Decimal):
        raise ValueError(f"is {shown(value)}, of type {type(value).__name__}; it must be text or a number")
    if not math.isfinite(value):
        raise ValueError(f"is {value}; a number must be finite")
    return str(value)


def missing(value: object) -> bool:
    """Whether this is None, NaN, or what pandas has in their place."""
    return value is None or value is pd.NA or value is pd.NaT or (isinstance(value, Real) and math.isnan(value))


def fill(template: str, row: Row, number: int, name: str) -> str:
    """The template with columns in place of their names.

    Raises:
        ValueError: as `text`, or as `template_fields`.
    """
    values = [text(row, field, number, name) for field in template_fields(template)]
    parts = [
        literal + (values.pop(0) if field is not None else "")
        for literal, field, _, _ in string.Formatter().parse(template)
    ]
    return "".join(parts)


def rows_in(table: Any, name: str) -> Iterator[Row]:
    """The rows of a list of mappings, of a pandas DataFrame or of a Dataset.

    Raises:
        ValueError: it is a DatasetDict, whose splits get listed, or two columns have one name.
        TypeError: it is nothing of the kind, or one of its rows is no mapping from column to value.
    """
    if isinstance(table, pd.DataFrame):
        yield from _frame_rows(table, name)
        return
    datasets = sys.modules.get("datasets")  # without it nobody can have made an object of it
    if datasets is not None and isinstance(table, datasets.DatasetDict | datasets.IterableDatasetDict):
        raise ValueError(
            f"{name}: a {type(table).__name__} is several tables; give one of its splits {', '.join(table)}, as in from_rows(data[split])"
        )
    if datasets is not None and isinstance(table, datasets.Dataset) and table.format["type"] != "custom":
        from mrp_lens.data.readers import dataset_rows

        yield from dataset_rows(table)
        return
    if isinstance(table, str | bytes | Mapping) or not isinstance(table, Iterable):
        raise TypeError(
            f"{name}: rows must be a list of mappings, a DataFrame or a Dataset, got {shown(table)}, of type {type(table).__name__}"
        )
    for number, row in enumerate(table):
        if isinstance(row, Mapping):
            yield row
        elif hasattr(row, "keys") and hasattr(row, "__getitem__"):  # rows of pandas or of a database
            yield {key: row[key] for key in row.keys()}  # noqa: SIM118
        else:
            raise TypeError(
                f"{name}, row {number} is {shown(row)} of type {type(row).__name__}, not a mapping from column to value"
            )


def _frame_rows(frame: pd.DataFrame, name: str) -> Iterator[Row]:
    names = unique(list(frame.columns), name)
    # Of arrays, not of the frame: that would make doubles of its single-precision numbers, with other digits.
    columns = [frame.iloc[:, place].array for place in range(frame.shape[1])]
    for values in zip(*columns, strict=True):
        yield dict(zip(names, values, strict=True))


def unique(names: Sequence[Any], where: str) -> list[Any]:
    """The names of columns.

    Raises:
        ValueError: one occurs twice.
    """
    if len(set(names)) < len(names):
        double = next(name for place, name in enumerate(names) if name in names[:place])
        raise ValueError(f"{where}: two columns are named {shown(double)}; rename one of them")
    return list(names)


def digest(content: object) -> str:
    """SHA-256 of anything that JSON can hold."""
    return hashlib.sha256(json.dumps(content, ensure_ascii=False).encode()).hexdigest()


def evenly(items: Sequence[Item], limit: int | None) -> list[Item]:
    """At most `limit` of the items, evenly spread over all; None: all.

    Raises:
        ValueError: the limit is below 1.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1, got {limit}; leave it out for all")
    count = len(items) if limit is None else min(limit, len(items))
    return [items[i * len(items) // count] for i in range(count)]
