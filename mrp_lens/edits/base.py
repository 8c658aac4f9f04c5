"""What every edit can do: be applied for the length of a block, attached and detached, stacked, saved."""

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from mrp_lens.models import LensModel, check_lens_model, check_same_model
from mrp_lens.models.attachments import On, entries_on, exclusive, putting_on, take_off

Undo = Callable[[], bool]
"""Takes an edit off again; False if somebody had removed a part of it before."""


class Attached:
    """An edit that is on, until `detach`. Also a context manager, which takes it off at the end of the block."""

    def __init__(self, model: Any, entry: On) -> None:
        self._model, self._entry = model, entry

    def detach(self, *, discard: bool = False) -> None:
        """Take the edit off: the model computes what it did before, bit for bit.

        Args:
            discard: overwrite matrices that somebody else has changed meanwhile.

        Warns:
            UserWarning: the edit was not as it had been left: its hooks were gone, for example.

        Raises:
            ValueError: it was taken off already, or a matrix that it had written was changed by somebody else.
        """
        if not self.on:
            raise ValueError("this edit was detached already")
        _detach(self._model, self._entry, discard=discard)

    @property
    def on(self) -> bool:
        """Whether the edit is still on."""
        return self._entry in entries_on(self._model)

    def __enter__(self) -> "Attached":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.on and error is not None:
            take_off(self._model, self._entry, discard=True)  # a warning or a refusal would hide the error
        elif self.on:
            _detach(self._model, self._entry, discard=True)

    def __repr__(self) -> str:
        return f"Attached({self._entry.edit!r}, on={self.on})"


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
    def _put_on(self, model: LensModel, entry: On, *, check: bool) -> None:
        """Put the edit on and note each change as it is made; may raise at any point."""

    def install(self, model: LensModel, *, check: bool = True) -> Undo:
        """Put the edit on and return how to take it off; nothing is changed if this raises.

        Raises:
            ValueError: as `applied`.
        """
        entry = self.attach(model, check=check)._entry
        return lambda: not take_off(model, entry, discard=True)

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

        Warns:
            UserWarning: matrices that it had written, or its hooks, were changed inside; that is overwritten.

        Raises:
            ValueError: the model lacks a hook or tensor, has another width, or is not the edit's; the edit or a part of it is
                on already; another thread uses the model.

        Example:
            >>> with edit.applied(model):  # doctest: +SKIP
            ...     model.generate("Question: ...")
        """
        check_lens_model(model)
        with exclusive(model):
            handle = self.attach(model, check=check)
            with handle:
                yield model

    def attach(self, model: LensModel, *, check: bool = True) -> Attached:
        """Apply the edit until `detach`, for notebook cells. Survives `model.reset_hooks()`.

        A `copy.deepcopy` of the model carries the edit too, and `edit.detach(copy)` takes it off there.

        Returns:
            The handle: `.detach()` takes the edit off, and so does the end of a `with` block.

        Raises:
            ValueError: as `applied`.

        Example:
            >>> handle = edit.attach(model)  # doctest: +SKIP
            >>> handle.detach()  # doctest: +SKIP
        """
        check_lens_model(model)
        with putting_on(model, self) as entry:
            for part in self.parts:
                part._put_on(model, entry, check=check)
        return Attached(model, entry)

    def detach(self, model: Any, *, discard: bool = False) -> None:
        """Take the edit off again, whatever else was put on before or since.

        Args:
            model: what it was attached to, a plain Hugging Face model included.
            discard: overwrite matrices that somebody else has changed meanwhile.

        Warns:
            UserWarning: its hooks were gone already (`reset_hooks(including_permanent=True)`).

        Raises:
            ValueError: it is not attached to this model, or a matrix that it had written was changed by somebody else;
                nothing is changed then.
        """
        entry = next((entry for entry in entries_on(model) if entry.edit == self), None)
        if entry is None:
            raise ValueError("this edit is not attached to this model")
        _detach(model, entry, discard=discard)

    def __add__(self, other: "Edit") -> "Edit":
        """Both edits. Projections join (order does not matter); weight edits are applied in the order given."""
        from mrp_lens.edits.stack import stacked

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
        from mrp_lens.edits.merging import merge_

        merge_(model, self)

    def save_pretrained(self, path: str | Path, *, overwrite: bool = False) -> None:
        """Write `edit_config.json` and `edit.safetensors` into a folder, whole or not at all.

        Raises:
            FileExistsError: the folder exists and is not empty, and `overwrite` is False.
        """
        from mrp_lens.edits.serialization import save_edit

        save_edit(self, path, overwrite=overwrite)

    def __eq__(self, other: object) -> bool:
        """Whether both do the same, however they came about."""
        if self is other:
            return True
        if not isinstance(other, Edit) or type(self) is not type(other):
            return NotImplemented
        (settings, tensors), (others, other_tensors) = self.to_parts(), other.to_parts()
        return settings == others and _equal(tensors, other_tensors)

    def __hash__(self) -> int:
        return hash((self.kind, self.layers))

    def _check_model(self, model: LensModel, check: bool) -> None:
        if check and "model" in self.provenance:
            check_same_model(model, self.provenance["model"])


def edit_on(model: LensModel, edit: Edit | None) -> AbstractContextManager[Any]:
    """`edit.applied(model)`, or nothing where the edit is None: the unedited model."""
    return nullcontext(model) if edit is None else edit.applied(model)


def _detach(model: Any, entry: On, *, discard: bool) -> None:
    for problem in take_off(model, entry, discard=discard):
        warnings.warn(problem, UserWarning, stacklevel=3)


def _equal(tensors: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> bool:
    return tensors.keys() == others.keys() and all(
        tensor.dtype == others[name].dtype and torch.equal(tensor.cpu(), others[name].cpu())
        for name, tensor in tensors.items()
    )


def check_width(model: LensModel, d_model: int, what: str) -> None:
    """Refuse tensors of another stream's width."""
    if model.cfg.d_model != d_model:
        raise ValueError(
            f"{what} has d_model {d_model}, the model {model.cfg.d_model}: this edit was made for another model"
        )
