"""Less of an edit, or more: states and matrices go a part of the way that it moves them."""

import math
from typing import Any

import torch
from torch import Tensor

from mrp_lens.edits.base import Edit, EditStack, Wrapper
from mrp_lens.edits.projection import ProjectionEdit
from mrp_lens.edits.provenance import of_model_alone
from mrp_lens.edits.steering import SteeringEdit
from mrp_lens.edits.weight import WeightEdit
from mrp_lens.edits.wrapped import WrappedEdit
from mrp_lens.models import LensModel, weights_by_name
from mrp_lens.models.hooks import HookFunction


def at_strength(model: LensModel, edit: Edit, strength: float) -> Edit:
    """The edit at a strength s: where it turns a state h into e(h) this gives h + s (e(h) - h), and W + s (W' - W) of a matrix.

    So s = 0 is the unedited model and s = 1 the edit, bit for bit. Of a projection that is h - s (h Q^T) Q, which at s < 1
    removes nothing: it makes a part of the state smaller, which can be made large again. Hooks at a strength are for looking
    at, and are not saved. Of steering that adds, it is the coefficient times s; of steering that replaces, a mean of
    the state and of what replaces it, weighted by 1 - s and s.

    Args:
        model: without the edit: the matrices that a weight edit starts from are read from it.
        edit: of any kind of this library, or a stack of them.
        strength: s, from 0 to 1; beyond 1 where the edit only adds to states or writes weights.

    Raises:
        TypeError: a strength that is no number.
        ValueError: a strength outside of that, an edit of a kind that has no strength, or one of another model.

    Example:
        >>> with at_strength(model, edit, 0.5).applied(model):
        ...     half = ml.continuations(model, ["The colour of"])
    """
    most = most_strength(edit)
    if isinstance(strength, bool) or not isinstance(strength, int | float):
        raise TypeError(f"strength must be a number, got {strength!r}")
    if not 0.0 <= strength <= most or math.isinf(strength):
        beyond = (
            "" if math.isinf(most) else f" to {most:g}: beyond it a state would be reflected, and not edited further"
        )
        raise ValueError(f"strength must be a number from 0{beyond}, got {strength}")
    if strength == 1.0:
        return edit
    hooks = [part for part in edit.parts if not isinstance(part, WeightEdit)]
    weights = [part for part in edit.parts if isinstance(part, WeightEdit)]
    parts: list[Edit] = [_between(model, weights, strength)] if weights else []
    if hooks:
        wrapped = EditStack(hooks) if len(hooks) > 1 else hooks[0]
        parts.append(
            WrappedEdit(wrapped, _partly(strength), note=f"it is an edit at strength {strength:g}, for looking at")
        )
    return parts[0] if len(parts) == 1 else EditStack(parts)


def most_strength(edit: Edit) -> float:
    """The largest strength that makes sense: 1 where states are projected or replaced, infinity where they are added to or
    weights are written.

    Raises:
        ValueError: a part is of a kind that has no strength.
    """
    for part in edit.parts:
        if not isinstance(part, ProjectionEdit | SteeringEdit | WeightEdit):
            raise ValueError(
                f"an edit of the kind {type(part).__name__} has no strength; projections, steering and weight edits have one"
            )
    only_add = all(isinstance(part, WeightEdit) or getattr(part, "mode", "") == "add" for part in edit.parts)
    return math.inf if only_add else 1.0


def _partly(strength: float) -> Wrapper:
    def wrapper(edit: Edit, name: str, function: HookFunction) -> HookFunction:
        def hook(activation: Tensor, hook: Any) -> Tensor:
            changed = function(activation, hook)
            assert changed is not None
            wide = activation if activation.dtype == torch.float64 else activation.float()
            return (wide + strength * (changed.to(wide) - wide)).type_as(activation)

        return hook

    return wrapper


def _between(model: LensModel, edits: list[WeightEdit], strength: float) -> WeightEdit:
    """What the edits leave after one another, so far from the model's own matrices."""
    known = weights_by_name(model)
    last = {name: values for edit in edits for name, values in edit.tensors.items()}
    replaced = {name: hashes for edit in reversed(edits) for name, hashes in edit.replaces.items()}
    tensors = dict(last)  # what does not fit the model is refused by name when it is put on
    for name, values in last.items():
        if name in known and (own := known[name].read().cpu()).shape == values.shape:
            wide = own.double()
            tensors[name] = (wide + strength * (values.double() - wide)).to(own.dtype)
    return WeightEdit.of_own(tensors, replaced, provenance=of_model_alone(edits[0].provenance))
