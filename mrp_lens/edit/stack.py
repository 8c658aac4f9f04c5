"""Several edits as one."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from typing_extensions import override

from mrp_lens.edit.base import Edit
from mrp_lens.edit.projection import ProjectionEdit
from mrp_lens.edit.storage import KINDS, register
from mrp_lens.edit.weight import WeightEdit
from mrp_lens.model import LensModel
from mrp_lens.model.edits_on import On


class EditStack(Edit):
    """Edits applied in order; all projections among them are joined into one."""

    kind = "stack"

    def __init__(self, parts: Sequence[Edit]) -> None:
        self._parts = tuple(parts)
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
        parts = []
        for number, described in enumerate(settings["parts"]):
            owned = {
                name.split("/", 1)[1]: tensor
                for name, tensor in tensors.items()
                if name.split("/", 1)[0] == str(number)
            }
            part = KINDS[described["kind"]].from_parts(described["settings"], owned)
            part.provenance = described["provenance"]
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
