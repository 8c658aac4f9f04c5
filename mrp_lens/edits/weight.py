"""RMU's edit: new values for a few matrices of the checkpoint."""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from mrp_lens.edits.base import Edit
from mrp_lens.edits.serialization import setting
from mrp_lens.models import EditableWeight, Layout, LensModel, same_tensor, weights_by_name
from mrp_lens.models.attachments import AppliedEdit, write

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class WeightEdit(Edit):
    """New tensors, in the checkpoint's names and layout, with the hashes of those they replace.

    So the same edit fits a HookedTransformer and a TransformerBridge, and is refused on a model whose tensors are
    not the ones it was trained from.

    Args:
        tensors: name in the checkpoint -> new values, in the checkpoint's layout; copied (`of_own` keeps them as they are).
        replaces: name -> hashes of the old values (`model.tensor_digests`).
        provenance: how it came about.

    Raises:
        TypeError: a value is not a floating point tensor of an ordinary precision.
        ValueError: no tensors, NaN, or names without hashes.
    """

    kind = "weight"

    tensors: dict[str, Tensor]

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        replaces: Mapping[str, Mapping[str, str]],
        *,
        provenance: Mapping[str, Any] | None = None,
    ) -> None:
        self._set(tensors, replaces, dict(provenance or {}))
        self.tensors = {
            name: kept.clone() if kept.data_ptr() == tensors[name].data_ptr() else kept
            for name, kept in self.tensors.items()
        }

    @classmethod
    def of_own(
        cls,
        tensors: Mapping[str, Tensor],
        replaces: Mapping[str, Mapping[str, str]],
        *,
        provenance: Mapping[str, Any] | None = None,
    ) -> "WeightEdit":
        """The same without a copy, of tensors that nobody will change: matrices may be as large as the model."""
        edit = cls.__new__(cls)
        edit._set(tensors, replaces, dict(provenance or {}))
        return edit

    def _set(
        self,
        tensors: Mapping[str, Tensor],
        replaces: Mapping[str, Mapping[str, str]],
        provenance: dict[str, Any],
    ) -> None:
        if not tensors or set(tensors) != set(replaces):
            raise ValueError(
                f"tensors {sorted(tensors)} and the hashes of what they replace {sorted(replaces)} must name the same matrices, at least one"
            )
        for name, tensor in tensors.items():
            if not isinstance(tensor, Tensor) or tensor.dtype not in DTYPES:
                raise TypeError(
                    f"{name!r} must be a tensor in one of {', '.join(map(str, DTYPES))}, got {_kind(tensor)}"
                )
            if tensor.numel() and not all(bool(torch.isfinite(end)) for end in tensor.aminmax()):  # allocates nothing
                raise ValueError(f"{name!r} holds NaN or infinity")
        self.tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        self.replaces = {name: dict(digests) for name, digests in replaces.items()}
        self.provenance = provenance

    @property
    @override
    def made_for(self) -> Mapping[str, Any] | None:
        # It knows the matrices that it replaces, and may itself write the embedding by which a model is known.
        return None

    @property
    @override
    def layers(self) -> tuple[int, ...]:
        numbers = (re.search(r"\.(\d+)\.", name) for name in self.tensors)
        return tuple(sorted({int(number[1]) for number in numbers if number}))

    @override
    def _put_on(self, model: LensModel, entry: AppliedEdit, *, check: bool) -> None:
        self.write_into(model, weights_by_name(model), entry, check=check)

    def write_into(self, model: Any, known: Mapping[str, EditableWeight], entry: AppliedEdit, *, check: bool) -> None:
        """Put it on, given the matrices of a model by their names in the checkpoint."""
        for name, tensor in self.tensors.items():
            if name not in known:
                raise ValueError(
                    f"this model has no tensor {name!r} that can be edited; it has {', '.join(list(known)[:3])}, ... "
                    "A HookedTransformer has the MLP output matrices only; load the checkpoint with backend='bridge'"
                )
            current = known[name].read()
            if current.shape != tensor.shape:
                raise ValueError(
                    f"{name} has shape {list(tensor.shape)} in the edit and {list(current.shape)} in the model"
                )
            if check and not same_tensor(current, self.replaces[name]):
                raise ValueError(
                    f"{name} is not the matrix that this edit replaces: the model is another one, in another precision, or carries an edit "
                    "already. Load the model it was made for, stack edits in the order they were fitted, or pass check=False"
                )
        for name, tensor in self.tensors.items():
            write(model, entry, known[name], tensor)

    @override
    def why_not_mergeable(self, layout: Layout | None) -> str | None:
        return None

    @override
    def merge_targets(self, model: LensModel) -> list[torch.nn.Parameter]:
        known = weights_by_name(model)
        return [known[name].parameter for name in self.tensors if name in known]

    @override
    def write_over(self, model: LensModel) -> None:
        known = weights_by_name(model)
        for name, tensor in self.tensors.items():
            known[name].write(tensor)

    @override
    def to_parts(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        return {
            "replaces": self.replaces,
            "shapes": {name: list(tensor.shape) for name, tensor in self.tensors.items()},
        }, dict(self.tensors)

    @classmethod
    @override
    def from_parts(cls, settings: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> "WeightEdit":
        shapes, replaces = (setting(settings, name, dict) for name in ("shapes", "replaces"))
        for name, digests in replaces.items():
            if not isinstance(digests, dict) or not all(isinstance(value, str) for value in digests.values()):
                raise ValueError(f"the hashes of {name!r} must be names and their text, got {digests!r}")
        for name, shape in shapes.items():
            if list(tensors[name].shape) != shape:
                raise ValueError(f"{name!r} has shape {list(tensors[name].shape)}, the configuration says {shape}")
        return cls.of_own({name: tensors[name] for name in shapes}, replaces)

    def __repr__(self) -> str:
        return f"WeightEdit({list(self.tensors)})"


def _kind(value: object) -> str:
    return str(value.dtype) if isinstance(value, Tensor) else type(value).__name__
