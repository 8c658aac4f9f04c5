"""Losses on the model's predictions: what forgetting and keeping mean to MRP."""

from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from mrp_lens.batching import Encoded, TokenBatch
from mrp_lens.predictions import targets

ForgetLoss = Literal["marginal", "bounded", "ascent"]
RetainLoss = Literal["kl", "cross_entropy"]


def cross_entropy(log_probabilities: Float[Tensor, "counted d_vocab"], batch: TokenBatch) -> Float[Tensor, " counted"]:
    """-log p of the text's own tokens, in nats."""
    return -log_probabilities.gather(-1, targets(batch)[:, None])[:, 0]


def kl(
    reference: Float[Tensor, "counted d_vocab"], log_probabilities: Float[Tensor, "counted d_vocab"]
) -> Float[Tensor, " counted"]:
    """KL(reference || model) at each position, in nats."""
    return torch.nn.functional.kl_div(log_probabilities, reference, reduction="none", log_target=True).sum(-1)


class Followers:
    """What follows each token in a set of texts: all that a model which knows their style but no facts could say."""

    def __init__(self, rows: Sequence[Encoded], d_vocab: int) -> None:
        pairs = torch.tensor(
            [
                pair
                for row in rows
                for *pair, counted in zip(row.ids, row.ids[1:], row.in_loss[1:], strict=False)
                if counted
            ]
        )
        distinct, counts = pairs.unique(dim=0, return_counts=True)  # sorted by the token before
        before, self.next = distinct.T
        self.number = torch.bincount(before, minlength=d_vocab)
        self.start = self.number.cumsum(0) - self.number
        total = torch.zeros(d_vocab).index_add_(0, before, counts.float())
        self.share = counts / total[before]

    def cross_entropy(
        self, log_probabilities: Float[Tensor, "counted d_vocab"], batch: TokenBatch
    ) -> Float[Tensor, " counted"]:
        """Cross-entropy against the distribution of what follows the same token anywhere in the texts, in nats.

        Least, at that distribution's entropy, where the prediction *is* that distribution: so it is bounded from below
        for every token, and pushes no answer below the others.
        """
        before = batch.tokens[:, :-1][batch.loss_mask[:, 1:]].cpu()
        number = self.number[before]
        position = torch.arange(len(before)).repeat_interleave(number)
        within = torch.arange(len(position)) - (number.cumsum(0) - number)[position]
        entry = self.start[before][position] + within
        place = position.to(log_probabilities.device), self.next[entry].to(log_probabilities.device)
        weighted = self.share[entry].to(log_probabilities) * log_probabilities[place]
        return -torch.zeros_like(log_probabilities[:, 0]).index_add(0, place[0], weighted)
