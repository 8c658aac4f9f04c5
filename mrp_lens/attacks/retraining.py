"""Retraining an edited model in place: which tensors an attacker may change, and the way back to what they were."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.utils import parametrize
from typing_extensions import override

from mrp_lens.checks import generator_for
from mrp_lens.edit import Edit
from mrp_lens.masters import Trainable, trainable
from mrp_lens.model import LensModel, checkpoint_tensors, is_bridge, restored
from mrp_lens.stream import frozen
from mrp_lens.torch_state import refuse_inference_tensors

Parameters = Literal["all", "lora", "before", "at", "after"]

LORA_RANK = 8


@contextmanager
def unlocked(
    model: LensModel, edit: Edit | None, parameters: Parameters, *, lora_rank: int, seed: int
) -> Iterator[list[Trainable]]:
    """The tensors that the attacker may change; they require grad inside, and hold their old values on exit.

    Args:
        model: with the edit on.
        edit: tells "before", "at" and "after" apart.
        parameters: "all" of the checkpoint's tensors; those "before" the first edited layer (embeddings included), "at"
            the edited layers (from the first to the last), "after" the last (with the unembedding); "lora": low-rank
            updates of every matrix in the blocks (arXiv 2106.09685).
        lora_rank: rank of those.
        seed: of their start.

    Raises:
        ValueError: LoRA on a HookedTransformer, a choice that leaves nothing to train, or a model that was loaded in
            inference mode.
    """
    refuse_inference_tensors(model.parameters())
    with frozen(model):
        if parameters == "lora":
            with low_rank_updates(model, rank=lora_rank, seed=seed) as updates:
                yield updates
            return
        reached = reach_of(edit, parameters)
        chosen = [tensor for tensor in checkpoint_tensors(model) if reached(tensor.depth)]
        if not chosen:
            raise ValueError(
                f"there are no tensors {parameters!r} the edited layers {list(edit.layers if edit else ())} of this model of "
                f"{model.cfg.n_layers} layers; choose another of 'all', 'before', 'at', 'after'"
            )
        with restored(p for tensor in chosen for p in tensor.parameters):
            yield [trainable(*tensor.parameters) for tensor in chosen]


def reach_of(edit: Edit | None, parameters: Parameters) -> Callable[[int], bool]:
    """Whether tensors at a depth (see `CheckpointTensor`) are among these parameters.

    Raises:
        ValueError: "before", "at" or "after" without an edit.
    """
    if parameters == "all":
        return lambda depth: True
    if edit is None:
        raise ValueError(f"parameters={parameters!r} needs an edit: without one there are no edited layers; use 'all'")
    first, last = edit.layers[0], edit.layers[-1]
    return {
        "before": lambda depth: depth < first,
        "at": lambda depth: first <= depth <= last,
        "after": lambda depth: depth > last,
    }[parameters]


class LowRank(torch.nn.Module):
    """W -> W + left right: a low-rank update that starts at 0."""

    def __init__(self, matrix: Float[Tensor, "out in"], rank: int, generator: torch.Generator) -> None:
        super().__init__()
        rows, columns = matrix.shape
        right = torch.randn(rank, columns, generator=generator) / columns**0.5
        self.left = torch.nn.Parameter(torch.zeros(rows, rank, device=matrix.device))
        self.right = torch.nn.Parameter(right.to(matrix.device))

    @override
    def forward(self, matrix: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
        """The updated matrix, in its own precision."""
        return matrix + (self.left @ self.right).type_as(matrix)


@contextmanager
def low_rank_updates(model: LensModel, *, rank: int, seed: int) -> Iterator[list[Trainable]]:
    """Every matrix in the blocks with a low-rank update; taken off again on exit.

    Raises:
        ValueError: the model is a HookedTransformer, whose attention has no matrices of the checkpoint's shape, or rank
            below 1.
    """
    if not is_bridge(model):
        raise ValueError(
            "low-rank updates need the checkpoint's own matrices, which a HookedTransformer does not have; load the model with backend='bridge'"
        )
    if rank < 1:
        raise ValueError(f"lora_rank must be at least 1, got {rank}")
    generator = generator_for(seed)
    blocks = {id(p) for block in model.blocks for p in block.parameters()}
    found = [(module, module._parameters.get("weight")) for module in model.modules()]
    matrices = {
        module: weight for module, weight in found if weight is not None and weight.ndim == 2 and id(weight) in blocks
    }
    order = {module: list(module._parameters) for module in matrices}
    updates: list[LowRank] = []
    try:
        for module, weight in matrices.items():
            update = LowRank(weight, rank, generator)
            parametrize.register_parametrization(module, "weight", update)
            updates.append(update)
        yield [Trainable(factor) for update in updates for factor in (update.left, update.right)]
    finally:
        for module in list(matrices)[: len(updates)]:
            parametrize.remove_parametrizations(module, "weight", leave_parametrized=False)
            for name in order[module]:  # the weight came back behind the bias
                module._parameters[name] = module._parameters.pop(name)
