"""Losses on what a model predicts, at the positions whose next token counts: in fits, attacks and measures alike."""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mrp_lens.data.tokenization import Encoded, TokenBatch
from mrp_lens.models import LensModel, logits_at
from mrp_lens.models.finite import check_log_probabilities


def predictions(model: LensModel, batch: TokenBatch) -> Float[Tensor, "counted d_vocab"]:
    """Log-probabilities, in float32, at the positions whose next token counts in the loss.

    They may be -infinity: so a model rules a token out. While gradients are recorded, NaN is left to who minimises the
    loss: `training.train` stops at one that is not finite.

    Raises:
        NonFiniteError: a NaN or +infinity among the logits there, outside training.
    """
    found = logits_at(model, batch.tokens, batch.attention_mask, before_counted(batch)).float().log_softmax(-1)
    if not torch.is_grad_enabled():
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
    """KL(reference || model) at each position, in nats."""
    return torch.nn.functional.kl_div(log_probabilities, reference, reduction="none", log_target=True).sum(-1)


def log_odds(
    reference: Float[Tensor, "counted d_vocab"], log_probabilities: Float[Tensor, "counted d_vocab"], batch: TokenBatch
) -> Float[Tensor, " counted"]:
    """log p of the text's own tokens over the mean log p of the other tokens, in nats.

    The mean is weighted by the probability that `reference` gives the other tokens: those it would say if it had to
    say something else. So a topic's answers are not merely lowered together, which would leave their order.
    """
    own = targets(batch)[:, None]
    others = reference.scatter(-1, own, -torch.inf).softmax(-1)
    return log_probabilities.gather(-1, own)[:, 0] - (others * log_probabilities).sum(-1)


def openness(rows: Sequence[Encoded], d_vocab: int) -> Float[Tensor, " d_vocab"]:
    """For each token, in [0, 1), how little the texts alone say about what follows it: 1 - 1 / perplexity.

    0 where one token always follows (a full stop after an answer), near 1 where many do.
    """
    pairs = torch.tensor(
        [pair for row in rows for *pair, counted in zip(row.ids, row.ids[1:], row.in_loss[1:], strict=False) if counted]
    )
    distinct, counts = pairs.unique(dim=0, return_counts=True)
    before = distinct[:, 0]
    share = counts / torch.zeros(d_vocab).index_add_(0, before, counts.float())[before]
    return 1 - torch.zeros(d_vocab).index_add_(0, before, share * share.log()).exp()
