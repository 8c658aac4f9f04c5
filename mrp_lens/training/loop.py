"""The one training loop: progress bar, per-step log, checkpoints, stop on a non-finite loss, clean end on Ctrl-C."""

import logging
import math
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pandas as pd
import torch
from torch import Tensor
from tqdm.auto import tqdm
from typing_extensions import override

from mrp_lens.training.checkpoints import Checkpoint, Resumable
from mrp_lens.training.optim import MasterAdamW
from mrp_lens.utils.torch_state import ordinary_torch
from mrp_lens.utils.validation import whole

logger = logging.getLogger(__name__)

Losses = Callable[[int], Iterable[dict[str, Tensor]]]


class NonFiniteLossError(FloatingPointError):
    """A loss became NaN or infinite; nothing was written into the model."""


@dataclass(frozen=True)
class TrainingRun:
    """What a run leaves behind: one row a step, and whether Ctrl-C ended it early."""

    log: pd.DataFrame
    interrupted: bool


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
        generator: what `losses` draws from; checkpoints keep its state.
        resumable: what else `losses` reads on and a checkpoint has to keep, by name.
        checkpoint: where the state is written every so many steps, and where it is read from first: a run that was
            killed goes on, and ends with the same bits as one that was not.

    Returns:
        The log (columns `step`, the names that `losses` yields, `seconds`) and whether Ctrl-C came: the step
        under way is then finished and the tensors keep their values; a second Ctrl-C stops at once.

    Raises:
        ValueError: `steps` is below 1, or the checkpoint is damaged or has other tensors.
        NonFiniteLossError: a loss is NaN or infinite; the tensors keep the values of the last good step.
        SystemExit: SIGTERM came; with a checkpoint the step under way is finished and saved first.
    """
    whole(steps=steps)
    run = _Run(optimizer, generator, dict(resumable or {}), checkpoint, description)
    run.restore()
    interrupted = False
    with _deferred_signals(terminate=checkpoint is not None) as asked:
        start = time.perf_counter() - run.seconds
        with tqdm(total=steps, initial=len(run.rows), desc=description, disable=not progress) as bar:
            try:
                for step in range(len(run.rows), steps):
                    optimizer.zero_grad(set_to_none=True)
                    row = _accumulate(losses(step), step, description)
                    if max_grad_norm is not None:
                        torch.nn.utils.clip_grad_norm_(run.tensors, max_grad_norm)
                    run.set_rates(schedule(step / steps) if schedule else 1.0)
                    optimizer.step()
                    run.rows.append({"step": step, **row, "seconds": time.perf_counter() - start})
                    bar.update()
                    bar.set_postfix({name: f"{value:.3g}" for name, value in row.items()}, refresh=False)
                    run.save(last=asked.signal is not None or step + 1 == steps)
                    if asked.signal == signal.SIGTERM:
                        raise SystemExit(128 + signal.SIGTERM)
                    if asked.signal is not None:
                        raise KeyboardInterrupt
            except KeyboardInterrupt:
                interrupted = True
                logger.warning(
                    "%s: interrupted after %d of %d steps; what was learned so far is kept",
                    *(description, len(run.rows), steps),
                )
            finally:
                optimizer.zero_grad(set_to_none=True)
    return TrainingRun(pd.DataFrame(run.rows), interrupted)


@dataclass
class _Run:
    """Everything about a run that changes from step to step."""

    optimizer: torch.optim.Optimizer
    generator: torch.Generator | None
    resumable: dict[str, Resumable]
    checkpoint: Checkpoint | None
    description: str
    rows: list[dict[str, float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.tensors = [tensor for group in self.optimizer.param_groups for tensor in group["params"]]
        self.base_rates = [group["lr"] for group in self.optimizer.param_groups]

    @property
    def seconds(self) -> float:
        """Spent by the processes before this one."""
        return self.rows[-1]["seconds"] if self.rows else 0.0

    def set_rates(self, factor: float) -> None:
        for group, rate in zip(self.optimizer.param_groups, self.base_rates, strict=True):
            group["lr"] = rate * factor

    def save(self, *, last: bool) -> None:
        """Write the checkpoint, if it is time."""
        if self.checkpoint is None or not (last or len(self.rows) % self.checkpoint.every == 0):
            return
        self.checkpoint.save(
            {
                "tensors": [tensor.detach() for tensor in self.tensors],
                "optimizer": self.optimizer.state_dict(),
                "generator": None if self.generator is None else self.generator.get_state(),
                "resumable": {name: part.state_dict() for name, part in self.resumable.items()},
                "rows": self.rows,
            }
        )

    def restore(self) -> None:
        """Go on where the checkpoint ends."""
        state = None if self.checkpoint is None else self.checkpoint.load()
        if state is None:
            return
        try:
            shapes = [tensor.shape for tensor in state["tensors"]]
            if shapes != [tensor.shape for tensor in self.tensors]:
                raise ValueError("its tensors have other shapes")
            self.optimizer.load_state_dict(state["optimizer"])
            with torch.no_grad():
                for tensor, values in zip(self.tensors, state["tensors"], strict=True):
                    tensor.copy_(values)
            if self.generator is not None:
                self.generator.set_state(state["generator"])
            for name, part in self.resumable.items():
                part.load_state_dict(state["resumable"][name])
            self.rows = [dict(row) for row in state["rows"]]
            if not all("seconds" in row for row in self.rows):
                raise ValueError("its log is incomplete")
        except (KeyError, TypeError, AttributeError, ValueError, RuntimeError) as error:
            folder = self.checkpoint.folder if self.checkpoint is not None else ""
            raise ValueError(
                f"the checkpoint in {folder} does not fit this run ({error}); remove the folder and fit again"
            ) from error
        if isinstance(self.optimizer, MasterAdamW):
            self.optimizer.spread()
        logger.info("%s: goes on after %d steps", self.description, len(self.rows))


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


@dataclass
class _Asked:
    """The signal that came while a step was under way."""

    signal: int | None = None


@contextmanager
def _deferred_signals(*, terminate: bool) -> Iterator[_Asked]:
    """Note the first Ctrl-C, and SIGTERM if so told, so that neither lands in the middle of an update."""
    asked = _Asked()
    if threading.current_thread() is not threading.main_thread():
        yield asked  # Python delivers signals to the main thread only
        return
    chosen = (signal.SIGINT, signal.SIGTERM) if terminate else (signal.SIGINT,)
    previous = {number: signal.getsignal(number) for number in chosen}

    def handle(number: int, _frame: object) -> None:
        if asked.signal is not None:
            raise KeyboardInterrupt
        asked.signal = number

    for number in chosen:
        signal.signal(number, handle)
    try:
        yield asked
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


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


def linear_decay(share: float) -> float:
    """The learning rate as given for the first half of the run, then falling linearly to 0."""
    return min(1.0, 2 * (1 - share))


def warmup_cosine(share: float, *, warmup: float = 0.05) -> float:
    """Rise linearly over the first `warmup` of the run, then fall along a cosine to 0."""
    if share < warmup:
        return (share + 1e-3) / warmup
    return 0.5 * (1 + math.cos(math.pi * (share - warmup) / (1 - warmup)))
