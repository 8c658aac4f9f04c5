"""A projection written into the weights instead of hooked: exact only where nothing stands between matrix and hook."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mrp_lens.edits.base import Edit
from mrp_lens.edits.projection import ProjectionEdit
from mrp_lens.edits.steering import SteeringEdit
from mrp_lens.edits.subspace import Subspace
from mrp_lens.edits.weight import WeightEdit
from mrp_lens.models import (
    LensModel,
    architecture_of,
    device_of,
    dtype_of,
    is_bridge,
    logits_of,
    restored,
    weights_by_name,
)
from mrp_lens.models.architectures import LAYOUTS, Layout
from mrp_lens.models.attachments import entries_on
from mrp_lens.models.hooks import check_hook_names, frozen, layer_of, site_of

PROBE = (4, 16)  # rows and tokens of the random input on which weights and hooks are compared
ALLOWED = {torch.float32: 1e-4, torch.float64: 1e-8}  # largest difference, in standard deviations of the logits
ALLOWED_COARSE = 0.2  # bfloat16 and float16, where the projected weights are rounded: no proof, only a safeguard

# site -> TransformerLens's names: part of a block, the Bridge's output matrix, HookedTransformer's matrix and bias
OUTPUTS = {"mlp_out": ("mlp", "out", "W_out", "b_out"), "attn_out": ("attn", "o", "W_O", "b_O")}


@contextmanager
def folded(model: LensModel, edit: Edit) -> Iterator[list[torch.nn.Parameter]]:
    """Inside, the edit is on with its projections multiplied into the matrices and biases that write to the stream.

    Exact for the sites `mlp_out` and `attn_out` where no norm follows the matrix, and for `resid_pre` of layer 0 (into
    the embeddings) where these are not tied to the unembedding. Compared with the hooks on random tokens first.

    Yields:
        The tensors that were changed.

    Raises:
        ValueError: this edit has no such form (steering, or a projection elsewhere), or the model computes something
            else with it; the model is left as it was.
    """
    written = _written_by(model, edit)
    with restored(written):
        _write(model, edit)
        yield written


def merge_(model: LensModel, edit: Edit) -> None:
    """See `Edit.merge_`."""
    if entries_on(model):
        raise ValueError(
            f"an edit is on this model and would be merged or lost with it ({entries_on(model)[0].edit!r}); take it off first: edit.detach(model)"
        )
    with folded(model, edit) as written:
        learned = [(parameter, parameter.detach().clone()) for parameter in written]
    with torch.no_grad():
        for parameter, values in learned:
            parameter.copy_(values)


def why_not_foldable(edit: Edit, layout: Layout | None) -> str | None:
    """Why an edit cannot be written into an architecture's weights exactly; None if it can (untied, where it changes the
    embeddings), or if that is all that can be said without its layout."""
    for part in edit.parts:
        if isinstance(part, SteeringEdit):
            return "steering overwrites states, which no matrix of the model does"
        for hook in part.hook_names if isinstance(part, ProjectionEdit) else ():
            layer, site = layer_of(hook), site_of(hook)
            if site in OUTPUTS and layout is not None and not layout.foldable:
                return f"in this architecture a norm stands between the matrix and {hook}"
            if site not in OUTPUTS and (site, layer) != ("resid_pre", 0):
                return (
                    f"at {hook} the stream is a sum of many layers' outputs, and the norm behind it divides by the length of that sum; "
                    "exact are mlp_out, attn_out, and resid_pre of layer 0"
                )
    return None


def _written_by(model: LensModel, edit: Edit) -> list[torch.nn.Parameter]:
    """The tensors that change when the edit is written into the model.

    Raises:
        ValueError: a part of it cannot be written exactly.
    """
    dtype = dtype_of(model)
    layout = LAYOUTS.get(architecture_of(model))
    reason = why_not_foldable(edit, layout)
    if layout is None and dtype not in ALLOWED:
        reason = reason or f"whether that is exact in this architecture cannot be told in {dtype}"
    parts = edit.parts if reason is None else ()
    hooks = [hook for part in parts if isinstance(part, ProjectionEdit) for hook in part.hook_names]
    check_hook_names(model, hooks)
    missing = next((hook for hook in hooks if not _writers(model, hook)), None)
    if missing is not None:
        reason = f"behind {missing} there is no single matrix (a mixture of experts, perhaps)"
    projected = [parameter for hook in hooks for parameter, _ in _writers(model, hook)]
    if {id(parameter) for parameter in projected} & {id(parameter) for parameter in model.unembed.parameters()}:
        reason = "the embeddings that would be changed are tied to the unembedding"
    if reason is not None:
        raise ValueError(f"this edit cannot be written into weights: {reason}. Keep the edit as hooks")
    names = [name for part in parts if isinstance(part, WeightEdit) for name in part.tensors]
    known = weights_by_name(model) if names else {}
    written = [known[name].parameter for name in names if name in known]
    return list({id(p): p for p in [*projected, *written]}.values())


def _write(model: LensModel, edit: Edit) -> None:
    """Write the edit and compare with its hooks.

    Raises:
        ValueError: the model computes something else with it.
    """
    with edit.applied(model):
        wanted = _logits(model)
    # New matrices first: a hook projects what they write, wherever it stands in the stack.
    for part in sorted(edit.parts, key=lambda part: isinstance(part, ProjectionEdit)):
        if isinstance(part, ProjectionEdit):
            for hook, subspace in part.subspaces().items():
                _project(_writers(model, hook), subspace)
        else:
            assert isinstance(part, WeightEdit)
            part.write_over(model)
    off = float((_logits(model) - wanted).abs().max() / wanted.std())
    if not off <= ALLOWED.get(dtype_of(model), ALLOWED_COARSE):
        raise ValueError(
            f"written into the weights of this model, the edit gives logits that differ by {off:.2g} of their spread: something stands "
            "between the matrix and the hook, or the embeddings are tied; keep the edit as hooks"
        )


def _project(writers: list[tuple[torch.nn.Parameter, int]], subspace: Subspace) -> None:
    """Remove the subspace from what these tensors write."""
    with torch.no_grad():
        for parameter, axis in writers:
            values = parameter.movedim(axis, -1)
            values.copy_(subspace.to(values.device).project_out(values))


def _writers(model: LensModel, hook: str) -> list[tuple[torch.nn.Parameter, int]]:
    """The tensors whose sum of outputs is what the hook sees, each with its axis of the stream; none where there are several
    matrices. For hooks that `why_not_foldable` lets pass."""
    layer, site = layer_of(hook), site_of(hook)
    if site == "resid_pre" and layer == 0:
        embeddings = [getattr(model, name, None) for name in ("embed", "pos_embed")]
        return [(p, -1) for component in embeddings if component is not None for p in component.parameters()]
    part, output, matrix, bias = OUTPUTS[site]
    component: Any = getattr(model.blocks[layer], part)
    if not is_bridge(model):
        tensors = [getattr(component, name, None) for name in (matrix, bias)]
        found = [(tensor, -1) for tensor in tensors if tensor is not None]
        return found if len(found) == len(tensors) else []
    module = getattr(getattr(component, output, None), "original_component", None)
    if not isinstance(module, torch.nn.Module):
        return []
    axis = 0 if isinstance(module, torch.nn.Linear) else -1  # GPT-2's Conv1D is [in, out]
    return [(parameter, axis if parameter.ndim == 2 else 0) for parameter in module.parameters()]


def _logits(model: LensModel) -> Float[Tensor, "batch seq d_vocab"]:
    """Of random tokens, in float32."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(int(model.W_E.shape[0]), PROBE, generator=generator)
    tokens = tokens.to(device_of(model))
    with frozen(model), torch.no_grad():
        return logits_of(model, tokens, torch.ones_like(tokens, dtype=torch.bool)).float()
