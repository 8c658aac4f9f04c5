"""Which methods there are, and what each says of itself to the command line, sweeps, the report page and the documentation."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from mrp_lens.data import Corpus
from mrp_lens.edits import Edit
from mrp_lens.methods.fit import Fit
from mrp_lens.methods.search_space import Space, check_space
from mrp_lens.models import LensModel
from mrp_lens.training.callbacks import Callback
from mrp_lens.training.checkpoints import EVERY
from mrp_lens.utils.registry import Registry
from mrp_lens.utils.validation import PlainSettings


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

    A method of your own implements `fit` whole, or derives from `FitTemplate`, which has a `fit`, and implements its two
    steps.

    Attributes:
        name: that tables and commands use.
        summary: one line on what it does.
        source: the paper, such as "arXiv 2403.03218".
        swept: what a sweep may vary; None: it is no method for sweeps.
        space: setting -> what `tune` may draw for it; None: it cannot be tuned.
        report: a sentence on what was done, with fields of the fit's settings in braces; several, if it leaves records of
            several phases: the first whose fields are all there is told.
    """

    name: ClassVar[str] = ""
    summary: ClassVar[str] = ""
    source: ClassVar[str] = ""
    swept: ClassVar[Swept | None] = None
    space: ClassVar[Space | None] = None
    report: ClassVar[str | tuple[str, ...]] = ""

    @abstractmethod
    def fit(
        self,
        model: LensModel,
        forget: Corpus | Sequence[Corpus],
        retain: Corpus,
        *,
        seed: int = 0,
        after: Edit | None = None,
        request: str | None = None,
        progress: bool = True,
        checkpoint: str | Path | None = None,
        every: int = EVERY,
        callbacks: Sequence[Callback] = (),
    ) -> Fit:
        """Fit the method to a model, which is left as it is.

        In a process group of `torch.distributed` every process has to call this, with the same arguments. They share the work, and
        each returns the fit; the first one writes checkpoints and shows bars.

        Args:
            model: HookedTransformer or TransformerBridge, in any dtype (what is trained is float32).
            forget: the forget set; of several corpora each method says what it makes.
            retain: the retain set.
            seed: of everything random, such as the order of the data.
            after: an earlier edit, on during the fit; the result holds both.
            request: name of this request, for edits that are kept by request (projections). None: the names of the forget
                corpora.
            progress: show a progress bar.
            checkpoint: a folder of its own in which the fit is kept while it runs; the same call again goes on with a fit that
                was killed, and ends with the same bits. It is left there when the fit is done.
            every: updates after which it is written.
            callbacks: told of the start, of every update and of the end of training.

        Raises:
            TypeError: no Corpus, or a setting of another type.
            ValueError: a layer that does not exist, an empty corpus, a setting out of range, a request that `after` has
                already, a checkpoint of another fit.
            NonFiniteLossError: the loss became NaN or infinite.
            SystemExit: SIGTERM came while a fit with a checkpoint was trained; the step under way is saved.
        """


METHODS: Registry[type[Method]] = Registry("method", "mrp_lens.methods")

Class = TypeVar("Class", bound=type[Any])


def register(
    name: str,
    *,
    summary: str,
    source: str,
    swept: Swept | None = None,
    report: str | tuple[str, ...] = "",
    space: Space | None = None,
) -> Callable[[Class], Class]:
    """Make a method known by its name.

        @register("mine", summary="Does what I want.", source="arXiv 0000.00000", swept=Swept(layer="layers"))
        @dataclass(frozen=True, kw_only=True)
        class Mine(Method): ...

    Raises:
        ValueError: the name is taken or ill-formed, or the search space names what is no setting.
    """

    def registered(kind: Class) -> Class:
        if space is not None:
            check_space(space, kind)
        kind.name, kind.summary, kind.source, kind.swept, kind.report = name, summary, source, swept, report
        kind.space = space
        METHODS.add(name, kind)
        return kind

    return registered
