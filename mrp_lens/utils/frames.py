"""Frames as JSON rows and back, shares as text, and the versions that a figure depends on."""

import csv
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any, TypeGuard

import pandas as pd

PACKAGES = ("mrp_lens", "torch", "transformer_lens", "transformers")

Row = Mapping[str, Any]


def versions() -> dict[str, str]:
    """Versions of what a figure depends on."""
    return {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}}


def csv_of(frame: pd.DataFrame) -> str:
    """A frame as CSV that is read as it was written: `csv` leaves a lone carriage return, which a token may be, unquoted, and readers
    take it for the end of a line."""
    texts = frame.select_dtypes(exclude="number")
    returns = any("\r" in str(value) for column in texts for value in texts[column])
    return str(frame.to_csv(index=False, quoting=csv.QUOTE_NONNUMERIC if returns else csv.QUOTE_MINIMAL))


def is_number(value: Any) -> TypeGuard[float]:
    """Whether it is a number, and not NaN."""
    return isinstance(value, int | float) and value == value


def percent(share: float) -> str:
    """0.256 -> 25.6%; one near 0 with two digits, 0.0011%."""
    value = 100 * share
    return f"{value:.2g}%" if 0.0 < value < 0.1 else f"{value:.1f}%"


def rows_of(frame: pd.DataFrame) -> list[Row]:
    """The rows of a frame; what it does not know is None, as JSON has no NaN."""
    return [
        {str(key): None if value != value else value for key, value in row.items()} for row in frame.to_dict("records")
    ]


def frame_of(rows: Sequence[Row]) -> pd.DataFrame:
    """The inverse: what is not known is NaN again."""
    frame = pd.DataFrame(list(rows))
    return frame.astype(dict.fromkeys(frame.columns[frame.isna().all()], float))


def by_figure(found: Mapping[str, Mapping[str, pd.DataFrame]]) -> dict[str, pd.DataFrame]:
    """The frames of several methods, each by the name of its figure: those of one figure behind each other, with a column `method`."""
    figures = dict.fromkeys(figure for frames in found.values() for figure in frames)
    return {
        figure: pd.concat(
            [frames[figure].assign(method=method) for method, frames in found.items() if figure in frames],
            ignore_index=True,
        )
        for figure in figures
    }
