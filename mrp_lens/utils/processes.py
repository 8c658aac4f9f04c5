"""Several processes at one fit, as torchrun starts them: what each of them computes, and what all of them agree on.

Every process has the whole model and draws the same batches from the same seed. Inside `together` it computes its share of each
batch's rows; gradients of what is trained, losses and measurements are added up. Outside, a process is on its own, so that a
script may go on in one of them alone.
"""

import os
import pickle
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from itertools import islice
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

ENVIRONMENT = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
TIMEOUT = timedelta(days=2)  # of waiting for another process, which may be measuring; torchrun ends all if one dies

Result = TypeVar("Result")

_together: ContextVar[bool] = ContextVar("together", default=False)
_dealt: ContextVar[bool] = ContextVar("dealt", default=False)


@contextmanager
def together() -> Iterator[None]:
    """Inside, the processes of the group share the work, if there is a group; each of them has to come here."""
    token = _together.set(True)
    try:
        yield
    finally:
        _together.reset(token)


def launched() -> int:
    """How many processes torchrun, or whoever says the same in the environment, has started for one thing; 1 without it."""
    return int(os.environ["WORLD_SIZE"]) if all(name in os.environ for name in ENVIRONMENT) else 1


@contextmanager
def joined() -> Iterator[None]:
    """Inside, the processes that were launched for one thing are a group: gloo between CPUs, nccl between GPUs, one GPU a process.

    Nothing happens where this process was launched alone, or where there is a group already.

    Raises:
        ValueError: there are more processes on this machine than GPUs.
    """
    if launched() == 1 or _grouped():
        yield
        return
    backend = "gloo"
    if torch.cuda.is_available():
        place, gpus = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
        if place >= gpus:
            raise ValueError(
                f"this is process {place} on a machine with {gpus} GPUs; start at most {gpus}: torchrun --nproc-per-node {gpus}"
            )
        torch.cuda.set_device(place)
        backend = "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend, timeout=TIMEOUT)
    try:
        yield
    finally:
        leave()


def leave() -> None:
    """End the group, so that this process goes on alone; without a group nothing happens."""
    if _grouped():
        dist.destroy_process_group()


def is_first() -> bool:
    """Whether this process writes files and shows bars: the first of a group, or one without a group."""
    return not _grouped() or dist.get_rank() == 0


def count() -> int:
    """Processes that share the work here; 1 outside `together`."""
    return dist.get_world_size() if _together.get() and _grouped() else 1


def dealt(items: Iterable[Result]) -> Iterator[Result]:
    """This process's share of the items: every n-th."""
    return islice(items, _rank(), None, count())


def shares(rows: int, size: int | None) -> Iterator[slice]:
    """This process's share of so many rows, in parts of at most `size` (None: whole). A process may have none.

    What `training.train` is given by the loop's body is taken for a share of the loss; all else for the whole of it.
    """
    first, step = _rank(), count()
    width = (size or max(1, rows)) * step
    for start in range(first, rows, width):
        _dealt.set(True)
        yield slice(start, min(rows, start - first + width), step)


def was_dealt() -> bool:
    """Whether `shares` has given something since this was last asked."""
    found = _dealt.get()
    _dealt.set(False)
    return found


def gathered(value: Result) -> list[Result]:
    """The value that each process has, in their order."""
    if count() == 1:
        return [value]
    values: list[Any] = [None] * count()
    dist.all_gather_object(values, value)
    return values


def summed(values: Sequence[Tensor]) -> None:
    """Add up the values of all processes, in place; each has the sums then."""
    _in_place(dist.all_reduce, values)


def copied_from_first(values: Sequence[Tensor]) -> None:
    """Give all processes the first one's values, in place."""
    _in_place(partial(dist.broadcast, src=0), values)


def _in_place(operation: Callable[..., Any], values: Sequence[Tensor]) -> None:
    if count() == 1:
        return
    sent = [_as_sent(value.detach()) for value in values]
    for work in [operation(each, async_op=True) for each in sent]:
        work.wait()
    for value, each in zip(values, sent, strict=True):
        if each.data_ptr() != value.data_ptr():
            value.detach().copy_(each)


def _as_sent(value: Tensor) -> Tensor:
    """Laid out in one piece, and on a GPU in a group of these alone."""
    return (value.cuda() if dist.get_backend() == "nccl" else value).contiguous()


@dataclass(frozen=True)
class _Outcome:
    value: Any = None
    error: Exception | None = None


def computed_once(compute: Callable[[], Result]) -> Result:
    """What the first process computes, given to all; where it fails, so do all.

    Raises:
        Exception: whatever `compute` raises.
    """
    if count() == 1:
        return compute()
    found = _Outcome()
    if is_first():
        try:
            found = _Outcome(compute())
        except Exception as error:
            found = _Outcome(error=error)
    sent: list[Any] = [_Outcome(found.value, portable(found.error))]
    dist.broadcast_object_list(sent, src=0)
    if found.error is not None or sent[0].error is not None:
        raise found.error or sent[0].error
    value: Result = sent[0].value
    return value


def portable(error: Exception | None) -> Exception | None:
    """The error as another process can be given it: itself, or its kind and text."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


def _grouped() -> bool:
    return dist.is_available() and dist.is_initialized()


def _rank() -> int:
    return dist.get_rank() if count() > 1 else 0
