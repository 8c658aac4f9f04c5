"""Retraining an edited model in place: which tensors an attacker may change, and the way back to what they were."""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.utils import parametrize
from typing_extensions import override

from mrp_lens.data import Corpus
from mrp_lens.data.tokenization import Batches, parts_of
from mrp_lens.edits import Edit, edit_on, has_hooks, projection_in, without_hooks
from mrp_lens.models import LensModel, check_lens_model, checkpoint_tensors, encoder_for, is_bridge, restored
from mrp_lens.models.finite import NonFiniteError, non_finite
from mrp_lens.models.hooks import frozen
from mrp_lens.models.quantised import refuse_packed
from mrp_lens.training.callbacks import Callback
from mrp_lens.training.loop import NonFiniteLossError, train
from mrp_lens.training.losses import cross_entropy, predictions
from mrp_lens.training.optim import MasterAdamW, Trainable, trainable
from mrp_lens.utils.torch_state import ordinary_torch, refuse_inference_tensors
from mrp_lens.utils.validation import check_one_of, check_positive, check_whole, generator_for

Form = Literal["kept", "stripped", "weights"]
Parameters = Literal["all", "lora", "before", "at", "after"]
Outcome = Literal["finished", "interrupted", "diverged"]

LR_BY_WIDTH = 0.128  # 1e-3 at d_model 128, 3e-5 at 4096
LR_SHARES = (0.3, 1.0, 3.0)
EXPERTS = 3  # axes of the matrices of all experts in one
LORA_SHARE = 10.0  # low-rank factors start at 0 and take larger steps
LORA_RANK = 8

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Attacker:
    """How a model is retrained.

    Attributes:
        steps: updates (AdamW, constant rate, no weight decay).
        batch_size: documents an update.
        form: what is retrained. "kept": the model with the edit on; "stripped": with its hooks removed; "weights": with
            its projections written into the weights, which retraining can then undo.
        parameters: what may change: "all" tensors of the checkpoint; those "before" the first edited layer (embeddings
            included), "at" the edited layers (from the first to the last), "after" the last (with the unembedding);
            or, "lora", low-rank updates of every matrix in the blocks (arXiv 2106.09685; Bridge only).
        lora_rank: rank of these.
        seed: of the order of the data.

    Raises:
        ValueError: a budget that is not above 0, an unknown form or choice of parameters.
    """

    steps: int = 100
    batch_size: int = 32
    form: Form = "kept"
    parameters: Parameters = "all"
    lora_rank: int = LORA_RANK
    seed: int = 0

    def __post_init__(self) -> None:
        check_positive(steps=self.steps, batch_size=self.batch_size, lora_rank=self.lora_rank)
        check_one_of(Form, form=self.form)
        check_one_of(Parameters, parameters=self.parameters)
        generator_for(self.seed)

    def rates(self, model: LensModel, lr: float | Sequence[float] | None) -> tuple[float, ...]:
        """The grid of learning rates: as given, or three around one that suits the model's width.

        Raises:
            ValueError: none, or one that is not above 0.
        """
        check_lens_model(model)
        if lr is None:
            centre = LR_BY_WIDTH / int(model.cfg.d_model) * (LORA_SHARE if self.parameters == "lora" else 1.0)
            return tuple(share * centre for share in LR_SHARES)
        rates = (lr,) if isinstance(lr, int | float) else tuple(lr)
        if not rates or not all(rate > 0 for rate in rates):
            raise ValueError(f"lr must be above 0, or several such rates, got {lr}")
        return rates

    def faced_with(self, model: LensModel, edit: Edit | None) -> AbstractContextManager[object]:
        """The model in the form that is retrained.

        Raises:
            ValueError: the edit has no hooks to strip, or cannot be written into weights.
        """
        if edit is None or self.form == "kept":
            return edit_on(model, edit)
        if self.form == "weights":
            return edit.applied_in_weights(model)
        if not has_hooks(edit):
            raise ValueError("this edit has no hooks that could be stripped: it is in the weights; use form='kept'")
        return edit_on(model, without_hooks(edit))

    @contextmanager
    def retrained(
        self,
        model: LensModel,
        edit: Edit | None,
        taught: Corpus,
        *,
        lr: float,
        callbacks: Sequence[Callback] = (),
        progress: bool = True,
    ) -> Iterator[Outcome]:
        """Inside, the model is what retraining made of it; on exit it is as before, bit for bit.

        Training does not heed gradients that are switched off, autocast or torch's defaults; the code inside does.

        Args:
            model: without the edit.
            edit: None: the unedited model.
            taught: what it is trained on; the completions count.
            lr: learning rate.
            callbacks: of the training, such as an `Evaluation`.
            progress: show a progress bar.

        Yields:
            How training ended: "diverged" where the loss, or the logits at an evaluation, became infinite (with a
            warning), "interrupted" by Ctrl-C.

        Raises:
            ValueError: nothing to train on, or a model that was loaded in inference mode.
            NonFiniteError: the model's logits are NaN or infinite before the first update.
        """
        description = f"retraining ({self.form}, lr {lr:.2g})"
        with ordinary_torch(gradients=True), ExitStack() as entered:
            losses = Losses(model, taught, self.batch_size, self.seed)
            entered.enter_context(self.faced_with(model, edit))
            tensors = unlocked(model, edit, self.parameters, lora_rank=self.lora_rank, seed=self.seed)
            optimizer = MasterAdamW(entered.enter_context(tensors), lr)
            outcome: Outcome = "finished"
            try:
                run = train(
                    losses,
                    optimizer,
                    steps=self.steps,
                    description=description,
                    progress=progress,
                    callbacks=callbacks,
                )
                outcome = "interrupted" if run.interrupted else "finished"
            except (NonFiniteLossError, NonFiniteError) as error:
                if not losses.begun:
                    raise
                logger.warning("%s", error)
                outcome = "diverged"
            as_before = entered.pop_all()
        try:
            yield outcome  # to code that sees torch as its own settings have it
        finally:
            with ordinary_torch(gradients=True):
                as_before.close()


class Losses:
    """Cross-entropy of batch after batch of what is taught.

    Attributes:
        begun: whether an update was made.

    Raises:
        ValueError: nothing to train on.
    """

    def __init__(self, model: LensModel, taught: Corpus, batch_size: int, seed: int) -> None:
        self.begun = False
        self._model, self._encoder = model, encoder_for(model)
        rows = [row for row in self._encoder.encode(taught.documents) if any(row.in_loss[1:])]
        if not rows:
            raise ValueError(f"nothing to train on: {taught.name!r} holds no document with a token to predict")
        self._batches = Batches(rows, batch_size, generator_for(seed))

    def __call__(self, step: int) -> Iterator[dict[str, Tensor]]:
        """One batch's mean over its counted tokens."""
        batch = self._encoder.collate(next(self._batches))
        for part in parts_of(batch, None, d_vocab=int(self._model.cfg.d_vocab)):
            loss = cross_entropy(predictions(self._model, part), part).sum() / batch.loss_mask.sum()
            if not step and not bool(torch.isfinite(loss)):  # it is the model, and not the rate
                raise non_finite(self._model, part.tokens, part.attention_mask, "the losses")
            yield {"loss": loss}
        self.begun = True


def possible_forms(model: LensModel, edit: Edit, wanted: tuple[Form, ...] | None) -> tuple[Form, ...]:
    """The forms that are wanted, or all in which this edit can be retrained.

    Raises:
        ValueError: one that is wanted and that the edit does not have.
    """
    found: list[Form] = []
    for form in wanted or get_args(Form):
        if wanted is None and form == "weights" and projection_in(edit) is None:
            continue  # it is in the weights as it is, or is no projection
        try:
            with Attacker(form=form).faced_with(model, edit):
                found.append(form)
        except ValueError:
            if wanted is not None:
                raise
    return tuple(found)


@contextmanager
def unlocked(
    model: LensModel, edit: Edit | None, parameters: Parameters, *, lora_rank: int, seed: int
) -> Iterator[list[Trainable]]:
    """The tensors that the attacker may change; they require grad inside, and hold their old values on exit.

    Args:
        model: with the edit on.
        edit: tells "before", "at" and "after" apart.
        parameters, lora_rank: see `Attacker`.
        seed: of the start of low-rank updates.

    Raises:
        ValueError: LoRA on a HookedTransformer, a choice that leaves nothing to train, or a model that was loaded in
            inference mode.
    """
    refuse_inference_tensors(model.parameters())
    with frozen(model):
        if parameters == "lora":
            with low_rank_updates(model, rank=lora_rank, seed=seed) as updates:
                yield updates
            return
        reached = reach_of(edit, parameters)
        chosen = [tensor for tensor in checkpoint_tensors(model) if reached(tensor.depth)]
        if not chosen:
            raise ValueError(
                f"there are no tensors {parameters!r} the edited layers {list(edit.layers if edit else ())} of this model of "
                f"{model.cfg.n_layers} layers; choose another of 'all', 'before', 'at', 'after'"
            )
        with restored(p for tensor in chosen for p in tensor.parameters):
            yield [trainable(*tensor.parameters) for tensor in chosen]


def reach_of(edit: Edit | None, parameters: Parameters) -> Callable[[int], bool]:
    """Whether tensors at a depth (see `CheckpointTensor`) are among these parameters.

    Raises:
        ValueError: "before", "at" or "after" without an edit.
    """
    if parameters == "all":
        return lambda depth: True
    if edit is None:
        raise ValueError(f"parameters={parameters!r} needs an edit: without one there are no edited layers; use 'all'")
    first, last = edit.layers[0], edit.layers[-1]
    return {
        "before": lambda depth: depth < first,
        "at": lambda depth: first <= depth <= last,
        "after": lambda depth: depth > last,
    }[parameters]


class LowRank(torch.nn.Module):
    """W -> W + left right: a low-rank update that starts at 0; of a stack of matrices one each."""

    def __init__(self, matrix: Float[Tensor, "*stack out in"], rank: int, generator: torch.Generator) -> None:
        super().__init__()
        *stack, rows, columns = matrix.shape
        right = torch.randn(*stack, rank, columns, generator=generator) / columns**0.5
        self.left = torch.nn.Parameter(torch.zeros(*stack, rows, rank, device=matrix.device))
        self.right = torch.nn.Parameter(right.to(matrix.device))

    @override
    def forward(self, matrix: Float[Tensor, "*stack out in"]) -> Float[Tensor, "*stack out in"]:
        """The updated matrix, in its own precision."""
        return matrix + (self.left @ self.right).type_as(matrix)


@contextmanager
def low_rank_updates(model: LensModel, *, rank: int, seed: int) -> Iterator[list[Trainable]]:
    """Every matrix in the blocks, each expert's too, with a low-rank update; taken off again on exit.

    Raises:
        ValueError: the model is a HookedTransformer, whose attention has no matrices of the checkpoint's shape, rank
            below 1, or quantised matrices.
    """
    if not is_bridge(model):
        raise ValueError(
            "low-rank updates need the checkpoint's own matrices, which a HookedTransformer does not have; load the model with backend='bridge'"
        )
    check_whole(lora_rank=rank)
    generator = generator_for(seed)
    blocks = {id(p) for block in model.blocks for p in block.parameters()}
    matrices = [
        (module, name, parameter)
        for module in model.modules()
        for name, parameter in module._parameters.items()
        if parameter is not None
        and id(parameter) in blocks
        and ((name == "weight" and parameter.ndim == 2) or parameter.ndim == EXPERTS)
    ]
    for module, _, matrix in matrices:
        refuse_packed(matrix, f"a matrix of a {type(module).__name__}")
    order = {module: list(module._parameters) for module, _, _ in matrices}
    updates: list[LowRank] = []
    try:
        for module, name, matrix in matrices:
            update = LowRank(matrix, rank, generator)
            parametrize.register_parametrization(module, name, update)
            updates.append(update)
        yield [Trainable(factor) for update in updates for factor in (update.left, update.right)]
    finally:
        for module, name, _ in matrices[: len(updates)]:
            parametrize.remove_parametrizations(module, name, leave_parametrized=False)
        for module, names in order.items():
            for name in names:  # a matrix came back behind the bias
                module._parameters[name] = module._parameters.pop(name)
