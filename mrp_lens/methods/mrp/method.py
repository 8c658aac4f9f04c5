"""MRP (arXiv 2508.15449): subspaces of the residual stream are removed at chosen layers, and learn which to remove."""

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import pandas as pd
import torch
from torch import Tensor
from typing_extensions import override

from mrp_lens.data import Corpus
from mrp_lens.data.tokenization import Batches
from mrp_lens.edits import Edit, projection_in, without_projections
from mrp_lens.methods.base import Data, FitContext, FitTemplate, both_sides, fitting, parts_of
from mrp_lens.methods.fit import Fit
from mrp_lens.methods.mrp.distillation import Distillation, DistillationSettings
from mrp_lens.methods.mrp.initialization import LearnedRows, Start, start_rows
from mrp_lens.methods.registry import Swept, register
from mrp_lens.methods.spaces import MRP_SPACE
from mrp_lens.models import LensModel, check_layers, describe
from mrp_lens.models.hooks import Site, hook_name, hooked
from mrp_lens.training.losses import cross_entropy, kl, log_odds, openness, predictions
from mrp_lens.training.optim import linear_decay
from mrp_lens.utils.torch_state import ordinary_torch
from mrp_lens.utils.validation import generator_for, or_default

ForgetLoss = Literal["odds", "bounded", "ascent"]
RetainLoss = Literal["kl", "cross_entropy"]

FORGET_BOUND = {"odds": 1.0, "bounded": 5.0, "ascent": math.inf}  # nats


@dataclass(frozen=True, kw_only=True)
class MRPSettings:
    """What a fit of MRP runs with where the user gave nothing; the distillation's only where one was asked for."""

    layers: tuple[int, ...]
    rank: int
    lr: float
    distillation: DistillationSettings | None


@register(
    "mrp",
    summary="Projects learned directions out of the residual stream, irreversibly.",
    source="Metamorphosis Representation Projection, arXiv 2508.15449",
    swept=Swept(layer="layers"),
    space=MRP_SPACE,
    report=(
        "subspaces of rank {rank} removed from the residual stream at layers {layers}",
        "matrices of layers {layers} replaced by noise and taught again what the projection leaves alone",
    ),
)
@dataclass(frozen=True, kw_only=True)
class MRP(FitTemplate[MRPSettings]):
    """Metamorphosis Representation Projection (arXiv 2508.15449).

    At each chosen layer h <- h - (h Q^T) Q, where Q are orthonormal rows spanning what W [rank, d_model] spans. Only W
    learns, from forget loss + retain_weight * retain loss. Several forget corpora make one request.

    A later request (`fit(..., after=...)`) has rows orthogonal to those of the earlier ones, and every other step trains with
    these off, so that each request does its work also once another is taken back.

    Args:
        layers: where to project. None: the second half of the depth, at most four layers spread over it.
        rank: directions removed at each layer. None: d_model / 16, between 2 and 32.
        site: where on the stream, `resid_post` by default.
        init: start of W. "complement": forget states without their part in the retain states' top principal components,
            then the top principal directions of what is left; "code": the reverse, as in the released code; "random".
        retain_energy: share of the retain states' energy that counts as their span in `init`.
        forget_loss: "odds": per token, the log odds of the text's token against the other tokens that the model without
            the projection considers there, down to -forget_bound. Tokens that the forget texts alone determine do not
            count. "bounded": -min(CE, forget_bound) per token. "ascent": -CE, the paper's, which diverges.
        forget_bound: nats. None: 1 for "odds", 5 for "bounded".
        retain_loss: "kl": KL(unedited || edited) on the retain corpus; "cross_entropy": on its text, as in the paper.
        retain_weight: factor on the retain loss; the released code has 1.2, with its cross-entropy.
        lr: of Adam, falling linearly to 0 in the second half. None: a fifth of the size of W's entries at the start.
        steps: updates.
        batch_size: documents an update on each side.
        micro_batch: documents a pass, if a batch does not fit into memory.
        max_length: tokens at which documents are cut. None: 512, or the context if that is shorter.
        distillation: reset the layers that look facts up and teach them again without what the projection removes, so
            that retraining finds less of it (see `Distillation`; Bridge only, and many times the time). The edit then
            holds the projection and new matrices, and forgets with its hooks stripped too. After Ctrl-C meanwhile it
            holds the projection alone.

    Example:
        >>> fit = MRP(layers=[1, 2], rank=4, steps=2).fit(model, forget, retain, seed=0)
    """

    layers: Sequence[int] | None = None
    rank: int | None = None
    site: Site = "resid_post"
    init: Start = "complement"
    retain_energy: float = 0.9
    forget_loss: ForgetLoss = "odds"
    forget_bound: float | None = None
    retain_loss: RetainLoss = "kl"
    retain_weight: float = 10.0
    lr: float | None = None
    steps: int = 150
    batch_size: int = 32
    micro_batch: int | None = None
    max_length: int | None = None
    distillation: Distillation | None = None

    by_request = True

    @override
    def check(self, model: LensModel) -> None:
        self.check_values(
            above_0=("lr", "retain_weight", "forget_bound", "retain_energy"),
            counts=("rank", "steps", "batch_size", "micro_batch"),
        )
        rank, width = or_default(self.rank, default_rank(model)), int(model.cfg.d_model)
        if rank >= width:
            raise ValueError(
                f"rank {rank} must be below d_model {width}: removing every direction would leave no state"
            )
        self._layers(model)

    @override
    def resolve(self, model: LensModel, data: Data) -> MRPSettings:
        return MRPSettings(
            layers=self._layers(model),
            rank=or_default(self.rank, default_rank(model)),
            lr=or_default(self.lr, 0.2 / math.sqrt(model.cfg.d_model)),
            distillation=None if self.distillation is None else self.distillation.resolve(model),
        )

    @override
    def learn(self, settings: MRPSettings, context: FitContext) -> Fit:
        model, after = context.model, context.after
        with fitting(model, after):
            learned = self._start(settings, model, context.data, after, context.generator)
        with fitting(model, without_projections(after)):
            losses = _Losses(self, context, learned)
            with hooked(model, learned.hooks()):
                run = context.train(
                    losses,
                    torch.optim.Adam(list(learned.rows.values()), lr=settings.lr),
                    steps=self.steps,
                    schedule=linear_decay,
                    resumable={"forget": losses.forget, "retain": losses.retain},
                    shown=learned.with_all,
                )
        projection = learned.edit(context.request, context.request_provenance(steps=len(run.log)))
        fit = context.result(projection, run)
        if self.distillation is None or settings.distillation is None or run.interrupted:
            return fit
        earlier, begun = projection_in(after), time.perf_counter()
        phase = context.phase("distillation", fit.settings["distillation"])
        try:
            with fitting(model, without_projections(after)):
                matrices, taught = self.distillation.teach(
                    settings.distillation,
                    phase,
                    projection if earlier is None else earlier.join(projection),
                    micro_batch=self.micro_batch,
                )
        except KeyboardInterrupt:
            return replace(fit, interrupted=True)
        if taught.interrupted:  # matrices taught halfway are still mostly noise
            return replace(fit, interrupted=True)
        log = joined_logs(run.log, taught.log, seconds=time.perf_counter() - begun)
        return replace(fit, edit=fit.edit + matrices, log=log)

    @ordinary_torch(gradients=True)
    def start(
        self,
        model: LensModel,
        forget: Corpus | Sequence[Corpus],
        retain: Corpus,
        *,
        seed: int = 0,
        after: Edit | None = None,
        request: str | None = None,
    ) -> Edit:
        """The control "untrained start": the projection from which `fit` with the same arguments sets out."""
        data, settings, label = self.prepared(model, forget, retain, after, request)
        with fitting(model, after):
            learned = self._start(settings, model, data, after, generator_for(seed))
        edit: Edit = learned.edit(label, {"model": describe(model)})
        return edit if after is None else after + edit

    def _layers(self, model: LensModel) -> tuple[int, ...]:
        return check_layers(model, or_default(self.layers, default_layers(model.cfg.n_layers)))

    def _start(
        self, settings: MRPSettings, model: LensModel, data: Data, after: Edit | None, generator: torch.Generator
    ) -> LearnedRows:
        earlier = projection_in(after)
        removed = earlier.subspaces() if earlier is not None else {}
        device = data.encoder.device
        taken = {hook: subspace.basis.to(device) for hook, subspace in removed.items()}
        changes = {hook: earlier.change_at(hook).to(device) for hook in removed} if earlier is not None else {}
        starts = start_rows(
            model,
            data.encoder,
            data.all_forget,
            data.retain,
            hooks=[hook_name(layer, self.site) for layer in settings.layers],
            taken=taken,
            rank=settings.rank,
            init=self.init,
            retain_energy=self.retain_energy,
            generator=generator,
        )
        return LearnedRows({hook: rows.requires_grad_() for hook, rows in starts.items()}, taken, changes)


class _Losses:
    """What the training loop minimises: for each step the share of each micro-batch."""

    def __init__(self, method: MRP, context: FitContext, learned: LearnedRows) -> None:
        data = context.data
        self.method, self.model, self.encoder, self.learned = method, context.model, data.encoder, learned
        self.forget = Batches(data.all_forget, method.batch_size, context.generator)
        self.retain = Batches(data.retain, method.batch_size, context.generator)
        self.weights = openness(data.all_forget, self.model.cfg.d_vocab).to(data.encoder.device)
        self.bound = or_default(method.forget_bound, FORGET_BOUND[method.forget_loss])
        self.needs_reference = method.forget_loss == "odds" or method.retain_loss == "kl"

    def __call__(self, step: int) -> Iterator[dict[str, Tensor]]:
        method = self.method
        self.learned.alone = step % 2 == 1
        batch, is_lost = both_sides(self.encoder, next(self.forget), next(self.retain))
        lost_count, kept_count = batch.loss_mask[is_lost].sum(), batch.loss_mask[~is_lost].sum()
        for part, side in zip(
            parts_of(batch, method.micro_batch), is_lost.split(method.micro_batch or len(batch)), strict=True
        ):
            to_lose = side[:, None].expand_as(part.loss_mask)[:, 1:][part.loss_mask[:, 1:]]
            predicted = predictions(self.model, part)
            reference = predicted
            if self.needs_reference:
                with torch.no_grad(), self.learned.off():
                    reference = predictions(self.model, part)
            text = cross_entropy(predicted, part)
            if method.forget_loss == "odds":
                before = part.tokens[:, :-1][part.loss_mask[:, 1:]]
                losing = self.weights[before] * log_odds(reference, predicted, part).clamp(min=-self.bound)
            else:
                losing = -text.clamp(max=self.bound)
            keeping = kl(reference, predicted) if method.retain_loss == "kl" else text
            forget = losing[to_lose].sum() / lost_count
            retain = keeping[~to_lose].sum() / kept_count
            yield {
                "loss": forget + method.retain_weight * retain,
                "forget": forget,
                "retain": retain,
                "forget_cross_entropy": text.detach()[to_lose].sum() / lost_count,
            }


def joined_logs(projection: pd.DataFrame, distillation: pd.DataFrame, *, seconds: float) -> pd.DataFrame:
    """One log of both, by `phase`; steps and seconds go on. The distillation took `seconds` in all, its texts included."""
    before = projection["seconds"].iloc[-1] + seconds - distillation["seconds"].iloc[-1]
    later = distillation.assign(
        step=distillation["step"] + len(projection), seconds=distillation["seconds"] + before, phase="distillation"
    )
    return pd.concat([projection.assign(phase="projection"), later], ignore_index=True)


def default_rank(model: LensModel) -> int:
    """A sixteenth of the stream's width, from 2 to 32."""
    return min(32, max(2, int(model.cfg.d_model) // 16))


def default_layers(n_layers: int) -> list[int]:
    """The second half of the depth, at most four layers spread evenly over it: there an answer that has been looked up
    can be removed at the least cost to others."""
    first, last = n_layers // 2, n_layers - 1
    count = min(4, last - first + 1)
    return sorted({round(first + i * (last - first) / max(1, count - 1)) for i in range(count)})
