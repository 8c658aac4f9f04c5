"""The tensors behind a hook, and a projection multiplied into them: exact only where nothing stands between the two."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mrp_lens.edits.subspace import Subspace
from mrp_lens.models import LensModel, device_of, is_bridge, logits_of
from mrp_lens.models.hooks import frozen, layer_of, site_of

PROBE = (4, 16)  # rows and tokens of the random input
ALLOWED = {torch.float32: 1e-4, torch.float64: 1e-8}  # largest difference, in standard deviations of the logits
ALLOWED_COARSE = 0.2  # bfloat16 and float16, where the projected weights are rounded: no proof, only a safeguard

# site -> TransformerLens's names: part of a block, the Bridge's output matrix, HookedTransformer's matrix and bias
OUTPUTS = {"mlp_out": ("mlp", "out", "W_out", "b_out"), "attn_out": ("attn", "o", "W_O", "b_O")}


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


def probe_logits(model: LensModel) -> Float[Tensor, "batch seq d_vocab"]:
    """Logits of random tokens, in float32, on which weights and hooks are compared."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(int(model.W_E.shape[0]), PROBE, generator=generator).to(device_of(model))
    with frozen(model), torch.no_grad():
        return logits_of(model, tokens, torch.ones_like(tokens, dtype=torch.bool)).float()
