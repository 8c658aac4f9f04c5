"""Which methods there are, and what each says of itself to the command line, sweeps, the report page and the documentation."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from mrp_lens.utils.registry import Registry
from mrp_lens.utils.validation import PlainSettings

if TYPE_CHECKING:
    from mrp_lens.data import Corpus
    from mrp_lens.edits import Edit
    from mrp_lens.methods.base import Fit
    from mrp_lens.models import LensModel


@dataclass(frozen=True)
class Swept:
    """What a sweep varies of a method besides its seed.

    Attributes:
        layer: the field that says where: "layers" takes a list of one, "layer" a number.
        strength: the field that says how hard; None: there is none.
    """

    layer: str
    strength: str | None = None


class Method(PlainSettings, ABC):
    """A method: a frozen dataclass of hyperparameters (None: derived from the model) that fits an edit.

    Attributes:
        name: that tables and commands use.
        summary: one line on what it does.
        source: the paper, such as "arXiv 2403.03218".
        swept: what a sweep may vary; None: it is no method for sweeps.
        report: a sentence on what was done, with fields of the fit's settings in braces; several, if it leaves records of
            several phases: the first whose fields are all there is told.
    """

    name: ClassVar[str] = ""
    summary: ClassVar[str] = ""
    source: ClassVar[str] = ""
    swept: ClassVar[Swept | None] = None
    report: ClassVar[str | tuple[str, ...]] = ""

    @abstractmethod
    def fit(
        self,
        model: "LensModel",
        forget: "Corpus | Sequence[Corpus]",
        retain: "Corpus",
        *,
        seed: int = 0,
        after: "Edit | None" = None,
        progress: bool = True,
        checkpoint: str | Path | None = None,
        every: int = 25,
    ) -> "Fit":
        """Train on a model, which is left as it is."""


METHODS: Registry[type[Method]] = Registry("method", "mrp_lens.methods")

Kind = TypeVar("Kind", bound=type[Any])


def register(
    name: str, *, summary: str, source: str, swept: Swept | None = None, report: str | tuple[str, ...] = ""
) -> Callable[[Kind], Kind]:
    """Make a method known by its name.

        @register("mine", summary="Does what I want.", source="arXiv 0000.00000", swept=Swept(layer="layers"))
        @dataclass(frozen=True, kw_only=True)
        class Mine(Method): ...

    Raises:
        ValueError: the name is taken or ill-formed.
    """

    def registered(kind: Kind) -> Kind:
        kind.name, kind.summary, kind.source, kind.swept, kind.report = name, summary, source, swept, report
        METHODS.add(name, kind)
        return kind

    return registered
