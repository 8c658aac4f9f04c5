"""States that several metrics read of the same texts, computed once for all of them."""

from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from jaxtyping import Float
from torch import Tensor

from mrp_lens.data.tokenization import TokenBatch
from mrp_lens.edits import SteeringEdit
from mrp_lens.models import LensModel
from mrp_lens.models.attachments import entries_on
from mrp_lens.models.hooks import frozen, read_states

BYTES = 2**30  # of states at most

StatesByHook = Mapping[str, Float[Tensor, "tokens d_model"]]


class SharedStates:
    """The states that were read last, by the model, the edits that were on, and the batch.

    Where they would take over 2^30 bytes, those go that were not asked for the longest.
    """

    def __init__(self) -> None:
        # beside the states the model and the edits, whose numbers are part of the key and must not become those of others
        self._kept: OrderedDict[Any, tuple[list[Any], StatesByHook]] = OrderedDict()
        self._size = 0

    def read(self, model: LensModel, batch: TokenBatch, hooks: Sequence[str]) -> StatesByHook:
        """As `read_states`, which is asked for the hooks that are not kept; for all where an edit draws noise in each pass."""
        edits = [entry.edit for entry in entries_on(model)]
        if any(isinstance(part, SteeringEdit) and part.noise > 0.0 for edit in edits for part in edit.parts):
            return _read(model, batch, hooks)
        on = [model, *edits]
        read = (batch.tokens, batch.attention_mask, batch.content_mask)
        key = (*map(id, on), *(part.cpu().numpy().tobytes() for part in read))
        known = self._kept.pop(key, (on, {}))[1]
        self._size -= _bytes_of(known)
        if missing := [hook for hook in hooks if hook not in known]:
            known = {**known, **_read(model, batch, missing)}
        self._kept[key] = on, known
        self._size += _bytes_of(known)
        while self._size > BYTES:
            self._size -= _bytes_of(self._kept.popitem(last=False)[1][1])
        return {hook: known[hook] for hook in hooks}


_SHARED: ContextVar[SharedStates | None] = ContextVar("shared_states", default=None)


@contextmanager
def states_shared() -> Iterator[None]:
    """Inside, metrics that read the states of the same texts share them; the model's own weights must not change."""
    token = _SHARED.set(SharedStates())
    try:
        yield
    finally:
        _SHARED.reset(token)


def shared_or_read(model: LensModel, batch: TokenBatch, hooks: Sequence[str]) -> StatesByHook:
    """States of a batch's content tokens at each hook: shared ones inside `states_shared`."""
    shared = _SHARED.get()
    return _read(model, batch, hooks) if shared is None else shared.read(model, batch, hooks)


def _read(model: LensModel, batch: TokenBatch, hooks: Sequence[str]) -> StatesByHook:
    with frozen(model):
        return read_states(model, batch, hooks)


def _bytes_of(states: StatesByHook) -> int:
    return sum(each.numel() * each.element_size() for each in states.values())
