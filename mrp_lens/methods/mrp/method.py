"""MRP (arXiv 2508.15449): subspaces of the residual stream are removed at chosen layers, and learn which to remove."""

import logging
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor
from typing_extensions import override

from mrp_lens.data import Corpus
from mrp_lens.data.tokenization import Batches, Encoded, TokenBatch, parts_of
from mrp_lens.edits import Edit, projection_in, without_projections
from mrp_lens.methods.base import Data, FitContext, FitTemplate, fitting
from mrp_lens.methods.coverage import Coverage
from mrp_lens.methods.fit import Fit
from mrp_lens.methods.mrp.alternatives import Alternatives
from mrp_lens.methods.mrp.distillation import Distillation, DistillationSettings
from mrp_lens.methods.mrp.gates import gate_loss, gate_weights, start_gates
from mrp_lens.methods.mrp.initialization import Start, start_rows
from mrp_lens.methods.mrp.learned import LearnedRows
from mrp_lens.methods.registry import Swept, register
from mrp_lens.methods.spaces import MRP_SPACE, UNCONDITIONAL_MRP_SPACE
from mrp_lens.models import LensModel, check_layers, describe
from mrp_lens.models.hooks import Site, hook_name, hooked, layer_of
from mrp_lens.models.kept_states import KeptStates
from mrp_lens.training.losses import cross_entropy, kl, predictions
from mrp_lens.training.optim import linear_decay
from mrp_lens.utils import processes
from mrp_lens.utils.sequences import spread_over
from mrp_lens.utils.torch_state import ordinary_torch
from mrp_lens.utils.validation import or_default

logger = logging.getLogger(__name__)

Objective = Literal["alternatives", "odds", "bounded", "ascent"]
RetainLoss = Literal["kl", "cross_entropy"]

FORGET_BOUND = {"alternatives": 1.0, "odds": 1.0, "bounded": 5.0, "ascent": math.inf}  # nats
GATE_LR = 0.2  # learning rate of the gates over that of the rows
SOME_LEFT_OUT = 0.1  # share of the forget texts that "alternatives" cannot reach, above which that is told
MOST_LEFT_OUT = 0.5  # and from which on "bounded" takes its place
TOKENS = 7000  # of forget texts, for which the usual rank is enough
LARGEST = 32  # rank that more of them give


@dataclass(frozen=True, kw_only=True)
class MRPSettings:
    """What a fit of MRP runs with where the user gave nothing; the distillation's only where one was asked for."""

    layers: tuple[int, ...]
    rank: int
    lr: float
    distillation: DistillationSettings | None


@register(
    "mrp",
    summary="Projects learned directions out of the residual stream, irreversibly, wherever a text is about the forget set.",
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
    """Metamorphosis Representation Projection (arXiv 2508.15449), behind a gate.

    At each chosen layer h <- h - g(h) (h Q^T) Q, where Q are orthonormal rows spanning what W [rank, d_model] spans, and the
    gate g(h) in [0, 1] is a detector of what the forget set is about. The paper's projection has no gate and takes its directions
    from every token, which costs the retain set as much as the forget set; `UnconditionalMRP` is that.
    W and the gates learn, from forget loss + retain_weight * retain loss. Several forget corpora make one request.

    A later request (`fit(..., after=...)`) has rows orthogonal to those of the earlier ones, and every other step trains with
    these off, so that each request does its work also once another is taken back.

    Args:
        layers: where to project. None: eight layers spread evenly from a fifth of the depth to 0.85 of it; all between, where there are fewer.
        rank: directions removed at each layer. None: d_model / 16, between 2 and 16; for more than 7,000 tokens of forget texts as
            many more in proportion, up to d_model / 6 and 32.
        site: where on the stream, `resid_post` by default.
        init: start of W. "complement": the top principal directions of the forget states without their part in the retain
            states' top principal components, as in the paper; "code": the reverse, as in the released code; "difference": of the
            forget states less the retain states' mean, which reaches more wordings and starts with more damage; "random".
        retain_energy: share of the retain states' energy that counts as their span in `init`.
        conditional: with the gate.
        gate_directions: directions of a gate, each for a cluster of the forget states. More than one pays where the forget set is
            about many things that have nothing in common.
        gate_weight: factor on the gates' own loss: open on the tokens of forget documents, closed on others.
        forget_loss: "alternatives": per token, the log odds of the text's token against the tokens that follow the same token in
            other forget texts, down to -forget_bound. Tokens that the forget texts determine do not count. "odds": the same
            against the other tokens that the model without the projection considers there, for texts that have no form in
            common. "bounded": -min(CE, forget_bound) per token. "ascent": -CE, the paper's, which diverges.
        forget_bound: nats. None: 1 for "alternatives" and "odds", 5 for "bounded".
        retain_loss: "kl": KL(before || after this fit) on the retain corpus, of a later request with the earlier ones in place on both
            sides; "cross_entropy": on its text, as in the paper.
        retain_weight: factor on the retain loss, at the start of a fit with a budget; the released code has 1.2, with its
            cross-entropy.
        layer_dropout: share of the layers, drawn anew for each update, whose rows are left out of its pass over forget texts: no
            layer then counts on the others to remove what it leaves.
        lr: of Adam, falling linearly to 0 in the second half. None: a fifth of the size of W's entries at the start.
        steps: updates at most.
        batch_size: documents an update on each side.
        retain_length: tokens of a retain document that an update reads; of a longer one, if it has no prompt, a random piece, since
            sixteen whole paragraphs would be most of the time. None: all of it.
        micro_batch: documents a pass. None: as many as their logits are at most 2^24 numbers.
        max_length: tokens at which documents are cut. None: 512, or the context if that is shorter.
        budget: nats a token of KL(unedited || edited) that are allowed for on retain text that no update sees, and four times
            as many on the answers it knows to questions made from it: the retain term's weight keeps to it, and the fit ends
            at its target. It keeps to three tenths of that, and to more where it is too slow with that. None: a fixed weight, every step,
            all of the retain corpus.
        target: accuracy to forget down to on questions made from the forget set (`control_accuracy`). None: chance.
        coverage: what is read besides the corpora. None: nothing.
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
    conditional: bool = True
    gate_directions: int = 1
    gate_weight: float = 0.1
    forget_loss: Objective = "alternatives"
    forget_bound: float | None = None
    retain_loss: RetainLoss = "kl"
    retain_weight: float = 5.0
    layer_dropout: float = 0.0
    lr: float | None = None
    steps: int = 1000
    batch_size: int = 16
    retain_length: int | None = 64
    micro_batch: int | None = None
    max_length: int | None = None
    budget: float | None = 0.1
    target: float | None = None
    coverage: Coverage | None = field(default_factory=Coverage)
    distillation: Distillation | None = None

    by_request = True
    first_share = 0.3

    @override
    def check(self, model: LensModel) -> None:
        self.check_values(
            above_0=("lr", "retain_weight", "forget_bound", "retain_energy"),
            counts=("rank", "steps", "batch_size", "retain_length", "micro_batch", "gate_directions"),
        )
        if not 0.0 <= self.gate_weight < math.inf:
            raise ValueError(f"gate_weight must be at least 0 and finite, got {self.gate_weight}")
        if self.retain_energy > 1.0:
            raise ValueError(f"retain_energy is a share, above 0 and at most 1; got {self.retain_energy}")
        if self.forget_loss == "ascent" and self.forget_bound is not None:
            raise ValueError(
                f"forget_loss='ascent' has no bound, got forget_bound={self.forget_bound}; leave it out, or choose 'bounded'"
            )
        if not self.conditional and self.gate_directions > 1:
            raise ValueError(
                f"without a gate there is nothing that gate_directions={self.gate_directions} could be of; leave it out"
            )
        if not 0.0 <= self.layer_dropout < 1.0:
            raise ValueError(f"layer_dropout is a share of the layers, from 0 to below 1; got {self.layer_dropout}")
        rank, width = self._rank(model), int(model.cfg.d_model)
        if rank >= width:
            raise ValueError(
                f"rank {rank} must be below d_model {width}: removing every direction would leave no state"
            )
        self._layers(model)

    @override
    def resolve(self, model: LensModel, data: Data) -> MRPSettings:
        return MRPSettings(
            layers=self._layers(model),
            rank=self._rank(model, tokens=sum(sum(row.in_loss[1:]) for row in data.all_forget)),
            lr=or_default(self.lr, 0.2 / math.sqrt(model.cfg.d_model)),
            distillation=None if self.distillation is None else self.distillation.resolve(model),
        )

    @override
    def learn(self, settings: MRPSettings, context: FitContext) -> Fit:
        model, after = context.model, context.after
        with fitting(model, after):
            read, learned = self._start(settings, context)
        with fitting(model, without_projections(after)):
            losses = _Losses(self, context, read, learned)
            with hooked(model, learned.hooks()):
                run = context.train(
                    losses,
                    torch.optim.Adam(learned.parameters(lr=settings.lr, gate_lr=GATE_LR * settings.lr)),
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
            if processes.count() > 1:  # the others wait for this process: it has to end
                raise
            return replace(fit, interrupted=True)
        if taught.interrupted:  # matrices taught halfway are still mostly noise
            return replace(fit, interrupted=True)
        log = joined_logs(run.log, taught.log, seconds=time.perf_counter() - begun)
        return replace(context.result(projection, run, further=matrices), log=log)

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
        settings, context = self.context(model, forget, retain, seed=seed, after=after, request=request, progress=False)
        with fitting(model, after):
            _, learned = self._start(settings, context)
        edit: Edit = learned.edit(context.request, {"model": describe(model)})
        return edit if after is None else after + edit

    def _layers(self, model: LensModel) -> tuple[int, ...]:
        return check_layers(model, or_default(self.layers, default_layers(model.cfg.n_layers)))

    def _rank(self, model: LensModel, *, tokens: int = 0) -> int:
        return or_default(self.rank, default_rank(model, tokens))

    def _start(self, settings: MRPSettings, context: FitContext) -> tuple[Data, LearnedRows]:
        """What is read, and the rows and gates before the first update; earlier requests are on."""
        model, data, generator = context.model, context.data, context.generator
        earlier, device = projection_in(context.after), data.encoder.device
        removed = earlier.subspaces() if earlier is not None else {}
        taken = {hook: subspace.basis.to(device) for hook, subspace in removed.items()}
        for hook, basis in taken.items():
            if hook in {hook_name(layer, self.site) for layer in settings.layers}:
                left = int(model.cfg.d_model) - len(basis)
                if settings.rank >= left:
                    raise ValueError(
                        f"rank {settings.rank} is too much at {hook}: earlier requests take {len(basis)} of {model.cfg.d_model} directions, so that "
                        f"this one may have {left - 1}; give a lower rank"
                    )
        changes = {hook: earlier.change_at(hook).to(device) for hook in removed} if earlier is not None else {}
        hooks = [hook_name(layer, self.site) for layer in settings.layers]
        starts = start_rows(
            model,
            data.encoder,
            data.all_forget,
            data.retain,
            hooks=hooks,
            taken=taken,
            rank=settings.rank,
            init=self.init,
            retain_energy=self.retain_energy,
            generator=generator,
            complete=self.rank is None,
        )
        rows = {hook: values.requires_grad_() for hook, values in starts.items()}
        read = context.covered()
        gates = {}
        if self.conditional:
            gates = start_gates(
                model,
                data.encoder,
                read.all_forget,
                read.retain,
                hooks=hooks,
                directions=self.gate_directions,
                generator=generator,
            )
        return read, LearnedRows(rows, taken, changes, gates)


class _Losses:
    """What the training loop minimises: for each step the share of each micro-batch, forget side first.

    The sides are passes of their own: forget texts are often a line long and retain texts paragraphs, to whose length a
    common batch would pad all of them.
    """

    def __init__(self, method: MRP, context: FitContext, data: Data, learned: LearnedRows) -> None:
        self.context = context
        self.method, self.model, self.encoder, self.learned = method, context.model, data.encoder, learned
        self.forget = Batches(data.all_forget, method.batch_size, context.generator)
        self.retain = Batches(data.retain, method.batch_size, context.generator, length=method.retain_length)
        self.alternatives = Alternatives.of(data.all_forget, int(self.model.cfg.d_vocab), data.encoder.device)
        self.forget_loss = method.forget_loss
        compares = method.forget_loss in ("alternatives", "odds")
        left_out = self.alternatives.left_out(data.all_forget) if compares else 0.0
        if left_out >= MOST_LEFT_OUT:
            self.forget_loss = "bounded"
            logger.warning(
                "in %.0f%% of the forget set's texts every token of the ending follows from the one before it, so that there is nothing to "
                "compare it with: forget_loss='bounded' is used in place of %r; more texts of their kind make them comparable",
                100 * left_out,
                method.forget_loss,
            )
        elif left_out > SOME_LEFT_OUT:
            logger.warning(
                "in %.0f%% of the forget set's texts every token of the ending follows from the one before it: there is nothing to compare "
                "it with, and it may be left as it is; ask about these, and use forget_loss='bounded' if they are still known",
                100 * left_out,
            )
        self.bound = or_default(method.forget_bound, FORGET_BOUND[self.forget_loss])
        # Where the model leaves its last block, without any projection and with the earlier requests; and where it comes to the first
        # hook of any.
        self.last = self.last_before = KeptStates(self.model, int(self.model.cfg.n_layers))
        self.first = KeptStates(self.model, min(layer_of(hook) for hook, _ in learned.hooks()))
        retain = self.retain.texts
        compared = [(self.last, retain)] if method.retain_loss == "kl" else []
        compared += [(self.last, data.all_forget)] if self.forget_loss == "odds" else []
        for kept, rows in (*compared, (self.first, retain), (self.first, data.all_forget)):
            self._keep(kept, rows)
        if method.retain_loss == "kl" and learned.earlier:
            self.last_before = KeptStates(self.model, self.last.layer)
            with hooked(self.model, learned.hooks()), learned.before():
                self._keep(self.last_before, retain)

    def _keep(self, kept: KeptStates, rows: Sequence[Encoded]) -> None:
        passes = self.method.steps * self.method.batch_size / len(rows)
        kept.read(self.encoder, rows, passes=passes, progress=self.context.progress)

    def __call__(self, step: int) -> Iterator[dict[str, Tensor]]:
        self.learned.alone = step % 2 == 1
        forget, retain = (self.encoder.collate(next(side)) for side in (self.forget, self.retain))
        yield from self._losing(forget, self._left_out())
        yield from self._keeping(retain)

    def _left_out(self) -> list[str]:
        """The hooks that do without their rows in this step's pass over forget texts."""
        hooks = list(self.learned.rows)
        if not self.method.layer_dropout or len(hooks) < 2:
            return []
        count = min(len(hooks) - 1, max(1, int(self.method.layer_dropout * len(hooks))))
        return [hooks[place] for place in torch.randperm(len(hooks), generator=self.context.generator)[:count].tolist()]

    def _losing(self, batch: TokenBatch, left_out: Sequence[str]) -> Iterator[dict[str, Tensor]]:
        method, count = self.method, batch.loss_mask.sum()
        for part in parts_of(batch, method.micro_batch, d_vocab=int(self.model.cfg.d_vocab)):
            with self.learned.without(left_out), self.first.entered(part):
                predicted = predictions(self.model, part)
            gate = self._gate_loss(part, batch, lost=True)
            text = cross_entropy(predicted, part)
            losing = self._forget_loss(predicted, part, text)
            forget = losing.sum() / count
            yield {
                "loss": forget + method.gate_weight * gate.get("gate", 0.0),
                "forget": forget,
                **gate,
                "forget_cross_entropy": text.detach().sum() / count,
            }

    def _forget_loss(
        self, predicted: Float[Tensor, "counted d_vocab"], part: TokenBatch, text: Float[Tensor, " counted"]
    ) -> Float[Tensor, " counted"]:
        """At each token that counts, in nats; `text`: the cross-entropy there."""
        kind = self.forget_loss
        if kind in ("bounded", "ascent"):
            return -text.clamp(max=self.bound)
        if kind == "alternatives":
            odds, weights = self.alternatives.log_odds(predicted, part)
        else:
            odds, weights = self.alternatives.reference_log_odds(self._reference(part), predicted, part)
        return weights * odds.clamp(min=-self.bound)

    def _keeping(self, batch: TokenBatch) -> Iterator[dict[str, Tensor]]:
        method, count = self.method, batch.loss_mask.sum()
        for part in parts_of(batch, method.micro_batch, d_vocab=int(self.model.cfg.d_vocab)):
            with self.first.entered(part):
                predicted = predictions(self.model, part)
            gate = self._gate_loss(part, batch, lost=False)
            divergence = method.retain_loss == "kl"
            keeping = kl(self._before(part), predicted) if divergence else cross_entropy(predicted, part)
            retain = keeping.sum() / count
            weight = self.context.multiplier * method.retain_weight
            yield {"loss": weight * retain + method.gate_weight * gate.get("gate", 0.0), "retain": retain, **gate}

    def _before(self, part: TokenBatch) -> Float[Tensor, "counted d_vocab"]:
        """What the model predicts as this fit found it: held against the unedited one, a request would undo the earlier ones where they
        cost anything on retain text."""
        kept = self.last if self.learned.alone else self.last_before
        with torch.no_grad(), self.learned.before(), kept.entered(part):
            return predictions(self.model, part)

    def _reference(self, part: TokenBatch) -> Float[Tensor, "counted d_vocab"]:
        """What the model without any projection predicts."""
        with torch.no_grad(), self.learned.off(), self.last.entered(part):
            return predictions(self.model, part)

    def _gate_loss(self, part: TokenBatch, batch: TokenBatch, *, lost: bool) -> dict[str, Tensor]:
        """The part's share of the gates' loss, from the pass just made; nothing without gates."""
        if not self.learned.gates:
            return {}
        return {"gate": gate_loss(self.learned.shares, gate_weights(part, batch, lost=lost), lost=lost)}


def joined_logs(projection: pd.DataFrame, distillation: pd.DataFrame, *, seconds: float) -> pd.DataFrame:
    """One log of both, by `phase`; steps and seconds go on. The distillation took `seconds` in all, its texts included."""
    before = projection["seconds"].iloc[-1] + seconds - distillation["seconds"].iloc[-1]
    later = distillation.assign(
        step=distillation["step"] + len(projection), seconds=distillation["seconds"] + before, phase="distillation"
    )
    return pd.concat([projection.assign(phase="projection"), later], ignore_index=True)


def default_rank(model: LensModel, tokens: int = 0, *, most: int = 16) -> int:
    """A sixteenth of the stream's width, from 2 to `most`; more in proportion to the tokens to forget, where these are many."""
    width = int(model.cfg.d_model)
    usual = min(most, max(2, width // 16))
    return max(usual, min(int(usual * tokens / TOKENS), LARGEST, width // 6))


def default_layers(n_layers: int) -> list[int]:
    """Eight layers spread evenly from a fifth of the depth to 0.85 of it; all between, where there are fewer."""
    layers = spread_over(n_layers // 5, round(0.85 * n_layers), 8)
    return sorted({min(n_layers - 1, layer) for layer in layers})


@register(
    "mrp-unconditional",
    summary="MRP as published: the directions are projected out of every state.",
    source="Metamorphosis Representation Projection, arXiv 2508.15449",
    swept=Swept(layer="layers"),
    space=UNCONDITIONAL_MRP_SPACE,
    report=(
        "subspaces of rank {rank} removed from every state of the residual stream at layers {layers}",
        "matrices of layers {layers} replaced by noise and taught again what the projection leaves alone",
    ),
)
@dataclass(frozen=True, kw_only=True)
class UnconditionalMRP(MRP):
    """MRP without the gate, as published (arXiv 2508.15449): h <- h - (h Q^T) Q for every state.

    The arguments are those of `MRP`. The fit has a fixed weight and number of steps and reads nothing but the corpora, unless
    budget and coverage are given.

    Args:
        layers: None: the second half of the depth, at most four layers spread over it.
        rank: None: d_model / 16, between 2 and 32.
    """

    conditional: bool = False
    forget_loss: Objective = "odds"
    retain_weight: float = 10.0
    steps: int = 150
    batch_size: int = 32
    retain_length: int | None = None
    budget: float | None = None
    coverage: Coverage | None = None

    @override
    def _layers(self, model: LensModel) -> tuple[int, ...]:
        return check_layers(model, or_default(self.layers, later_layers(model.cfg.n_layers)))

    @override
    def _rank(self, model: LensModel, *, tokens: int = 0) -> int:
        return or_default(self.rank, default_rank(model, most=32))


def later_layers(n_layers: int) -> list[int]:
    """The second half of the depth, at most four layers spread evenly over it: there an answer that has been looked up
    can be removed at the least cost to others."""
    first, last = n_layers // 2, n_layers - 1
    return list(spread_over(first, last, min(4, last - first + 1)))
