"""The tensors of a loaded model that its checkpoint holds: what anyone who retrains the checkpoint can change."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from mrp_lens.model.base import LensModel, is_bridge


@dataclass(frozen=True)
class CheckpointTensor:
    """One tensor of the checkpoint inside a loaded model.

    Attributes:
        name: the model's own name for it.
        depth: -1 in the embeddings, the layer inside a block, the number of layers behind the last block.
        parameter: its values.
        copy: HookedTransformer keeps tied embeddings twice; the transposed second copy, which has to follow.
    """

    name: str
    depth: int
    parameter: torch.nn.Parameter
    copy: torch.nn.Parameter | None = None

    @property
    def parameters(self) -> tuple[torch.nn.Parameter, ...]:
        """All that holds its values."""
        return (self.parameter,) if self.copy is None else (self.parameter, self.copy)


def checkpoint_tensors(model: LensModel) -> list[CheckpointTensor]:
    """Every tensor of the checkpoint once, in the model's order.

    Both classes hold more: biases that the checkpoint lacks, all of them 0, and HookedTransformer a second copy of tied
    embeddings. Training those too would let the two classes drift apart, and the result would fit no checkpoint. (A
    bias that is 0 in the checkpoint itself counts as absent; training leaves no bias so.)
    """
    depths = {id(p): layer for layer, block in enumerate(model.blocks) for p in block.parameters()}
    before = {id(p) for name in ("embed", "pos_embed") for p in _parameters_of(model, name)}
    tied = None if is_bridge(model) else _untied_copy(model)
    tensors = []
    for name, parameter in {id(p): (name, p) for name, p in model.named_parameters()}.values():
        is_bias = name.rsplit(".", 1)[-1].lstrip("_").startswith("b")
        if parameter is tied or (is_bias and not bool(parameter.any())):
            continue
        depth = -1 if id(parameter) in before else depths.get(id(parameter), int(model.cfg.n_layers))
        copy = tied if name == "embed.W_E" else None
        tensors.append(CheckpointTensor(name, depth, parameter, copy))
    return tensors


@contextmanager
def restored(parameters: Iterable[torch.nn.Parameter]) -> Iterator[None]:
    """Inside, values may change; on exit they are as before, bit for bit, and so is the gradient (kept in main memory)."""
    before = [(parameter, parameter.detach().to("cpu", copy=True), parameter.grad) for parameter in parameters]
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, values, gradient in before:
                parameter.copy_(values)
                parameter.grad = gradient


def _parameters_of(model: LensModel, name: str) -> list[torch.nn.Parameter]:
    component = getattr(model, name, None)
    return list(component.parameters()) if isinstance(component, torch.nn.Module) else []


def _untied_copy(model: LensModel) -> torch.nn.Parameter | None:
    """HookedTransformer's unembedding, where it holds the embedding's values."""
    unembedding: torch.nn.Parameter = dict(model.named_parameters())["unembed.W_U"]
    return unembedding if torch.equal(unembedding.T, model.W_E) else None
