"""RMU (arXiv 2403.03218) and Adaptive RMU (arXiv 2408.06223): a few MLP matrices learn to steer forget states away."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, Self

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from typing_extensions import override

from mrp_lens.data import Corpus
from mrp_lens.data.tokenization import Batches, BatchesInTurn, Encoded, PaddingSide, TokenBatch
from mrp_lens.edits import Edit, WeightEdit
from mrp_lens.edits.subspace import Law, random_units
from mrp_lens.methods.base import (
    Data,
    Fit,
    Forget,
    claimed,
    fitting,
    parts_of,
    prepare,
    provenance,
)
from mrp_lens.methods.registry import Method, Swept, register
from mrp_lens.models import EditableWeight, LensModel, check_layers, check_lens_model, mlp_out_weight, tensor_digests
from mrp_lens.models.hooks import Site, captured, hook_name, run_segment
from mrp_lens.training.checkpoints import EVERY
from mrp_lens.training.loop import train
from mrp_lens.training.optim import TransformersAdamW
from mrp_lens.utils.torch_state import ordinary_torch
from mrp_lens.utils.validation import generator_for, given, one_of, positive, whole

Positions = Literal["content", "all"]
Optimizer = Literal["adamw", "transformers_adamw"]
States = Float[Tensor, "batch seq d_model"]
Mask = Bool[Tensor, "batch seq"]

DEPTH_OF_LAYER = 7 / 32  # the released recipe's layer 7 of Zephyr's 32
MEASURED_DOCUMENTS = 64
ALPHA_SHARE = 4.0  # alpha over (c / norm)^2: the forget term grows with c^2, so what balances it must as well
LR_SHARE = 0.05  # learning rate over the root mean square of the trained entries; AdamW moves each by about lr a step


Coefficient = Literal["token", "sample", "first_batch"]
_RELEASED: dict[str, Any] = {
    "batch_size": 4,
    "positions": "all",
    "padding": "left",
    "shuffle": False,
    "optimizer": "transformers_adamw",
    "eps": 1e-6,
}
C_SHARE = 2.0  # c over the mean norm of the forget states


@dataclass(frozen=True, kw_only=True)
class Steering(Method):
    """Hyperparameters that RMU and Adaptive RMU share. None: derived from the model when fitting."""

    layer: int | None = None
    site: Site = "resid_post"
    trained_layers: tuple[int, ...] | None = None
    alpha: float | None = None
    lr: float | None = None
    steps: int = 150
    batch_size: int = 32
    micro_batch: int | None = None
    max_length: int | None = None
    direction: Law = "uniform"
    positions: Positions = "content"
    padding: PaddingSide = "right"
    shuffle: bool = True
    optimizer: Optimizer = "adamw"
    eps: float = 1e-8
    retain_noise: float = 0.0

    @ordinary_torch(gradients=True)
    def fit(
        self,
        model: LensModel,
        forget: Forget,
        retain: Corpus,
        *,
        seed: int = 0,
        after: Edit | None = None,
        progress: bool = True,
        checkpoint: str | Path | None = None,
        every: int = EVERY,
    ) -> Fit:
        """Train the MLP output matrices of three layers; the model itself is left as it is.

        Args:
            model: HookedTransformer or TransformerBridge, in any dtype (the trained copies are float32).
            forget: what must go; several corpora take turns, each with its own direction u, as in WMDP.
            retain: what must stay.
            seed: of u and of the order of the data.
            after: an earlier edit, on during the fit; the result holds both.
            progress: show a progress bar.
            checkpoint: a folder of its own in which the fit is kept while it runs; the same call again goes on with a fit that
                was killed, and ends with the same bits. It is left there when the fit is done.
            every: updates after which it is written.

        Raises:
            ValueError: a layer that does not exist, an empty corpus, a hyperparameter out of range, or a checkpoint of another
                fit.
            NonFiniteLossError: the loss became NaN or infinite.
        """
        generator = generator_for(seed)
        check_lens_model(model)
        placed = self._placed(model)
        data = prepare(model, forget, retain, max_length=self.max_length)
        with fitting(model, after):
            weights = {layer: mlp_out_weight(model, layer) for layer in given(placed.trained_layers, ())}
            original = {layer: weight.read() for layer, weight in weights.items()}
            replaces = {weights[layer].name: tensor_digests(tensor) for layer, tensor in original.items()}
            resolved = placed._measured(model, data, list(original.values()))
        settings = asdict(resolved)
        record = provenance(model, self.name, settings, data, seed=seed)
        kept = claimed(checkpoint, every, model, record, after)
        with fitting(model, after):
            directions = {
                name: random_units(1, model.cfg.d_model, self.direction, generator)[0].to(data.encoder.device)
                for name in data.names
            }
            masters = {layer: tensor.float().clone().requires_grad_() for layer, tensor in original.items()}
            kind = torch.optim.AdamW if self.optimizer == "adamw" else TransformersAdamW
            optimizer = kind(list(masters.values()), lr=given(resolved.lr, 0.0), eps=self.eps, weight_decay=0.0)
            losses = _Losses(resolved, model, data, weights, masters, list(directions.values()), generator)
            with captured(model, [losses.hook]) as losses.store:
                run = train(
                    losses,
                    optimizer,
                    steps=self.steps,
                    description=self.name,
                    progress=progress,
                    generator=generator,
                    resumable={"losses": losses},
                    checkpoint=kept,
                )
        edit: Edit = WeightEdit(
            {weights[layer].name: master for layer, master in masters.items()},
            replaces,
            provenance={**record, "steps_done": len(run.log)},
        )
        return Fit(edit if after is None else after + edit, run.log, settings, run.interrupted, directions)

    def _placed(self, model: LensModel) -> Self:
        """Hyperparameters checked, layers filled in."""
        positive(
            alpha=self.alpha,
            lr=self.lr,
            steps=self.steps,
            batch_size=self.batch_size,
            micro_batch=self.micro_batch,
            eps=self.eps,
        )
        whole(steps=self.steps, batch_size=self.batch_size, micro_batch=self.micro_batch)
        if not self.retain_noise >= 0.0:
            raise ValueError(
                f"retain_noise is a share of the states' norm and must be at least 0, got {self.retain_noise}"
            )
        one_of(Law, direction=self.direction)
        one_of(Positions, positions=self.positions)
        one_of(PaddingSide, padding=self.padding)
        one_of(Optimizer, optimizer=self.optimizer)
        one_of(Site, site=self.site)
        layer = given(self.layer, default_layer(model))
        check_layers(model, [layer])
        trained = check_layers(model, given(self.trained_layers, up_to(layer)))
        if max(trained) > layer:
            raise ValueError(f"trained_layers {trained} reach beyond layer {layer}, where the loss is read")
        return replace(self, layer=layer, trained_layers=trained)

    def _measured(self, model: LensModel, data: Data, matrices: list[Tensor]) -> Self:
        """Hyperparameters that depend on the size of weights and states filled in."""
        norm = mean_norm(model, data, layer=given(self.layer, 0), hook=hook_name(given(self.layer, 0), self.site))
        placed = self._scaled(norm)
        alpha = given(self.alpha, ALPHA_SHARE * placed._share(norm) ** 2)
        return replace(placed, alpha=alpha, lr=given(self.lr, LR_SHARE * entry_size(matrices)))

    def _scaled(self, norm: float) -> Self:
        """The coefficient filled in, given the mean norm of the forget states."""
        return self

    def _share(self, norm: float) -> float:
        """c over the mean norm of the forget states."""
        raise TypeError("use RMU or AdaptiveRMU, which say what the coefficient is")

    def _coefficient(self, states: States, mask: Mask, first: float | None) -> float | Float[Tensor, "batch #seq 1"]:
        """c for a batch of frozen forget states, given the number from its corpus's first batch (None: this is it)."""
        raise TypeError("use RMU or AdaptiveRMU, which say what the coefficient is")


class _Losses:
    """What the training loop minimises: for each step the share of each micro-batch."""

    def __init__(
        self,
        settings: Steering,
        model: LensModel,
        data: Data,
        weights: Mapping[int, EditableWeight],
        masters: Mapping[int, Tensor],
        directions: Sequence[Tensor],
        generator: torch.Generator,
    ) -> None:
        self.settings, self.model, self.data = settings, model, data
        self.weights, self.masters, self.directions = weights, masters, directions
        self.layer = int(given(settings.layer, 0))
        self.hook = hook_name(self.layer, settings.site)
        self.store: dict[str, Tensor] = {}
        self.first: dict[int, float] = {}
        self.generator = generator
        self.forget = [self._batches(rows) for rows in data.forget]
        self.retain = [self._batches(data.retain) for _ in data.forget]

    def _batches(self, rows: Sequence[Encoded]) -> Batches:
        """Batches for ever: shuffled in each pass, or in the order of the corpus."""
        size = self.settings.batch_size
        return Batches(rows, size, self.generator) if self.settings.shuffle else BatchesInTurn(rows, size)

    def _next(self, batches: Batches) -> TokenBatch:
        return self.data.encoder.collate(next(batches), side=self.settings.padding)

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
            yield {"loss": given(self.settings.alpha, 0.0) * part, "retain": part}

    def _squared_errors(self, batch: TokenBatch, topic: int | None) -> Iterator[Float[Tensor, ""]]:
        """Shares of mean ||h - target||^2 / d; the target is c u on a forget topic, the frozen state on retain text.

        The blocks below the trained ones run once, without gradient, and give trained and frozen states alike; the
        frozen weights are simply the model's own, since training never writes into it.
        """
        total = self._mask(batch).sum() * self.model.cfg.d_model
        if topic is not None and topic not in self.first:
            self._remember_first(batch, topic)
        for part in parts_of(batch, self.settings.micro_batch):
            mask = self._mask(part)
            frozen_states, states = self._states(part)
            target = frozen_states
            if topic is None and self.settings.retain_noise > 0.0:
                target = target + self._noise(target)
            if topic is not None:
                target = self.settings._coefficient(frozen_states, mask, self.first.get(topic)) * self.directions[topic]
            yield ((states - target).square() * mask[..., None]).sum() / total

    def _noise(self, states: States) -> States:
        """Isotropic, of the share of each state's norm that the settings say, on average."""
        drawn = torch.randn(states.shape, generator=self.generator).to(states.device)
        scale = self.settings.retain_noise / states.shape[-1] ** 0.5
        return scale * states.norm(dim=-1, keepdim=True) * drawn

    def _remember_first(self, batch: TokenBatch, topic: int) -> None:
        """The coefficient of a corpus for good, from its first batch in the model as trained so far."""
        if getattr(self.settings, "coefficient", None) == "first_batch":
            with torch.no_grad():
                first = self.settings._coefficient(self._states(batch)[1], self._mask(batch), None)
            assert isinstance(first, float)
            self.first[topic] = first

    def _states(self, batch: TokenBatch) -> tuple[States, States]:
        """With the model's own weights, and with those in training."""
        segment = run_segment(self.model, batch.tokens, batch.attention_mask, first=min(self.weights), last=self.layer)
        frozen_states = self.store[self.hook].float()
        segment.replay({layer: {w.key: w.to_model(self.masters[layer])} for layer, w in self.weights.items()})
        return frozen_states, self.store[self.hook].float()

    def _mask(self, batch: TokenBatch) -> Mask:
        return batch.content_mask if self.settings.positions == "content" else torch.ones_like(batch.content_mask)


def default_layer(model: LensModel) -> int:
    """Where the released recipe steers, by depth: 7/32 of it, at least layer 2."""
    return min(int(model.cfg.n_layers) - 1, max(2, round(DEPTH_OF_LAYER * model.cfg.n_layers)))


def up_to(layer: int) -> range:
    """The layers whose matrices learn when states are steered at a layer: it and the two before."""
    return range(max(0, layer - 2), layer + 1)


def default_trained_layers(model: LensModel) -> range:
    """The layers whose matrices learn unless told otherwise."""
    return up_to(default_layer(model))


def entry_size(matrices: Iterable[Tensor]) -> float:
    """Root mean square of a matrix's entries, on average over the matrices."""
    return float(torch.stack([matrix.float().square().mean().sqrt() for matrix in matrices]).mean())


def mean_norm(model: LensModel, data: Data, *, layer: int, hook: str) -> float:
    """Mean L2 norm of the forget states at a hook, over the content tokens of the first 64 documents."""
    batch = data.encoder.collate(data.all_forget[:MEASURED_DOCUMENTS])
    with captured(model, [hook]) as store:
        run_segment(model, batch.tokens, batch.attention_mask, first=layer, last=layer)
    return float(store[hook].float().norm(dim=-1)[batch.content_mask].mean())


@register(
    "rmu",
    summary="Trains three MLP matrices so that forget states become a fixed random vector.",
    source="RMU, arXiv 2403.03218",
    swept=Swept(layer="layer", strength="steering_coeff"),
    report="MLP output matrices of layers {trained_layers} trained to steer forget states of layer {layer} to a random direction",
)
@dataclass(frozen=True, kw_only=True)
class RMU(Steering):
    """Representation Misdirection for Unlearning (WMDP, arXiv 2403.03218).

    L = mean_forget ||h_l - c u||^2 / d + alpha * mean_retain ||h_l - h_l^frozen||^2 / d, over the tokens of the batch
    (pads and BOS excluded, see `positions`); u is a random unit vector. Only the MLP output matrices of layers
    l-2, l-1, l learn.

    Args:
        layer: l. None: 7/32 of the depth, as in the released Zephyr-7B recipe, at least 2.
        steering_coeff: c. None: twice the mean norm of the forget states at l.
        alpha: weight of the retain term. None: four times the square of c over the mean norm of the forget states.
        lr: of AdamW. None: derived from the size of the trained matrices' entries.
        steps, batch_size: updates, and documents an update on each side.
        micro_batch: documents a pass, if a batch does not fit into memory.
        max_length: tokens at which documents are cut. None: 512, or the context if that is shorter.
        direction: "uniform": entries of u from U[0, 1), as released; "gaussian": isotropic.
        site, trained_layers: where the states are read, and which layers learn, if not as above.
        positions: "content", or "all" to count pads and BOS as the released code does.
        padding: "right", or "left" as the released code has it; of no effect unless pads are counted.
        shuffle: False: batches in the order of the corpora, as the released code takes them.
        optimizer: "adamw", or "transformers_adamw": as in transformers 4, which the released code uses.
        eps: of the optimizer.
        retain_noise: Gaussian noise on the states that retain text is held to, as a share of their norm; see `NoisyRMU`.

    Example:
        >>> fit = RMU().fit(model, forget, retain, seed=0)  # doctest: +SKIP
    """

    steering_coeff: float | None = None

    @classmethod
    def released(
        cls, *, layer: int = 7, steering_coeff: float = 6.5, alpha: float = 1200.0, lr: float = 5e-5, steps: int = 150
    ) -> "RMU":
        """The recipe of the released code for Zephyr-7B: batches of 4 in the corpora's order, padded on the left, pads and
        BOS counted, transformers 4's AdamW.

        The released code pads with EOS (set `model.tokenizer.pad_token`), and cuts texts at 512 tokens. What a model
        computes at pads is its implementation's choice: the Bridge's states there are Hugging Face's,
        HookedTransformer's are not."""
        return cls(
            layer=layer,
            steering_coeff=steering_coeff,
            alpha=alpha,
            lr=lr,
            steps=steps,
            **_RELEASED,
        )

    @override
    def _placed(self, model: LensModel) -> Self:
        positive(steering_coeff=self.steering_coeff)
        return super()._placed(model)

    @override
    def _scaled(self, norm: float) -> Self:
        return replace(self, steering_coeff=given(self.steering_coeff, C_SHARE * norm))

    @override
    def _share(self, norm: float) -> float:
        return float(given(self.steering_coeff, 0.0)) / norm

    @override
    def _coefficient(self, states: States, mask: Mask, first: float | None) -> float:
        return float(given(self.steering_coeff, 0.0))


@register(
    "rmu-noise",
    summary="RMU with random noise on the retain branch.",
    source="after RNA, arXiv 2501.19202",
    swept=Swept(layer="layer", strength="steering_coeff"),
    report="MLP output matrices of layers {trained_layers} trained to steer forget states of layer {layer} to a random direction",
)
@dataclass(frozen=True, kw_only=True)
class NoisyRMU(RMU):
    """RMU with random noise on the retain branch: the idea of RNA (arXiv 2501.19202), so that a forget token inside a retain
    text breaks less. The paper's own formula and scale were not to be had: the noise here is drawn anew for every token, a
    tenth of its state's norm.

    The arguments are those of `RMU`.
    """

    retain_noise: float = 0.1


@register(
    "adaptive-rmu",
    summary="RMU whose vector is as long as beta times each state's norm.",
    source="Adaptive RMU, arXiv 2408.06223",
    swept=Swept(layer="layer", strength="beta"),
    report="MLP output matrices of layers {trained_layers} trained to steer forget states of layer {layer} to a random direction",
)
@dataclass(frozen=True, kw_only=True)
class AdaptiveRMU(Steering):
    """Adaptive RMU (arXiv 2408.06223, Eq. 24): RMU with c = beta * ||h_l^frozen|| of the forget states.

    Args:
        beta: factor on the norm; the paper tries 2, 3, 5, 10 and reports 5.
        coefficient: whose norm: "token": each token's own; "sample": the mean over each document's tokens (Eq. 24);
            "first_batch": one number a corpus, the mean over its first batch (the released code).

    The other arguments are those of `RMU`.
    """

    beta: float = 5.0
    coefficient: Coefficient = "token"

    @classmethod
    def released(
        cls, *, layer: int = 7, beta: float = 5.0, alpha: float = 1200.0, lr: float = 5e-5, steps: int = 500
    ) -> "AdaptiveRMU":
        """The recipe of the released code: as `RMU.released`, with c = beta times the mean norm of the corpus's first
        batch. The paper trains 500 steps with c from each sample's own norm."""
        return cls(
            layer=layer,
            beta=beta,
            alpha=alpha,
            lr=lr,
            steps=steps,
            **_RELEASED,
            coefficient="first_batch",
        )

    @override
    def _placed(self, model: LensModel) -> Self:
        positive(beta=self.beta)
        one_of(Coefficient, coefficient=self.coefficient)
        return super()._placed(model)

    @override
    def _share(self, norm: float) -> float:
        return self.beta

    @override
    def _coefficient(self, states: States, mask: Mask, first: float | None) -> float | Float[Tensor, "batch #seq 1"]:
        norms = states.norm(dim=-1) * mask
        if self.coefficient == "token":
            return self.beta * norms[..., None]
        if self.coefficient == "sample":
            return self.beta * (norms.sum(dim=1) / mask.sum(dim=1).clamp(min=1))[:, None, None]
        return self.beta * float(norms.sum() / mask.sum()) if first is None else first
