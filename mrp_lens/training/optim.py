"""Optimizers, their schedules, and the sizes that learning rates follow.

A model's own tensors are trained in float32: in bfloat16 most small updates round away.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override


@dataclass(frozen=True)
class Trainable:
    """A tensor under training, and how a model in another precision or with tied copies gets its values.

    Attributes:
        master: float32; what the optimizer changes.
        model_tensors: what the model computes with; empty where that is the master itself.
    """

    master: Tensor
    model_tensors: tuple[torch.nn.Parameter, ...] = ()

    def collect(self) -> None:
        """The gradients of the model's tensors are added to the master's; they themselves are cleared."""
        gradients = [
            tensor.grad if number == 0 else tensor.grad.T
            for number, tensor in enumerate(self.model_tensors)
            if tensor.grad is not None
        ]
        if gradients:
            found = torch.stack([gradient.float() for gradient in gradients]).sum(0)
            self.master.grad = found if self.master.grad is None else self.master.grad + found
        for tensor in self.model_tensors:
            tensor.grad = None

    def spread(self) -> None:
        """The model's tensors get the master's values."""
        with torch.no_grad():
            for number, tensor in enumerate(self.model_tensors):
                tensor.copy_(self.master if number == 0 else self.master.T)


class MasterAdamW(torch.optim.AdamW):
    """AdamW without weight decay on float32 masters, whatever the model's precision."""

    def __init__(self, tensors: Sequence[Trainable], lr: float) -> None:
        self.trained = list(tensors)
        super().__init__([tensor.master for tensor in tensors], lr=lr, weight_decay=0.0)

    @override
    def step(self, closure: Any = None) -> Any:
        """One update of the masters, and of the model."""
        self.collect()
        result = super().step(closure)
        self.spread()
        return result

    def collect(self) -> None:
        """The masters get the model's gradients."""
        for tensor in self.trained:
            tensor.collect()

    def spread(self) -> None:
        """The model gets the masters' values."""
        for tensor in self.trained:
            tensor.spread()

    @override
    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients of masters and model."""
        super().zero_grad(set_to_none)
        for tensor in self.trained:
            for parameter in tensor.model_tensors:
                parameter.grad = None


def trainable(parameter: torch.nn.Parameter, *copies: torch.nn.Parameter) -> Trainable:
    """A parameter, with transposed copies of it that follow, ready to be trained; all of them require grad from now on."""
    for tensor in (parameter, *copies):
        tensor.requires_grad_(True)
    if not copies and parameter.dtype == torch.float32:
        return Trainable(parameter)
    return Trainable(parameter.detach().float().clone(), (parameter, *copies))


class TransformersAdamW(torch.optim.AdamW):
    """AdamW as transformers 4 had it, which the released RMU code uses: eps is added before the bias correction.

    torch adds it after, so that 1e-6 counts 30 times as much here in the first step: ten steps end 1e-4 apart.
    """

    @override
    def step(self, closure: Any = None) -> Any:
        """One update."""
        for group in self.param_groups:
            done = max((int(self.state[tensor]["step"]) for tensor in group["params"] if self.state[tensor]), default=0)
            group["eps"] = self.defaults["eps"] / math.sqrt(1 - group["betas"][1] ** (done + 1))
        return super().step(closure)


def warmup_linear_decay(share: float, *, warmup: float = 0.1) -> float:
    """From a tenth to 1 over the first `warmup` of a run, and linearly down to 0 over its second half."""
    return min(1.0, 0.1 + 0.9 * share / warmup, linear_decay(share))


def linear_decay(share: float) -> float:
    """The learning rate as given for the first half of the run, then falling linearly to 0."""
    return min(1.0, 2 * (1 - share))


def warmup_cosine(share: float, *, warmup: float = 0.05) -> float:
    """Rise linearly over the first `warmup` of the run, then fall along a cosine to 0."""
    if share < warmup:
        return (share + 1e-3) / warmup
    return 0.5 * (1 + math.cos(math.pi * (share - warmup) / (1 - warmup)))


def entry_size(matrices: Iterable[Tensor]) -> float:
    """Root mean square of a matrix's entries, on average over the matrices."""
    return float(torch.stack([matrix.float().square().mean().sqrt().cpu() for matrix in matrices]).mean())


def update_size(matrices: Iterable[Tensor]) -> float:
    """How far every entry of a matrix may be moved at once to change it by as much as it is, on average over the matrices.

    Sizes are spectral norms: about (sqrt(m) + sqrt(n)) s for m x n independent entries of size s, sqrt(m n) lr where all entries move by
    lr the same way. So a wide matrix takes smaller steps than a narrow one with entries of the same size.
    """
    sizes = [entry_size([matrix]) * sum(side**-0.5 for side in matrix.shape) for matrix in matrices]
    return sum(sizes) / len(sizes)
