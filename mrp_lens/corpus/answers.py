"""Which choice of a question is the right one, in the notations that data sets use."""

import re
from collections.abc import Sequence
from numbers import Integral
from typing import Any

from mrp_lens.corpus.rows import Row, column

MOST_CHOICES = 10
LETTER = re.compile(r"\(([A-Za-z])\)|([A-Za-z])[.)]?")


class AmbiguousAnswerError(ValueError):
    """Several choices have the text of the right one."""


def choices_of(row: Row, columns: str | Sequence[str], number: int, name: str) -> list[Any]:
    """The choices as the row holds them: those of a list column, or of several columns in their order.

    Raises:
        ValueError: a column is missing, a choice is, or there are not 2 to 10.
    """
    if isinstance(columns, str):
        listed = column(row, columns, number, name)
        valid = isinstance(listed, Sequence) and not isinstance(listed, str)
        found = list(listed) if valid else []
    else:
        listed = [column(row, field, number, name) for field in columns]
        found = []
        for value in listed:
            found += [value] if isinstance(value, str) or not isinstance(value, Sequence) else value
    if not 2 <= len(found) <= MOST_CHOICES:
        raise ValueError(
            f"{name}, row {number}: choices must be a list of at least 2 and at most {MOST_CHOICES}, got {listed!r}"
        )
    if any(choice is None for choice in found):
        raise ValueError(f"{name}, row {number}: a choice has no value in {found!r}; leave it out or fill it in")
    return found


def right_choice(given: Any, choices: Sequence[Any], number: int, name: str) -> int:
    """The index of the right choice.

    An answer that is the text of a choice is that choice; else a letter (`B`, `b`, `B.`, `(B)`) is its place, and so is
    a number, counted from 0, as an int or as digits. Where choices and answer are ints, the answer may be meant as
    either, and is refused unless both mean the same choice.

    Raises:
        ValueError: the answer is none of these.
        AmbiguousAnswerError: another choice has the same text as the right one.
    """
    texts = [str(choice).strip() for choice in choices]
    index = _place(given, choices, texts)
    if index is None or not 0 <= index < len(texts):
        raise ValueError(
            f"{name}, row {number}: the answer {given!r} is neither an index in 0..{len(texts) - 1} nor a letter in "
            f"A..{chr(ord('A') + len(texts) - 1)} nor one of the choices {texts}"
        )
    if isinstance(given, Integral) and given in choices and choices[index] != given:
        raise ValueError(
            f"{name}, row {number}: the answer {given!r} may be an index or one of the choices {list(choices)}; give it as a letter"
        )
    if texts.count(texts[index]) > 1:
        raise AmbiguousAnswerError(
            f"{name}, row {number}: several choices are {texts[index]!r}, the right answer; keep one of them in {texts}"
        )
    return index


def _place(given: Any, choices: Sequence[Any], texts: Sequence[str]) -> int | None:
    if isinstance(given, bool):  # True and False are ints, but no index
        return None
    if isinstance(given, Integral):
        return int(given) if 0 <= int(given) < len(texts) or given not in choices else list(choices).index(given)
    if not isinstance(given, str):
        return None
    answer = given.strip()
    if answer in texts:
        return texts.index(answer)
    if letter := LETTER.fullmatch(answer):
        return ord((letter[1] or letter[2]).upper()) - ord("A")
    return int(answer) if answer.isdecimal() else None
