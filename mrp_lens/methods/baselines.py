"""The baselines that MRP is compared with: gradient methods, noisy RMU, direction ablation."""

import math
import time
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor
from typing_extensions import override

from mrp_lens.data.tokenization import Batches, Encoded, TokenBatch, in_order, rows_within
from mrp_lens.edits import ConditionalProjectionEdit, ProjectionEdit, WeightEdit, projection_in
from mrp_lens.edits.subspace import Subspace
from mrp_lens.methods.base import Data, FitContext, FitTemplate, both_sides, fitting, states_at
from mrp_lens.methods.coverage import Coverage
from mrp_lens.methods.fit import Fit
from mrp_lens.methods.registry import Swept, register
from mrp_lens.methods.rmu import RELEASED_DEPTH_SHARE, RMU, default_layer, up_to
from mrp_lens.methods.rmu import REPORT as STEERED
from mrp_lens.methods.spaces import ABLATION_SPACE, GRADIENT_ASCENT_SPACE, GRADIENT_SPACE, RMU_SPACE
from mrp_lens.models import EditableWeight, LensModel, check_layers, mlp_out_weight, restored, tensor_digests
from mrp_lens.models.hooks import Site, hook_name
from mrp_lens.training.loop import TrainingRun
from mrp_lens.training.losses import cross_entropy, predictions
from mrp_lens.training.optim import MasterAdamW, entry_size, linear_decay, trainable
from mrp_lens.utils.processes import dealt, shares, summed
from mrp_lens.utils.validation import or_default

Unit = Literal["token", "document"]
LR_SHARE = 0.033  # learning rate over the root mean square of the trained entries
REPORT = "MLP output matrices of layers {layers} trained on what the model predicts"


@dataclass(frozen=True)
class ForgetSide:
    """The forget side of a micro-batch, as the model in training predicts it.

    Attributes:
        documents: at least one.
        batch: the same as tokens.
        predicted: log-probabilities before each counted token.
        text: -log p of each counted token, in nats.
        rows: which document it belongs to.
    """

    documents: Sequence[Encoded]
    batch: TokenBatch
    predicted: Float[Tensor, "counted d_vocab"]
    text: Float[Tensor, " counted"]
    rows: Int[Tensor, " counted"]

    @property
    def log_p(self) -> Float[Tensor, " documents"]:
        """Log p of each document's counted tokens together."""
        return -sums_of(self.text, self.rows, len(self.documents))


ForgetLoss = Callable[[ForgetSide], Float[Tensor, " units"]]


@dataclass(frozen=True, kw_only=True)
class GradientSettings:
    """What a fit of a gradient method runs with where the user gave nothing."""

    layers: tuple[int, ...]
    lr: float


@dataclass(frozen=True, kw_only=True)
class GradientMethod(FitTemplate[GradientSettings]):
    """Hyperparameters of a method that trains MLP output matrices on what the model predicts.

    Several forget corpora are taken as one.

    Args:
        layers: whose matrices learn. None: those of the released RMU, by depth: later ones cost more of the retain set.
        retain_weight: weight of the cross-entropy of the retain set; 0: that is not looked at.
        lr: of AdamW, falling linearly to 0 in the second half. None: derived from the size of the trained entries.
        steps, batch_size: updates, and documents an update on each side.
        retain_length: tokens of a retain document that an update reads; of a longer one, if it has no prompt, a random piece. None:
            all of it.
        micro_batch: documents a pass. None: as many as their logits are at most 2^24 numbers.
        max_length: tokens at which documents are cut. None: 512, or the context if that is shorter.
        budget: nats a token of KL(unedited || edited) that are allowed for on retain text that no update sees, and four times
            as many on the answers it knows to questions made from it; without a retain term a fit ends as soon as there is
            more. None: a fixed weight, every step, all of the retain corpus.
        target: accuracy to forget down to on questions made from the forget set (`control_accuracy`). None: chance.
        coverage: what is read besides the corpora. None: nothing.
        unit: what the forget term is a mean over; each method has its own.
    """

    layers: Sequence[int] | None = None
    retain_weight: float = 0.0
    lr: float | None = None
    steps: int = 200
    batch_size: int = 32
    retain_length: int | None = 64
    micro_batch: int | None = None
    max_length: int | None = None
    budget: float | None = None
    target: float | None = None
    coverage: Coverage | None = None
    unit: Unit = "token"

    @abstractmethod
    def forget_loss(self, losses: "Losses") -> ForgetLoss:
        """What is minimised, for each token or document of the forget side. The model is still as it was before training."""

    def read(self, data: Data) -> Data:
        """The data with the documents as the loss reads them."""
        return data

    @override
    def check(self, model: LensModel) -> None:
        self.check_values(above_0=("lr",), counts=("steps", "batch_size", "retain_length", "micro_batch"))
        if not 0.0 <= self.retain_weight < math.inf:
            raise ValueError(f"retain_weight must be at least 0 and finite, got {self.retain_weight}")
        self._layers(model)

    @property
    @override
    def holds(self) -> bool:
        return self.retain_weight > 0.0

    @override
    def resolve(self, model: LensModel, data: Data) -> GradientSettings:
        layers = self._layers(model)
        size = entry_size(mlp_out_weight(model, layer).read() for layer in layers)
        return GradientSettings(layers=layers, lr=or_default(self.lr, LR_SHARE * size))

    @override
    def learn(self, settings: GradientSettings, context: FitContext) -> Fit:
        model = context.model
        weights = [mlp_out_weight(model, layer) for layer in settings.layers]
        with fitting(model, context.after), restored(weight.parameter for weight in weights):
            replaced = {weight.name: tensor_digests(weight.read()) for weight in weights}
            losses = Losses(self, context, weights)
            masters = [trainable(weight.parameter) for weight in weights]
            run = context.train(
                losses,
                MasterAdamW(masters, settings.lr),
                steps=self.steps,
                schedule=linear_decay,
                resumable={"forget": losses.forget, "retain": losses.retain},
            )
            learned = {
                weight.name: weight.to_checkpoint(master.master.detach())
                for weight, master in zip(weights, masters, strict=True)
            }
        return context.result(
            WeightEdit.of_own(learned, replaced, provenance=context.provenance(steps=len(run.log))), run
        )

    def _layers(self, model: LensModel) -> tuple[int, ...]:
        return check_layers(model, or_default(self.layers, up_to(default_layer(model, RELEASED_DEPTH_SHARE))))


class Losses:
    """What the training loop minimises: for each step the share of each micro-batch."""

    def __init__(self, method: GradientMethod, context: FitContext, weights: Sequence[EditableWeight]) -> None:
        self.method, self.model, self.encoder = method, context.model, context.data.encoder
        self.context, self.weights = context, weights
        self.data = data = method.read(context.covered())
        self.forget_loss = method.forget_loss(self)
        self.forget = Batches(data.all_forget, method.batch_size, context.generator)
        self.retain = Batches(data.retain, method.batch_size, context.generator, length=method.retain_length)

    def __call__(self, step: int) -> Iterator[dict[str, Tensor]]:
        """The terms of each micro-batch, in nats."""
        method = self.method
        lost, kept = next(self.forget), next(self.retain) if method.retain_weight > 0.0 else []
        batch, is_lost = both_sides(self.encoder, lost, kept)
        units = len(lost) if method.unit == "document" else int(batch.loss_mask[is_lost].sum())
        kept_tokens = int(batch.loss_mask[~is_lost].sum())
        for share in shares(len(batch), method.micro_batch or rows_within(batch, int(self.model.cfg.d_vocab))):
            part, documents = batch[share], lost[share]
            predicted, text, rows = self._text(part)
            losing = is_lost[share][rows]
            forget = text.new_zeros(())
            if documents:  # they come first
                count = int(losing.sum())
                side = ForgetSide(documents, part[: len(documents)], predicted[:count], text[losing], rows[losing])
                forget = self.forget_loss(side).sum() / units
            terms = {"loss": forget, "forget": forget}
            if kept_tokens:
                terms["retain"] = text[~losing].sum() / kept_tokens
                terms["loss"] = forget + self.context.multiplier * method.retain_weight * terms["retain"]
            yield terms

    def log_p(self, documents: Sequence[Encoded]) -> Float[Tensor, " documents"]:
        """Log p of each document's counted tokens together, by the model as it is."""
        return self._log_p(self.encoder.collate(documents))

    def log_p_before(self, documents: Sequence[Encoded]) -> Callable[[Sequence[Encoded]], Float[Tensor, " documents"]]:
        """The same of any of these documents by the model as it is now, whatever becomes of it."""
        values = torch.zeros(len(documents), dtype=torch.float64)
        with torch.no_grad():
            for places, batch in dealt(in_order(self.encoder, documents, self.method.batch_size, logits=True)):
                values[places] = self._log_p(batch).cpu().double()
        summed([values])
        known = dict(zip(documents, values.tolist(), strict=True))
        return lambda chosen: torch.tensor([known[row] for row in chosen], device=self.encoder.device)

    def _log_p(self, batch: TokenBatch) -> Float[Tensor, " documents"]:
        _, text, rows = self._text(batch)
        return -sums_of(text, rows, len(batch))

    def _text(
        self, batch: TokenBatch
    ) -> tuple[Float[Tensor, "counted d_vocab"], Float[Tensor, " counted"], Int[Tensor, " counted"]]:
        """Log-probabilities before each counted token; of the token itself -log p, and its row."""
        counts = batch.loss_mask[:, 1:].sum(dim=1)
        rows = torch.repeat_interleave(torch.arange(len(batch), device=counts.device), counts)
        predicted = predictions(self.model, batch)
        return predicted, cross_entropy(predicted, batch), rows


def sums_of(
    values: Float[Tensor, " counted"], rows: Int[Tensor, " counted"], count: int
) -> Float[Tensor, " documents"]:
    """The sum of each document's values. On a GPU `index_add` would add them up in an order of its own, and the same seed give
    another edit."""
    places = rows[None, :] == torch.arange(count, device=rows.device)[:, None]
    return (places * values[None, :]).sum(dim=1)


@register(
    "gradient-ascent",
    summary="Ascends the loss of the forget set.",
    source="arXiv 2210.01504",
    report=REPORT,
    space=GRADIENT_ASCENT_SPACE,
)
@dataclass(frozen=True, kw_only=True)
class GradientAscent(GradientMethod):
    """Ascend the loss of the forget set (arXiv 2210.01504): L = log p(forget), per token; nothing holds the rest in place.

    The arguments are those of `GradientMethod`; the loss has no bound, so the number of steps decides.
    """

    steps: int = 30

    @override
    def forget_loss(self, losses: Losses) -> ForgetLoss:
        return lambda side: -side.text


@register(
    "gradient-difference",
    summary="Gradient ascent on the forget set, descent on the retain set.",
    source="arXiv 2203.12817",
    report=REPORT,
    space=GRADIENT_SPACE,
)
@dataclass(frozen=True, kw_only=True)
class GradientDifference(GradientAscent):
    """Gradient ascent on the forget set and descent on the retain set (arXiv 2203.12817):
    L = log p(forget) + retain_weight * CE(retain), each per token.

    The arguments are those of `GradientMethod`.
    """

    steps: int = 200
    retain_weight: float = 10.0


@register(
    "rmu-noise",
    summary="RMU with random noise on the retain branch.",
    source="after RNA, arXiv 2501.19202",
    swept=Swept(layer="layer", strength="steering_coeff"),
    report=STEERED,
    space=RMU_SPACE,
)
@dataclass(frozen=True, kw_only=True)
class NoisyRMU(RMU):
    """RMU with random noise on the retain branch: the idea of RNA (arXiv 2501.19202), so that a forget token inside a retain
    text breaks less. The paper's own formula and scale were not to be had: the noise here is drawn anew for every token, a
    tenth of its state's norm.

    The arguments are those of `RMU`.
    """

    retain_noise: float = 0.1


@dataclass(frozen=True, kw_only=True)
class AblationSettings:
    """Where a direction is projected out."""

    layers: tuple[int, ...]


@register(
    "direction-ablation",
    summary="Projects out the difference of the mean forget and retain states; nothing is trained.",
    source="difference of means, arXiv 2406.11717",
    swept=Swept(layer="layers"),
    report="one direction removed from the residual stream at layers {layers}",
    space=ABLATION_SPACE,
)
@dataclass(frozen=True, kw_only=True)
class DirectionAblation(FitTemplate[AblationSettings]):
    """One direction a layer projected out: the mean of the forget states less that of the retain states (the difference of
    means of arXiv 2406.11717), of about 4,096 tokens of each side. Several forget corpora are taken as one. Nothing is trained:
    one pass over the texts is the whole fit, without progress bar or callbacks.

    Args:
        layers: where. None: all.
        site: of the hooks.
        max_length: tokens at which documents are cut. None: 512, or the context if that is shorter.
    """

    layers: Sequence[int] | None = None
    site: Site = "resid_post"
    max_length: int | None = None

    by_request = True

    @override
    def check(self, model: LensModel) -> None:
        self.check_values()
        self._layers(model)

    @override
    def resolve(self, model: LensModel, data: Data) -> AblationSettings:
        return AblationSettings(layers=self._layers(model))

    @override
    def learn(self, settings: AblationSettings, context: FitContext) -> Fit:
        model, data = context.model, context.data
        hooks = [hook_name(layer, self.site) for layer in settings.layers]
        started = time.perf_counter()
        with fitting(model, context.after):
            lost, kept = (
                states_at(model, data.encoder, rows, hooks, context.generator)
                for rows in (data.all_forget, data.retain)
            )
        # Behind a gate, what earlier requests remove cannot be shared with a later one.
        earlier = projection_in(context.after)
        taken = earlier.subspaces() if isinstance(earlier, ConditionalProjectionEdit) else {}
        subspaces = {}
        for hook in hooks:
            difference = (lost[hook].mean(0) - kept[hook].mean(0))[None].cpu()
            beyond = taken[hook].to("cpu").project_out(difference) if hook in taken else difference
            subspaces[hook] = Subspace.spanned_by(beyond)
        log = pd.DataFrame([{"step": 0, "loss": float("nan"), "seconds": time.perf_counter() - started}])
        edit = ProjectionEdit(subspaces, request=context.request, provenance=context.request_provenance(steps=0))
        return context.result(edit, TrainingRun(log, interrupted=False))

    def _layers(self, model: LensModel) -> tuple[int, ...]:
        return check_layers(model, or_default(self.layers, range(model.cfg.n_layers)))
