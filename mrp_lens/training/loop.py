"""The one training loop: a row of the log a step, callbacks, stop on a non-finite loss, clean end on Ctrl-C."""

import logging
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from mrp_lens.models.memory import ran_out
from mrp_lens.training.callbacks import Callback, Checkpointing, ProgressBar, TrainingState
from mrp_lens.training.checkpoints import Checkpoint, Resumable
from mrp_lens.training.optim import MasterAdamW
from mrp_lens.training.reduction import begun_alike, ended_alike, reduced
from mrp_lens.utils.interrupts import deferred
from mrp_lens.utils.processes import count, is_first, together, was_dealt
from mrp_lens.utils.torch_state import ordinary_torch
from mrp_lens.utils.validation import check_whole

logger = logging.getLogger(__name__)

Losses = Callable[[int], Iterable[dict[str, Tensor]]]


class NonFiniteLossError(FloatingPointError):
    """A loss became NaN or infinite; nothing was written into the model."""


class TooLittleMemoryError(ValueError):
    """Memory ran out in an update; nothing was written into the model."""


@dataclass(frozen=True)
class TrainingRun:
    """What a run leaves behind: one row a step, and whether Ctrl-C ended it early."""

    log: pd.DataFrame
    interrupted: bool


@together()
@ordinary_torch(gradients=True)
def train(
    losses: Losses,
    optimizer: torch.optim.Optimizer,
    *,
    steps: int,
    description: str,
    schedule: Callable[[float], float] | None = None,
    max_grad_norm: float | None = None,
    progress: bool = True,
    generator: torch.Generator | None = None,
    resumable: Mapping[str, Resumable] | None = None,
    checkpoint: Checkpoint | None = None,
    callbacks: Sequence[Callback] = (),
    governor: Callback | None = None,
    settings: Mapping[str, Any] | None = None,
    shown: Callable[[], AbstractContextManager[object]] = nullcontext,
) -> TrainingRun:
    """Minimise what `losses` yields.

    In a process group of `torch.distributed` all processes have to call this, with the same arguments. What `losses` yields for
    a part of a batch that `parts_of` gave is this process's share; anything else counts as computed by each of them. Gradients
    of the trained tensors and the log's losses are added up over the processes, so that all of them hold the same tensors.

    Args:
        losses: called with the step's index; yields one dict of scalar tensors for every micro-batch.
            The entry "loss" is differentiated. Micro-batches are *added up*, so each must already carry
            its share of the step's loss; the graph of one is freed before the next is asked for.
        optimizer: holds the trained tensors; only these are changed.
        steps: number of updates, at least 1.
        description: shown beside the progress bar and in errors.
        schedule: maps the share of the run that is over, in [0, 1), to a factor on the learning rate.
        max_grad_norm: clip the joint L2 norm of the gradient to this, if given.
        progress: show a tqdm bar.
        generator: what `losses` draws from; checkpoints keep its state.
        resumable: what else `losses` reads on and a checkpoint has to keep, by name.
        checkpoint: where the state is written every so many steps, and where it is read from first: a run that was
            killed goes on, and ends with the same bits as one that was not.
        callbacks: told of the start, of every update once it is saved, and of the end.
        governor: told before the update is saved. It may lower `state.steps`, upon which the schedule hurries to its end,
            and change `state.pace`; what it knows has to be in `resumable`.
        settings: of what is trained, for loggers.
        shown: inside its context the model computes with what is being trained, for evaluation; by default it does so
            anyway.

    Returns:
        The log (columns `step`, the names that `losses` yields, `seconds`) and whether Ctrl-C came: the step
        under way is then finished and the tensors keep their values; a second Ctrl-C stops at once.

    Raises:
        ValueError: `steps` is below 1, or the checkpoint is damaged or has other tensors.
        NonFiniteLossError: a loss is NaN or infinite; the tensors keep the values of the last good step.
        TooLittleMemoryError: memory ran out; says what needs less.
        SystemExit: SIGTERM came; with a checkpoint the step under way is finished and saved first.
    """
    check_whole(steps=steps)
    standing = [
        *([governor] if governor else []),
        *([Checkpointing(checkpoint)] if checkpoint else []),
        *([ProgressBar()] if progress and is_first() else []),
    ]
    interrupted = False
    with deferred(terminate=checkpoint is not None) as asked, ExitStack() as ends:
        state = TrainingState(
            description, steps, optimizer, settings or {}, generator, resumable or {}, shown, interruption=asked
        )
        rates = [group["lr"] for group in optimizer.param_groups]
        ends.callback(optimizer.zero_grad, set_to_none=True)
        try:
            for callback in (*standing, *callbacks):
                callback.on_start(state)
                ends.callback(callback.on_end)
            begun_alike(state)
            start = time.perf_counter() - (state.rows[-1]["seconds"] if state.rows else 0.0)
            while not state.last:
                step = state.done
                optimizer.zero_grad(set_to_none=True)
                row = reduced(partial(_accumulate, losses, step, state), state)
                if max_grad_norm is not None:
                    torch.nn.utils.clip_grad_norm_(state.tensors, max_grad_norm)
                for group, rate in zip(optimizer.param_groups, rates, strict=True):
                    group["lr"] = rate * state.pace * (schedule(step / state.steps) if schedule else 1.0)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)  # what looks on has the memory of the gradients
                state.rows.append({"step": step, **row, "seconds": time.perf_counter() - start})
                state.stopping = bool(asked) and (count() == 1 or asked.everywhere)
                for callback in (*standing, *callbacks):
                    callback.on_step(step, state.rows[-1])
            ended_alike(state)
            interrupted = bool(asked)
        except RuntimeError as error:
            if not ran_out(error):
                raise
            raise TooLittleMemoryError(
                f"{description}: memory ran out in update {state.done + 1}. Give a smaller micro_batch, such as 1 (documents a pass: what is "
                "learned stays the same), shorter texts (max_length), or a model in bfloat16; mrp-lens plan says what fits"
            ) from error
        except KeyboardInterrupt:
            if count() > 1:  # the others wait for this process: it has to end
                raise
            interrupted = True
        asked.end_if_terminated()
        if interrupted:
            logger.warning(
                "%s: interrupted after %d of %d steps; what was learned so far is kept",
                description,
                state.done,
                state.steps,
            )
    return TrainingRun(pd.DataFrame(state.rows), interrupted)


def _accumulate(losses: Losses, step: int, state: TrainingState) -> dict[str, float]:
    """Gradients and losses of a step, in this process. What is no share of it counts as what each of the processes computes."""
    row: dict[str, float] = {}
    was_dealt()
    micro_batches = losses(step)
    all_dealt = was_dealt()  # of a function that returns a list
    for terms in micro_batches:
        share = 1.0 if was_dealt() or all_dealt else 1.0 / count()
        values = {name: float(term.detach()) for name, term in terms.items()}
        for name, value in values.items():
            if not math.isfinite(value):
                raise NonFiniteLossError(
                    f"{state.description}: the {name} is {value} at step {step}, so the run was stopped and the model left as it was. "
                    "Lower the learning rate, or look for extreme values in the data at this step."
                )
            row[name] = row.get(name, 0.0) + share * value
        if terms["loss"].requires_grad:
            (terms["loss"] if share == 1.0 else share * terms["loss"]).backward()
            if isinstance(state.optimizer, MasterAdamW):  # many parts would not add up in the model's half precision
                state.optimizer.collect()
    return row
