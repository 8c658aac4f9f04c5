"""Losses on the model's predictions: what forgetting and keeping mean to MRP."""

from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from mrp_lens.batching import Encoded, TokenBatch
from mrp_lens.predictions import targets

ForgetLoss = Literal["odds", "bounded", "ascent"]
RetainLoss = Literal["kl", "cross_entropy"]


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
