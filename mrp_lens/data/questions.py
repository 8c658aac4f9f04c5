"""Multiple-choice questions: reading them from files, folders, the Hub or rows."""

import random
import re
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from numbers import Integral, Real
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import pandas as pd

from mrp_lens.data.documents import Corpus, Document, all_of, check_text, in_chat
from mrp_lens.data.rows import Row, Untyped, column, digest, evenly, fill, label, missing, rows_in, shown, words
from mrp_lens.data.schemas import KNOWN, QuestionColumns, Schema, schema_named
from mrp_lens.data.sources import file_rows, hub_name, hub_rows

MOST_CHOICES = 10
MOST_DIGITS = 4  # of an index; Python refuses to read thousands
LETTER = re.compile(r"\(([A-Za-z])\)|([A-Za-z])[.)]?")


Half = Literal["question", "entity"]


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


@dataclass(frozen=True)
class Questions:
    """An ordered set of multiple-choice questions; each choice is scored as the text that follows the prompt."""

    questions: tuple[Question, ...]
    name: str = "questions"

    def __post_init__(self) -> None:
        object.__setattr__(self, "questions", all_of(Question, self.questions, "Questions"))

    @classmethod
    def from_rows(
        cls,
        rows: Iterable[Row] | pd.DataFrame,
        *,
        prompt: str | None = None,
        choices: str | Sequence[str] | None = None,
        answer: str | None = None,
        group: str | None = None,
        entity: str | None = None,
        schema: str | Schema | None = None,
        name: str = "rows",
    ) -> "Questions":
        """One question a row.

        Args:
            rows: mappings from column to value, a pandas DataFrame or a Dataset.
            prompt: template whose braces name columns. None: `{question}`, or what the schema says.
            choices: a column holding a list, or several columns holding one choice or a list of them each; 2 to 10 in
                all. A choice is joined to the prompt by one space unless it starts with white space already. None:
                `choices`, or what the schema says.
            answer: column with the right choice: its text, its letter (`B`, `b`, `B.`, `(B)`), or its index from 0, as
                an int or as digits. A string that is the text of a choice is taken as that, then as a letter, then as
                an index; in a .csv or .tsv file, which does not tell texts from numbers, digits that may be meant as
                either are refused. None: `answer`, or what the schema says.
            group: column by which `metrics.accuracy` reports separately, such as a topic.
            entity: column that says whom or what the question is about; `halves(by="entity")` never parts these.
            schema: a known data set whose rows these are, such as `cais/wmdp`; the arguments above override it.
                Its rows in which several choices equal the right one are left out, with a warning.
            name: for logs and provenance.

        Raises:
            ValueError: a column is missing (the columns there are get listed), not 2 to 10 choices, an answer that is
                not among them or that several of them equal (with the row's number), an unknown schema, or one
                without questions.
        """
        known = schema_named(schema)
        if known is not None and not known.questions and (choices is None or answer is None):
            raise ValueError(
                f"{known.path} holds texts, no questions; read it as a Corpus, or name its columns with prompt=, choices= and answer="
            )
        given = {"prompt": prompt, "choices": choices, "answer": answer, "group": group, "entity": entity}
        overrides: dict[str, Any] = {option: value for option, value in given.items() if value is not None}
        kinds = [replace(kind, **overrides) for kind in (known.questions if known else ()) or (QuestionColumns(),)]
        columns, questions, ambiguous = None, [], 0
        for number, row in enumerate(rows_in(rows, name)):
            columns = columns or next((kind for kind in kinds if kind.needed <= row.keys()), kinds[0])
            if known is not None and not known.keeps_row(row):
                continue
            try:
                questions.append(_question(row, number, columns, name))
            except AmbiguousAnswerError:
                if known is None:
                    raise
                ambiguous += 1
        if ambiguous:
            warnings.warn(
                f"{name}: left out {ambiguous} of {ambiguous + len(questions)} questions in which several choices equal the right answer",
                stacklevel=2,
            )
        return cls(tuple(questions), name)

    @classmethod
    def from_file(
        cls,
        path: str | Path,
        *,
        split: str | None = None,
        prompt: str | None = None,
        choices: str | Sequence[str] | None = None,
        answer: str | None = None,
        group: str | None = None,
        entity: str | None = None,
        schema: str | Schema | None = None,
    ) -> "Questions":
        """Read what `Corpus.from_file` reads; the other arguments as `from_rows`."""
        rows, name = file_rows(path, split), Path(path).stem
        return cls.from_rows(
            rows, prompt=prompt, choices=choices, answer=answer, group=group, entity=entity, schema=schema, name=name
        )

    @classmethod
    def from_hub(
        cls,
        path: str,
        *,
        config: str | None = None,
        split: str | None = None,
        prompt: str | None = None,
        choices: str | Sequence[str] | None = None,
        answer: str | None = None,
        group: str | None = None,
        entity: str | None = None,
        schema: str | Schema | None = None,
    ) -> "Questions":
        """Read a data set of the Hugging Face Hub, as `Corpus.from_hub` does, by default its `test` split."""
        known = schema_named(schema) or KNOWN.get(path)
        rows = hub_rows(path, config, split or (known.question_split if known else "test"), known)
        name = hub_name(path, config)
        return cls.from_rows(
            rows, prompt=prompt, choices=choices, answer=answer, group=group, entity=entity, schema=known, name=name
        )

    def spread(self, limit: int | None) -> "Questions":
        """At most `limit` of the questions, evenly spread over all; None: all."""
        return replace(self, questions=tuple(evenly(self.questions, limit)))

    def halves(self, *, by: Half = "question", seed: int = 0) -> tuple["Questions", "Questions"]:
        """Two halves that share no question, and with `by="entity"` no entity either, drawn at random.

        Raises:
            ValueError: fewer than two questions or entities, or a question whose entity is unknown.
        """
        if by not in get_args(Half):
            raise ValueError(f"unknown by={by!r}; choose one of {', '.join(get_args(Half))}")
        labels = [q.entity if by == "entity" else str(place) for place, q in enumerate(self.questions)]
        if not all(labels):
            raise ValueError(
                f"{self.name}: some questions do not say whom they are about; name that column with entity=..., or split by='question'"
            )
        names = sorted(dict.fromkeys(labels))
        if len(names) < 2:
            raise ValueError(f"{self.name} has {len(names)} {by}, which cannot be split; give at least 2")
        first = set(random.Random(f"mrp_lens halves {seed}").sample(names, len(names) // 2))
        sides = [
            tuple(q for q, label in zip(self.questions, labels, strict=True) if (label in first) == wanted)
            for wanted in (True, False)
        ]
        return replace(self, questions=sides[0]), replace(self, questions=sides[1])

    def right_answers(self) -> Corpus:
        """The questions as documents, each with its right choice as the completion."""
        return Corpus(tuple(Document(q.prompt, q.choices[q.answer]) for q in self.questions), self.name)

    def chat(self, tokenizer: Any, *, system: str | None = None) -> "Questions":
        """A copy whose prompts are turns of the tokenizer's chat template; as `Corpus.chat`."""
        questions = []
        for question in self.questions:
            prompt, choices = in_chat(question.prompt, question.choices, tokenizer, system)
            questions.append(replace(question, prompt=prompt, choices=choices))
        return replace(self, questions=tuple(questions))

    @property
    def groups(self) -> tuple[str, ...]:
        """The groups that occur, in order of appearance."""
        return tuple(dict.fromkeys(question.group for question in self.questions))

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the questions, for provenance."""
        # Without an entity as in version 0.1, so that its records still name their data.
        return digest(
            [[q.prompt, list(q.choices), q.answer, q.group] + [q.entity] * bool(q.entity) for q in self.questions]
        )

    def __len__(self) -> int:
        return len(self.questions)


def _question(row: Row, number: int, columns: QuestionColumns, name: str) -> Question:
    choices = choices_of(row, columns.choices, number, name)
    given = column(row, columns.answer, number, name)
    index = right_choice(given, choices, number, name, typed=not isinstance(row, Untyped))
    options = [str(choice) for choice in choices]
    spaced = tuple(option if option[:1].isspace() else f" {option}" for option in options)
    group, entity = ("" if it is None else label(row, it, number, name) for it in (columns.group, columns.entity))
    return Question(fill(columns.prompt, row, number, name), spaced, index, group, entity)
