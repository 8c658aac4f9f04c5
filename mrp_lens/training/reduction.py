"""One update of several processes: losses and gradients are added up, and what ends a run in one of them ends it in all."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import torch

from mrp_lens.training.callbacks import TrainingState
from mrp_lens.training.optim import MasterAdamW
from mrp_lens.utils.processes import copied_from_first, count, gathered, portable, summed


@dataclass(frozen=True)
class _Share:
    """What the others are told of a process's share of an update.

    Attributes:
        row: its losses.
        error: what went wrong.
        moved: whether it has a gradient, for each trained tensor.
        generator: digest of the state of what its losses draw from.
        signal: what it was told to stop by.
    """

    row: dict[str, float]
    error: Exception | None
    moved: list[bool]
    generator: str
    signal: int | None


def reduced(accumulate: Callable[[], dict[str, float]], state: TrainingState) -> dict[str, float]:
    """Losses of an update over all processes, and gradients over all in the trained tensors.

    Args:
        accumulate: gives this process's share of both.
        state: of the run; told to stop if another process was.

    Raises:
        Exception: what any of the processes raised.
        RuntimeError: they draw other random numbers from here on.
    """
    if count() == 1:
        return accumulate()
    row: dict[str, float] = {}
    error: Exception | None = None
    try:
        row = accumulate()
    except Exception as raised:
        error = raised
    tensors = state.tensors
    moved = [tensor.grad is not None for tensor in tensors]
    found = gathered(_Share(row, portable(error), moved, _digest(state.generator), state.interruption.signal))
    errors = [share.error for share in found if share.error is not None]
    if errors:
        raise error or errors[0]
    if len({share.generator for share in found}) > 1:
        raise RuntimeError(
            f"{state.description}: the processes draw different random numbers, since one is drawn for a part of a batch; draw for the "
            "whole batch before it is parted, or train with one process"
        )
    state.interruption.follow(share.signal for share in found)
    gradients = []
    for tensor, *anywhere in zip(tensors, *(share.moved for share in found), strict=True):
        if any(anywhere):
            tensor.grad = torch.zeros_like(tensor) if tensor.grad is None else tensor.grad
            gradients.append(tensor.grad)
    summed(gradients)
    names = dict.fromkeys(name for share in found for name in share.row)
    return {name: sum(share.row.get(name, 0.0) for share in found) for name in names}


def begun_alike(state: TrainingState) -> None:
    """The trained tensors as the first process has them, before the first update.

    Raises:
        RuntimeError: the processes have done different numbers of updates.
    """
    done = gathered(state.done)
    if len(set(done)) > 1:
        raise RuntimeError(
            f"{state.description}: the processes found checkpoints of {', '.join(map(str, done))} updates; give a folder that all of them see"
        )
    copied_from_first(state.tensors)
    if isinstance(state.optimizer, MasterAdamW):
        state.optimizer.spread()


def ended_alike(state: TrainingState) -> None:
    """Whether the run was told to stop, in any of the processes."""
    state.interruption.follow(gathered(state.interruption.signal))


def _digest(generator: torch.Generator | None) -> str:
    return "" if generator is None else hashlib.sha256(generator.get_state().numpy().tobytes()).hexdigest()
