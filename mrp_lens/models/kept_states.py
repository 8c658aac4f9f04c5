"""States that no training changes, computed once a text instead of in every pass.

A fit reads the same texts again and again. Below the first layer that it hooks or trains each pass gives what the last one gave, and
so does the unedited model, which its predictions are compared with, in every layer.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence

from mrp_lens.data.tokenization import Encoded, Encoder, TokenBatch, in_order
from mrp_lens.models.base import dtype_of, logits_at
from mrp_lens.models.hooks import run_segment
from mrp_lens.models.memory import ran_out
from mrp_lens.models.protocol import LensModel
from mrp_lens.utils.io import one_line
from mrp_lens.utils.progress import progress_bar

logger = logging.getLogger(__name__)

BYTES = 2**30  # of states at most
BATCH = 32
COMPARED = 4  # texts on which a pass that enters at the layer is compared with a whole one
TOLERANCE = 0.02  # of the largest logit, which is what half precision leaves

States = Float[Tensor, "batch seq d_model"]


@dataclass
class KeptStates:
    """What enters a layer, for the texts that were read. The layer behind the last block is the final norm.

    Passes are right padded: then what a text gives does not depend on the padding, but for rounding.
    """

    model: LensModel
    layer: int
    states: dict[tuple[int, ...], Float[Tensor, "seq d_model"]] = field(default_factory=dict)
    _tuples: bool = field(default=False, init=False)  # what blocks of the architecture give

    def read(self, encoder: Encoder, rows: Sequence[Encoded], *, passes: float, progress: bool = True) -> None:
        """Keep the states of texts that a fit will read so many times each; with a progress bar.

        None are kept where that is less than once, where they would take over 2^30 bytes, and where the model does not go on from
        them as it does in a whole pass. They are computed in the same batches whatever a fit reads first, so that one that
        goes on from a checkpoint has them bit by bit.
        """
        fresh = list({row.ids: row for row in rows if row.ids not in self.states}.values())
        size = sum(len(ids) for ids in self.states) + sum(len(row.ids) for row in fresh)
        if (
            not fresh
            or self.layer == 0
            or passes < 1.0
            or size * self._bytes_a_token > BYTES
            or not self._works(encoder, fresh)
        ):
            return
        with progress_bar(total=len(fresh), desc=f"states at layer {self.layer}", progress=progress) as bar:
            for places, batch in in_order(encoder, fresh, BATCH):
                for place, states in zip(places, self._computed(batch), strict=True):
                    ids = fresh[place].ids
                    self.states[ids] = states[: len(ids)].clone()
                bar.update(len(places))

    @contextmanager
    def entered(self, batch: TokenBatch) -> Iterator[None]:
        """Inside, passes over this batch begin at the layer; with the first, if the states of one of its texts are not kept."""
        states = self._of(batch) if self.states else None
        with nullcontext() if states is None else self._begun(states):
            yield

    @property
    def _bytes_a_token(self) -> int:
        return int(self.model.cfg.d_model) * dtype_of(self.model).itemsize

    def _of(self, batch: TokenBatch) -> States | None:
        lengths = batch.attention_mask.sum(dim=1).tolist()
        texts = [tuple(ids[:length]) for ids, length in zip(batch.tokens.tolist(), lengths, strict=True)]
        if not all(ids in self.states for ids in texts):
            return None
        longest = torch.zeros_like(self.states[texts[0]][:1]).expand(batch.tokens.shape[1], -1)
        return pad_sequence([*(self.states[ids] for ids in texts), longest], batch_first=True)[:-1]

    def _computed(self, batch: TokenBatch) -> States:
        """What leaves the block below."""
        below = self.layer - 1
        output = run_segment(self.model, batch.tokens, batch.attention_mask, first=below, last=below).output
        self._tuples = isinstance(output, tuple)
        states: Tensor = output[0] if self._tuples else output
        return states

    def _works(self, encoder: Encoder, rows: Sequence[Encoded]) -> bool:
        """Whether a pass goes on from the states as a whole one does; not where a later block reads more of an earlier one."""
        if self.states:
            return True
        batch = encoder.collate(rows[:COMPARED])
        last = batch.attention_mask & ~pad(batch.attention_mask[:, 1:], (0, 1))  # which have read all before them
        with torch.no_grad():
            whole = logits_at(self.model, batch.tokens, batch.attention_mask, last)
            try:
                with self._begun(self._computed(batch)):
                    short = logits_at(self.model, batch.tokens, batch.attention_mask, last)
            except Exception as error:  # what an architecture's own code says to a block that gives nothing but states
                if ran_out(error):
                    raise
                logger.info(
                    "passes begin with the first layer: the model cannot be entered at %d (%s)",
                    self.layer,
                    one_line(error),
                )
                return False
        return bool((whole - short).abs().max() <= TOLERANCE * whole.abs().max())

    @contextmanager
    def _begun(self, states: States) -> Iterator[None]:
        """Inside, the block below the layer gives the states, and those before it do nothing."""

        def giving(given: Tensor | None) -> Callable[..., Any]:
            def forward(entering: Tensor, *_: Any, **__: Any) -> Any:
                leaving = entering if given is None else given
                return (leaving,) if self._tuples else leaving

            return forward

        skipped = [self.model.blocks[place] for place in range(self.layer)]
        try:
            for block in skipped:
                block.__dict__["forward"] = giving(states if block is skipped[-1] else None)
            yield
        finally:
            for block in skipped:
                block.__dict__.pop("forward", None)
