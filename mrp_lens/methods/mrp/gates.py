"""MRP's gates: at each hook a detector of the topic, which tells forget states from retain states by their direction.

Logistic regressions on states brought to length 1. What a forget set is about need not lie in one direction: its states are
parted into clusters, each cluster has a regression of its own against all retain states, and the gate opens as far as the one
that is surest says.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import normalize

from mrp_lens.data.tokenization import Encoded, Encoder, TokenBatch
from mrp_lens.edits import Gate
from mrp_lens.edits.gate import shares
from mrp_lens.methods.base import states_at
from mrp_lens.models import LensModel
from mrp_lens.training.losses import before_counted
from mrp_lens.utils.logistic import logistic_regression

STATES = 8192  # a side
NUMBERS = 2**27  # in states that are held at once, half a GiB; hooks with more of them are read one group after another
FEWEST = 16  # states of a cluster
ROUNDS = 15  # of clustering

States = Float[Tensor, "states d_model"]


@dataclass
class LearnedGate:
    """A gate under training: directions and thresholds learn, how sharply it opens stays as the regression found it."""

    direction: Float[Tensor, "directions d_model"]
    threshold: Float[Tensor, " directions"]
    sharpness: Float[Tensor, " directions"]

    @property
    def parameters(self) -> list[Tensor]:
        """What learns."""
        return [self.direction, self.threshold]

    def __call__(self, states: States) -> Float[Tensor, " states"]:
        """How far it is open for each state."""
        return shares(states, normalize(self.direction, dim=-1), self.threshold, self.sharpness)

    def gate(self) -> Gate:
        """As it is now."""
        direction = normalize(self.direction.detach().cpu(), dim=-1)
        threshold, sharpness = (tuple(values.tolist()) for values in (self.threshold.detach(), self.sharpness))
        return Gate(direction, threshold, sharpness)


def start_gates(
    model: LensModel,
    encoder: Encoder,
    forget: Sequence[Encoded],
    retain: Sequence[Encoded],
    *,
    hooks: Sequence[str],
    directions: int,
    generator: torch.Generator,
) -> dict[str, LearnedGate]:
    """Gates that tell the states of both sides apart, before any training."""
    gates: dict[str, LearnedGate] = {}
    together = hooks_together(int(model.cfg.d_model))
    for group in (hooks[begin : begin + together] for begin in range(0, len(hooks), together)):
        lost, kept = (states_at(model, encoder, rows, group, generator, count=STATES) for rows in (forget, retain))
        telling = states_at(model, encoder, forget, group, generator, count=STATES, places=before_what_counts)
        for hook in group:
            inside = _half_of(lost.pop(hook), telling.pop(hook))
            gates[hook] = _gate(inside, kept.pop(hook), directions, generator)
    return gates


def hooks_together(d_model: int) -> int:
    """At how many hooks states of this width are held at once."""
    return max(1, NUMBERS // (3 * STATES * d_model))


def _half_of(states: States, telling: States) -> States:
    """The states, and as many of others, each as often as it takes; there may be none."""
    again = torch.arange(len(states), device=states.device)
    return torch.cat([states, telling[again % len(telling)]]) if len(telling) else states


def before_what_counts(batch: TokenBatch) -> Bool[Tensor, "batch seq"]:
    """The content tokens behind which the loss counts what comes: of a question, its last one and the answer's."""
    return before_counted(batch) & batch.content_mask


def gate_weights(part: TokenBatch, batch: TokenBatch, *, lost: bool) -> Float[Tensor, "batch seq"]:
    """How much each content token of a part counts in the gates' loss; those of the whole batch add up to 1.

    Of forget documents (`lost`) half goes to the tokens behind which the loss counts what comes: a gate that is closed there lets an
    answer out, however open it was before.
    """
    alike = part.content_mask.float() / batch.content_mask.sum()
    if not lost:
        return alike
    return 0.5 * alike + 0.5 * before_what_counts(part).float() / before_what_counts(batch).sum().clamp(min=1)


def gate_loss(
    opened: Mapping[str, Float[Tensor, "batch seq"]], weights: Float[Tensor, "batch seq"], *, lost: bool
) -> Float[Tensor, ""]:
    """Cross-entropy of gates that should be open on forget documents (`lost`), and closed on others, in nats: the weighted sum over
    tokens, the mean over hooks."""
    shares = torch.stack([each.to(weights.device) for each in opened.values()])
    return (weights * -(shares if lost else 1.0 - shares).clamp(min=1e-4).log().mean(dim=0)).sum()


def _gate(lost: States, kept: States, directions: int, generator: torch.Generator) -> LearnedGate:
    lost, kept = (normalize(states.detach(), dim=-1) for states in (lost, kept))
    clusters = [part for part in _clusters(lost, directions, generator) if len(part) >= FEWEST] or [lost]
    found = [logistic_regression(part, kept) for part in clusters]
    weights, offsets = torch.stack([each[0] for each in found]), torch.stack([each[1] for each in found])
    sharpness = weights.norm(dim=-1)
    direction, threshold = weights / sharpness[:, None], -offsets / sharpness
    return LearnedGate(direction.requires_grad_(), threshold.requires_grad_(), sharpness)


def _clusters(states: States, count: int, generator: torch.Generator) -> list[States]:
    """Spherical k-means."""
    if count == 1:
        return [states]
    chosen = torch.randperm(len(states), generator=generator)[:count].to(states.device)
    centres = states[chosen]
    for _ in range(ROUNDS):
        nearest = (states @ centres.T).argmax(dim=1)
        sums = (torch.arange(len(centres), device=states.device)[:, None] == nearest).to(states) @ states
        centres = torch.where(sums.norm(dim=1, keepdim=True) > 0, normalize(sums, dim=1), centres)
    nearest = (states @ centres.T).argmax(dim=1)
    return [states[nearest == number] for number in range(len(centres))]
