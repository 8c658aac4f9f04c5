"""The figures of models and edits on the terminal: the table of `unlearn` and `measure`, and the measures that it has no column for."""

from collections.abc import Sequence
from typing import Any

from mrp_lens import metrics
from mrp_lens.cli.console import Column, show_table, three_digits
from mrp_lens.utils.frames import Row, percent

CAPTION = (
    "forget text: mean probability per token of the forget documents. Brackets: 95%, bootstrap. text: perplexity of retain documents "
    "that the fit did not see, as a multiple of the unedited model's; damage: KL(unedited || edited) on them, nats a token "
    "(what a fit says it did is on other documents, and counts answers, too). "
    "Chance is what guessing gives; an interval below it: the answer is suppressed, not gone."
)
IN_TABLE = {"forget_probability", "forget_accuracy", "retain_accuracy", "text_perplexity_ratio", "damage"}


def show_figures(title: str, rows: Sequence[Row]) -> None:
    """Print a row for each model or edit, the unedited model first; then the measures that are no column of that, one a line."""
    show_table(title, columns(rows), rows, caption=CAPTION)
    named = {key: heading for key, heading in metrics.headings().items() if key not in IN_TABLE}
    lines = [
        {"measure": heading, **{str(row["method"]): row.get(key) for row in rows}}
        for key, heading in named.items()
        if any(row.get(key) is not None for row in rows)
    ]
    if lines:
        of_each: list[Column] = [(method, three_digits(method)) for method in (str(row["method"]) for row in rows)]
        show_table("Other measures", [("measure", lambda line: str(line["measure"])), *of_each], lines)


def _damage(row: Row) -> str:
    if row.get("damage") is None:
        return ""
    ends = [row.get(f"damage_{end}") for end in ("low", "high")]
    return f"{row['damage']:.3f}" + ("" if None in ends else f" [{ends[0]:.3f}, {ends[1]:.3f}]")


def columns(rows: Sequence[Row]) -> list[Column]:
    """The columns that these rows fill, the unedited model's first."""
    figures = rows[0]

    def with_interval(key: str, low: str, high: str) -> Any:
        return lambda row: f"{percent(row[key])} [{percent(row[low])}, {percent(row[high])}]"

    quizzes = [
        (
            f"{side} quiz (chance {percent(figures[f'{side}_chance'])})",
            with_interval(f"{side}_accuracy", f"{side}_low", f"{side}_high"),
        )
        for side in ("forget", "retain")
        if f"{side}_accuracy" in figures
    ]
    damage: list[Column] = [("damage", _damage)] if any("damage" in row for row in rows) else []
    fit: list[Column] = [("fit", lambda row: f"{row['seconds']:.0f} s")] if "seconds" in figures else []
    return [
        ("method", lambda row: str(row["method"])),
        ("forget text", with_interval("forget_probability", "forget_probability_low", "forget_probability_high")),
        *quizzes,
        ("text", lambda row: f"x{row['text_perplexity_ratio']:.3f}"),
        *damage,
        *fit,
    ]
