"""Rows of tables: their columns as text, and templates of columns."""

import hashlib
import json
import math
import reprlib
import string
from collections.abc import Iterable, Mapping, Sequence
from decimal import Decimal
from numbers import Real
from typing import Any, TypeVar

import numpy as np
import pandas as pd

from mrp_lens.data.schemas import template_fields
from mrp_lens.utils.io import SURROGATE

Row = Mapping[str, Any]
Item = TypeVar("Item")
Kind = TypeVar("Kind")

MOST_LISTED = 20

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


class MissingColumnError(ValueError):
    """A row lacks a column that was asked for."""


def column(row: Row, field: str, number: int, name: str, *, remedy: str = "") -> Any:
    """The value of a column.

    Raises:
        MissingColumnError: the row has no such column (those that it has get listed, and the remedy, if one is given).
    """
    if field not in row:
        raise MissingColumnError(f"{name}, row {number}: no field {field!r}; the row has {listing(row)}{remedy}")
    return row[field]


def text(row: Row, field: str, number: int, name: str, *, remedy: str = "") -> str:
    """The value of a column as text.

    Raises:
        ValueError: as `column`, or the value is missing, or neither text nor a finite number.
    """
    value = column(row, field, number, name, remedy=remedy)
    try:
        return words(value)
    except ValueError as error:
        raise ValueError(f"{name}, row {number}: field {field!r} {error}") from error


def label(row: Row, field: str, number: int, name: str, *, remedy: str = "") -> str:
    """The value of a column that only tells rows apart, which may also be True or False; else as `text`."""
    value = column(row, field, number, name, remedy=remedy)
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


def fill(template: str, row: Row, number: int, name: str, *, remedy: str = "") -> str:
    """The template with columns in place of their names.

    Raises:
        ValueError: as `text`, or as `template_fields`.
    """
    values = [text(row, field, number, name, remedy=remedy) for field in template_fields(template)]
    parts = [
        literal + (values.pop(0) if field is not None else "")
        for literal, field, _, _ in string.Formatter().parse(template)
    ]
    return "".join(parts)


def unique(names: Sequence[Any], where: str) -> list[Any]:
    """The names of columns.

    Raises:
        ValueError: one occurs twice.
    """
    if len(set(names)) < len(names):
        double = next(name for place, name in enumerate(names) if name in names[:place])
        raise ValueError(f"{where}: two columns are named {shown(double)}; rename one of them")
    return list(names)


def check_text(value: object, what: str) -> None:
    """Refuse what is no text.

    Raises:
        TypeError: it is no string.
        ValueError: it holds half a character.
    """
    if not isinstance(value, str):
        raise TypeError(f"{what} is {shown(value)}, of type {type(value).__name__}, not a string")
    try:
        words(value)
    except ValueError as error:
        raise ValueError(f"{what} {error}") from error


def all_of(kind: type[Kind], items: Iterable[Kind], what: str) -> tuple[Kind, ...]:
    """The items as a tuple.

    Raises:
        TypeError: they are no collection, or one is of another kind (with its place).
    """
    if isinstance(items, str | bytes | kind) or not isinstance(items, Iterable):
        raise TypeError(f"a {what} is made of several {kind.__name__} objects, got {shown(items)}")
    several = tuple(items)
    for place, item in enumerate(several):
        if not isinstance(item, kind):
            raise TypeError(
                f"item {place} of a {what} must be a {kind.__name__}, got {shown(item)}; see {what}.from_rows"
            )
    return several


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
