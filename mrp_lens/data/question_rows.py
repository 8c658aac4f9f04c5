"""One multiple-choice question, and how a row of a table becomes one: which of the choices is right."""

import re
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from numbers import Integral, Real
from typing import Any

import numpy as np

from mrp_lens.data.rows import Row, Untyped, check_text, column, fill, label, missing, shown, words
from mrp_lens.data.schemas import QuestionColumns, Schema, check_names_column

REMEDY = (
    ". A question's columns are named by question_prompt=... (of Questions.from_file and its like that is `prompt`), choices=..., "
    "answer=... and entity=..."
)
MOST_CHOICES = 10
MOST_DIGITS = 4  # of an index; Python refuses to read thousands
FEW = 20  # answers below which it says nothing that none is the first
LETTER = re.compile(r"\(([A-Za-z])\)|([A-Za-z])[.)]?")


class AmbiguousAnswerError(ValueError):
    """Several choices have the text of the right one."""


@dataclass(frozen=True)
class Question:
    """One multiple-choice question; `answer` is the index of the right choice, `entity` whom or what it is about."""

    prompt: str
    choices: tuple[str, ...]
    answer: int
    group: str = ""
    entity: str = ""

    def __post_init__(self) -> None:
        choices: Any = self.choices
        answer: Any = self.answer
        if isinstance(choices, str) or not isinstance(choices, Sequence):
            raise TypeError(f"the choices of a Question must be several strings, got {shown(choices)}")
        texts = {"prompt": self.prompt, "group": self.group, "entity": self.entity}
        for part, value in [*texts.items(), *(("choice", choice) for choice in choices)]:
            check_text(value, f"the {part} of a Question")
        if isinstance(answer, bool) or not isinstance(answer, Integral):
            raise TypeError(f"the answer of a Question must be the index of a choice, got {shown(answer)}")
        if not 0 <= int(answer) < len(choices):
            raise ValueError(f"the answer of a Question must be an index below {len(choices)}, got {answer}")
        object.__setattr__(self, "choices", tuple(choices))
        object.__setattr__(self, "answer", int(answer))


def question_columns(known: Schema | None, **given: Any) -> list[QuestionColumns]:
    """Where the rows of a data set hold their questions: what the schema says, with what was given in its place.

    Raises:
        ValueError: the schema is that of texts, and choices or answer are not given.
    """
    if known is not None and not known.questions and (given.get("choices") is None or given.get("answer") is None):
        raise ValueError(
            f"{known.path} holds texts, no questions; read it as a Corpus, or name its columns with prompt=, choices= and answer="
        )
    if given.get("prompt") is not None:
        check_names_column(given["prompt"], "the prompt of a question")
    overrides: dict[str, Any] = {option: value for option, value in given.items() if value is not None}
    return [replace(kind, **overrides) for kind in (known.questions if known else ()) or (QuestionColumns(),)]


def read_questions(
    rows: Iterable[Row], kinds: Sequence[QuestionColumns], known: Schema | None, name: str
) -> Iterator[Question]:
    """One question a row, read by the first of the kinds of columns that the first row has.

    Of a known data set rows in which several choices equal the right one are left out, with a warning.

    Raises:
        ValueError: as `Questions.from_rows`; or every answer is a letter, and one of them may be that of a place or a choice.

    Warns:
        UserWarning: the same is asked twice with different answers, or no answer is the index 0.
    """
    columns, count, ambiguous, answers = None, 0, 0, _Answers(name)
    for number, row in enumerate(rows):
        columns = columns or next((kind for kind in kinds if kind.needed <= row.keys()), kinds[0])
        if known is not None and not known.keeps_row(row):
            continue
        count += 1
        try:
            question = _question(row, number, columns, name)
        except AmbiguousAnswerError:
            if known is None:
                raise
            ambiguous += 1
            continue
        answers.read(row[columns.answer], question, number)
        yield question
    answers.check()
    if ambiguous:
        warnings.warn(
            f"{name}: left out {ambiguous} of {count} questions in which several choices equal the right answer",
            stacklevel=3,
        )


class _Answers:
    """What only the answers of all rows tell: whether letters are places, and numbers count from 0."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.letters = True
        self.either = ""
        self.indices: list[int] = []
        self.right: dict[tuple[str, tuple[str, ...]], set[str]] = {}

    def read(self, given: Any, question: Question, number: int) -> None:
        """The answer of a row as it is given there."""
        texts = [choice.strip() for choice in question.choices]
        letter = LETTER.fullmatch(given.strip()) if isinstance(given, str) else None
        self.letters &= letter is not None
        if letter is not None and given.strip() in texts and question.answer != _place_of(letter) < len(texts):
            self.either = (
                self.either
                or f"{self.name}, row {number}: the answer {given!r} may be a letter or one of the choices {shown(texts)}"
            )
        index = _number(given.strip()) if isinstance(given, str) else given
        if isinstance(index, Integral) and str(given).strip() not in texts:
            self.indices.append(int(index))
        self.right.setdefault((question.prompt, tuple(sorted(texts))), set()).add(texts[question.answer])

    def check(self) -> None:
        """Refuse letters that may be either, and warn of what is odd."""
        if self.either and self.letters:
            raise ValueError(f"{self.either}; give the answers as indices, from 0")
        if len(self.indices) >= FEW and min(self.indices) > 0:
            warnings.warn(
                f"{self.name}: none of {len(self.indices)} answers is 0, the first choice: take 1 off each if yours count from 1",
                stacklevel=4,
            )
        if contradicting := sum(len(right) > 1 for right in self.right.values()):
            warnings.warn(
                f"{self.name}: {contradicting} questions are asked again, with the same choices and another right answer; no model can be right in "
                "both: keep one of them",
                stacklevel=4,
            )


def _question(row: Row, number: int, columns: QuestionColumns, name: str) -> Question:
    choices = choices_of(row, columns.choices, number, name)
    given = column(row, columns.answer, number, name, remedy=REMEDY)
    index = right_choice(given, choices, number, name, typed=not isinstance(row, Untyped))
    options = [str(choice) for choice in choices]
    prompt = fill(columns.prompt, row, number, name, remedy=REMEDY)
    if not prompt.strip():
        raise ValueError(f"{name}, row {number}: the question has no text; leave the row out or fill it in")
    joined = prompt[-1:].isspace()  # a second space would ask in a form that no model knows
    spaced = tuple(option if joined or option[:1].isspace() else f" {option}" for option in options)
    group, entity = (
        "" if it is None else label(row, it, number, name, remedy=REMEDY) for it in (columns.group, columns.entity)
    )
    return Question(prompt, spaced, index, group, entity)


def choices_of(row: Row, columns: str | Sequence[str], number: int, name: str) -> list[Any]:
    """The choices as the row holds them: those of a list column, or of several columns in their order.

    Raises:
        ValueError: a column is missing, a choice has no value or is neither text nor a number, or there are not 2 to 10.
    """
    if isinstance(columns, str):
        listed = column(row, columns, number, name, remedy=REMEDY)
        found = list(listed) if _is_list(listed) else []
    else:
        listed = [column(row, field, number, name, remedy=REMEDY) for field in columns]
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
        return _place_of(letter)
    return _number(answer)


def _place_of(letter: re.Match[str]) -> int:
    return ord((letter[1] or letter[2]).upper()) - ord("A")


def _number(answer: str) -> int | None:
    return int(answer) if answer.isdecimal() and len(answer) <= MOST_DIGITS else None
