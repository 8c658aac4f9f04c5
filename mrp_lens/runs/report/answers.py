"""What a page says first of each edit: did the model forget, what did that cost, does it survive an attack?"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mrp_lens.metrics.controls import CONTROLS, NEVER_TAUGHT, UNEDITED, verdict
from mrp_lens.metrics.recovery import FORM_TITLES
from mrp_lens.runs.report.table import cell
from mrp_lens.utils.frames import is_number

VERDICTS = {
    "absent": "Forgotten",
    "suppressed": "Suppressed: below {}",
    "known": "Not all forgotten",
}
ALIKE = "Cannot be told from {}"
NOTHING = "Nothing to forget: the unedited model is at that level, too"
UNTOLD = "Cannot be told: too few questions"
UNTAUGHT = "facts never taught"
NEVER_SAW = "never_saw_accuracy"
LEVELS = {  # the first that a row has
    NEVER_SAW: ("by", "a model that never saw the forget set"),
    "untaught_accuracy": ("on", UNTAUGHT),
    "forget_chance": ("by", "guessing"),
}
BACK = "recovery_"
UNTESTED = "Not attacked yet: mrp-lens attack"
UNCLEAR = "Cannot be told: without the edit, too, the model answers no more than the floor"


@dataclass(frozen=True)
class Answer:
    """A few words, the figures behind them, and a share in [0, 1] that a bar shows; None: no bar."""

    words: str
    figures: str = ""
    share: float | None = None


@dataclass(frozen=True)
class Answers:
    """What there is to say of one edit; an answer is None where nothing was measured that gives it."""

    method: str
    forgot: Answer | None
    cost: Answer | None
    survives: Answer | None


def answers_of(rows: Sequence[Mapping[str, Any]]) -> list[Answers]:
    """One for each edit of a table that has a row for each method and one for the unedited model; else none.

    Args:
        rows: of a run, as its `table.csv` has them.
    """
    named = {str(row.get("method")): row for row in rows}
    before, never = named.get(UNEDITED), named.get(NEVER_TAUGHT)
    if before is None or len(named) < len(rows):
        return []
    edits = {name: row for name, row in named.items() if name not in CONTROLS}
    if never is not None and is_number(never.get("forget_accuracy")):
        edits = {name: {**row, NEVER_SAW: never["forget_accuracy"]} for name, row in edits.items()}
    found = [Answers(name, _forgot(row, before), _cost(row, before), _survives(row)) for name, row in edits.items()]
    return [each for each in found if each.forgot is not None or each.cost is not None]


def _forgot(row: Mapping[str, Any], before: Mapping[str, Any]) -> Answer | None:
    """From the forget quiz; without one, from the forget texts."""
    quiz, texts = "forget_accuracy", "forget_probability"
    key = quiz if is_number(row.get(quiz)) and is_number(before.get(quiz)) else texts
    if not (is_number(row.get(key)) and is_number(before.get(key))):
        return None
    was, now = cell(before, key).value, cell(row, key)
    if key == texts:
        return Answer(f"{was} → {now}", "probability of a token of the forget texts, before → after; no quiz was asked")
    known = next((level for level in LEVELS if is_number(row.get(level))), None)
    level = 0.0 if known is None else float(row[known])
    above = float(before[key]) - level
    left = (float(row[key]) - level) / above if above > 0 else None
    if known is None and row.get("verdict") not in VERDICTS:
        return Answer(f"{was} → {now}", "of the forget quiz right, before → after; what guessing gives is not known")
    compared = "" if known is None else f"; {cell(row, known).value} {' '.join(LEVELS[known])}"
    words = _in_words(row, before, known)
    share = None if words in (NOTHING, UNTOLD) else _clipped(left)
    return Answer(words, f"{now} of the forget quiz right; {was} before{compared}", share)


def _in_words(row: Mapping[str, Any], before: Mapping[str, Any], known: str | None) -> str:
    """Whether the quiz was forgotten, by the level that is known: as the run says itself, or as `mrp-lens demo` has it."""
    told = row.get("verdict")
    if known is not None:
        accuracy, level, what = float(row["forget_accuracy"]), float(row[known]), LEVELS[known][1]
        if _may_be(before, level):
            return NOTHING
        if not _has_interval(row) or (_may_be(row, level) and _may_be(row, float(before["forget_accuracy"]))):
            return UNTOLD
        if told not in VERDICTS:
            told = verdict(accuracy, level)
            return ALIKE.format(what) if told != "absent" and _may_be(row, level) else VERDICTS[told].format(what)
    return VERDICTS[str(told)].format(UNTAUGHT)


def _has_interval(row: Mapping[str, Any]) -> bool:
    return is_number(row.get("forget_low")) and is_number(row.get("forget_high"))


def _may_be(row: Mapping[str, Any], accuracy: float) -> bool:
    """Whether the interval of a row's accuracy on the forget quiz holds another one."""
    return _has_interval(row) and row["forget_low"] <= accuracy <= row["forget_high"]


def _cost(row: Mapping[str, Any], before: Mapping[str, Any]) -> Answer | None:
    told, kept, words = [], None, ""
    if is_number(row.get("retain_accuracy")) and is_number(before.get("retain_accuracy")):
        was, now = (float(each["retain_accuracy"]) for each in (before, row))
        told.append(f"{cell(row, 'retain_accuracy')} right; {cell(before, 'retain_accuracy').value} before")
        kept, words = (
            _clipped(now / was if was else None),
            f"{100 * (now - was):+.1f} points on the retain quiz",
        )
    if is_number(row.get("worst_topic_accuracy")):
        about = f" ({row['worst_topic']})" if row.get("worst_topic") else ""
        told.append(f"worst topic{about} {cell(row, 'worst_topic_accuracy')}")
    if is_number(row.get("text_perplexity_ratio")):
        ratio = f"text perplexity {cell(row, 'text_perplexity_ratio')}"
        words, told = (words, [*told, ratio]) if words else (ratio.capitalize(), told)
    return Answer(words, "; ".join(told), kept) if words else None


def _survives(row: Mapping[str, Any]) -> Answer:
    """From the attack after which most was back."""
    measured = {key: value for key, value in row.items() if _is_recovery(key)}
    back = {key: float(value) for key, value in measured.items() if is_number(value)}
    if not back:
        return Answer(UNTESTED if not measured else UNCLEAR)
    most = max(back, key=lambda key: back[key])
    words = most.removeprefix(BACK).split("_")
    updates = [f"after {word} updates on others of the facts" for word in words if word.isdigit()]
    after = ", ".join([*(FORM_TITLES.get(word, word) for word in words if not word.isdigit()), *updates])
    ends = [f"{100 * end:.0f}" for end in (row.get(f"{most}_low"), row.get(f"{most}_high")) if is_number(end)]
    interval = f" [{', '.join(ends)}]" if len(ends) == 2 else ""
    share = back[most]
    return Answer(f"{100 * share:.0f}%{interval} comes back", after, _clipped(share))


def _is_recovery(key: str) -> bool:
    return key.startswith(BACK) and not key.endswith(("_low", "_high"))


def _clipped(share: float | None) -> float | None:
    return None if share is None else min(1.0, max(0.0, share))
