"""The figures of models and edits on the terminal: the table of `unlearn` and `measure`, and the measures that it has no column for."""

from collections.abc import Callable, Sequence

from mrp_lens import metrics
from mrp_lens.cli.console import Column, number, show_table, three_digits, with_interval
from mrp_lens.utils.frames import Row, is_number, percent

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
        if any(is_number(row.get(key)) for row in rows)
    ]
    if lines:
        of_each: list[Column] = [(method, three_digits(method)) for method in (str(row["method"]) for row in rows)]
        show_table("Other measures", [("measure", lambda line: str(line["measure"])), *of_each], lines)


def columns(rows: Sequence[Row]) -> list[Column]:
    """The columns that these rows fill, the unedited model's first."""
    figures = rows[0]

    def shown(key: str, stem: str, form: Callable[[float], str] = percent) -> Callable[[Row], str]:
        return lambda row: with_interval(row.get(key), row.get(f"{stem}_low"), row.get(f"{stem}_high"), form)

    quizzes = [
        (
            f"{side} quiz (chance {percent(figures[f'{side}_chance'])})",
            shown(f"{side}_accuracy", side),
        )
        for side in ("forget", "retain")
        if f"{side}_accuracy" in figures
    ]
    damage: list[Column] = [("damage", shown("damage", "damage", "{:.3f}".format))]
    fit: list[Column] = [("fit", lambda row: number(row.get("seconds"), "{:.0f} s".format))]
    return [
        ("method", lambda row: str(row["method"])),
        ("forget text", shown("forget_probability", "forget_probability")),
        *quizzes,
        ("text", lambda row: number(row.get("text_perplexity_ratio"), "x{:.3f}".format)),
        *(damage if any("damage" in row for row in rows) else []),
        *(fit if any("seconds" in row for row in rows) else []),
    ]
