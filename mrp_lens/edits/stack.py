"""Several edits as one."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from typing_extensions import override

from mrp_lens.edits.base import Edit
from mrp_lens.edits.folder import field
from mrp_lens.edits.projection import ProjectionEdit
from mrp_lens.edits.serialization import KINDS, register
from mrp_lens.edits.weight import WeightEdit
from mrp_lens.models import LensModel
from mrp_lens.models.attachments import On


class EditStack(Edit):
    """Edits applied in order; `edit_a + edit_b` makes one, and joins the projections among them.

    Args:
        parts: the edits; of a stack among them, its parts.

    Raises:
        TypeError: a part is not an edit.
        ValueError: no parts, or two projections at one hook, which would have to be joined.
    """

    kind = "stack"

    def __init__(self, parts: Sequence[Edit]) -> None:
        for part in parts:
            if not isinstance(part, Edit):
                raise TypeError(f"a stack is made of edits, got {type(part).__name__}")
        self._parts = tuple(own for part in parts for own in part.parts)
        hooks = [hook for part in self._parts if isinstance(part, ProjectionEdit) for hook in part.hook_names]
        if not self._parts or len(set(hooks)) < len(hooks):
            raise ValueError(
                "a stack needs an edit at least, and at each hook one projection at most; join them: edit_a + edit_b"
            )
        self.provenance: Mapping[str, Any] = {}

    @property
    @override
    def parts(self) -> tuple[Edit, ...]:
        return self._parts

    @property
    @override
    def layers(self) -> tuple[int, ...]:
        return tuple(sorted({layer for part in self.parts for layer in part.layers}))

    @override
    def _put_on(self, model: LensModel, entry: On, *, check: bool) -> None:
        for part in self.parts:
            part._put_on(model, entry, check=check)

    @override
    def to_parts(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        described = []
        tensors: dict[str, Tensor] = {}
        for number, part in enumerate(self.parts):
            settings, owned = part.to_parts()
            described.append({"kind": part.kind, "settings": settings, "provenance": dict(part.provenance)})
            tensors |= {f"{number}/{name}": tensor for name, tensor in owned.items()}
        return {"parts": described}, tensors

    @classmethod
    @override
    def from_parts(cls, settings: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> "EditStack":
        described = field(settings, "parts", list)
        owned: dict[str, dict[str, Tensor]] = {str(number): {} for number in range(len(described))}
        for name, tensor in tensors.items():
            number, _, own = name.partition("/")
            if number not in owned:
                raise ValueError(f"the tensor {name!r} belongs to no part of the stack")
            owned[number][own] = tensor
        parts = []
        for entry, mine in zip(described, owned.values(), strict=True):
            kind, provenance = field(entry, "kind", str), field(entry, "provenance", dict)
            if kind not in KINDS or kind == cls.kind:
                raise ValueError(f"a part of the stack is of the kind {kind!r}, which none can be")
            part = KINDS[kind].from_parts(field(entry, "settings", dict), mine)
            part.provenance = provenance
            parts.append(part)
        return cls(parts)

    def __repr__(self) -> str:
        return f"EditStack({list(self.parts)})"


def stacked(*edits: Edit) -> Edit:
    """One edit out of several; projections join at the place of the first."""
    parts: list[Edit] = []
    for edit in edits:
        for part in edit.parts:
            place = next((i for i, known in enumerate(parts) if isinstance(known, ProjectionEdit)), None)
            if isinstance(part, ProjectionEdit) and place is not None:
                known = parts[place]
                assert isinstance(known, ProjectionEdit)
                parts[place] = known.join(part)
            else:
                parts.append(part)
    return parts[0] if len(parts) == 1 else EditStack(parts)


def projection_in(edit: Edit | None) -> ProjectionEdit | None:
    """The projection that an edit holds, if any."""
    return next((part for part in _parts(edit) if isinstance(part, ProjectionEdit)), None)


def besides_projections(edit: Edit | None) -> Edit | None:
    """The edit without the projection that it holds."""
    others = [part for part in _parts(edit) if not isinstance(part, ProjectionEdit)]
    return EditStack(others) if others else None


def has_hooks(edit: Edit | None) -> bool:
    """Whether a part of it is a hook that can be taken off, and no weight."""
    return any(not isinstance(part, WeightEdit) for part in _parts(edit))


def stripped(edit: Edit | None) -> Edit | None:
    """What is left of an edit when its hooks are removed: the weights that it writes; None if it writes none."""
    written = [part for part in _parts(edit) if isinstance(part, WeightEdit)]
    return stacked(*written) if written else None


def _parts(edit: Edit | None) -> tuple[Edit, ...]:
    """The parts of an edit; none where there is no edit."""
    return () if edit is None else edit.parts


register(EditStack)
