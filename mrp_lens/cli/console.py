"""Tables and answers on the terminal."""

import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.table import Table

from mrp_lens.utils.frames import Row, is_number

LOGGED = 200  # characters a line where the output goes into a file or a pipe: rich would cut tables at 80


def _width() -> int | None:
    """None: the terminal's."""
    asked = os.environ.get("COLUMNS", "")
    return None if sys.stdout.isatty() else int(asked) if asked.isdecimal() and int(asked) else LOGGED


console = Console(width=_width(), markup=False, emoji=False)  # names, and what a model writes, are shown as they are

Column = tuple[str, Callable[[Mapping[str, Any]], str]]


@contextmanager
def silent() -> Iterator[None]:
    """Inside, nothing but errors is printed: no messages, no warnings, no bars of libraries that load a model."""
    from transformers.utils import logging as bars

    quiet, shown, level = console.quiet, bars.is_progress_bar_enabled(), logging.root.level
    console.quiet = True
    bars.disable_progress_bar()
    logging.root.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        console.quiet = quiet
        logging.root.setLevel(level)
        if shown:
            bars.enable_progress_bar()


def show_table(title: str, columns: Sequence[Column], rows: Sequence[Mapping[str, Any]], *, caption: str = "") -> None:
    """Print one table."""
    table = Table(title=title, caption=caption, title_justify="left", caption_justify="left")
    for number, (heading, _) in enumerate(columns):
        table.add_column(heading, justify="left" if number == 0 else "right")
    for row in rows:
        table.add_row(*(cell(row) for _, cell in columns))
    console.print(table)


def number(value: Any, form: Callable[[float], str]) -> str:
    """A number as text; nothing where it is not known."""
    return form(value) if is_number(value) else ""


def with_interval(value: Any, low: Any, high: Any, form: Callable[[float], str]) -> str:
    """A number with its interval, without one where an end is not known."""
    ends = f" [{form(low)}, {form(high)}]" if is_number(low) and is_number(high) else ""
    return f"{form(value)}{ends}" if is_number(value) else ""


def three_digits(key: str) -> Callable[[Row], str]:
    """A column's cell: the number under the key; empty where there is none."""
    return lambda row: number(row.get(key), "{:.3f}".format)


def show_examples(examples: Sequence[Mapping[str, Any]]) -> None:
    """Print generated answers: a line for each prompt, a column for each version of the model."""
    table = Table(*(examples[0] if examples else ()), title="Generated answers", title_justify="left")
    for row in examples:
        table.add_row(*map(str, row.values()))
    console.print(table)
