"""Unlearn, noise, distil: the layers that look facts up are reset and taught again what the projection leaves alone."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from mrp_lens.data import Corpus
from mrp_lens.data.tokenization import Batches, Encoded, Encoder, in_order, parts_of
from mrp_lens.edits import ProjectionEdit, WeightEdit, edit_on
from mrp_lens.methods.base import FitContext
from mrp_lens.models import (
    EditableWeight,
    LensModel,
    check_layers,
    checkpoint_names,
    encoder_for,
    is_bridge,
    restored,
    tensor_digests,
    weights_by_name,
)
from mrp_lens.models.generation import drawn_seed, start_token, written_texts
from mrp_lens.models.hooks import captured, hook_name, read_states
from mrp_lens.training.loop import TrainingRun
from mrp_lens.training.losses import kl, predictions
from mrp_lens.training.optim import MasterAdamW, Trainable, warmup_cosine
from mrp_lens.utils.io import write_json
from mrp_lens.utils.processes import computed_once, dealt, summed
from mrp_lens.utils.validation import PlainSettings, or_default

TEXTS_FILE = "texts.json"
LR_BY_WIDTH = 0.384  # 3e-3 at d_model 128


@dataclass(frozen=True, kw_only=True)
class DistillationSettings:
    """What a distillation runs with where the user gave nothing."""

    layers: tuple[int, ...]
    lr: float


@dataclass(frozen=True, kw_only=True)
class Distillation(PlainSettings):
    """Put facts out of reach of retraining: after UNDO (unlearn, noise, distil on outputs; arXiv 2506.06278).

    A projection hides facts; the weights behind it still hold them. So the matrices of some layers are replaced by noise
    and trained to do what the unedited model does, on texts that it writes itself, less those on which the projection
    changes what it predicts: these are about the forget set. Texts of one's own would not do: what they do not mention
    would be lost with the forget set. Other than in UNDO the teacher is the unedited model, on those texts only, the noise is
    not spread evenly over the model, and the states behind the reset layers are matched too.

    Args:
        layers: whose matrices are replaced. None: the first half of the depth, where facts are looked up.
        noise: share of these that is replaced by normal noise of each matrix's own spread, in (0, 1].
        later_noise: the same for the other layers, in [0, 1].
        texts: how many texts the model writes.
        text_length: most tokens of one.
        agreement: nats. Of those texts the ones stay where the projection changes no next-token distribution by more
            (KL divergence).
        match_weight: factor on the squared error of the states behind the last of `layers`, as a share of their variance.
        lr: of AdamW, rising over the first 5% and falling along a cosine. None: 0.384 / d_model.
        steps: updates.
        batch_size: documents an update.
    """

    layers: Sequence[int] | None = None
    noise: float = 1.0
    later_noise: float = 0.2
    texts: int = 15_000
    text_length: int = 64
    agreement: float = 1.5
    match_weight: float = 1.0
    lr: float | None = None
    steps: int = 1200
    batch_size: int = 64

    def resolve(self, model: LensModel) -> DistillationSettings:
        """Defaults filled in, and everything checked.

        Raises:
            ValueError: a value out of range, a layer that does not exist, a HookedTransformer, a family whose joint
                matrices the Bridge keeps apart, or a tokenizer without a token to start texts from.
        """
        self.check_values(
            above_0=("noise", "agreement", "match_weight", "lr"),
            counts=("texts", "text_length", "steps", "batch_size"),
        )
        if self.noise > 1.0 or not 0.0 <= self.later_noise <= 1.0:
            raise ValueError(
                f"noise must be in (0, 1] and later_noise in [0, 1], got {self.noise} and {self.later_noise}: shares of each matrix"
            )
        if not is_bridge(model):
            raise ValueError(
                "distillation trains matrices of the checkpoint that a HookedTransformer keeps in other shapes; load the model with backend='bridge'"
            )
        start_token(model)
        depth, width = int(model.cfg.n_layers), int(model.cfg.d_model)
        layers = check_layers(model, or_default(self.layers, range(max(1, depth // 2))))
        known = checkpoint_names(model)
        foreign = [weight.name for weight in self._matrices(model, layers) if weight.name not in known]
        if foreign:
            raise ValueError(
                f"distillation is not possible in this architecture: TransformerLens keeps {foreign[0]} and others apart, which the "
                "checkpoint holds in joint matrices; leave distillation out"
            )
        return DistillationSettings(layers=layers, lr=or_default(self.lr, LR_BY_WIDTH / width))

    def teach(
        self,
        settings: DistillationSettings,
        context: FitContext,
        projection: ProjectionEdit,
        *,
        micro_batch: int | None = None,
    ) -> tuple[WeightEdit, TrainingRun]:
        """New matrices that do without the facts that the projection removes.

        Args:
            settings: of `resolve`.
            context: its model is the Bridge without the projection, frozen; it is left as it is. The documents of its retain
                set are taught as well; texts and training are kept in its checkpoint, and read from there.
            projection: tells which texts are about the forget set. Every other update trains with it on, so that the
                matrices serve with it and without.
            micro_batch: documents a pass. None: as many as their logits are at most 2^24 numbers.

        Raises:
            ValueError: there is no text on which model and projection agree.
        """
        model, generator = context.model, context.generator
        weights = self._matrices(model, settings.layers)
        # What follows a text's last token is taught too, where the tokenizer has an EOS to end texts with.
        encoder = encoder_for(model, append_eos=model.tokenizer.eos_token_id is not None)
        texts = self._texts(context)
        rows = [*self._agreed(model, projection, encoder, texts), *context.data.retain]
        with restored(weight.parameter for weight in weights):
            original = {weight.name: weight.read() for weight in weights}
            noise = [self._noise_of(weight, settings.layers) for weight in weights]
            student = _Student(weights, noise, generator)
            batches = Batches(rows, self.batch_size, generator)
            hook = hook_name(max(settings.layers))

            def losses(step: int) -> Iterator[dict[str, Tensor]]:
                """KL(unedited || student), and the error of the states behind the reset layers."""
                batch = encoder.collate(next(batches))
                with student.away():  # of all of the batch, whatever parts it is read in and whichever process has them
                    spread = squared_distances(read_states(model, batch, [hook])[hook])
                for part in parts_of(batch, micro_batch, d_vocab=int(model.cfg.d_vocab)):
                    with student.away(), torch.no_grad(), captured(model, [hook]) as store:
                        wanted = predictions(model, part)
                        states = store[hook]
                    with edit_on(model, projection if step % 2 else None), captured(model, [hook]) as store:
                        divergence = kl(wanted, predictions(model, part)).sum() / batch.loss_mask[:, 1:].sum()
                        error = (store[hook] - states)[part.content_mask].float().square().sum() / spread
                    yield {
                        "loss": divergence + self.match_weight * error,
                        "divergence": divergence,
                        "unexplained": error,
                    }

            run = context.train(
                losses,
                MasterAdamW(student.masters, settings.lr),
                steps=self.steps,
                schedule=warmup_cosine,
                resumable={"batches": batches},
                shown=lambda: edit_on(model, projection),
            )
            learned = {weight.name: weight.read() for weight in weights}
        replaced = {name: tensor_digests(matrix) for name, matrix in original.items()}
        return WeightEdit.of_own(learned, replaced, provenance=context.provenance(steps=len(run.log))), run

    def _matrices(self, model: LensModel, layers: Sequence[int]) -> list[EditableWeight]:
        """All tensors of the layers that change, of which `layers` are reset."""
        chosen = range(int(model.cfg.n_layers)) if self.later_noise > 0.0 else layers
        inside = {id(p) for layer in chosen for p in model.blocks[layer].parameters()}
        return [weight for weight in weights_by_name(model).values() if id(weight.parameter) in inside]

    def _noise_of(self, weight: EditableWeight, layers: Sequence[int]) -> float:
        """The share of a tensor that becomes noise; gains and biases keep theirs."""
        if weight.parameter.ndim < 2:
            return 0.0
        return self.noise if weight.layer in layers else self.later_noise

    def _texts(self, context: FitContext) -> list[str]:
        """Texts that the model writes; those of the checkpoint, if they are there."""
        length = min(self.text_length, int(context.model.cfg.n_ctx) - 2)
        path = None if context.checkpoint is None else context.checkpoint.folder / TEXTS_FILE
        # Drawn in either case: what follows must not depend on where the texts come from.
        seed = drawn_seed(context.generator)

        def found() -> list[str]:
            if path is not None and path.is_file():
                known: list[str] = json.loads(path.read_text(encoding="utf-8"))
                return known
            texts = written_texts(
                context.model, self.texts, max_new_tokens=length, seed=seed, progress=context.progress
            )
            if path is not None:
                write_json(path, texts)
            return texts

        return computed_once(found)

    def _agreed(
        self, model: LensModel, projection: ProjectionEdit, encoder: Encoder, texts: Sequence[str]
    ) -> list[Encoded]:
        """Texts less those on which the projection changes what the model predicts."""
        rows = [row for row in encoder.encode(Corpus.from_texts(texts).documents) if any(row.in_loss[1:])]
        most = torch.zeros(len(rows))
        with torch.no_grad():
            for places, batch in dealt(in_order(encoder, rows, self.batch_size, logits=True)):
                before = predictions(model, batch)
                with edit_on(model, projection):
                    changed = kl(before, predictions(model, batch))
                counts = batch.loss_mask[:, 1:].sum(dim=1).tolist()
                most[places] = torch.stack([values.max() for values in changed.split(counts)]).cpu()
        summed([most])
        agreed = sorted(
            (row for row, each in zip(rows, most.tolist(), strict=True) if each < self.agreement),
            key=lambda row: len(row.ids),
        )
        if not agreed:
            raise ValueError(
                f"the projection changes what the model predicts by {self.agreement} nats or more in all of its {len(rows)} texts; raise agreement"
            )
        return agreed


def squared_distances(states: Float[Tensor, "tokens d_model"]) -> Float[Tensor, ""]:
    """Of states from their mean, summed: what an error of theirs is a share of."""
    wide = states.float()
    return (wide - wide.mean(0)).square().sum()


class _Student:
    """The matrices under training, and the model's own for the while of a forward pass."""

    def __init__(self, weights: Sequence[EditableWeight], noise: Sequence[float], generator: torch.Generator) -> None:
        self.parameters = [weight.parameter for weight in weights]
        self.own = [parameter.detach().clone() for parameter in self.parameters]
        self.masters = [
            Trainable(noised(values, share, generator).requires_grad_(True), (parameter,))
            for parameter, values, share in zip(self.parameters, self.own, noise, strict=True)
        ]
        for parameter, master in zip(self.parameters, self.masters, strict=True):
            parameter.requires_grad_(True)
            master.spread()

    @contextmanager
    def away(self) -> Iterator[None]:
        """Inside, the model has its own matrices."""
        with torch.no_grad():
            for parameter, values in zip(self.parameters, self.own, strict=True):
                parameter.copy_(values)
        try:
            yield
        finally:
            for master in self.masters:
                master.spread()


def noised(tensor: Float[Tensor, "..."], share: float, generator: torch.Generator) -> Float[Tensor, "..."]:
    """A float32 copy, `share` of it replaced by normal noise of its own standard deviation."""
    values = tensor.detach().float()
    if share == 0.0:
        return values.clone()
    noise = torch.randn(values.shape, generator=generator).to(values.device) * values.std()
    return (1 - share) * values + share * noise
