"""What else happens while something is trained: a progress bar, checkpoints, evaluation, logging."""

import logging
from collections.abc import Callable, Collection, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from typing_extensions import override

from mrp_lens.training.checkpoints import Checkpoint, Resumable
from mrp_lens.training.optim import MasterAdamW
from mrp_lens.utils.interrupts import Interruption
from mrp_lens.utils.processes import count, is_first
from mrp_lens.utils.progress import progress_bar

logger = logging.getLogger(__name__)


@dataclass
class TrainingState:
    """A run of the training loop, as callbacks see it.

    Attributes:
        description: what is trained, such as a method's name.
        steps: updates in all, as far as can be told.
        settings: that loggers show beside it.
        optimizer: holds the trained tensors.
        generator: what the losses draw from.
        resumable: what else the losses read on, by name.
        shown: inside its context the model computes with what has been learned so far.
        rows: of the log: `step`, the terms of the loss, `seconds`; one for every update that is done.
        interruption: true from the moment that the run is told to stop.
        pace: factor on the learning rate, besides the schedule's; a governor may change it.
        stopping: the update just done is the last for that reason. What is told to stop while callbacks look on does one
            more update, so that its end is always saved.
    """

    description: str
    steps: int
    optimizer: torch.optim.Optimizer
    settings: Mapping[str, Any] = field(default_factory=dict)
    generator: torch.Generator | None = None
    resumable: Mapping[str, Resumable] = field(default_factory=dict)
    shown: Callable[[], AbstractContextManager[object]] = nullcontext
    rows: list[dict[str, float]] = field(default_factory=list)
    interruption: Interruption = field(default_factory=Interruption)
    pace: float = 1.0
    stopping: bool = False

    @property
    def done(self) -> int:
        """Updates done, in this process and those before it."""
        return len(self.rows)

    @property
    def last(self) -> bool:
        """Whether no update will follow."""
        return self.stopping or self.done >= self.steps

    @property
    def tensors(self) -> list[torch.Tensor]:
        """What is trained."""
        return [tensor for group in self.optimizer.param_groups for tensor in group["params"]]


class Callback:
    """Something that looks on while a run of the training loop goes its way; each method does nothing unless overridden.

    What a callback raises ends the run. One that was started is always told of the end, whatever happened. Of several processes
    that train together each has its own callbacks, which are told the same.
    A fit of two phases (MRP with distillation) is two runs.

    Example:
        >>> class Patience(Callback):
        ...     def on_step(self, step, row):
        ...         if row["loss"] > 100:
        ...             raise RuntimeError("this leads nowhere")
    """

    def on_start(self, state: TrainingState) -> None:
        """Before the first update of this process. `state` goes on changing: keep it to read it later."""

    def on_step(self, step: int, row: Mapping[str, float]) -> None:
        """After each update.

        Args:
            step: its index, from 0.
            row: of the log.
        """

    def on_end(self) -> None:
        """After the last update, or the error that ended the run."""


class ProgressBar(Callback):
    """A tqdm bar with the latest row beside it."""

    @override
    def on_start(self, state: TrainingState) -> None:
        self._state = state
        self._bar = progress_bar(total=state.steps, initial=state.done, desc=state.description, progress=True)

    @override
    def on_step(self, step: int, row: Mapping[str, float]) -> None:
        terms = {name: f"{value:.3g}" for name, value in row.items() if name not in ("step", "seconds")}
        self._bar.set_postfix(terms, refresh=False)
        self._bar.total = self._state.steps
        self._bar.update()

    @override
    def on_end(self) -> None:
        self._bar.close()


class Evaluation(Callback):
    """Calls a function at given numbers of updates, with the model as it has been trained until then.

    A run that is told to stop is not evaluated again.

    Args:
        measure: called with the number of updates done.
        marks: these numbers; 0: before the first update.
    """

    def __init__(self, measure: Callable[[int], object], marks: Collection[int]) -> None:
        self._measure, self._marks = measure, frozenset(marks)

    @override
    def on_start(self, state: TrainingState) -> None:
        self._state = state
        if not state.done:
            self._evaluate()

    @override
    def on_step(self, step: int, row: Mapping[str, float]) -> None:
        self._evaluate()

    def _evaluate(self) -> None:
        # Several processes agree on the former alone.
        told = self._state.stopping if count() > 1 else self._state.interruption
        if self._state.done in self._marks and not told:
            with self._state.shown():
                self._measure(self._state.done)


class Checkpointing(Callback):
    """Goes on where a checkpoint ends, and writes it every so many updates and at the end.

    Raises:
        ValueError: the checkpoint is damaged or belongs to other tensors.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint

    @override
    def on_start(self, state: TrainingState) -> None:
        self._state = state
        known = self._checkpoint.load()
        if known is None:
            return
        try:
            self._restore(known)
        except (KeyError, TypeError, AttributeError, ValueError, RuntimeError) as error:
            raise ValueError(
                f"the checkpoint in {self._checkpoint.folder} does not fit this run ({error}); remove the folder and fit again"
            ) from error
        if isinstance(state.optimizer, MasterAdamW):
            state.optimizer.spread()
        logger.info("%s: goes on after %d steps", state.description, state.done)

    @override
    def on_step(self, step: int, row: Mapping[str, float]) -> None:
        state = self._state
        if (not state.last and state.done % self._checkpoint.every) or not is_first():
            return
        self._checkpoint.save(
            {
                "tensors": [tensor.detach() for tensor in state.tensors],
                "optimizer": state.optimizer.state_dict(),
                "generator": None if state.generator is None else state.generator.get_state(),
                "resumable": {name: part.state_dict() for name, part in state.resumable.items()},
                "rows": state.rows,
            }
        )

    def _restore(self, known: Mapping[str, Any]) -> None:
        state = self._state
        if [tensor.shape for tensor in known["tensors"]] != [tensor.shape for tensor in state.tensors]:
            raise ValueError("its tensors have other shapes")
        state.optimizer.load_state_dict(known["optimizer"])
        with torch.no_grad():
            for tensor, values in zip(state.tensors, known["tensors"], strict=True):
                tensor.copy_(values)
        if state.generator is not None:
            state.generator.set_state(known["generator"])
        for name, part in state.resumable.items():
            part.load_state_dict(known["resumable"][name])
        rows = [dict(row) for row in known["rows"]]
        if not all("seconds" in row for row in rows):
            raise ValueError("its log is incomplete")
        state.rows[:] = rows
