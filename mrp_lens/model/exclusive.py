"""One thread at a time: two that change or measure one model would mix their figures, in silence."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary


@dataclass
class _Owner:
    thread: threading.Thread
    depth: int = 0


_owners: WeakKeyDictionary[Any, _Owner] = WeakKeyDictionary()
_lock = threading.RLock()  # reentrant: a block that the garbage collector closes may end inside of this one's lines


def anchor_of(model: Any) -> Any:
    """The module that holds the weights: of a TransformerBridge the Hugging Face model inside, which several may share."""
    return vars(model).get("original_model", model)


@contextmanager
def exclusive(model: Any) -> Iterator[None]:
    """Inside, no other thread may put an edit on this model, take one off, fit, measure or attack it.

    May be nested within one thread. Plain passes (`model(...)`, `generate`) are not refused: a model with an edit attached
    may serve any number of threads.

    Args:
        model: HookedTransformer, TransformerBridge, or a plain Hugging Face model.

    Raises:
        ValueError: another thread is inside; names both.

    Example:
        >>> with exclusive(model):  # doctest: +SKIP
        ...     ml.metrics.accuracy(model, quiz)
    """
    anchor, here = anchor_of(model), threading.current_thread()
    with _lock:
        owner = _owners.get(anchor)
        if owner is None or not owner.thread.is_alive():
            owner = _owners[anchor] = _Owner(here)
        elif owner.thread is not here:
            raise ValueError(
                f"thread {here.name!r} cannot use this model now: thread {owner.thread.name!r} has an edit applied to it, or fits, measures "
                "or attacks it, and their figures would mix; wait for it, or give each thread a model of its own (copy.deepcopy(model))"
            )
        owner.depth += 1
    try:
        yield
    finally:
        with _lock:
            owner.depth -= 1
            if owner.depth == 0 and _owners.get(anchor) is owner:
                del _owners[anchor]
