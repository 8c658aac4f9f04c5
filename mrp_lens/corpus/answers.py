"""Which choice of a question is the right one, in the notations that data sets use."""

import re
from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any

import numpy as np

from mrp_lens.corpus.rows import Row, column, missing, shown, words

MOST_CHOICES = 10
MOST_DIGITS = 4  # of an index; Python refuses to read thousands
LETTER = re.compile(r"\(([A-Za-z])\)|([A-Za-z])[.)]?")


class AmbiguousAnswerError(ValueError):
    """Several choices have the text of the right one."""


def choices_of(row: Row, columns: str | Sequence[str], number: int, name: str) -> list[Any]:
    """The choices as the row holds them: those of a list column, or of several columns in their order.

    Raises:
        ValueError: a column is missing, a choice has no value or is neither text nor a number, or there are not 2 to 10.
    """
    if isinstance(columns, str):
        listed = column(row, columns, number, name)
        found = list(listed) if _is_list(listed) else []
    else:
        listed = [column(row, field, number, name) for field in columns]
        found = [choice for value in listed for choice in (value if _is_list(value) else [value])]
    if not 2 <= len(found) <= MOST_CHOICES:
        raise ValueError(
            f"{name}, row {number}: choices must be a list of at least 2 and at most {MOST_CHOICES}, got {shown(listed)}"
        )
    for choice in found:
        if missing(choice) or (isinstance(choice, str) and not choice.strip()):
            raise ValueError(
                f"{name}, row {number}: a choice has no value in {shown(found)}; leave it out or fill it in"
            )
        try:
            words(choice)
        except ValueError as error:
            raise ValueError(f"{name}, row {number}: a choice {error}") from error
    return found


def right_choice(given: Any, choices: Sequence[Any], number: int, name: str, *, typed: bool = True) -> int:
    """The index of the right choice.

    An answer that is the text of a choice is that choice; else a letter (`B`, `b`, `B.`, `(B)`) is its place, and so is
    a number, counted from 0, as an int or as digits. Where choices and answer are ints, the answer may be meant as
    either, and is refused unless both mean the same choice; so are digits where numbers and texts cannot be told apart
    (`typed=False`). A number that is no int is a choice.

    Raises:
        ValueError: the answer is none of these.
        AmbiguousAnswerError: another choice has the same text as the right one.
    """
    texts = [str(choice).strip() for choice in choices]
    index = _place(given, choices, texts)
    if index is None or not 0 <= index < len(texts):
        raise ValueError(
            f"{name}, row {number}: the answer {shown(given)} is neither an index in 0..{len(texts) - 1} nor a letter in "
            f"A..{chr(ord('A') + len(texts) - 1)} nor one of the choices {shown(texts)}"
        )
    if _may_be_either(given, index, choices, texts, typed):
        raise ValueError(
            f"{name}, row {number}: the answer {given!r} may be an index or one of the choices {shown(list(choices))}; give it as a letter"
        )
    if texts.count(texts[index]) > 1:
        raise AmbiguousAnswerError(
            f"{name}, row {number}: several choices are {shown(texts[index])}, the right answer; keep one of them in {shown(texts)}"
        )
    return index


def _is_list(value: object) -> bool:
    if isinstance(value, np.ndarray):
        return value.ndim == 1
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)


def _may_be_either(given: Any, index: int, choices: Sequence[Any], texts: Sequence[str], typed: bool) -> bool:
    """Whether the answer is the index of one choice and the value of another."""
    if isinstance(given, str):
        number = _number(given.strip())
        return not typed and number is not None and number < len(texts) and number != index
    if isinstance(given, Integral):
        return given in choices and choices[index] != given
    return float(given).is_integer() and 0 <= given < len(texts) and int(given) != index


def _place(given: Any, choices: Sequence[Any], texts: Sequence[str]) -> int | None:
    if isinstance(given, bool | np.bool_):  # True and False are ints, but no index
        return None
    if isinstance(given, Integral):
        return int(given) if 0 <= int(given) < len(texts) or given not in choices else list(choices).index(given)
    if isinstance(given, Real):
        return list(choices).index(given) if given in choices else None
    if not isinstance(given, str):
        return None
    answer = given.strip()
    if answer in texts:
        return texts.index(answer)
    if letter := LETTER.fullmatch(answer):
        return ord((letter[1] or letter[2]).upper()) - ord("A")
    return _number(answer)


def _number(answer: str) -> int | None:
    return int(answer) if answer.isdecimal() and len(answer) <= MOST_DIGITS else None
