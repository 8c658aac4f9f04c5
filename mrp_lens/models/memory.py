"""Where memory runs out in a pass: the batch is read in halves."""

import logging
from collections.abc import Callable, Mapping
from typing import Protocol, Self, TypeVar

import torch
from torch import Tensor

logger = logging.getLogger(__name__)


class Rows(Protocol):
    """A batch of texts, as tokens or with what belongs to them."""

    def __len__(self) -> int: ...

    def __getitem__(self, rows: slice, /) -> Self: ...


Batch = TypeVar("Batch", bound=Rows)
Found = TypeVar("Found", Tensor, dict[str, Tensor])


def in_halves(batch: Batch, read: Callable[[Batch], Found]) -> Found:
    """What a pass without gradient gives of a batch; where memory runs out, what it gives of the halves, one after the other.

    Args:
        batch: to read, or anything else that has rows and slices.
        read: gives a tensor, or several by name, in the order of the batch's rows.

    Raises:
        RuntimeError: memory runs out for a single row, too; torch's own error.
    """
    try:
        return read(batch)
    except RuntimeError as error:
        if len(batch) == 1 or not ran_out(error):
            raise
        logger.info("memory ran out for %d texts in a pass; they are read in halves", len(batch))
    _release()  # here, where the frames of the pass, and with them its tensors, are gone
    half = len(batch) // 2
    first, second = (in_halves(part, read) for part in (batch[:half], batch[half:]))
    if isinstance(first, Mapping):
        return {name: torch.cat([first[name], second[name]]) for name in first}
    return torch.cat([first, second])


def ran_out(error: BaseException) -> bool:
    """Whether an error says that memory ran out, whatever the device."""
    from accelerate.utils.memory import should_reduce_batch_size  # type: ignore[import-untyped]  # heavy

    return isinstance(error, Exception) and bool(should_reduce_batch_size(error))


def _release() -> None:
    from accelerate.utils.memory import clear_device_cache

    clear_device_cache()
