"""A run's rows as a table for reading: values with their intervals, controls marked."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

CONTROLS = {"unedited", "random-projection", "untrained-start", "never-taught"}
HEADINGS = {
    "forget_accuracy": "accuracy on what must go",
    "retain_accuracy": "accuracy on what must stay",
    "worst_topic_accuracy": "worst topic that must stay",
    "untaught_accuracy": "never taught",
    "forget_probability": "probability of the forget texts' tokens",
    "text_perplexity_ratio": "perplexity of text, after / before",
    "verdict": "what must go is",
    "relative_coefficient": "c / norm",
    "seconds": "fit",
}
HIDDEN = {"text_perplexity"}  # its ratio says more
LEGENDS = {
    "verdict": "absent: within 5 points of the accuracy on facts that the model was never taught; suppressed: lower, so the "
    "answer is still known and pushed down; known: higher.",
    "untaught_accuracy": "never taught: the unedited model's accuracy on facts that no text ever stated; the level of full forgetting.",
    "text_perplexity_ratio": "perplexity: of text that no fit saw; 1 is as before.",
}
INTERVALS = "Brackets: 95% intervals, bootstrap over questions or documents. Rows in grey are controls."


@dataclass(frozen=True)
class Table:
    """What the page shows.

    Attributes:
        headings: of the columns.
        rows: whether it is a control, and the cells.
        legend: what the figures mean.
    """

    headings: list[str]
    rows: list[tuple[bool, list[str]]]
    legend: list[str]


def table_of(rows: Sequence[Mapping[str, Any]]) -> Table:
    """The columns in which a row has a value; an interval stands behind its value, a constant unit in its cell."""
    keys = sorted(dict.fromkeys(key for row in rows for key in row), key=lambda key: key != "method")
    ends = {end for key in keys for end in _ends(key, keys)}
    shown = [key for key in keys if key not in ends | HIDDEN and any(row.get(key) is not None for row in rows)]
    return Table(
        headings=[HEADINGS.get(key, key.replace("_", " ")) for key in shown],
        rows=[(str(row.get("method")) in CONTROLS, [_cell(row, key, keys) for key in shown]) for row in rows],
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


def _cell(row: Mapping[str, Any], key: str, keys: Sequence[str]) -> str:
    form = _form(key)
    value = row.get(key)
    if value is None or value != value:
        return ""
    low, high = (row.get(end) for end in _ends(key, keys)) if _ends(key, keys) else (None, None)
    if low is None or high is None:
        return form(value)
    return f"{form(value)} [{form(low).removesuffix('%')}, {form(high).removesuffix('%')}]"


def _form(key: str) -> Callable[[Any], str]:
    def plain(value: Any) -> str:
        return f"{value:.4g}" if isinstance(value, float) else str(value)

    def share(value: Any) -> str:
        return f"{100 * value:.1f}%"

    if key.endswith(("accuracy", "probability", "chance")):
        return share
    if key.endswith("ratio"):
        return lambda value: f"x{value:.3f}"
    return (lambda value: f"{value:.0f} s" if value else "") if key == "seconds" else plain
