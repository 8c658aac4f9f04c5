"""Losses on what a model predicts, at the positions whose next token counts: in fits, attacks and measures alike."""

import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mrp_lens.data.tokenization import TokenBatch
from mrp_lens.models import LensModel, logits_at
from mrp_lens.models.finite import check_log_probabilities
from mrp_lens.models.memory import in_halves

AT_ONCE = 2**21  # numbers


def predictions(model: LensModel, batch: TokenBatch, *, whole: bool = False) -> Float[Tensor, "counted d_vocab"]:
    """Log-probabilities, in float32, at the positions whose next token counts in the loss.

    They may be -infinity: so a model rules a token out. While gradients are recorded, NaN is left to who minimises the
    loss: `training.train` stops at one that is not finite. Otherwise a batch for which memory runs out is read in halves,
    but not `whole`: for whoever looks at the pass itself.

    Raises:
        NonFiniteError: a NaN or +infinity among the logits there, outside training.
    """

    def read(part: TokenBatch) -> Float[Tensor, "counted d_vocab"]:
        return logits_at(model, part.tokens, part.attention_mask, before_counted(part)).float().log_softmax(-1)

    if torch.is_grad_enabled():
        return read(batch)
    found = read(batch) if whole else in_halves(batch, read)
    check_log_probabilities(model, batch, found)
    return found


def before_counted(batch: TokenBatch) -> Bool[Tensor, "batch seq"]:
    """The positions whose next token counts in the loss."""
    return torch.nn.functional.pad(batch.loss_mask[:, 1:], (0, 1))


def targets(batch: TokenBatch) -> Int[Tensor, " counted"]:
    """The tokens that count in the loss, in the order of `predictions`."""
    return batch.tokens[:, 1:][batch.loss_mask[:, 1:]]


def cross_entropy(log_probabilities: Float[Tensor, "counted d_vocab"], batch: TokenBatch) -> Float[Tensor, " counted"]:
    """-log p of the text's own tokens, in nats."""
    return -log_probabilities.gather(-1, targets(batch)[:, None])[:, 0]


def kl(
    reference: Float[Tensor, "counted d_vocab"], log_probabilities: Float[Tensor, "counted d_vocab"]
) -> Float[Tensor, " counted"]:
    """KL(reference || model) at each position, in nats; a few positions at a time, as what is summed up is as large as both.

    A token that the reference rules out counts nothing, whatever the model says of it.
    """
    parts = zip(*(each.split(rows_at_once(each)) for each in (log_probabilities, reference)), strict=True)
    return torch.cat([_kl(ours, theirs) for ours, theirs in parts])


def _kl(ours: Float[Tensor, "counted d_vocab"], theirs: Float[Tensor, "counted d_vocab"]) -> Float[Tensor, " counted"]:
    ruled_out = theirs == -math.inf
    if bool(ruled_out.any()):  # 0 * (-inf - -inf) would be NaN, and so would its gradient
        ours, theirs = (each.masked_fill(ruled_out, 0.0) for each in (ours, theirs))
    return torch.nn.functional.kl_div(ours, theirs, reduction="none", log_target=True).sum(-1)


def rows_at_once(numbers: Float[Tensor, "rows columns"]) -> int:
    """Rows, at least one, that together have at most 2^21 numbers."""
    return max(1, AT_ONCE // max(1, numbers.shape[-1]))
