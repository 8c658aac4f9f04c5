"""Requests that come one after another: the forget set of each, the retain set meanwhile, and how either is measured."""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from mrp_lens import metrics
from mrp_lens.data import Corpus, Questions, UnlearningTask
from mrp_lens.data.world import World
from mrp_lens.edits import Edit, edit_on
from mrp_lens.models import LensModel

Gone = Sequence[str]
"""Names of the requests so far."""


@dataclass(frozen=True)
class Requests:
    """What may be requested, and what is retained meanwhile.

    Attributes:
        forget: name of a request -> its forget set.
        quizzes: name of a request -> the quiz about it.
        retain: requests so far -> the retain set that a fit may see.
        kept: requests so far -> the retain quiz, by topic; None where nothing is left to be asked about.
        held_out: text that no fit sees.
        untaught: on what the model was never taught, if that is known.
    """

    forget: Mapping[str, Corpus]
    quizzes: Mapping[str, Questions]
    retain: Callable[[Gone], Corpus]
    kept: Callable[[Gone], Questions | None]
    held_out: Corpus
    untaught: Questions | None = None

    @classmethod
    def from_world(cls, topics: Sequence[str], *, limit: int | None = None) -> "Requests":
        """Topics of the demo's world: each belongs to the retain set until it is requested.

        Args:
            topics: that may be requested.
            limit: at most this many questions about each topic, evenly spread.
        """
        world = World()

        def kept(gone: Gone) -> Questions | None:
            left = [world.questions(topic, half=1).spread(limit) for topic in world.topics if topic not in gone]
            return Questions(tuple(q for quiz in left for q in quiz.questions), "world-kept") if left else None

        return cls(
            {topic: world.forget(topic) for topic in topics},
            {topic: world.questions(topic).spread(limit) for topic in topics},
            lambda gone: world.retain(without=tuple(gone)),
            kept,
            world.text(),
            world.questions(taught=False),
        )

    @classmethod
    def of_files(cls, task: UnlearningTask, quizzes: Sequence[Questions], *, limit: int | None = None) -> "Requests":
        """A forget corpus each, with one quiz each in the same order; the retain set is the same throughout.

        Raises:
            ValueError: not as many quizzes as corpora, or two corpora of one name.
        """
        names = [corpus.name for corpus in task.forget]
        if len(set(names)) < len(names):
            raise ValueError(f"requests are told apart by the names of their files; got {', '.join(names)}")
        if len(quizzes) != len(names):
            raise ValueError(
                f"each request is measured by questions of its own: {len(names)} files of --forget need as many of --questions, "
                f"in the same order; got {len(quizzes)}"
            )
        kept = task.retain_questions.spread(limit) if task.retain_questions is not None else None
        return cls(
            dict(zip(names, task.forget, strict=True)),
            {name: quiz.spread(limit) for name, quiz in zip(names, quizzes, strict=True)},
            lambda gone: task.retain,
            lambda gone: kept,
            task.held_out,
            task.untaught_questions,
        )

    def order(self, seed: int) -> tuple[str, ...]:
        """All requests, in the order that this seed draws."""
        return tuple(random.Random(f"mrp_lens requests {seed}").sample(list(self.forget), len(self.forget)))

    def fingerprints(self) -> dict[str, Any]:
        """Role -> hash of the data."""
        kept = self.kept(())
        untaught = {} if self.untaught is None else {"untaught": self.untaught.fingerprint}
        return {
            **untaught,
            # A list: `order` draws from the requests as they are given.
            "forget": [[name, corpus.fingerprint] for name, corpus in self.forget.items()],
            "quizzes": {name: quiz.fingerprint for name, quiz in self.quizzes.items()},
            "retain": self.retain(()).fingerprint,
            "kept": kept.fingerprint if kept is not None else None,
            "held_out": self.held_out.fingerprint,
        }

    def legacy_fingerprints(self) -> dict[str, Any]:
        """`fingerprints` as version 0.1 wrote them: entities did not count, nor the order of the requests."""

        def nameless(quiz: Questions | None) -> str | None:
            if quiz is None:
                return None
            return replace(quiz, questions=tuple(replace(q, entity="") for q in quiz.questions)).fingerprint

        quizzes = {name: nameless(quiz) for name, quiz in self.quizzes.items()}
        named = {name: corpus.fingerprint for name, corpus in self.forget.items()}
        known = {role: value for role, value in self.fingerprints().items() if role != "untaught"}
        return {**known, "forget": named, "quizzes": quizzes, "kept": nameless(self.kept(()))}

    def measure(self, model: LensModel, edit: Edit | None, *, asked: Gone, gone: Gone) -> dict[str, Any]:
        """What an edit did.

        Args:
            model: without the edit.
            edit: None: the model as it is.
            asked: the requests that are asked about.
            gone: the requests that need not stay.

        Returns:
            `asked`: request -> accuracy; `kept`: topic -> accuracy on the retain quiz, empty where nothing is left;
            `text_perplexity`.
        """
        kept = self.kept(gone)
        with edit_on(model, edit):
            return {
                "asked": {name: accuracy(model, self.quizzes[name]) for name in asked},
                "kept": topic_accuracies(model, kept) if kept is not None else {},
                "text_perplexity": float(metrics.perplexity(model, self.held_out)["perplexity"].iloc[0]),
            }


def accuracy(model: LensModel, questions: Questions) -> float:
    """Over all questions."""
    return float(metrics.accuracy(model, questions)["accuracy"].iloc[0])


def topic_accuracies(model: LensModel, questions: Questions) -> dict[str, float]:
    """Group of the questions -> accuracy; "all" where they have none."""
    table = metrics.accuracy(model, questions).set_index("group")["accuracy"]
    topics = table if len(table) == 1 else table.drop("all")
    return {str(name): float(value) for name, value in topics.items()}


def numbers_in(edit: Edit | None) -> int:
    """How many numbers an edit consists of."""
    return 0 if edit is None else sum(tensor.numel() for tensor in edit.to_parts()[1].values())
