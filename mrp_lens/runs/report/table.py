"""A run's rows as a table for reading: values with their intervals, controls marked."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mrp_lens import metrics
from mrp_lens.metrics.controls import CONTROLS
from mrp_lens.utils.frames import percent

HEADINGS = {  # of columns that no metric makes
    "worst_topic_accuracy": "worst topic of the retain quiz",
    "untaught_accuracy": "never taught",
    "verdict": "the forget set is",
    "relative_coefficient": "c / norm",
    "outcome": "end of the fit",
    "seconds": "fit",
    "damage": "damage on retain text, nats a token",
    "accuracy_before": "accuracy before",
    "accuracy_edited": "with the edit",
    "accuracy_after": "after the attack",
    "bits_in_all": "bits in all",
    "recovery_5": "back after 5 updates",
    "recovery_20": "back after 20 updates",
}
BY_ATTACK = {f"recovery_{budget}" for budget in ("5", "20", "100", "100_stripped", "100_weights")} | {
    "forget_accuracy",
    "untaught_accuracy",
}
HIDDEN = {"text_perplexity"}  # its ratio says more
LEGENDS = {
    "verdict": "absent: within 5 points of the accuracy on facts that the model was never taught; suppressed: lower, so the "
    "answer is still known and pushed down; known: higher.",
    "untaught_accuracy": "never taught: the unedited model's accuracy on facts that no text ever stated; the level of full forgetting.",
    "outcome": "end of the fit: target: what is left of the forget set cannot be told from chance, on questions made from it; budget: "
    "the damage that it was allowed was done first; unmoved: next to nothing was forgotten; steps: the last update came first.",
    "floor": "floor: facts that were never taught (without such questions, guessing), after the same attack; ceiling: the unedited model "
    "under the same treatment.",
    "recovery": "recovery: (after the attack - floor) / (ceiling - floor): 0 is as if never taught, 1 as before the edit.",
    "bits": "bits: what a probe at its best layer reads about the right answer of questions that it was not trained on.",
    "damage": "damage: KL(unedited || edited) per token of retain text that no fit saw; 0 is as before. The damage that a fit says it did is on "
    "other documents, and on what it knew of answers, too, so it may be larger.",
    "text_perplexity_ratio": "perplexity: of text that no fit saw; 1 is as before.",
}
INTERVALS = "Brackets: 95% intervals, over questions, entities or documents. Controls are in grey."


@dataclass(frozen=True)
class Cell:
    """A value as text, its unit included, and its interval."""

    value: str
    interval: str = ""

    def __str__(self) -> str:
        return f"{self.value} {self.interval}".rstrip()


@dataclass(frozen=True)
class Table:
    """What the page shows.

    Attributes:
        headings: of the columns.
        rows: whether it is a control, and the cells.
        legend: what the figures mean.
    """

    headings: list[str]
    rows: list[tuple[bool, list[Cell]]]
    legend: list[str]

    @property
    def turned(self) -> bool:
        """Whether it reads better with its rows as columns: it has more of the latter."""
        return len(self.headings) > len(self.rows)

    @property
    def lines(self) -> list[list[Cell]]:
        """Of the turned table: for each heading, its cells."""
        return [[cells[place] for _, cells in self.rows] for place in range(len(self.headings))]


def table_of(rows: Sequence[Mapping[str, Any]]) -> Table:
    """The columns in which a row has a value; an interval belongs to its value, a constant unit to its cell."""
    keys = sorted(dict.fromkeys(key for row in rows for key in row), key=lambda key: key != "method")
    ends = {end for key in keys for end in _ends(key, keys)}
    hidden = HIDDEN | (BY_ATTACK if "attack" in keys else set())  # where each attack has a row of its own
    shown = [key for key in keys if key not in ends | hidden and any(_is_known(row.get(key)) for row in rows)]
    known = HEADINGS | metrics.headings()
    return Table(
        headings=[known.get(key, key.replace("_", " ")) for key in shown],
        rows=[(str(row.get("method")) in CONTROLS, [cell(row, key, keys) for key in shown]) for row in rows],
        legend=[*(LEGENDS[key] for key in shown if key in LEGENDS), *([INTERVALS] if ends else [])],
    )


def _ends(key: str, keys: Sequence[str]) -> tuple[str, ...]:
    """The columns of a value's interval: `x_low`, `x_high`; for `side_accuracy` and `null_mean`, `side_low` and
    `null_low`; plain `low` and `high` belong to the column before them."""
    for stem in (f"{key}_", f"{key.removesuffix('_accuracy').removesuffix('_mean')}_"):
        if f"{stem}low" in keys and f"{stem}high" in keys:
            return f"{stem}low", f"{stem}high"
    following = keys[keys.index(key) + 1 :][:2]
    return ("low", "high") if list(following) == ["low", "high"] else ()


def _is_known(value: Any) -> bool:
    """Whether it is neither None nor NaN."""
    return value is not None and value == value


def cell(row: Mapping[str, Any], key: str, keys: Sequence[str] | None = None) -> Cell:
    """The value of a row under a key, with its interval if it has one; `keys`: of the whole table, None: of the row."""
    keys = list(row) if keys is None else keys
    written = _format_of(key)
    value = row.get(key)
    if not _is_known(value):
        return Cell("")
    ends = [row.get(end) for end in _ends(key, keys)]
    if not ends or not all(map(_is_known, ends)):
        return Cell(written(value))
    return Cell(written(value), f"[{', '.join(written(end).removesuffix('%') for end in ends)}]")


def _format_of(key: str) -> Callable[[Any], str]:
    def plain(value: Any) -> str:
        return f"{value:.4g}" if isinstance(value, float) else str(value)

    if (
        key.endswith(("accuracy", "probability", "chance"))
        or key.startswith(("accuracy_", "train_accuracy_", "new_accuracy_"))
        or key in ("floor", "ceiling")
    ):
        return percent
    if key.startswith("recovery") or ("bits" in key and "layer" not in key):
        return lambda value: f"{value:.2f}"
    if key.endswith("perplexity_ratio"):
        return lambda value: f"x{value:.3f}"
    return (lambda value: f"{value:.0f} s" if value else "") if key == "seconds" else plain
