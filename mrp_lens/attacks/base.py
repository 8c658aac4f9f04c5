"""What an attack is, and what it is given: a model with its edit, and the facts split by what the attacker may see."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, TypeVar

import pandas as pd

from mrp_lens.attacks.evaluation import check_held_out, check_untaught
from mrp_lens.data import Questions
from mrp_lens.data.questions import Half
from mrp_lens.data.task import UnlearningTask
from mrp_lens.edits import Edit
from mrp_lens.models import LensModel
from mrp_lens.utils.interrupts import complete
from mrp_lens.utils.result_store import ResultStore
from mrp_lens.utils.validation import PlainSettings

Frames = Mapping[str, pd.DataFrame]
AttackKind = TypeVar("AttackKind", bound="Attack")
HALVED_BY_QUESTION = (
    "The attacker's questions and those that are scored may be about the same entity, of which what is taught of it may tell something: the "
    "questions do not say whom they are about. Name the column that does with --entity."
)
"""Of a split that did not draw entities."""


@dataclass(frozen=True)
class FactSplit:
    """The facts of a task by what an attacker may see of them, as questions.

    Attributes:
        train: T, of which the attacker knows the answers.
        held_out: V, which recovery is measured on.
        untaught: what the model was never taught; None: there are no such questions.
        new: a half of these that is no floor, taught as new facts.
    """

    train: Questions
    held_out: Questions
    untaught: Questions | None
    new: Questions | None

    @classmethod
    def of(
        cls, task: UnlearningTask, *, by: Half | None = None, limit: int | None = None, seed: int = 0
    ) -> "FactSplit":
        """The task's questions, split and checked; the arguments are those of `UnlearningTask.split`.

        Raises:
            ValueError: there are no questions about what was forgotten, or they cannot be split so.
        """
        train, held_out = task.split(by, limit=limit, seed=seed)
        untaught = task.untaught_alike
        check_held_out(held_out, train=train)
        check_untaught(untaught, train=train, held_out=held_out)
        return cls(train, held_out, untaught, None if untaught is None else untaught.halves(seed=seed)[1])

    def fingerprints(self) -> dict[str, str]:
        """Role -> hash of the questions."""
        parts = {"train": self.train, "held_out": self.held_out, "untaught": self.untaught}
        return {role: part.fingerprint for role, part in parts.items() if part is not None}


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What an attack of a suite is run on.

    Attributes:
        model: without the edit; left exactly as it is.
        edit: what is attacked.
        name: of the edit, in frames and rows.
        task: the data.
        facts: the questions of the task, split.
        reference: a model that never saw what was forgotten, if there is one.
        store: the folder of the suite.
        budgets: of all attacks, also of those that are not run.
        seed: of every random choice.
        progress: show progress bars.
    """

    model: LensModel
    edit: Edit
    name: str
    task: UnlearningTask
    facts: FactSplit
    reference: LensModel | None
    store: ResultStore
    budgets: tuple["Attack", ...]
    seed: int
    progress: bool

    @property
    def retain_questions(self) -> Questions | None:
        """As many as there are in V."""
        quiz = self.task.retain_questions
        return None if quiz is None else quiz.spread(len(self.facts.held_out))

    def arguments(self, *facts: str) -> dict[str, Any]:
        """Keyword arguments of an attack's function: these parts of the facts, `seed` and `progress`."""
        return {name: getattr(self.facts, name) for name in facts} | {"seed": self.seed, "progress": self.progress}

    def budget(self, kind: type[AttackKind]) -> AttackKind:
        """The budget of another attack, on which one that looks at its result depends."""
        return next((attack for attack in self.budgets if isinstance(attack, kind)), kind())

    def frame(self, name: str, compute: Callable[[], pd.DataFrame]) -> pd.DataFrame:
        """The frame of that name, computed and kept unless it is there.

        Raises:
            KeyboardInterrupt: Ctrl-C cut it short, so that it is not kept.
        """
        return self.store.frame(name, lambda: complete(compute()))


@dataclass(frozen=True, kw_only=True)
class Attack(PlainSettings, ABC):
    """An attack: a frozen dataclass of budgets, each with a default, that is run on a model with an edit.

    Attributes:
        name: that tables and commands use.
        summary: one line on what it does.
        source: the paper, such as "arXiv 2410.08827".
    """

    name: ClassVar[str] = ""
    summary: ClassVar[str] = ""
    source: ClassVar[str] = ""

    def resolved(self: AttackKind, model: LensModel, edit: Edit) -> AttackKind:
        """These budgets as they will be spent on a model and edit; called before anything is written.

        Raises:
            ValueError: what cannot be done with them.
        """
        return self

    def check_facts(self, facts: FactSplit) -> None:
        """Refuse facts with which it cannot be run; called before anything is written.

        Raises:
            ValueError: what is missing.
        """

    @abstractmethod
    def run(self, setting: Setting) -> Frames:
        """What it finds: name of a figure (or any name of its own) -> tidy frame. Whatever takes longer than a few seconds is
        kept in `setting.store`, so that an interrupted suite goes on."""

    @abstractmethod
    def rows(self, frames: Frames, name: str) -> Iterable[Mapping[str, Any]]:
        """The rows of the summary table: `method`, `attack`, and where they apply `accuracy_before`, `accuracy_edited`,
        `accuracy_after`, `floor`, `ceiling`, `recovery` with `recovery_low` and `recovery_high`; controls are rows too.

        Args:
            frames: of `run`, and of the other attacks that were run.
            name: of the edit.
        """

    def notes(self, frames: Frames, name: str) -> Iterable[str]:
        """Sentences that must be known to read the rows."""
        return ()


def labelled(parts: Mapping[str, Questions | None]) -> Questions:
    """Questions as one set, each part with its name as the group."""
    return Questions(
        tuple(replace(q, group=name) for name, part in parts.items() if part is not None for q in part.questions)
    )
