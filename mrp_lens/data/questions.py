"""Multiple-choice questions: reading them from files, folders, the Hub or rows."""

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import pandas as pd

from mrp_lens.data.documents import Corpus, Document, in_chat
from mrp_lens.data.question_rows import Question, question_columns, read_questions
from mrp_lens.data.rows import Row, all_of, digest, evenly
from mrp_lens.data.schemas import KNOWN, Schema, schema_named
from mrp_lens.data.sources import file_rows, hub_name, hub_rows, named_in_errors, rows_in

Half = Literal["question", "entity"]


@dataclass(frozen=True)
class Questions:
    """An ordered set of multiple-choice questions; each choice is scored as the text that follows the prompt."""

    questions: tuple[Question, ...]
    name: str = "questions"

    def __post_init__(self) -> None:
        object.__setattr__(self, "questions", all_of(Question, self.questions, "Questions"))

    def __repr__(self) -> str:
        return f"Questions({self.name!r}, {len(self)} questions)"

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
                all. A choice is joined to the prompt by one space unless it starts, or the prompt ends, with white space
                already. None: `choices`, or what the schema says.
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
        kinds = question_columns(known, prompt=prompt, choices=choices, answer=answer, group=group, entity=entity)
        return cls(tuple(read_questions(rows_in(rows, name), kinds, known, name)), name)

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
        with named_in_errors(path):
            return cls.from_rows(
                rows,
                prompt=prompt,
                choices=choices,
                answer=answer,
                group=group,
                entity=entity,
                schema=schema,
                name=name,
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
        """Two halves that share no question, and with `by="entity"` no entity either, drawn at random. A question is what is asked
        and its right answer: rows that say both again are in the same half.

        Raises:
            ValueError: fewer than two questions or entities, or a question whose entity is unknown.
        """
        return self.parted(0.5, by=by, seed=seed)

    def parted(self, share: float, *, by: Half = "question", seed: int = 0) -> tuple["Questions", "Questions"]:
        """As `halves`, with this share of the questions or entities in the first part: at least one in each.

        Raises:
            ValueError: as `halves`, or a share that is not between 0 and 1.
        """
        if not 0.0 < share < 1.0:
            raise ValueError(f"a share must be between 0 and 1, got {share}")
        if by not in get_args(Half):
            raise ValueError(f"unknown by={by!r}; choose one of {', '.join(get_args(Half))}")
        first: dict[tuple[str, str], int] = {}
        places = [first.setdefault((q.prompt, q.choices[q.answer]), place) for place, q in enumerate(self.questions)]
        labels = self._spelled_entities() if by == "entity" else [str(place) for place in places]
        if not all(labels):
            raise ValueError(
                f"{self.name}: some questions do not say whom they are about; name that column with entity=..., or split by='question'"
            )
        names = sorted(dict.fromkeys(labels))
        if len(names) < 2:
            raise ValueError(f"{self.name} has {len(names)} {by}, which cannot be split; give at least 2")
        drawn = set(random.Random(f"mrp_lens halves {seed}").sample(names, max(1, int(share * len(names)))))
        sides = [
            tuple(q for q, label in zip(self.questions, labels, strict=True) if (label in drawn) == wanted)
            for wanted in (True, False)
        ]
        return replace(self, questions=sides[0]), replace(self, questions=sides[1])

    def right_answers(self) -> Corpus:
        """The questions as documents, each with its right choice as the completion."""
        return Corpus(tuple(Document(q.prompt, q.choices[q.answer]) for q in self.questions), self.name)

    def chat(self, tokenizer: Any, *, system: str | None = None, **variables: Any) -> "Questions":
        """A copy whose prompts are turns of the tokenizer's chat template; as `Corpus.chat`."""
        questions = []
        for question in self.questions:
            prompt, choices = in_chat(question.prompt, question.choices, tokenizer, system, **variables)
            questions.append(replace(question, prompt=prompt, choices=choices))
        return replace(self, questions=tuple(questions))

    @property
    def groups(self) -> tuple[str, ...]:
        """The groups that occur, in order of appearance."""
        return tuple(dict.fromkeys(question.group for question in self.questions))

    @property
    def halved_by(self) -> Half:
        """What halves are drawn of: entities where all questions name theirs and there are several, else questions."""
        spelled = self._spelled_entities()
        return "entity" if all(spelled) and len(set(spelled)) > 1 else "question"

    @property
    def entities(self) -> tuple[int, ...]:
        """For each question, which entity it is about, as a number: the same for spellings that differ in case and blanks alone, and
        one of its own for a question that does not say."""
        numbers: dict[str | int, int] = {}
        labels = self._spelled_entities()
        return tuple(numbers.setdefault(label or place, len(numbers)) for place, label in enumerate(labels))

    def _spelled_entities(self) -> list[str]:
        """Of each question, its entity as it is spelled in the first question about it; spellings may differ in case and blanks, and
        blanks alone name none."""
        spelled = {"": ""}
        return [spelled.setdefault(" ".join(q.entity.split()).casefold(), q.entity) for q in self.questions]

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the questions, for provenance."""
        # Without an entity as in version 0.1, so that its records still name their data.
        return digest(
            [[q.prompt, list(q.choices), q.answer, q.group] + [q.entity] * bool(q.entity) for q in self.questions]
        )

    def __len__(self) -> int:
        return len(self.questions)
