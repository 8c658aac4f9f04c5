"""How many bits about the right answer a probe gets out of states: usable information, estimated on facts held out."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor

from mrp_lens.utils.validation import generator_for

ProbeKind = Literal["linear", "mlp"]

FOLDS = 5
STEPS = (5, 10, 20, 40, 80, 160, 320)
"""Updates after which a probe may stop: the fewer, the less it fits."""
STRENGTHS = tuple(0.05 * 1.2**power for power in range(29))  # up to 8.2
"""Factors on a probe's scores."""
PRIORS = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Factors on the answers' log-frequencies; 0: all answers alike."""
CERTAINTY = 2.0
"""Standard errors that a probe must gain in cross-validation to be used at all."""
HIDDEN = 64
REACH = {"linear": 1.0, "mlp": 0.3}
"""How far one update may move a score: the learning rate times the number of inputs."""


@dataclass(frozen=True)
class LabelledStates:
    """States, and what is right about each.

    Attributes:
        states: one state a fact, [facts, d_model], if answers recur: each class of answers gets a score of its own. Or
            one a fact and choice, [facts, choices, d_model]: one function scores the state of every choice.
        choices: the class of each choice, -1 where a fact has fewer choices than others. (With a state a choice only
            the sign counts.)
        right: the place of the right one among the choices.
    """

    states: Float[Tensor, "facts *choices d_model"]
    choices: Int[Tensor, "facts choices"]
    right: Int[Tensor, " facts"]

    def __len__(self) -> int:
        return len(self.right)

    @property
    def by_class(self) -> bool:
        """Whether there is one state a fact."""
        return self.states.ndim == 2

    @property
    def answers(self) -> Int[Tensor, " facts"]:
        """The class of each right answer."""
        return self.choices.gather(1, self.right[:, None])[:, 0]

    def among_choices(self, scores: Float[Tensor, "facts options"]) -> Float64[Tensor, "facts choices"]:
        """Scores of each fact's own choices; -infinity where it has fewer."""
        own = scores.gather(1, self.choices.clamp(min=0)) if self.by_class else scores
        return own.double().masked_fill(self.choices < 0, -math.inf)

    def shuffled(self, generator: torch.Generator) -> "LabelledStates":
        """The same states with labels that tell nothing about them, as frequent as the true ones.

        One state a fact: each gets choices and answer of another fact. A state a choice: any of them is called right.
        """
        if self.by_class:
            order = torch.randperm(len(self), generator=generator).to(self.right.device)
            return replace(self, choices=self.choices[order], right=self.right[order])
        counts = (self.choices >= 0).sum(dim=1).cpu()
        drawn = (torch.rand(len(self), generator=generator) * counts).long()  # choices come before what is missing
        return replace(self, right=drawn.to(self.right.device))


@dataclass(frozen=True)
class VInformation:
    """What a probe makes of held-out facts, one entry a fact.

    Attributes:
        blind: bits of surprise at the right answer without the state.
        surprise: with it.
        right: 1 where the right choice is the likeliest; shared where several are equally likely.
    """

    blind: Float64[Tensor, " facts"]
    surprise: Float64[Tensor, " facts"]
    right: Float64[Tensor, " facts"]

    @property
    def bits(self) -> Float64[Tensor, " facts"]:
        """Usable information, by fact: their mean is the estimate."""
        return self.blind - self.surprise


def usable_information(
    train: LabelledStates, held_out: LabelledStates, *, kind: ProbeKind = "linear", seed: int = 0
) -> VInformation:
    """V-information of the states about the right answers (arXiv 2002.10689), among each fact's own choices.

    H(answer | choices) - H(answer | choices, state), both as cross-entropies on held-out facts of predictors that are
    fitted on `train`: the first sees only how frequent the answers are, the second the state as well.

    A linear probe or an MLP with one hidden layer is fitted by full-batch Adam on standardised states. How long (`STEPS`)
    and how much its scores count (`STRENGTHS`) are chosen by cross-validation inside `train`. Where that gains less than
    two standard errors over the first predictor (`CERTAINTY`), the second is the first, so that states without
    information give 0 and not the loss of an overfitted probe; so may states with very little.

    Args:
        train: what the probe learns from, at least `FOLDS` facts.
        held_out: what it is scored on.
        kind: "linear" or "mlp".
        seed: of the folds and of the MLP's initial weights.
    """
    generator = generator_for(seed)
    fold = (torch.randperm(len(train), generator=generator) % FOLDS).to(train.right.device)
    facts = torch.arange(len(train), device=fold.device)
    used = torch.stack([fold != number for number in range(FOLDS + 1)]).float()  # the last probe learns from all
    share = used / used.sum(dim=1, keepdim=True)
    inputs, of_held_out = _inputs(train, held_out)
    prior = _prior(train, 1 + int(max(train.choices.max(), held_out.choices.max())))
    probes = [
        part.to(inputs.device).requires_grad_() for part in _initial(kind, inputs.shape[-1], len(prior), generator)
    ]
    rates = [REACH[kind] / max(part.shape[1], HIDDEN) for part in probes]
    optimizer = torch.optim.Adam([{"params": [part], "lr": rate} for part, rate in zip(probes, rates, strict=True)])
    blind = prior + torch.zeros_like(_scores(probes, of_held_out)[-1])
    without = _surprise(train, prior + torch.zeros_like(_scores(probes, inputs)[-1]))
    best, chosen = 0.0, blind
    for step in range(1, STEPS[-1] + 1):
        optimizer.zero_grad()
        (share * _losses(train, prior + _scores(probes, inputs))).sum().backward()
        optimizer.step()
        if step not in STEPS:
            continue
        with torch.no_grad():
            unseen, scores = _scores(probes, inputs)[fold, facts], _scores(probes, of_held_out)[-1]
            for strength in STRENGTHS:
                gains = without - _surprise(train, prior + strength * unseen)
                gain = float(gains.mean())
                if gain > max(best, CERTAINTY * float(gains.std()) / len(train) ** 0.5):
                    best, chosen = gain, prior + strength * scores
    own = held_out.among_choices(chosen)
    likeliest = (own == own.max(dim=1, keepdim=True).values).double()
    return VInformation(
        blind=_surprise(held_out, blind),
        surprise=_surprise(held_out, chosen),
        right=(likeliest / likeliest.sum(dim=1, keepdim=True)).gather(1, held_out.right[:, None])[:, 0],
    )


def _inputs(train: LabelledStates, held_out: LabelledStates) -> tuple[Tensor, Tensor]:
    """What the probes see: each coordinate at mean 0 and variance 1 over the training facts.

    Of the states of a fact's choices, the difference from their mean: what they share favours none of them.
    """
    seen = []
    for given in (train, held_out):
        states = given.states.double()
        if not given.by_class:
            there = (given.choices >= 0)[..., None]
            mean = (states * there).sum(dim=1, keepdim=True) / there.sum(dim=1, keepdim=True)
            states = (states - mean) * there
        seen.append(states)
    filled = seen[0] if train.by_class else seen[0][train.choices >= 0]
    centre, spread = filled.mean(dim=0), filled.std(dim=0, correction=0)
    spread[spread <= 1e-6 * spread.max()] = math.inf  # a constant coordinate is 0, whatever the rounding of its mean
    return ((seen[0] - centre) / spread).float(), ((seen[1] - centre) / spread).float()


def _prior(train: LabelledStates, classes: int) -> Float[Tensor, " classes"]:
    """Scores of the classes without a state: a multiple of their log-frequencies that serves facts left out one by one.

    A single 0 where the choices have states of their own: none of them is favoured.
    """
    if not train.by_class:
        return torch.zeros(1, device=train.right.device)
    hits = torch.nn.functional.one_hot(train.answers, classes)
    others = (hits.sum(dim=0) - hits + 1).log()
    surprise = [float(_surprise(train, factor * others).mean()) for factor in PRIORS]
    return PRIORS[surprise.index(min(surprise))] * (hits.sum(dim=0) + 1).log()


def _initial(kind: ProbeKind, width: int, outputs: int, generator: torch.Generator) -> list[Tensor]:
    """Weights [probes, inputs, units] and biases of FOLDS + 1 probes that are alike, layer by layer."""
    if kind == "linear":
        weights = [torch.zeros(width, outputs)]
    else:
        first = torch.randn(width, HIDDEN, generator=generator) / width**0.5
        weights = [first, 0.1 * torch.randn(HIDDEN, outputs, generator=generator) / HIDDEN**0.5]
    probes = []
    for weight in weights:
        probes += [weight.repeat(FOLDS + 1, 1, 1), torch.zeros(FOLDS + 1, 1, weight.shape[1])]
    return probes


def _scores(probes: Sequence[Tensor], inputs: Tensor) -> Float[Tensor, "probes facts options"]:
    """What each probe gives to each class, or to each choice where these have states of their own."""
    values = inputs.flatten(0, -2)
    for weight, bias in zip(probes[::2], probes[1::2], strict=True):
        values = (torch.einsum("nd,pdu->pnu", values, weight) if weight is probes[0] else values.relu() @ weight) + bias
    return values if inputs.ndim == 2 else values.view(FOLDS + 1, *inputs.shape[:2])


def _losses(train: LabelledStates, scores: Float[Tensor, "probes facts options"]) -> Float[Tensor, "probes facts"]:
    """Nats, by probe and fact. Of classes, all compete and not only a fact's choices: there is more to learn from."""
    targets = train.answers if train.by_class else train.right
    if not train.by_class:
        scores = scores.masked_fill(train.choices < 0, -math.inf)
    return -scores.log_softmax(dim=-1).gather(-1, targets.expand(len(scores), -1)[..., None])[..., 0]


def _surprise(facts: LabelledStates, scores: Float[Tensor, "facts options"]) -> Float64[Tensor, " facts"]:
    """Bits, of the right choice among the fact's own."""
    logs = facts.among_choices(scores).log_softmax(dim=1)
    return -logs.gather(1, facts.right[:, None])[:, 0] / math.log(2)
