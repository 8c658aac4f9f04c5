"""RMU (arXiv 2403.03218) and Adaptive RMU (arXiv 2408.06223): a few MLP matrices learn to steer forget states away."""

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Generic, Literal, TypeVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from typing_extensions import override

from mrp_lens.data.tokenization import Batches, BatchesInTurn, Encoded, PaddingSide, TokenBatch
from mrp_lens.edits import WeightEdit
from mrp_lens.edits.subspace import Law, random_units
from mrp_lens.methods.base import Data, FitContext, FitTemplate, fitting
from mrp_lens.methods.coverage import Coverage
from mrp_lens.methods.fit import Fit
from mrp_lens.methods.registry import Swept, register
from mrp_lens.methods.spaces import ADAPTIVE_RMU_SPACE, RMU_SPACE
from mrp_lens.models import EditableWeight, LensModel, check_layers, mlp_out_weight, restored, tensor_digests
from mrp_lens.models.hooks import Site, captured, hook_name, read_states, run_segment
from mrp_lens.models.kept_states import KeptStates
from mrp_lens.training.optim import TransformersAdamW, update_size, warmup_linear_decay
from mrp_lens.utils.processes import shares
from mrp_lens.utils.validation import check_positive, or_default

Positions = Literal["content", "all"]
Optimizer = Literal["adamw", "transformers_adamw"]
Coefficient = Literal["token", "sample", "first_batch"]
Errors = Literal["relative", "absolute"]
States = Float[Tensor, "batch seq d_model"]
Mask = Bool[Tensor, "batch seq"]

BEFORE_MLP: tuple[Site, ...] = ("resid_pre", "attn_out", "resid_mid")
DEPTH_SHARE = 3 / 10
RELEASED_DEPTH_SHARE = 7 / 32  # layer 7 of Zephyr's 32
MEASURED_DOCUMENTS = 64
C_SHARE = 2.0  # c over the norm of the forget states
ALPHA_SHARE = 4.0  # alpha; over (c / norm)^2 for absolute errors, whose forget term grows with c^2
# In many models a few tokens, the first of a text above all, are attention sinks (arXiv 2309.17453): their states are
# thousands of times as long as the others ("Massive Activations in Large Language Models", arXiv 2402.17762), say nothing of
# the text, and hold every other token's attention. Those above this many median norms are left alone.
SINK_SHARE = 4.0
# of a matrix's size that an update is, when AdamW moves every entry by the learning rate, all the same way
LR_SHARE = 0.3
WARMUP = 30  # updates, or a tenth of a run that is shorter than ten times as many
RELEASED: dict[str, Any] = {
    "batch_size": 4,
    "errors": "absolute",
    "budget": None,
    "coverage": None,
    "retain_length": None,
    "positions": "all",
    "padding": "left",
    "shuffle": False,
    "optimizer": "transformers_adamw",
    "eps": 1e-6,
}
REPORT = "MLP output matrices of layers {trained_layers} trained to steer forget states of layer {layer} to a random direction"


@dataclass(frozen=True, kw_only=True)
class MisdirectionSettings:
    """What a fit of RMU or Adaptive RMU runs with where the user gave nothing.

    Attributes:
        norm: of the forget states before training, from which c, alpha and what counts as an attention sink follow: their
            median for relative errors, their mean for absolute ones.
    """

    layer: int
    trained_layers: tuple[int, ...]
    norm: float
    alpha: float
    lr: float


@dataclass(frozen=True, kw_only=True)
class RMUSettings(MisdirectionSettings):
    """RMU's, with its c."""

    steering_coeff: float


Resolved = TypeVar("Resolved", bound=MisdirectionSettings)


@dataclass(frozen=True, kw_only=True)
class Misdirection(FitTemplate[Resolved], Generic[Resolved]):
    """What RMU and Adaptive RMU share, which differ in c alone. None: derived from the model when fitting."""

    layer: int | None = None
    site: Site = "resid_post"
    trained_layers: tuple[int, ...] | None = None
    alpha: float | None = None
    lr: float | None = None
    steps: int = 600
    batch_size: int = 32
    retain_length: int | None = 64
    micro_batch: int | None = None
    max_length: int | None = None
    budget: float | None = 0.05
    target: float | None = None
    coverage: Coverage | None = field(default_factory=Coverage)
    errors: Errors = "relative"
    direction: Law = "uniform"
    positions: Positions = "content"
    padding: PaddingSide = "right"
    shuffle: bool = True
    optimizer: Optimizer = "adamw"
    eps: float = 1e-8
    retain_noise: float = 0.0

    first_share = 0.3

    @abstractmethod
    def c_share(self, norm: float) -> float:
        """Beta: c over the norm of the forget states, which is given."""

    @abstractmethod
    def settled(self, *, layer: int, trained_layers: tuple[int, ...], norm: float, alpha: float, lr: float) -> Resolved:
        """The settings, with c if that is a number."""

    @abstractmethod
    def c(
        self, settings: Resolved, states: States, mask: Mask, first: float | None
    ) -> float | Float[Tensor, "batch #seq 1"]:
        """The norm that forget states are steered to, for a batch of frozen ones.

        Args:
            settings: of the fit.
            states: of the batch.
            mask: the tokens that count.
            first: the number that the corpus's first batch gave; None: this is it.
        """

    @property
    def c_of_first_batch(self) -> bool:
        """Whether the first batch of a corpus says what c is for all of its batches."""
        return False

    @override
    def check(self, model: LensModel) -> None:
        self.check_values(
            above_0=("alpha", "lr", "eps"), counts=("steps", "batch_size", "retain_length", "micro_batch")
        )
        if not self.retain_noise >= 0.0:
            raise ValueError(
                f"retain_noise is a share of the states' norm and must be at least 0, got {self.retain_noise}"
            )
        self._layers(model)

    @override
    def resolve(self, model: LensModel, data: Data) -> Resolved:
        layer, trained = self._layers(model)
        size = update_size(mlp_out_weight(model, place).read() for place in trained)
        norm = norm_of(model, data, layer=layer, hook=hook_name(layer, self.site), errors=self.errors)
        balance = 1.0 if self.errors == "relative" else self.c_share(norm) ** 2
        return self.settled(
            layer=layer,
            trained_layers=trained,
            norm=norm,
            alpha=or_default(self.alpha, ALPHA_SHARE * balance),
            lr=or_default(self.lr, LR_SHARE * size),
        )

    @override
    def learn(self, settings: Resolved, context: FitContext) -> Fit:
        model, data, generator = context.model, context.data, context.generator
        with fitting(model, context.after):
            weights = {layer: mlp_out_weight(model, layer) for layer in settings.trained_layers}
            original = {layer: weight.read() for layer, weight in weights.items()}
            directions = {
                name: random_units(1, model.cfg.d_model, self.direction, generator)[0].to(data.encoder.device)
                for name in data.names
            }
            masters = {layer: tensor.float().clone().requires_grad_() for layer, tensor in original.items()}
            kind = torch.optim.AdamW if self.optimizer == "adamw" else TransformersAdamW
            losses = _Losses(self, settings, context, weights, masters, list(directions.values()))
            with captured(model, [losses.hook]) as losses.store:
                run = context.train(
                    losses,
                    kind(list(masters.values()), lr=settings.lr, eps=self.eps, weight_decay=0.0),
                    steps=self.steps,
                    schedule=self._schedule(),
                    resumable={"losses": losses},
                    shown=losses.written,
                )
        edit = WeightEdit(
            {weights[layer].name: master for layer, master in masters.items()},
            {weights[layer].name: tensor_digests(tensor) for layer, tensor in original.items()},
            provenance=context.provenance(steps=len(run.log)),
        )
        return context.result(edit, run, directions)

    def _schedule(self) -> Callable[[float], float] | None:
        if self.errors == "absolute":
            return None
        return partial(warmup_linear_decay, warmup=min(0.1, WARMUP / self.steps))

    def _layers(self, model: LensModel) -> tuple[int, tuple[int, ...]]:
        """Where states are steered, and whose matrices learn."""
        share = DEPTH_SHARE if self.errors == "relative" else RELEASED_DEPTH_SHARE
        layer = or_default(self.layer, default_layer(model, share))
        check_layers(model, [layer])
        last = layer - 1 if self.site in BEFORE_MLP else layer  # whose matrix has a part in what the loss reads
        if last < 0:
            raise ValueError(
                f"site {self.site!r} of layer 0 lies before every MLP, so that no matrix could be trained; take a higher layer, or site='resid_post'"
            )
        trained = check_layers(model, or_default(self.trained_layers, up_to(last)))
        if max(trained) > last:
            raise ValueError(
                f"trained_layers {trained} reach beyond layer {last}, the last whose MLP comes before {self.site!r} of layer {layer}, where "
                "the loss is read"
            )
        return layer, trained


class _Losses(Generic[Resolved]):
    """What the training loop minimises: for each step the share of each micro-batch."""

    def __init__(
        self,
        method: Misdirection[Resolved],
        settings: Resolved,
        context: FitContext,
        weights: Mapping[int, EditableWeight],
        masters: Mapping[int, Tensor],
        directions: Sequence[Tensor],
    ) -> None:
        data = context.covered()
        self.method, self.settings, self.context = method, settings, context
        self.model, self.encoder, self.generator = context.model, context.data.encoder, context.generator
        self.weights, self.masters, self.directions = weights, masters, directions
        self.hook = hook_name(settings.layer, method.site)
        self.store: dict[str, Tensor] = {}
        self.first: dict[int, float] = {}
        self.forget = [self._batches(rows) for rows in data.forget]
        self.retain = [self._batches(data.retain, method.retain_length) for _ in self.forget]
        self.kept = KeptStates(self.model, min(weights))
        if method.positions == "content" and method.padding == "right":  # else pads count, whose states are not kept
            for rows in (*data.forget, self.retain[0].texts):
                passes = method.steps * method.batch_size / len(data.forget) / len(rows)
                self.kept.read(self.encoder, rows, passes=passes, progress=context.progress)

    def _batches(self, rows: Sequence[Encoded], length: int | None = None) -> Batches:
        """Batches for ever: shuffled in each pass, of long texts a random piece; or in the order of the corpus, as they are."""
        size = self.method.batch_size
        return Batches(rows, size, self.generator, length=length) if self.method.shuffle else BatchesInTurn(rows, size)

    def _next(self, batches: Batches) -> TokenBatch:
        return self.encoder.collate(next(batches), side=self.method.padding)

    def state_dict(self) -> dict[str, Any]:
        """How far each stream of batches is, and the coefficients that first batches have set."""
        streams = {"forget": self.forget, "retain": self.retain}
        return {side: [stream.state_dict() for stream in each] for side, each in streams.items()} | {
            "first": dict(self.first)
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there."""
        for side, streams in (("forget", self.forget), ("retain", self.retain)):
            for stream, known in zip(streams, state[side], strict=True):
                stream.load_state_dict(known)
        self.first = dict(state["first"])

    def __call__(self, step: int) -> Iterator[dict[str, Tensor]]:
        """Forget corpora take turns, one a step, each with its own pass through the retain corpus."""
        topic = step % len(self.forget)
        for part in self._squared_errors(self._next(self.forget[topic]), topic):
            yield {"loss": part, "forget": part}
        for part in self._squared_errors(self._next(self.retain[topic]), None):
            yield {"loss": self.context.multiplier * self.settings.alpha * part, "retain": part}

    def _squared_errors(self, batch: TokenBatch, topic: int | None) -> Iterator[Float[Tensor, ""]]:
        """Shares of the mean error against c u on a forget topic, against the frozen state on retain text; see `_weights`.

        The mean is over the batch's tokens by `positions`, whatever part of it a token is in; one that `_counted` leaves out
        adds 0 to it. So a part need not know the states of the others, and one without a token left has the share 0.

        The blocks below the trained ones run once, without gradient, and give trained and frozen states alike; the
        frozen weights are simply the model's own, since training never writes into it.
        """
        method = self.method
        total = self._mask(batch).sum() * (1 if method.errors == "relative" else self.model.cfg.d_model)
        if topic is not None and method.c_of_first_batch and topic not in self.first:
            with torch.no_grad():  # in the model as trained so far
                frozen_states, states = self._states(batch)
                counted = self._counted(batch, frozen_states)
                self.first[topic] = float(method.c(self.settings, states, counted, None))
        noise = self._drawn(batch) if topic is None and method.retain_noise > 0.0 else None
        for rows in shares(len(batch), method.micro_batch):
            part = batch[rows]
            frozen_states, states = self._states(part)
            counted = self._counted(part, frozen_states)
            target, unit = frozen_states, 1.0
            if noise is not None:
                target = target + self._scaled(noise[rows], target)
            if topic is not None:
                c = method.c(self.settings, frozen_states, counted, self.first.get(topic))
                target, unit = c * self.directions[topic], method.c_share(self.settings.norm)
            yield ((states - target).square() * self._weights(frozen_states, counted, unit)).sum() / total

    def _counted(self, batch: TokenBatch, frozen_states: States) -> Mask:
        """The tokens whose errors count: relative ones leave out attention sinks, and states of norm 0, which have none."""
        mask = self._mask(batch)
        if self.method.errors == "absolute":
            return mask
        norms = frozen_states.norm(dim=-1)
        return mask & (norms > 0.0) & (norms <= SINK_SHARE * self.settings.norm)

    def _weights(self, frozen_states: States, counted: Mask, unit: float) -> Float[Tensor, "batch seq 1"] | Mask:
        """Of each token's squared error: 1, or one over the squared norm of its frozen state, in `unit`s of it."""
        if self.method.errors == "absolute":
            return counted[..., None]
        lengths = unit * frozen_states.norm(dim=-1, keepdim=True)
        return torch.where(counted[..., None], lengths.square().reciprocal(), 0.0)

    def _drawn(self, batch: TokenBatch) -> States:
        """Noise for the whole batch, whichever parts of it are this process's."""
        return torch.randn(*batch.tokens.shape, int(self.model.cfg.d_model), generator=self.generator)

    def _scaled(self, noise: States, states: States) -> States:
        """The noise in the share of each state's norm that the settings say, on average."""
        scale = self.method.retain_noise / states.shape[-1] ** 0.5
        return scale * states.norm(dim=-1, keepdim=True) * noise.to(states.device)

    def _states(self, batch: TokenBatch) -> tuple[States, States]:
        """With the model's own weights, and with those in training."""
        first, last = min(self.weights), self.settings.layer
        with self.kept.entered(batch):
            segment = run_segment(self.model, batch.tokens, batch.attention_mask, first=first, last=last)
        frozen_states = self.store[self.hook].float()
        segment.replay({layer: {w.key: w.to_model(self.masters[layer])} for layer, w in self.weights.items()})
        return frozen_states, self.store[self.hook].float()

    def _mask(self, batch: TokenBatch) -> Mask:
        return batch.content_mask if self.method.positions == "content" else torch.ones_like(batch.content_mask)

    @contextmanager
    def written(self) -> Iterator[None]:
        """Inside, the model has the matrices in training."""
        with restored(weight.parameter for weight in self.weights.values()):
            for layer, weight in self.weights.items():
                weight.write(self.masters[layer].detach())
            yield


def default_layer(model: LensModel, share: float = DEPTH_SHARE) -> int:
    """The layer at a share of the depth, from layer 2 on, in a shallow model the last; RMU steers at three tenths of it."""
    return min(int(model.cfg.n_layers) - 1, max(2, round(share * model.cfg.n_layers)))


def up_to(layer: int) -> tuple[int, ...]:
    """The layers whose matrices learn when states are steered at a layer: it and the two before."""
    return tuple(range(max(0, layer - 2), layer + 1))


def norm_of(model: LensModel, data: Data, *, layer: int, hook: str, errors: Errors) -> float:
    """L2 norm of the forget states at a hook over the content tokens of the first 64 documents: their median for relative
    errors, which a few attention sinks do not move, their mean for absolute ones.
    """
    batch = data.encoder.collate(data.all_forget[:MEASURED_DOCUMENTS])
    norms = read_states(model, batch, [hook])[hook].float().norm(dim=-1)
    return float(norms.median() if errors == "relative" else norms.mean())


@register(
    "rmu",
    summary="Trains three MLP matrices so that forget states become a fixed random vector.",
    source="RMU, arXiv 2403.03218",
    swept=Swept(layer="layer", strength="steering_coeff"),
    report=REPORT,
    space=RMU_SPACE,
)
@dataclass(frozen=True, kw_only=True)
class RMU(Misdirection[RMUSettings]):
    """Representation Misdirection for Unlearning (WMDP, arXiv 2403.03218).

    L = mean_forget ||h_l - c u||^2 / (beta ||z||)^2 + alpha * mean_retain ||h_l - z||^2 / ||z||^2, over the tokens of the
    batch (pads and BOS excluded, see `positions`); z is h_l of the frozen model, beta is c over the median norm of the forget
    states, u is a random unit vector. Only the MLP output matrices of layers l-2, l-1, l learn. Several forget corpora
    take turns, each with its own u, as in WMDP.

    The paper's loss has ||.||^2 / d in both terms (`errors="absolute"`). In it the few tokens that are attention sinks, with
    states thousands of times as long as the others ("Massive Activations in Large Language Models", arXiv 2402.17762;
    arXiv 2309.17453), outweigh all others and set the norm that c is derived from. Here errors are relative to each
    state, states longer than four times the median count in neither term, and the learning rate rises over the
    first 30 updates (a tenth of a run of fewer than 300) and falls linearly to 0 over its second half.

    Args:
        layer: l. None: three tenths of the depth, for absolute errors 7/32 of it as in the released recipe; at least 2.
        steering_coeff: c. None: twice the norm of the forget states at l: the median for relative errors, the mean for
            absolute ones.
        alpha: weight of the retain term, at the start of a fit with a budget. None: 4; for absolute errors four times the square of c over that norm.
        lr: of AdamW. None: derived from the size of the trained matrices, entries and shape (`update_size`).
        steps: updates at most.
        batch_size: documents an update on each side.
        retain_length: tokens of a retain document that an update reads; of a longer one, if it has no prompt, a random piece. None,
            or without `shuffle`: all of it.
        micro_batch: documents a pass. None: all of an update.
        max_length: tokens at which documents are cut. None: 512, or the context if that is shorter.
        budget: nats a token of KL(unedited || edited) that are allowed for on retain text that no update sees, and four times
            as many on the answers it knows to questions made from it: the retain term's weight keeps to it, and the fit ends
            at its target. It keeps to three tenths of that, and to more where it is too slow with that. None: a fixed weight, every step,
            all of the retain corpus.
        target: accuracy to forget down to on questions made from the forget set (`control_accuracy`). None: chance.
        coverage: what is read besides the corpora. None: nothing.
        errors: "relative": as above; "absolute": the paper's, over all tokens, with a constant learning rate.
        direction: "uniform": entries of u from U[0, 1), as released; "gaussian": isotropic.
        site, trained_layers: where the states are read, and which layers learn, if not as above.
        positions: "content", or "all" to count pads and BOS as the released code does.
        padding: "right", or "left" as the released code has it; of no effect unless pads are counted.
        shuffle: False: batches in the order of the corpora, as the released code takes them.
        optimizer: "adamw", or "transformers_adamw": as in transformers 4, which the released code uses.
        eps: of the optimizer.
        retain_noise: Gaussian noise on the states that retain text is held to, as a share of their norm; see `NoisyRMU`.

    Example:
        >>> fit = RMU(steps=2).fit(model, forget, retain, seed=0)
    """

    steering_coeff: float | None = None

    @classmethod
    def released(
        cls, *, layer: int = 7, steering_coeff: float = 6.5, alpha: float = 1200.0, lr: float = 5e-5, steps: int = 150
    ) -> "RMU":
        """The recipe of the released code for Zephyr-7B: absolute errors, batches of 4 in the corpora's order, padded on
        the left, pads and BOS counted, transformers 4's AdamW.

        The released code pads with EOS (set `model.tokenizer.pad_token`), and cuts texts at 512 tokens. What a model
        computes at pads is its implementation's choice: the Bridge's states there are Hugging Face's,
        HookedTransformer's are not."""
        return cls(layer=layer, steering_coeff=steering_coeff, alpha=alpha, lr=lr, steps=steps, **RELEASED)

    @override
    def check(self, model: LensModel) -> None:
        check_positive(steering_coeff=self.steering_coeff)
        super().check(model)

    @override
    def c_share(self, norm: float) -> float:
        return or_default(self.steering_coeff, C_SHARE * norm) / norm

    @override
    def settled(
        self, *, layer: int, trained_layers: tuple[int, ...], norm: float, alpha: float, lr: float
    ) -> RMUSettings:
        return RMUSettings(
            layer=layer,
            trained_layers=trained_layers,
            norm=norm,
            alpha=alpha,
            lr=lr,
            steering_coeff=or_default(self.steering_coeff, C_SHARE * norm),
        )

    @override
    def c(self, settings: RMUSettings, states: States, mask: Mask, first: float | None) -> float:
        return float(settings.steering_coeff)


@register(
    "adaptive-rmu",
    summary="RMU whose vector is as long as beta times each state's norm.",
    source="Adaptive RMU, arXiv 2408.06223",
    swept=Swept(layer="layer", strength="beta"),
    report=REPORT,
    space=ADAPTIVE_RMU_SPACE,
)
@dataclass(frozen=True, kw_only=True)
class AdaptiveRMU(Misdirection[MisdirectionSettings]):
    """Adaptive RMU (arXiv 2408.06223, Eq. 24): RMU with c = beta * ||h_l^frozen|| of the forget states.

    Args:
        beta: factor on the norm; the paper tries 2, 3, 5, 10 and reports 5. A larger one costs more damage for the same
            forgetting: on SmolLM2 a fit with 5 spent its budget before it had forgotten.
        coefficient: whose norm: "token": each token's own; "sample": the mean over each document's tokens (Eq. 24);
            "first_batch": one number a corpus, the mean over its first batch (the released code). The means are over the
            tokens that count: for relative errors without attention sinks.

    The other arguments are those of `RMU`.
    """

    beta: float = C_SHARE
    coefficient: Coefficient = "token"

    @classmethod
    def released(
        cls, *, layer: int = 7, beta: float = 5.0, alpha: float = 1200.0, lr: float = 5e-5, steps: int = 500
    ) -> "AdaptiveRMU":
        """The recipe of the released code: as `RMU.released`, with c = beta times the mean norm of the corpus's first
        batch. The paper trains 500 steps with c from each sample's own norm."""
        return cls(layer=layer, beta=beta, alpha=alpha, lr=lr, steps=steps, coefficient="first_batch", **RELEASED)

    @override
    def check(self, model: LensModel) -> None:
        check_positive(beta=self.beta)
        super().check(model)

    @override
    def c_share(self, norm: float) -> float:
        return self.beta

    @override
    def settled(
        self, *, layer: int, trained_layers: tuple[int, ...], norm: float, alpha: float, lr: float
    ) -> MisdirectionSettings:
        return MisdirectionSettings(layer=layer, trained_layers=trained_layers, norm=norm, alpha=alpha, lr=lr)

    @property
    @override
    def c_of_first_batch(self) -> bool:
        return self.coefficient == "first_batch"

    @override
    def c(
        self, settings: MisdirectionSettings, states: States, mask: Mask, first: float | None
    ) -> float | Float[Tensor, "batch #seq 1"]:
        norms = states.norm(dim=-1) * mask
        if self.coefficient == "token":
            return self.beta * norms[..., None]
        if self.coefficient == "sample":
            return self.beta * (norms.sum(dim=1) / mask.sum(dim=1).clamp(min=1))[:, None, None]
        return self.beta * float(norms.sum() / mask.sum()) if first is None else first
