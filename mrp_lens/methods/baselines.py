"""The rivals that MRP is compared with: gradient ascent, gradient difference, preference optimisation, direction ablation."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor
from typing_extensions import override

from mrp_lens.data import Corpus
from mrp_lens.data.tokenization import Batches, Encoded, TokenBatch, in_order
from mrp_lens.edits import Edit, ProjectionEdit, WeightEdit
from mrp_lens.edits.subspace import Subspace
from mrp_lens.methods.base import Data, Fit, Forget, claimed, fitting, parts_of, prepare, provenance, request_provenance
from mrp_lens.methods.mrp.initialization import states_at
from mrp_lens.methods.registry import Method, Swept, register
from mrp_lens.methods.rmu import default_trained_layers, entry_size
from mrp_lens.models import LensModel, check_layers, check_lens_model, mlp_out_weight, restored, tensor_digests
from mrp_lens.models.hooks import Site, hook_name
from mrp_lens.training.checkpoints import EVERY
from mrp_lens.training.loop import train
from mrp_lens.training.losses import cross_entropy, predictions
from mrp_lens.training.optim import MasterAdamW, linear_decay, trainable
from mrp_lens.utils.torch_state import ordinary_torch
from mrp_lens.utils.validation import generator_for, given, one_of, positive, whole

Unit = Literal["token", "document"]


@dataclass(frozen=True, kw_only=True)
class Tuning(Method):
    """Hyperparameters of a method that trains MLP output matrices on what the model predicts.

    Args:
        layers: whose matrices learn. None: those of RMU, in the first third of the depth: later ones cost more of what must stay.
        retain_weight: weight of the cross-entropy of what must stay; 0: what must stay is not looked at.
        lr: of AdamW, falling linearly to 0 in the second half. None: derived from the size of the trained entries.
        steps, batch_size: updates, and documents an update on each side.
        micro_batch: documents a pass, if a batch does not fit into memory.
        max_length: tokens at which documents are cut. None: 512, or the context if that is shorter.
    """

    layers: Sequence[int] | None = None
    retain_weight: float = 0.0
    lr: float | None = None
    steps: int = 200
    batch_size: int = 32
    micro_batch: int | None = None
    max_length: int | None = None

    unit: Unit = "token"  # what the forget term is a mean over
    lr_share = 0.033  # learning rate over the root mean square of the trained entries

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
        """Train MLP output matrices; the model itself is left as it is.

        Args:
            model: HookedTransformer or TransformerBridge, in any dtype (the trained copies are float32).
            forget: what must go; several corpora are taken as one.
            retain: what must stay.
            seed: of the order of the data.
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
        self._check()
        generator = generator_for(seed)
        check_lens_model(model)
        layers = check_layers(model, given(self.layers, default_trained_layers(model)))
        data = prepare(model, forget, retain, max_length=self.max_length)
        weights = [mlp_out_weight(model, layer) for layer in layers]
        with fitting(model, after):
            original = {weight.name: weight.read() for weight in weights}
        lr = given(self.lr, self.lr_share * entry_size(original.values()))
        resolved = replace(self, layers=layers, lr=lr)
        settings = asdict(resolved)
        record = provenance(model, self.name, settings, data, seed=seed)
        kept = claimed(checkpoint, every, model, record, after)
        with fitting(model, after), restored(weight.parameter for weight in weights):
            losses = _Losses(resolved, model, data, generator)
            masters = [trainable(weight.parameter) for weight in weights]
            optimizer = MasterAdamW(masters, lr)
            run = train(
                losses,
                optimizer,
                steps=self.steps,
                description=self.name,
                schedule=linear_decay,
                progress=progress,
                generator=generator,
                resumable={"forget": losses.forget, "retain": losses.retain},
                checkpoint=kept,
            )
            learned = {
                weight.name: weight.to_checkpoint(master.master.detach())
                for weight, master in zip(weights, masters, strict=True)
            }
        edit: Edit = WeightEdit(
            learned,
            {name: tensor_digests(matrix) for name, matrix in original.items()},
            provenance={**record, "steps_done": len(run.log)},
        )
        return Fit(edit if after is None else after + edit, run.log, settings, run.interrupted)

    def _check(self) -> None:
        positive(lr=self.lr, steps=self.steps, batch_size=self.batch_size, micro_batch=self.micro_batch)
        whole(steps=self.steps, batch_size=self.batch_size, micro_batch=self.micro_batch)
        if not self.retain_weight >= 0.0:
            raise ValueError(f"retain_weight must be at least 0, got {self.retain_weight}")

    def _forgetting(
        self,
        text: Float[Tensor, " counted"],
        rows: Int[Tensor, " counted"],
        reference: Float[Tensor, " documents"],
    ) -> Float[Tensor, " units"]:
        """What is minimised, for each token or document of the forget side.

        Args:
            text: -log p of each counted token, in nats.
            rows: which document it belongs to.
            reference: log p of each document by the model before training.
        """
        raise TypeError("use GradientAscent, GradientDifference or NPO")


class _Losses:
    """What the training loop minimises: for each step the share of each micro-batch."""

    def __init__(self, settings: Tuning, model: LensModel, data: Data, generator: torch.Generator) -> None:
        self.settings, self.model, self.data = settings, model, data
        forget = data.all_forget
        self.reference = dict(zip(forget, self._log_probabilities(forget), strict=True))
        self.forget = Batches(forget, settings.batch_size, generator)
        self.retain = Batches(data.retain, settings.batch_size, generator)

    def __call__(self, step: int) -> Iterator[dict[str, Tensor]]:
        settings, encoder = self.settings, self.data.encoder
        lost, kept = next(self.forget), next(self.retain) if settings.retain_weight > 0.0 else []
        batch = encoder.collate([*lost, *kept])  # one pass for both sides
        is_lost = (torch.arange(len(batch)) < len(lost)).to(encoder.device)
        reference = torch.tensor([self.reference[row] for row in lost] + [0.0] * len(kept), device=encoder.device)
        size = settings.micro_batch or len(batch)
        units = len(lost) if settings.unit == "document" else int(batch.loss_mask[is_lost].sum())
        kept_tokens = int(batch.loss_mask[~is_lost].sum())
        for part, side, before in zip(
            parts_of(batch, settings.micro_batch), is_lost.split(size), reference.split(size), strict=True
        ):
            text, rows = self._text(part)
            losing = side[rows]
            forget = settings._forgetting(text[losing], rows[losing], before[side]).sum() / units
            terms = {"loss": forget, "forget": forget}
            if kept_tokens:
                terms["retain"] = text[~losing].sum() / kept_tokens
                terms["loss"] = forget + settings.retain_weight * terms["retain"]
            yield terms

    def _text(self, batch: TokenBatch) -> tuple[Float[Tensor, " counted"], Int[Tensor, " counted"]]:
        """-log p of each counted token, and its row."""
        counts = batch.loss_mask[:, 1:].sum(dim=1)
        rows = torch.repeat_interleave(torch.arange(len(batch), device=counts.device), counts)
        return cross_entropy(predictions(self.model, batch), batch), rows

    def _log_probabilities(self, documents: Sequence[Encoded]) -> list[float]:
        """Log p of each document before training; only methods that compare with it need it."""
        values = [0.0] * len(documents)
        if self.settings.unit == "token":
            return values
        with torch.no_grad():
            for chosen, batch in in_order(self.data.encoder, list(documents), self.settings.batch_size):
                text, rows = self._text(batch)
                sums = -sums_of(text, rows, len(batch))
                for place, value in zip(chosen, sums.tolist(), strict=True):
                    values[place] = value
        return values


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
    report="MLP output matrices of layers {layers} trained on what the model predicts",
)
@dataclass(frozen=True, kw_only=True)
class GradientAscent(Tuning):
    """Ascend the loss of what must go (arXiv 2210.01504): L = log p(forget), per token; nothing holds the rest in place.

    The arguments are those of `Tuning`; the loss has no bound, so the number of steps decides.
    """

    steps: int = 30

    @override
    def _forgetting(
        self,
        text: Float[Tensor, " counted"],
        rows: Int[Tensor, " counted"],
        reference: Float[Tensor, " documents"],
    ) -> Float[Tensor, " units"]:
        return -text


@register(
    "gradient-difference",
    summary="Gradient ascent on the forget set, descent on the retain set.",
    source="arXiv 2203.12817",
    report="MLP output matrices of layers {layers} trained on what the model predicts",
)
@dataclass(frozen=True, kw_only=True)
class GradientDifference(GradientAscent):
    """Gradient ascent on what must go and descent on what must stay (arXiv 2203.12817):
    L = log p(forget) + retain_weight * CE(retain), each per token.

    The arguments are those of `Tuning`.
    """

    steps: int = 200
    retain_weight: float = 10.0


@register(
    "npo",
    summary="Negative preference optimisation, with descent on the retain set.",
    source="arXiv 2404.05868",
    report="MLP output matrices of layers {layers} trained on what the model predicts",
)
@dataclass(frozen=True, kw_only=True)
class NPO(Tuning):
    """Negative preference optimisation (arXiv 2404.05868), with descent on what must stay:
    L = 2 / beta * mean over documents of log(1 + (p / p_before)^beta) + retain_weight * CE(retain).

    p is the probability of a document's counted tokens. As p falls below what the unedited model gives, its gradient
    vanishes, where gradient ascent's goes on.

    Args:
        beta: how soon it vanishes; small values come near to gradient ascent.

    The other arguments are those of `Tuning`.
    """

    beta: float = 0.1
    retain_weight: float = 1.0

    unit: Unit = "document"

    @override
    def _check(self) -> None:
        super()._check()
        positive(beta=self.beta)

    @override
    def _forgetting(
        self,
        text: Float[Tensor, " counted"],
        rows: Int[Tensor, " counted"],
        reference: Float[Tensor, " documents"],
    ) -> Float[Tensor, " units"]:
        now = -sums_of(text, rows, len(reference))
        return 2 / self.beta * torch.nn.functional.softplus(self.beta * (now - reference))


@register(
    "direction-ablation",
    summary="Projects out the difference of the mean forget and retain states; nothing is trained.",
    source="difference of means, arXiv 2406.11717",
    swept=Swept(layer="layers"),
    report="one direction removed from the residual stream at layers {layers}",
)
@dataclass(frozen=True, kw_only=True)
class DirectionAblation(Method):
    """One direction a layer projected out: the mean of the forget states less that of the retain states (the difference of
    means of arXiv 2406.11717). Nothing is trained.

    Args:
        layers: where. None: all.
        site: of the hooks.
        max_length: tokens at which documents are cut. None: 512, or the context if that is shorter.
    """

    layers: Sequence[int] | None = None
    site: Site = "resid_post"
    max_length: int | None = None

    @ordinary_torch(gradients=False)
    def fit(
        self,
        model: LensModel,
        forget: Forget,
        retain: Corpus,
        *,
        seed: int = 0,
        after: Edit | None = None,
        request: str | None = None,
        progress: bool = True,
        checkpoint: str | Path | None = None,
        every: int = EVERY,
    ) -> Fit:
        """Read the states; the model itself is left as it is.

        Args:
            model: HookedTransformer or TransformerBridge.
            forget: what must go; several corpora are taken as one.
            retain: what must stay.
            seed: of the documents that are read, about 4,096 tokens of each side.
            after: an earlier edit, on while states are read; the result holds both.
            request: name of this request. None: the names of the forget corpora.
            progress, checkpoint, every: of no use here, where one pass over the texts is the whole fit.

        Raises:
            ValueError: a layer that does not exist, an empty corpus, or states whose means do not differ.
        """
        one_of(Site, site=self.site)
        generator = generator_for(seed)
        check_lens_model(model)
        layers = check_layers(model, given(self.layers, range(model.cfg.n_layers)))
        hooks = [hook_name(layer, self.site) for layer in layers]
        data = prepare(model, forget, retain, max_length=self.max_length)
        started = time.perf_counter()
        with fitting(model, after):
            lost, kept = (
                states_at(model, data.encoder, rows, hooks, generator) for rows in (data.all_forget, data.retain)
            )
        subspaces = {hook: Subspace.spanned_by((lost[hook].mean(0) - kept[hook].mean(0))[None].cpu()) for hook in hooks}
        settings = asdict(replace(self, layers=layers))
        label = given(request, "+".join(data.names))
        record = {**provenance(model, self.name, settings, data, seed=seed), "steps_done": 0}
        edit: Edit = ProjectionEdit(subspaces, request=label, provenance=request_provenance(label, record))
        log = pd.DataFrame([{"step": 0, "loss": float("nan"), "seconds": time.perf_counter() - started}])
        return Fit(edit if after is None else after + edit, log, settings)
