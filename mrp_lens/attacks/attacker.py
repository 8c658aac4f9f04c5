"""Somebody who retrains an edited model: with what budget, in what form, and what is theirs to change."""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from mrp_lens.attacks.retraining import LORA_RANK, Parameters, unlocked
from mrp_lens.batching import Batches, Encoder
from mrp_lens.checks import generator_for, one_of, positive
from mrp_lens.corpus import Corpus
from mrp_lens.edit import Edit, edit_on
from mrp_lens.edit.fold import folded
from mrp_lens.edit.stack import has_hooks, stripped
from mrp_lens.finite import NonFiniteError, non_finite
from mrp_lens.masters import MasterAdamW
from mrp_lens.model import LensModel, check_lens_model
from mrp_lens.predictions import cross_entropy, predictions
from mrp_lens.torch_state import ordinary_torch
from mrp_lens.training import NonFiniteLossError, train

Form = Literal["kept", "stripped", "weights"]
FORM_TITLES: dict[str, str] = {"kept": "edit kept", "stripped": "hooks stripped", "weights": "in the weights"}
Outcome = Literal["finished", "interrupted", "diverged"]

LR_BY_WIDTH = 0.128  # 1e-3 at d_model 128, 3e-5 at 4096
LR_SHARES = (0.3, 1.0, 3.0)
LORA_SHARE = 10.0  # low-rank factors start at 0 and take larger steps

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Attacker:
    """How a model is retrained.

    Attributes:
        steps: updates (AdamW, constant rate, no weight decay).
        batch_size: documents an update.
        form: what is retrained. "kept": the model with the edit on; "stripped": with its hooks removed; "weights": with
            its projections written into the weights, which retraining can then undo.
        parameters: what may change: "all" tensors of the checkpoint, those "before" the first edited layer, "at" the
            edited layers, "after" the last; or low-rank updates of the matrices, "lora" (Bridge only).
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
        positive(steps=self.steps, batch_size=self.batch_size, lora_rank=self.lora_rank)
        one_of(Form, form=self.form)
        one_of(Parameters, parameters=self.parameters)
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
            return folded(model, edit)
        if not has_hooks(edit):
            raise ValueError("this edit has no hooks that could be stripped: it is in the weights; use form='kept'")
        return edit_on(model, stripped(edit))

    @contextmanager
    def retrained(
        self,
        model: LensModel,
        edit: Edit | None,
        taught: Corpus,
        *,
        lr: float,
        score: Callable[[int], None] | None = None,
        marks: Sequence[int] = (),
        progress: bool = True,
    ) -> Iterator[Outcome]:
        """Inside, the model is what retraining made of it; on exit it is as before, bit for bit.

        Training does not heed gradients that are switched off, autocast or torch's defaults; the code inside does.

        Args:
            model: without the edit.
            edit: None: the unedited model.
            taught: what it is trained on; the completions count.
            lr: learning rate.
            score: called with the number of updates done, whenever that is among `marks`.
            marks: from 0 to `steps`.
            progress: show a progress bar.

        Yields:
            How training ended: "diverged" where the loss, or the model's logits at a mark, became infinite (with a
            warning), "interrupted" by Ctrl-C.

        Raises:
            ValueError: nothing to train on, or a model that was loaded in inference mode.
            NonFiniteError: the model's logits are NaN or infinite before the first update.
        """
        with ordinary_torch(gradients=True), ExitStack() as entered:
            outcome = self._retrain(entered, model, edit, taught, lr, score, marks, progress)
            as_before = entered.pop_all()
        try:
            yield outcome  # to code that sees torch as its own settings have it
        finally:
            with ordinary_torch(gradients=True):
                as_before.close()

    def _retrain(
        self,
        entered: ExitStack,
        model: LensModel,
        edit: Edit | None,
        taught: Corpus,
        lr: float,
        score: Callable[[int], None] | None,
        marks: Sequence[int],
        progress: bool,
    ) -> Outcome:
        encoder = Encoder.for_model(model)
        documents = [row for row in encoder.encode(taught.documents) if any(row.in_loss[1:])]
        if not documents:
            raise ValueError(f"nothing to train on: {taught.name!r} holds no document with a token to predict")
        batches = Batches(documents, self.batch_size, generator_for(self.seed))
        updates = 0

        def losses(step: int) -> Iterator[dict[str, Tensor]]:
            nonlocal updates
            updates = step
            if score is not None and step in marks:
                score(step)
            batch = encoder.collate(next(batches))
            loss = cross_entropy(predictions(model, batch), batch).mean()
            if not updates and not bool(torch.isfinite(loss)):  # it is the model, and not the rate
                raise non_finite(model, batch.tokens, batch.attention_mask, "the losses")
            yield {"loss": loss}

        entered.enter_context(self.faced_with(model, edit))
        tensors = entered.enter_context(
            unlocked(model, edit, self.parameters, lora_rank=self.lora_rank, seed=self.seed)
        )
        description = f"retraining ({self.form}, lr {lr:.2g})"
        try:
            run = train(losses, MasterAdamW(tensors, lr), steps=self.steps, description=description, progress=progress)
            if run.interrupted:
                return "interrupted"
            updates = self.steps
            if score is not None and self.steps in marks:
                score(self.steps)
        except (NonFiniteLossError, NonFiniteError) as error:
            if not updates:
                raise
            logger.warning("%s", error)
            return "diverged"
        return "finished"
