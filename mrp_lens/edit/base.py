"""What every edit can do: be applied for the length of a block, attached and detached, stacked, saved."""

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor

from mrp_lens.model import LensModel, check_same_model

Undo = Callable[[], bool]
"""Takes an edit off again; False if somebody had removed a part of it before."""

# model -> id of the edit -> the edit (kept alive) and how to take it off again
_attached: WeakKeyDictionary[Any, dict[int, tuple["Edit", Undo]]] = WeakKeyDictionary()


class Edit(ABC):
    """Something that was learned or built and changes what a model computes: data, not code.

    Attributes:
        provenance: how it came about (method, settings, model, data hashes, versions); empty if built by hand.
    """

    kind: str
    provenance: Mapping[str, Any]

    @property
    @abstractmethod
    def layers(self) -> tuple[int, ...]:
        """The layers whose blocks it hooks or writes into, ascending."""

    @property
    def parts(self) -> tuple["Edit", ...]:
        """The edits that this one is made of, in order: itself, unless it is a stack."""
        return (self,)

    @abstractmethod
    def install(self, model: LensModel, *, check: bool = True) -> Undo:
        """Put the edit on and return how to take it off; nothing is changed if this raises."""

    @abstractmethod
    def to_parts(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Settings (JSON) and tensors, enough to build the edit again."""

    @classmethod
    @abstractmethod
    def from_parts(cls, settings: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> "Edit":
        """The inverse of `to_parts`.

        Raises:
            ValueError: a tensor is missing or has the wrong shape or content.
        """

    @contextmanager
    def applied(self, model: LensModel, *, check: bool = True) -> Iterator[LensModel]:
        """Apply the edit inside a `with` block; nothing remains on exit, whatever was raised inside.

        Args:
            model: HookedTransformer or TransformerBridge.
            check: refuse a model other than the one the edit was made for.

        Raises:
            ValueError: the model lacks a hook or tensor, has another width, or is not the edit's.

        Example:
            >>> with edit.applied(model):  # doctest: +SKIP
            ...     model.generate("Question: ...")
        """
        undo = self.install(model, check=check)
        try:
            yield model
        finally:
            undo()

    def attach(self, model: LensModel, *, check: bool = True) -> None:
        """Apply the edit until `detach`, for notebook cells. Survives `model.reset_hooks()`.

        Raises:
            ValueError: it is attached to this model already, or as `applied`.
        """
        mine = _attached.setdefault(model, {})
        if id(self) in mine:
            raise ValueError("this edit is attached to this model already; detach it first")
        mine[id(self)] = (self, self.install(model, check=check))

    def detach(self, model: LensModel) -> None:
        """Take the edit off again.

        Warns:
            UserWarning: its hooks were gone already (`reset_hooks(including_permanent=True)`).

        Raises:
            ValueError: it is not attached to this model.
        """
        entry = _attached.get(model, {}).pop(id(self), None)
        if entry is None:
            raise ValueError("this edit is not attached to this model")
        if not entry[1]():
            warnings.warn(
                "some hooks of this edit had been removed before detach, by reset_hooks(including_permanent=True) perhaps: "
                "what ran in between ran without them",
                UserWarning,
                stacklevel=2,
            )

    def __add__(self, other: "Edit") -> "Edit":
        """Both edits. Projections join (order does not matter); weight edits are applied in the order given."""
        from mrp_lens.edit.stack import stacked

        return stacked(self, other)

    def merge_(self, model: LensModel) -> None:
        """Write the edit into the loaded model for good: its hooks become weights. Only where that is exact.

        Args:
            model: HookedTransformer or TransformerBridge, without this edit on.

        Raises:
            ValueError: the edit has no such form on this model; says why. The model is left as it was.

        Example:
            >>> edit.merge_(model)  # doctest: +SKIP
        """
        from mrp_lens.edit.fold import merge_

        merge_(model, self)

    def save_pretrained(self, path: str | Path, *, overwrite: bool = False) -> None:
        """Write `edit_config.json` and `edit.safetensors` into a folder, whole or not at all.

        Raises:
            FileExistsError: the folder exists and is not empty, and `overwrite` is False.
        """
        from mrp_lens.edit.storage import save_edit

        save_edit(self, path, overwrite=overwrite)

    def _check_model(self, model: LensModel, check: bool) -> None:
        if check and "model" in self.provenance:
            check_same_model(model, self.provenance["model"])


def edit_on(model: LensModel, edit: Edit | None) -> AbstractContextManager[Any]:
    """`edit.applied(model)`, or nothing where the edit is None: the unedited model."""
    return nullcontext(model) if edit is None else edit.applied(model)


def check_width(model: LensModel, d_model: int, what: str) -> None:
    """Refuse tensors of another stream's width."""
    if model.cfg.d_model != d_model:
        raise ValueError(
            f"{what} has d_model {d_model}, the model {model.cfg.d_model}: this edit was made for another model"
        )
