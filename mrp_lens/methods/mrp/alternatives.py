"""What MRP's forget loss compares an answer with: what else the forget texts say in its place, or the model considers there.

An answer whose probability is merely lowered can be lowered together with everything of its kind, which leaves their order, and with
it the answer to a question that offers several. A model that never saw the texts gives the right one no more than the others.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mrp_lens.data.tokenization import Encoded, TokenBatch
from mrp_lens.training.losses import targets

MOST = 256  # that are compared with at one place


@dataclass(frozen=True)
class Alternatives:
    """The tokens that follow each token in a set of texts, and how often.

    Attributes:
        row: [d_vocab] of each token, its row in the other two; 0 where nothing follows it.
        tokens: [rows, most] that follow it, the most frequent first.
        shares: [rows, most] of them; 0 behind the last.
        openness: [rows] how open it is what follows, in [0, 1): 1 - 1 / perplexity. It is 0 where one token always follows (a full
            stop after an answer), near 1 where many do.
    """

    row: Int[Tensor, " d_vocab"]
    tokens: Int[Tensor, "rows most"]
    shares: Float[Tensor, "rows most"]
    openness: Float[Tensor, " rows"]

    @classmethod
    def of(cls, texts: Sequence[Encoded], d_vocab: int, device: torch.device) -> "Alternatives":
        """Of the tokens that count in the loss; of each the 256 most frequent."""
        following: dict[int, Counter[int]] = {}
        for text in texts:
            for before, after, counted in zip(text.ids, text.ids[1:], text.in_loss[1:], strict=False):
                if counted:
                    following.setdefault(before, Counter())[after] += 1
        kept = [found.most_common(MOST) for found in following.values()]
        row = torch.zeros(d_vocab, dtype=torch.long)
        row[list(following)] = torch.arange(1, len(kept) + 1)
        tokens, counts = (torch.zeros(len(kept) + 1, max(map(len, kept))) for _ in range(2))
        for number, found in enumerate(kept, start=1):
            tokens[number, : len(found)], counts[number, : len(found)] = torch.tensor(found).T.float()
        shares = counts / counts.sum(dim=1, keepdim=True).clamp(min=1.0)
        openness = torch.tensor([0.0, *(_openness(found) for found in following.values())])
        return cls(row.to(device), tokens.long().to(device), shares.to(device), openness.to(device))

    def left_out(self, texts: Sequence[Encoded]) -> float:
        """Share of the texts where nothing is open in the answer, or in the last half of one without a prompt: of these a fit would
        forget nothing of what they tell."""
        openness, row = self.openness.cpu(), self.row.cpu()
        without = 0
        for text in texts:
            places = [place for place in range(1, len(text.ids)) if text.in_loss[place]]
            ending = places if places[:1] > [1] else places[-max(1, len(places) // 2) :]
            without += not any(openness[row[text.ids[place - 1]]] > 0.0 for place in ending)
        return without / max(1, len(texts))

    def log_odds(
        self, log_probabilities: Float[Tensor, "counted d_vocab"], batch: TokenBatch
    ) -> tuple[Float[Tensor, " counted"], Float[Tensor, " counted"]]:
        """log p of a text's own tokens over the mean log p of what else follows the token before, in nats; and how much each counts:
        the openness, or nothing where nothing else follows."""
        row = self._rows(batch)
        tokens, shares, own = self.tokens[row], self.shares[row], targets(batch)[:, None]
        others = shares * (tokens != own)
        known = others.sum(dim=-1, keepdim=True)
        among = log_probabilities.gather(-1, tokens).masked_fill(
            others == 0.0, 0.0
        )  # of others alone, -infinity counts
        mean = (others / known.clamp(min=1e-9) * among).sum(dim=-1)
        return log_probabilities.gather(-1, own)[:, 0] - mean, torch.where(known[:, 0] > 0.0, self.openness[row], 0.0)

    def reference_log_odds(
        self,
        reference: Float[Tensor, "counted d_vocab"],
        log_probabilities: Float[Tensor, "counted d_vocab"],
        batch: TokenBatch,
    ) -> tuple[Float[Tensor, " counted"], Float[Tensor, " counted"]]:
        """log p of a text's own tokens over the mean log p of all others, weighted by the probability that `reference` gives them, in
        nats; and the openness."""
        own = targets(batch)[:, None]
        others = reference.scatter(-1, own, -torch.inf).softmax(-1)
        known = log_probabilities.masked_fill(others == 0.0, 0.0)  # of a token that is ruled out, 0 * -inf would be NaN
        odds = log_probabilities.gather(-1, own)[:, 0] - (others * known).sum(-1)
        return odds, self.openness[self._rows(batch)]

    def _rows(self, batch: TokenBatch) -> Int[Tensor, " counted"]:
        """Those of the tokens before the ones that count."""
        return self.row[batch.tokens[:, :-1][batch.loss_mask[:, 1:]]]


def _openness(following: Counter[int]) -> float:
    counts = torch.tensor(list(following.values())).double()
    return 1.0 - float((-torch.special.entr(counts / counts.sum()).sum()).exp())
