"""Which attacks there are, and what each says of itself to the suite, the command line, the report page and the leaderboard."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import pandas as pd

from mrp_lens.utils.registry import Registry
from mrp_lens.utils.validation import PlainSettings

if TYPE_CHECKING:
    from mrp_lens.attacks.suite import Setting

Frames = Mapping[str, pd.DataFrame]


class Attack(PlainSettings, ABC):
    """An attack: a frozen dataclass of budgets that is run on a model with an edit.

    Attributes:
        name: that tables and commands use.
        summary: one line on what it does.
        source: the paper, such as "arXiv 2410.08827".
    """

    name: ClassVar[str] = ""
    summary: ClassVar[str] = ""
    source: ClassVar[str] = ""

    @abstractmethod
    def run(self, setting: "Setting") -> Frames:
        """What it finds: name of a figure (or any name of its own) -> tidy frame. Whatever takes longer than a few seconds is
        kept in `setting.store`, so that an interrupted suite goes on."""

    @abstractmethod
    def rows(self, frames: Frames, name: str) -> Iterable[Mapping[str, Any]]:
        """The rows of the summary table: `method`, `attack`, and where they apply `accuracy_before`, `accuracy_edited`,
        `accuracy_after`, `floor`, `ceiling`, `recovery` with `recovery_low` and `recovery_high`; controls are rows too.

        Args:
            frames: of `run`.
            name: of the edit.
        """

    def notes(self, frames: Frames, name: str) -> Iterable[str]:
        """Sentences that must be known to read the rows."""
        return ()


ATTACKS: Registry[type[Attack]] = Registry("attack", "mrp_lens.attacks")

Kind = TypeVar("Kind", bound=type[Any])


def register(name: str, *, summary: str, source: str) -> Callable[[Kind], Kind]:
    """Make an attack known by its name.

        @register("mine", summary="Does what I want.", source="arXiv 0000.00000")
        @dataclass(frozen=True, kw_only=True)
        class Mine(Attack): ...

    Raises:
        ValueError: the name is taken or ill-formed.
    """

    def registered(kind: Kind) -> Kind:
        kind.name, kind.summary, kind.source = name, summary, source
        ATTACKS.add(name, kind)
        return kind

    return registered
