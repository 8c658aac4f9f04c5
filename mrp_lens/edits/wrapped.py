"""An edit of which each hook function is exchanged for another: one that does a part of it, or notes what passes."""

from collections.abc import Mapping
from typing import Any, NoReturn

from torch import Tensor
from typing_extensions import override

from mrp_lens.edits.base import Edit, Wrapper, as_it_is
from mrp_lens.edits.projection import ProjectionEdit
from mrp_lens.edits.steering import SteeringEdit
from mrp_lens.models import Layout, LensModel
from mrp_lens.models.attachments import AppliedEdit


class WrappedEdit(Edit):
    """For the length of a look: it is put on and taken off as any edit, and neither saved, nor merged, nor exported.

    Args:
        edit: what is wrapped; of a stack each part, in order. What writes weights, and hooks of kinds of edit that are
            not this library's own, stay as they are.
        wrapper: from the part, the name of its hook and what it does there, to what is done there instead.
        note: why it is not saved, for the refusal.
    """

    def __init__(self, edit: Edit, wrapper: Wrapper, *, note: str = "it only watches an edit") -> None:
        self.edit, self._wrapper, self._note = edit, wrapper, note
        self.provenance = edit.provenance
        self.kind = edit.kind  # type: ignore[misc]  # of the object alone: in no file is there such a kind

    @property
    @override
    def layers(self) -> tuple[int, ...]:
        return self.edit.layers

    @property
    @override
    def sole_hooks(self) -> tuple[str, ...]:
        return self.edit.sole_hooks

    @override
    def _check_model(self, model: LensModel, check: bool) -> None:
        self.edit._check_model(model, check)

    @override
    def _put_on(self, model: LensModel, entry: AppliedEdit, *, check: bool, wrapped: Wrapper = as_it_is) -> None:
        def both(part: Edit, hook: str, function: Any) -> Any:
            return wrapped(part, hook, self._wrapper(part, hook, function))

        for part in self.edit.parts:
            if isinstance(part, ProjectionEdit | SteeringEdit | WrappedEdit):
                part._put_on(model, entry, check=check, wrapped=both)
            else:
                part._put_on(model, entry, check=check)

    @override
    def why_not_mergeable(self, layout: Layout | None) -> str | None:
        return self._note

    @override
    def to_parts(self) -> NoReturn:
        raise ValueError(f"this cannot be saved: {self._note}; save the edit itself, {self.edit!r}")

    @classmethod
    @override
    def from_parts(cls, settings: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> NoReturn:
        raise ValueError("a wrapped edit is never saved, so there is nothing to load")

    @override
    def __eq__(self, other: object) -> bool:
        return self is other

    @override
    def __hash__(self) -> int:
        return id(self)

    def __repr__(self) -> str:
        return f"WrappedEdit({self.edit!r}: {self._note})"
