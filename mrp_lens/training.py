"""The one training loop: progress bar, per-step log, stop on a non-finite loss, clean end on Ctrl-C."""

import logging
import math
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from torch import Tensor
from tqdm.auto import tqdm
from typing_extensions import override

logger = logging.getLogger(__name__)

Losses = Callable[[int], Iterable[dict[str, Tensor]]]


class NonFiniteLossError(FloatingPointError):
    """A loss became NaN or infinite; nothing was written into the model."""


@dataclass(frozen=True)
class TrainingRun:
    """What a run leaves behind: one row a step, and whether Ctrl-C ended it early."""

    log: pd.DataFrame
    interrupted: bool


def train(
    losses: Losses,
    optimizer: torch.optim.Optimizer,
    *,
    steps: int,
    description: str,
    schedule: Callable[[float], float] | None = None,
    max_grad_norm: float | None = None,
    progress: bool = True,
) -> TrainingRun:
    """Minimise what `losses` yields.

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

    Returns:
        The log (columns `step`, the names that `losses` yields, `seconds`) and whether Ctrl-C came: the step
        under way is then finished and the tensors keep their values; a second Ctrl-C stops at once.

    Raises:
        ValueError: `steps` is below 1.
        NonFiniteLossError: a loss is NaN or infinite; the tensors keep the values of the last good step.
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    tensors = [tensor for group in optimizer.param_groups for tensor in group["params"]]
    base_rates = [group["lr"] for group in optimizer.param_groups]
    rows: list[dict[str, float]] = []
    interrupted = False
    start = time.perf_counter()
    with _deferred_interrupt() as stop_asked, tqdm(total=steps, desc=description, disable=not progress) as bar:
        try:
            for step in range(steps):
                optimizer.zero_grad(set_to_none=True)
                row = _accumulate(losses(step), step, description)
                if max_grad_norm is not None:
                    torch.nn.utils.clip_grad_norm_(tensors, max_grad_norm)
                for group, rate in zip(optimizer.param_groups, base_rates, strict=True):
                    group["lr"] = rate * (schedule(step / steps) if schedule else 1.0)
                optimizer.step()
                rows.append({"step": step, **row, "seconds": time.perf_counter() - start})
                bar.update()
                bar.set_postfix({name: f"{value:.3g}" for name, value in row.items()}, refresh=False)
                if stop_asked():
                    raise KeyboardInterrupt
        except KeyboardInterrupt:
            interrupted = True
            logger.warning(
                "%s: interrupted after %d of %d steps; what was learned so far is kept", description, len(rows), steps
            )
        finally:
            optimizer.zero_grad(set_to_none=True)
    return TrainingRun(pd.DataFrame(rows), interrupted)


def _accumulate(micro_batches: Iterable[dict[str, Tensor]], step: int, description: str) -> dict[str, float]:
    row: dict[str, float] = {}
    for terms in micro_batches:
        values = {name: float(term.detach()) for name, term in terms.items()}
        for name, value in values.items():
            if not math.isfinite(value):
                raise NonFiniteLossError(
                    f"{description}: the {name} is {value} at step {step}, so the run was stopped and the model left as it was. "
                    "Lower the learning rate, or look for extreme values in the data at this step."
                )
            row[name] = row.get(name, 0.0) + value
        if terms["loss"].requires_grad:
            terms["loss"].backward()
    return row


@contextmanager
def _deferred_interrupt() -> Iterator[Callable[[], bool]]:
    """Turn the first Ctrl-C into a flag, so that it never lands in the middle of an update."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked.is_set  # Python delivers Ctrl-C to the main thread only
        return
    previous = signal.getsignal(signal.SIGINT)

    def handle(_signal: int, _frame: object) -> None:
        if asked.is_set():
            raise KeyboardInterrupt
        asked.set()

    signal.signal(signal.SIGINT, handle)
    try:
        yield asked.is_set
    finally:
        signal.signal(signal.SIGINT, previous)


class TransformersAdamW(torch.optim.AdamW):
    """AdamW as transformers 4 had it, which the released RMU code uses: eps is added before the bias correction.

    torch adds it after, so that 1e-6 counts 30 times as much here in the first step: ten steps end 1e-4 apart.
    """

    @override
    def step(self, closure: Any = None) -> Any:
        """One update."""
        self.steps_done = getattr(self, "steps_done", 0) + 1
        for group in self.param_groups:
            corrected = math.sqrt(1 - group["betas"][1] ** self.steps_done)
            group["eps"] = self.defaults["eps"] / corrected
        return super().step(closure)


def linear_decay(share: float) -> float:
    """The learning rate as given for the first half of the run, then falling linearly to 0."""
    return min(1.0, 2 * (1 - share))


def warmup_cosine(share: float, *, warmup: float = 0.05) -> float:
    """Rise linearly over the first `warmup` of the run, then fall along a cosine to 0."""
    if share < warmup:
        return (share + 1e-3) / warmup
    return 0.5 * (1 + math.cos(math.pi * (share - warmup) / (1 - warmup)))
