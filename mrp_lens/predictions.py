"""What a model predicts at the positions that count, and what stands there."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mrp_lens.batching import TokenBatch
from mrp_lens.finite import check_log_probabilities
from mrp_lens.model import LensModel, logits_of


def predictions(model: LensModel, batch: TokenBatch) -> Float[Tensor, "counted d_vocab"]:
    """Log-probabilities, in float32, at the positions whose next token counts in the loss.

    They may be -infinity: so a model rules a token out. While gradients are recorded, NaN is left to who minimises the
    loss: `training.train` stops at one that is not finite.

    Raises:
        NonFiniteError: a NaN or +infinity among the logits there, outside training.
    """
    logits = logits_of(model, batch.tokens, batch.attention_mask)
    found = logits[:, :-1][batch.loss_mask[:, 1:]].float().log_softmax(-1)
    if not torch.is_grad_enabled():
        check_log_probabilities(model, batch, found)
    return found


def targets(batch: TokenBatch) -> Int[Tensor, " counted"]:
    """The tokens that count in the loss, in the order of `predictions`."""
    return batch.tokens[:, 1:][batch.loss_mask[:, 1:]]


def cross_entropy(log_probabilities: Float[Tensor, "counted d_vocab"], batch: TokenBatch) -> Float[Tensor, " counted"]:
    """-log p of the text's own tokens, in nats."""
    return -log_probabilities.gather(-1, targets(batch)[:, None])[:, 0]
