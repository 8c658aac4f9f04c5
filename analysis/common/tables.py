"""How the studies write their tables: figures with their range or interval, and Markdown."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pandas as pd

from mrp_lens.runs.report.table import table_of

NONE, DOES_NOT_COUNT = "-", "†"


def mean_of(part: pd.DataFrame, column: str, form: str = "{:.2f}", *, scale: float = 1.0) -> str:
    """The mean over the seeds, times `scale`; "-" where nothing is known."""
    known = part[column].dropna() if column in part else part.iloc[:0, 0]
    return form.format(known.astype(float).mean() * scale) if len(known) else NONE


def figure(part: pd.DataFrame, column: str, stem: str = "", form: str = "{:.2f}") -> str:
    """A figure of one method: with its interval, or, of several seeds, the mean with the lowest and the highest.

    Args:
        part: a row a seed.
        column: of the figure.
        stem: its interval is in `<stem>_low` and `<stem>_high`; without one it is left out.
        form: of each number.
    """
    mean = mean_of(part, column, form)
    if mean == NONE:
        return mean
    values = part[column].dropna().astype(float)
    if len(values) > 1:
        return f"{mean} ({form.format(values.min())} to {form.format(values.max())})"
    ends = [part[name].dropna() for name in (f"{stem}_low", f"{stem}_high") if name in part]
    if len(ends) < 2 or any(end.empty for end in ends):
        return mean
    return f"{mean} [{form.format(ends[0].iloc[0])}, {form.format(ends[1].iloc[0])}]"


def markdown(text: pd.DataFrame) -> str:
    """A table of text in Markdown, its columns aligned."""
    lines: list[list[str]] = [list(text.columns), *text.to_numpy().tolist()]
    widths = [max(len(line[column]) for line in lines) for column in range(len(text.columns))]
    lines.insert(1, ["-" * width for width in widths])
    drawn = (" | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)
    return "\n".join(f"| {line} |" for line in drawn)


def markdown_of_rows(rows: Iterable[Mapping[Any, Any]], keys: Sequence[str]) -> str:
    """Rows as the report page shows them: an interval stands behind its value; of each only these keys."""
    table = table_of([{key: row[key] for key in keys if key in row} for row in rows])
    return markdown(pd.DataFrame([list(map(str, cells)) for _, cells in table.rows], columns=table.headings))


def print_row(row: dict[str, Any]) -> dict[str, Any]:
    """Print a fit's row as soon as it is there: its figures without their intervals, how long it took and how it ended; the row."""
    apart = ("method", "seed", "seconds", "outcome")
    shown = [key for key in row if key not in apart and not key.endswith(("_low", "_high"))]
    name = row["method"] if row.get("seed") is None else f"{row['method']} seed {row['seed']}"
    figures = ", ".join(f"{key} {row[key]:.3f}" for key in shown)
    print(name, figures, f"{row['seconds']:.0f} s", row["outcome"], flush=True)
    return row
