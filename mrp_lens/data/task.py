"""What a command or study works on: what must go, what must stay, and the questions and texts to measure either with."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from mrp_lens.data import Corpus, Document, Questions
from mrp_lens.data.questions import Half
from mrp_lens.data.rows import digest
from mrp_lens.data.world import World

HUB = "hub:"
HELD_OUT = 200  # at most this many retain documents are kept from the fit, and at most a tenth

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class UnlearningTask:
    """The data of a study.

    Attributes:
        forget: what must go; several corpora have a direction each in RMU.
        retain: what must stay, and the fit may see.
        held_out: text that no fit sees, for perplexity.
        questions, retain_questions: multiple choice on what must go, and on what must stay.
        untaught_questions: on what the model was never taught: how *absent* looks.
    """

    forget: tuple[Corpus, ...]
    retain: Corpus
    held_out: Corpus
    questions: Questions | None = None
    retain_questions: Questions | None = None
    untaught_questions: Questions | None = None

    @classmethod
    def from_world(cls, topic: str, *, world: World | None = None) -> "UnlearningTask":
        """Forget one topic of the embedded world. Other topics are scored on entities that no retain corpus states."""
        world = world or World()
        others = [name for name in world.topics if name != topic]
        kept = [question for name in others for question in world.questions(name, half=1).questions]
        return cls(
            (world.forget(topic),),
            world.retain(without=topic),
            world.text(),
            world.questions(topic),
            Questions(tuple(kept), "world-questions-kept"),
            world.questions(taught=False),
        )

    @property
    def forget_texts(self) -> Corpus:
        """All that must go, as one corpus named "forget"."""
        return Corpus(tuple(document for corpus in self.forget for document in corpus.documents), "forget")

    def fingerprints(self) -> dict[str, str]:
        """Role -> hash of the data."""
        parts: dict[str, Any] = {
            "forget": self.forget_texts if len(self.forget) == 1 else None,
            "retain": self.retain,
            "held_out": self.held_out,
            "questions": self.questions,
            "retain_questions": self.retain_questions,
            "untaught_questions": self.untaught_questions,
        }
        hashes = {role: part.fingerprint for role, part in parts.items() if part is not None}
        if len(self.forget) != 1:  # where one corpus ends and the next begins matters: each has a direction in RMU
            hashes["forget"] = digest([corpus.fingerprint for corpus in self.forget])
        return hashes

    def quiz(self, *, limit: int | None = None) -> dict[str, Questions]:
        """The quizzes there are, by side: "forget", "retain"; of each at most `limit` questions, evenly spread."""
        sides = {"forget": self.questions, "retain": self.retain_questions}
        return {side: quiz.spread(limit) for side, quiz in sides.items() if quiz is not None}

    @property
    def untaught_alike(self) -> Questions | None:
        """The never-taught questions of the groups that `questions` have; all of them if they have other groups."""
        if self.untaught_questions is None or self.questions is None:
            return self.untaught_questions
        alike = [q for q in self.untaught_questions.questions if q.group in self.questions.groups]
        return replace(self.untaught_questions, questions=tuple(alike)) if alike else self.untaught_questions

    def split(self, by: Half | None = None, *, limit: int | None = None, seed: int = 0) -> tuple[Questions, Questions]:
        """(T, V): halves of what an attacker sees of the questions about what must go, and of what it is scored on.

        Args:
            by: "entity": none is in both halves; "question". None: by entity where all of them are known.
            limit: at most this many questions in all, evenly spread.
            seed: of the draw.

        Raises:
            ValueError: there are no such questions, or `by="entity"` and some do not say whom they are about.
        """
        if self.questions is None:
            raise ValueError("an attack is scored on questions about what was to be forgotten; give --questions")
        known = all(question.entity for question in self.questions.questions)
        return self.questions.spread(limit).halves(by=by or ("entity" if known else "question"), seed=seed)

    def texts(self, *, limit: int | None = None) -> dict[str, Corpus]:
        """What states are read from, by side; at most `limit` documents of each, evenly spread."""
        return {"forget": self.forget_texts.spread(limit), "retain": self.retain.spread(limit)}

    def asked(self, *, limit: int | None = None) -> dict[str, Questions] | dict[str, Corpus]:
        """What confidence is measured on: the quizzes, or the texts where there are none; at most `limit` a side."""
        return self.quiz(limit=limit) or self.texts(limit=limit)

    def forget_prompts(self, *, limit: int) -> list[str]:
        """At most `limit` questions about what must go, or, where there are none, beginnings of its documents."""
        if self.questions is not None:
            return [question.prompt for question in self.questions.spread(limit).questions]
        return [beginning(document) for document in self.forget_texts.spread(limit).documents]


def beginning(document: Document) -> str:
    """The prompt of a document; of one without, the first half of its first twelve words."""
    words = document.completion.split()[:12]
    return document.prompt or " ".join(words[: max(1, len(words) // 2)])


@dataclass(frozen=True)
class DataOptions:
    """Where the data are and how to read them. None: as the schema says, else the defaults of the library.

    `entity` is a column of `questions` and `untaught_questions`; the other columns are those of all questions or texts.
    """

    forget: tuple[str, ...]
    retain: str
    questions: str | None
    retain_questions: str | None
    field: str | None = None
    prompt: str | None = None
    completion: str | None = None
    question_prompt: str | None = None
    choices: str | None = None
    answer: str | None = None
    forget_schema: str | None = None
    retain_schema: str | None = None
    questions_schema: str | None = None
    untaught_questions: str | None = None
    entity: str | None = None

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> "DataOptions":
        """Those of a command's options that name data. In a template the two characters `\\n` are a line break, since a
        shell passes them so."""
        known = {field.name: options[field.name] for field in fields(cls) if field.name in options}
        for name in ("prompt", "completion", "question_prompt"):
            known[name] = known[name].replace("\\n", "\n") if known[name] else None
        return cls(**{**known, "forget": tuple(known["forget"])})

    def task(self) -> "UnlearningTask":
        """Read everything; a tenth of the retain corpus is held out."""
        forget = tuple(self.corpus(source, self.forget_schema) for source in self.forget)
        kept, held_out = split_tenth(self.corpus(self.retain, self.retain_schema))
        asked, untaught = (
            self.quiz(source, entity=self.entity) for source in (self.questions, self.untaught_questions)
        )
        return UnlearningTask(forget, kept, held_out, asked, self.quiz(self.retain_questions), untaught)

    def corpus(self, source: str, schema: str | None) -> Corpus:
        """Read one corpus: a file, a folder or `hub:NAME[:CONFIG[:SPLIT]]`."""
        columns = {"field": self.field, "prompt": self.prompt, "completion": self.completion}
        if source.startswith(HUB):
            path, config, split = hub_parts(source)
            return Corpus.from_hub(path, config=config, split=split, schema=schema, **columns)
        return Corpus.from_file(source, schema=schema, **columns)

    def quiz(self, source: str | None, *, entity: str | None = None) -> Questions | None:
        """Read one quiz, likewise, if there is one; `entity`: the column that says whom a question is about."""
        if source is None:
            return None
        choices = self.choices.split(",") if self.choices is not None and "," in self.choices else self.choices
        prompt, answer, schema = self.question_prompt, self.answer, self.questions_schema
        if source.startswith(HUB):
            path, config, split = hub_parts(source)
            return Questions.from_hub(
                path,
                config=config,
                split=split,
                prompt=prompt,
                choices=choices,
                answer=answer,
                entity=entity,
                schema=schema,
            )
        return Questions.from_file(source, prompt=prompt, choices=choices, answer=answer, entity=entity, schema=schema)


def task_for(model: str, options: Mapping[str, Any]) -> UnlearningTask:
    """The data that a command's options name: files, or, for the demo without files, a topic of its world.

    Raises:
        ValueError: one of --forget and --retain without the other, or neither for a model of one's own.
    """
    given = [name for name in ("forget", "retain") if options.get(name)]
    if len(given) == 2:
        return DataOptions.from_options(options).task()
    if given:
        raise ValueError("--forget and --retain go together; leave both out for the demo's world")
    if model != "demo":
        raise ValueError(
            "give --forget and --retain (and questions) for a model of your own; only the demo has a world"
        )
    return UnlearningTask.from_world(options["topic"])


def hub_parts(source: str) -> tuple[str, str | None, str | None]:
    """Name, configuration and split of `hub:NAME[:CONFIG[:SPLIT]]`; an empty configuration is the usual one.

    Raises:
        ValueError: there is no name, or there are more parts.
    """
    path, *rest = source.removeprefix(HUB).split(":")
    if not path or len(rest) > 2:
        raise ValueError(
            f"{source!r} is no data set of the Hub; write hub:NAME, hub:NAME:CONFIG or hub:NAME:CONFIG:SPLIT"
        )
    config, split = (*rest, "", "")[:2]
    return path, config or None, split or None


def split_tenth(corpus: Corpus) -> tuple[Corpus, Corpus]:
    """(for the fit, held out): every tenth document, at most 200, is kept from the fit; under ten documents, none is."""
    places = set(range(9, len(corpus), 10)[:HELD_OUT])
    if not places:
        logger.warning("%s: under 10 documents, so text perplexity is measured on what the fit saw", corpus.name)
        return corpus, corpus
    kept = tuple(document for i, document in enumerate(corpus.documents) if i not in places)
    held = tuple(document for i, document in enumerate(corpus.documents) if i in places)
    return replace(corpus, documents=kept), replace(corpus, documents=held)
