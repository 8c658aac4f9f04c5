"""What a model predicts at the positions that count, and what stands there."""

from jaxtyping import Float, Int
from torch import Tensor

from mrp_lens.batching import TokenBatch
from mrp_lens.model import LensModel, logits_of


def predictions(model: LensModel, batch: TokenBatch) -> Float[Tensor, "counted d_vocab"]:
    """Log-probabilities, in float32, at the positions whose next token counts in the loss."""
    logits = logits_of(model, batch.tokens, batch.attention_mask)
    return logits[:, :-1][batch.loss_mask[:, 1:]].float().log_softmax(-1)


def targets(batch: TokenBatch) -> Int[Tensor, " counted"]:
    """The tokens that count in the loss, in the order of `predictions`."""
    return batch.tokens[:, 1:][batch.loss_mask[:, 1:]]


def cross_entropy(log_probabilities: Float[Tensor, "counted d_vocab"], batch: TokenBatch) -> Float[Tensor, " counted"]:
    """-log p of the text's own tokens, in nats."""
    return -log_probabilities.gather(-1, targets(batch)[:, None])[:, 0]
