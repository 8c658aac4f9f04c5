"""An edit in the weights instead of hooked: exact only where nothing stands between a matrix and the hook behind it."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from mrp_lens.edits.subspace import Subspace
from mrp_lens.models import LensModel, architecture_of, device_of, dtype_of, is_bridge, logits_of, restored
from mrp_lens.models.architectures import LAYOUTS
from mrp_lens.models.hooks import frozen, layer_of, site_of

if TYPE_CHECKING:
    from mrp_lens.edits.base import Edit

PROBE = (4, 16)  # rows and tokens of the random input on which weights and hooks are compared
ALLOWED = {torch.float32: 1e-4, torch.float64: 1e-8}  # largest difference, in standard deviations of the logits
ALLOWED_COARSE = 0.2  # bfloat16 and float16, where the projected weights are rounded: no proof, only a safeguard

# site -> TransformerLens's names: part of a block, the Bridge's output matrix, HookedTransformer's matrix and bias
OUTPUTS = {"mlp_out": ("mlp", "out", "W_out", "b_out"), "attn_out": ("attn", "o", "W_O", "b_O")}


@contextmanager
def applied_in_weights(model: LensModel, edit: "Edit") -> Iterator[list[torch.nn.Parameter]]:
    """Inside, the edit is on with its projections multiplied into the matrices and biases that write to the stream.

    Exact for the sites `mlp_out` and `attn_out` where no norm follows the matrix, and for `resid_pre` of layer 0 (into
    the embeddings) where these are not tied to the unembedding. Compared with the hooks on random tokens first.

    Yields:
        The tensors that were changed.

    Raises:
        ValueError: this edit has no such form (steering, or a projection elsewhere), or the model computes something
            else with it; the model is left as it was.
    """
    layout, dtype = LAYOUTS.get(architecture_of(model)), dtype_of(model)
    reason = edit.why_not_mergeable(layout)
    if reason is None and layout is None and dtype not in ALLOWED:
        reason = f"whether that is exact in this architecture cannot be told in {dtype}"
    if reason is not None:
        raise not_mergeable(reason)
    written = list({id(parameter): parameter for parameter in edit.merge_targets(model)}.values())
    with restored(written):
        with edit.applied(model):
            wanted = _logits(model)
        edit.write_over(model)
        off = float((_logits(model) - wanted).abs().max() / wanted.std())
        if not off <= ALLOWED.get(dtype, ALLOWED_COARSE):
            raise ValueError(
                f"written into the weights of this model, the edit gives logits that differ by {off:.2g} of their spread: something stands "
                "between the matrix and the hook, or the embeddings are tied; keep the edit as hooks"
            )
        yield written


def not_mergeable(reason: str) -> ValueError:
    """The error that says why an edit stays hooks."""
    return ValueError(f"this edit cannot be written into weights: {reason}. Keep the edit as hooks")


def writers(model: LensModel, hook: str) -> list[tuple[torch.nn.Parameter, int]]:
    """The tensors whose sum of outputs is what a hook sees, each with its axis of the stream. For hooks at `OUTPUTS`, and
    `resid_pre` of layer 0.

    Raises:
        ValueError: there are several matrices, or the embeddings are tied.
    """
    found = _writers(model, hook)
    if not found:
        raise not_mergeable(f"behind {hook} there is no single matrix (a mixture of experts, perhaps)")
    if {id(parameter) for parameter, _ in found} & {id(parameter) for parameter in model.unembed.parameters()}:
        raise not_mergeable("the embeddings that would be changed are tied to the unembedding")
    return found


def project_writers(found: list[tuple[torch.nn.Parameter, int]], subspace: Subspace) -> None:
    """Remove the subspace from what these tensors write."""
    with torch.no_grad():
        for parameter, axis in found:
            values = parameter.movedim(axis, -1)
            values.copy_(subspace.to(values.device).project_out(values))


def _writers(model: LensModel, hook: str) -> list[tuple[torch.nn.Parameter, int]]:
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
