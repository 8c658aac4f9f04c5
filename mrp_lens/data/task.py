"""The data of a study of unlearning: forget set, retain set and quizzes; and where they are read from."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, TypedDict, TypeVar

from typing_extensions import Unpack

from mrp_lens.data.documents import Corpus, Document
from mrp_lens.data.questions import Half, Questions
from mrp_lens.data.rows import MissingColumnError, digest
from mrp_lens.data.world import World
from mrp_lens.utils.sequences import common_start

HUB = "hub:"
HELD_OUT = 200  # at most this many retain documents are kept from the fit, and at most a tenth

logger = logging.getLogger(__name__)

Data = TypeVar("Data", Corpus, Questions)


class Columns(TypedDict, total=False):
    """How files or data sets are read; what each means, `TaskConfig` says."""

    field: str | None
    prompt: str | None
    completion: str | None
    question_prompt: str | None
    choices: str | tuple[str, ...] | None
    answer: str | None
    entity: str | None
    forget_schema: str | None
    retain_schema: str | None
    questions_schema: str | None
    retain_field: str | None


@dataclass(frozen=True)
class UnlearningTask:
    """The data of a study of unlearning: what a fit learns from, and the quizzes that say what it did.

    Attributes:
        forget: the forget set: one corpus, or several, of which each has a direction of its own in RMU.
        retain: the retain set that a fit may see.
        held_out: retain text that no fit sees, for perplexity.
        questions: the quiz on the forget set.
        retain_questions: the quiz on the retain set.
        untaught_questions: the untaught quiz, on what the model was never taught: what *absent* is.

    Example:
        >>> task = UnlearningTask.from_world("potions")
        >>> [len(quiz) for quiz in task.quiz(limit=10).values()]
        [10, 10]
        >>> train, held_out = task.split(limit=20)  # halves of the quiz on the forget set that share no entity
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

    @classmethod
    def from_files(
        cls,
        forget: str | Path | Sequence[str | Path],
        retain: str | Path,
        *,
        questions: str | Path | None = None,
        retain_questions: str | Path | None = None,
        untaught_questions: str | Path | None = None,
        **columns: Unpack[Columns],
    ) -> "UnlearningTask":
        """Read the forget set, the retain set (of which a tenth is held out) and the quizzes there are.

        Args:
            forget, retain, questions, retain_questions, untaught_questions: files or folders as `Corpus.from_file` reads
                them, or `hub:NAME[:CONFIG[:SPLIT]]`; `forget` may be several.
            **columns: how they are read: the fields of `TaskConfig` from `field` on.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: a file cannot be read; as `Corpus.from_rows` and `Questions.from_rows`.

        Example:
            >>> task = UnlearningTask.from_files(
            ...     "forget.jsonl", "retain.jsonl", questions="quiz.jsonl", question_prompt="Question: {question}\\nAnswer:"
            ... )
        """
        several = [forget] if isinstance(forget, str | Path) else list(forget)
        quizzes = {
            "questions": questions,
            "retain_questions": retain_questions,
            "untaught_questions": untaught_questions,
        }
        named = {role: None if place is None else str(place) for role, place in quizzes.items()}
        return TaskConfig(tuple(map(str, several)), str(retain), **named, **columns).load()

    @classmethod
    def from_hub(
        cls,
        forget: str | Sequence[str],
        retain: str,
        *,
        questions: str | None = None,
        retain_questions: str | None = None,
        untaught_questions: str | None = None,
        **columns: Unpack[Columns],
    ) -> "UnlearningTask":
        """`from_files` for data sets of the Hugging Face Hub: each `NAME`, `NAME:CONFIG` or `NAME:CONFIG:SPLIT`.

        Example:
            >>> task = UnlearningTask.from_hub(  # doctest: +SKIP
            ...     "locuslab/TOFU:forget10", "locuslab/TOFU:retain90", questions="locuslab/TOFU:forget10_perturbed"
            ... )
        """
        names = [forget] if isinstance(forget, str) else list(forget)
        asked, kept, untaught = (
            None if name is None else HUB + name for name in (questions, retain_questions, untaught_questions)
        )
        return cls.from_files(
            [HUB + name for name in names],
            HUB + retain,
            questions=asked,
            retain_questions=kept,
            untaught_questions=untaught,
            **columns,
        )

    @property
    def forget_texts(self) -> Corpus:
        """The forget set as one corpus named "forget"."""
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

    def legacy_fingerprints(self) -> dict[str, str]:
        """`fingerprints` as version 0.1 wrote them, by which its run folders are known: entities did not count, nor where
        one forget corpus ends and the next begins."""

        def nameless(quiz: Questions | None) -> Questions | None:
            return (
                None if quiz is None else replace(quiz, questions=tuple(replace(q, entity="") for q in quiz.questions))
            )

        quizzes = (nameless(quiz) for quiz in (self.questions, self.retain_questions, self.untaught_questions))
        return UnlearningTask((self.forget_texts,), self.retain, self.held_out, *quizzes).fingerprints()

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
        """(T, V): two halves of the quiz on the forget set: what an attacker may learn from, and what it is scored on.

        Args:
            by: "entity": none is in both halves; "question". None: `halved_by`.
            limit: at most this many questions in all, evenly spread.
            seed: of the draw.

        Raises:
            ValueError: there is no such quiz, or `by="entity"` and some do not say whom they are about.
        """
        if self.questions is None:
            raise ValueError("an attack is scored on a quiz on the forget set; give questions=...")
        return self.questions.spread(limit).halves(by=by or self.halved_by, seed=seed)

    @property
    def halved_by(self) -> Half:
        """What `split` draws: entities where all questions name theirs and there are several, else questions."""
        return "question" if self.questions is None else self.questions.halved_by

    def texts(self, *, limit: int | None = None) -> dict[str, Corpus]:
        """What states are read from, by side; at most `limit` documents of each, evenly spread."""
        return {"forget": self.forget_texts.spread(limit), "retain": self.retain.spread(limit)}

    def asked(self, *, limit: int | None = None) -> dict[str, Questions] | dict[str, Corpus]:
        """What confidence is measured on: the quizzes, or the texts where there are none; at most `limit` a side."""
        return self.quiz(limit=limit) or self.texts(limit=limit)

    def forget_prompts(self, *, limit: int) -> list[str]:
        """At most `limit` prompts of the quiz on the forget set, or, where there is none, beginnings of its documents."""
        if self.questions is not None:
            return [question.prompt for question in self.questions.spread(limit).questions]
        return [beginning(document) for document in self.forget_texts.spread(limit).documents]


def beginning(document: Document) -> str:
    """The prompt of a document; of one without, the first half of its first twelve words."""
    words = document.completion.split()[:12]
    return document.prompt or " ".join(words[: max(1, len(words) // 2)])


@dataclass(frozen=True)
class TaskConfig:
    """Where the data of a study are, and how they are read.

    A source is a .jsonl, .json, .csv, .tsv, .parquet or .txt file, a folder that `save_to_disk` of `datasets` wrote, or
    `hub:NAME[:CONFIG[:SPLIT]]`. A schema is the name of a known data set (`mrp_lens.data.KNOWN`) whose columns a source has.

    Attributes:
        forget: The sources of the forget set; each is a topic of its own.
        retain: The source of the retain set; a tenth is held out to measure perplexity on.
        questions: The source of the quiz on the forget set (multiple choice).
        retain_questions: The source of the quiz on the retain set.
        field: Column that holds the text of a document. Default: `text`, or the schema's.
        prompt: Template of a document's context, such as `Question: {question}\\nAnswer:`; instead of `field`.
        completion: Template of what follows the prompt and counts in the loss, such as ` {answer}`.
        question_prompt: Template of a question; braces name columns. Default: `{question}`, or the schema's.
        choices: Column with the list of choices, or several columns: `a,b,c,d`. Default: `choices`, or the schema's.
        answer: Column with the text, the letter or the index (from 0) of the right choice. Default: `answer`, or the schema's.
        forget_schema: Known data set whose columns the forget set has, such as `locuslab/TOFU`.
        retain_schema: Known data set whose columns the retain set has, such as `wikitext`.
        questions_schema: Known data set whose columns the quizzes have, such as `cais/wmdp`.
        untaught_questions: The source of the untaught quiz, on what the model was never taught: which shows what absent is.
        entity: Column of `questions` and `untaught_questions` that says whom or what a question is about; `retain_questions` may have it.
        retain_field: Column that holds the text of a retain document, where the retain set has other columns than the forget set:
            `field`, `prompt` and `completion` are then of the forget set alone.
    """

    forget: tuple[str, ...] = ()
    retain: str | None = None
    questions: str | None = None
    retain_questions: str | None = None
    field: str | None = None
    prompt: str | None = None
    completion: str | None = None
    question_prompt: str | None = None
    choices: str | tuple[str, ...] | None = None
    answer: str | None = None
    forget_schema: str | None = None
    retain_schema: str | None = None
    questions_schema: str | None = None
    untaught_questions: str | None = None
    entity: str | None = None
    retain_field: str | None = None

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> "TaskConfig":
        """Those of a command's options that have these names. In a template the two characters `\\n` are a line break,
        since a shell passes them so."""
        known = {field.name: options[field.name] for field in fields(cls) if field.name in options}
        for name in ("prompt", "completion", "question_prompt"):
            known[name] = known[name].replace("\\n", "\n") if known.get(name) else None
        return cls(**{**known, "forget": tuple(known.get("forget") or ())})

    @property
    def names_data(self) -> bool:
        """Whether it names a forget set and a retain set, so that there is something to load.

        Raises:
            ValueError: it names one of them alone.
        """
        if bool(self.forget) != bool(self.retain):
            missing = "retain" if self.forget else "forget"
            raise ValueError(
                f"forget and retain go together: give {missing}=..., too, or leave both out for the demo's world"
            )
        return bool(self.forget)

    def check_quiz_options(self) -> None:
        """Refuse columns of questions where there are none.

        Raises:
            ValueError: names the first that is given.
        """
        if self.questions or self.retain_questions or self.untaught_questions:
            return
        for name in ("question_prompt", "choices", "answer", "questions_schema", "entity"):
            if getattr(self, name) is not None:
                raise ValueError(f"{name}=... is of a quiz: give questions=..., too, or leave it out")

    def load(self) -> UnlearningTask:
        """Read everything; a tenth of the retain set is held out.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: no forget or no retain set is named, or a source cannot be read.
        """
        if not self.names_data or self.retain is None:
            raise ValueError("no data are named: give forget=... and retain=... (and questions=...)")
        forget = told_apart([self.corpus(source, self.forget_schema) for source in self.forget], self.forget)
        kept, held_out = split_tenth(self.corpus(self.retain, self.retain_schema, field=self.retain_field))
        asked, untaught = (
            self.quiz(source, entity=self.entity) for source in (self.questions, self.untaught_questions)
        )
        try:
            retained = self.quiz(self.retain_questions, entity=self.entity)
        except MissingColumnError:  # it need not say; one that lacks another column is refused again
            retained = self.quiz(self.retain_questions)
        if self.question_prompt is None and self.questions_schema is None:
            warn_of_another_form(forget, [quiz for quiz in (asked, retained, untaught) if quiz is not None])
        return UnlearningTask(forget, kept, held_out, asked, retained, untaught)

    def corpus(self, source: str, schema: str | None, *, field: str | None = None) -> Corpus:
        """Read one corpus; `field`: the column of its texts, where it is not read as the config says."""
        if field is not None:
            return _read(Corpus, source, field=field, schema=schema)
        return _read(Corpus, source, field=self.field, prompt=self.prompt, completion=self.completion, schema=schema)

    def quiz(self, source: str | None, *, entity: str | None = None) -> Questions | None:
        """Read one quiz, if there is one; `entity`: the column that says whom a question is about."""
        if source is None:
            return None
        choices: str | Sequence[str] | None = self.choices
        if isinstance(choices, str) and "," in choices:
            choices = [column.strip() for column in choices.split(",")]
        return _read(
            Questions,
            source,
            prompt=self.question_prompt,
            choices=choices,
            answer=self.answer,
            entity=entity,
            schema=self.questions_schema,
        )


def told_apart(corpora: Sequence[Corpus], sources: Sequence[str]) -> tuple[Corpus, ...]:
    """The corpora, those from files of one name with their folders' names before it: `bio/train.jsonl` and `cyber/train.jsonl`.

    Raises:
        ValueError: two have the same name all the same.
    """
    files = [corpus.name for corpus, source in zip(corpora, sources, strict=True) if not source.startswith(HUB)]
    named = []
    for corpus, source in zip(corpora, sources, strict=True):
        shared = files.count(corpus.name) > 1 and not source.startswith(HUB)
        named.append(
            replace(corpus, name=f"{Path(source).parent.name}-{corpus.name}".lstrip("-")) if shared else corpus
        )
    names = [new.name for old, new in zip(corpora, named, strict=True) if new is not old]
    if len(set(names)) < len(names):
        raise ValueError(
            f"some of {', '.join(sources)} would have one name, {max(names, key=names.count)!r}; rename a file or its folder, or leave out "
            "what is given twice"
        )
    return tuple(named)


def _read(kind: type[Data], source: str, **columns: Any) -> Data:
    """From the Hub, a file or a folder."""
    if source.startswith(HUB):
        path, config, split = hub_parts(source)
        return kind.from_hub(path, config=config, split=split, **columns)
    return kind.from_file(source, **columns)


def task_for(model: str, config: TaskConfig, *, topic: str | None = None) -> UnlearningTask:
    """The data to study a model with: what the config names, or, for the demo without any, a topic of its world.

    Args:
        model: as given to `load_model`.
        config: where the data are.
        topic: of the embedded world. None: "potions".

    Raises:
        ValueError: one of forget and retain without the other, neither for a model of one's own or beside other options of the data, a
            topic beside data, or an unknown topic.
    """
    if config.names_data:
        if topic is not None:
            raise ValueError(
                f"topic={topic!r} is of the demo's world, and forget=... and retain=... are data of your own; leave one out"
            )
        return config.load()
    given = [field.name for field in fields(config) if getattr(config, field.name) not in (None, ())]
    if given:
        raise ValueError(f"{given[0]}=... goes with forget=... and retain=...; give these, too")
    if model != "demo":
        raise ValueError(
            "give forget=... and retain=... (and questions=...) for a model of your own; only the demo has a world"
        )
    return UnlearningTask.from_world(topic or "potions")


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


def warn_of_another_form(forget: Sequence[Corpus], quizzes: Sequence[Questions]) -> None:
    """Say so where the prompts of the forget set all end alike, as with `\\nAnswer:`, and those of a quiz do not: a model that was
    trained on such prompts is then asked in a form that it does not know, and answers less of what it knows."""
    prompts = sorted({document.prompt for corpus in forget for document in corpus.documents})
    length = common_start(prompt[::-1] for prompt in prompts)
    ending = prompts[0][len(prompts[0]) - length :] if prompts else ""
    if len(prompts) < 2 or not any(map(str.isalpha, ending)):
        return
    for quiz in quizzes:
        asked = next((q.prompt for q in quiz.questions if not q.prompt.endswith(ending.rstrip())), None)
        if asked is not None:
            logger.warning(
                "%s: prompts of the forget set end with %r and this quiz's do not: %r. If the model was trained on the former, ask in "
                "that form: question_prompt=... (--question-prompt 'Question: {question}\\nAnswer:')",
                quiz.name,
                ending,
                asked if len(asked) <= 60 else f"...{asked[-60:]}",
            )


def split_tenth(corpus: Corpus) -> tuple[Corpus, Corpus]:
    """(for the fit, held out): every tenth document, at most 200, is kept from the fit, and with it its copies among the others; under
    ten documents, none is."""
    held = corpus.documents[9::10][:HELD_OUT]
    unseen = set(held)
    kept = tuple(document for document in corpus.documents if document not in unseen)
    if not held or not kept:
        logger.warning(
            "%s: under 10 different documents, so text perplexity is measured on what the fit saw", corpus.name
        )
        return corpus, corpus
    return replace(corpus, documents=kept), replace(corpus, documents=tuple(dict.fromkeys(held)))
