"""What an attacked model is asked, and what its answers mean."""

from dataclasses import dataclass
from typing import Any

import torch

from mrp_lens.attacks.recovery import Counted, Recovery, check_held_out, counted, guessed, recovery
from mrp_lens.batching import Encoder, in_order
from mrp_lens.corpus import Corpus, Questions
from mrp_lens.edit import Edit, edit_on
from mrp_lens.model import LensModel
from mrp_lens.predictions import predictions, targets
from mrp_lens.stream import frozen

UNKNOWN = float("nan")
RECITED = 100  # of T, at most so many are asked to see whether it was learned


@dataclass(frozen=True)
class Exam:
    """What an attacked model is asked.

    Attributes:
        taught: T.
        held_out: V.
        floor, control: halves of the never-taught questions, if there are any.
        before, edited: on V without attack, the unedited and the edited model.
        seed: of the bootstrap.
    """

    taught: Questions | Corpus
    held_out: Questions
    floor: Questions | None
    control: Questions | None
    before: Counted
    edited: Counted
    seed: int

    @classmethod
    def of(
        cls,
        model: LensModel,
        edit: Edit | None,
        taught: Questions | Corpus,
        held_out: Questions,
        untaught: Questions | None,
        *,
        seed: int,
    ) -> "Exam":
        """Check the data, and score the model without attack."""
        check_held_out(held_out, train=taught, untaught=untaught)
        floor, control = untaught.halves(seed=seed) if untaught is not None else (None, None)
        before = counted(model, held_out)
        with edit_on(model, edit):
            return cls(taught, held_out, floor, control, before, counted(model, held_out), seed)

    def marked(self, model: LensModel) -> dict[str, Any]:
        """The model's figures as it is now."""
        after = counted(model, self.held_out)
        floor = counted(model, self.floor) if self.floor is not None else guessed(self.held_out)
        control = Recovery(UNKNOWN, UNKNOWN, UNKNOWN)
        if self.control is not None:
            control = recovery(counted(model, self.control), floor, self.before, seed=self.seed)
        taught = _share_said(model, self.taught.spread(RECITED))
        return {
            "train_accuracy": taught,
            "held_out_accuracy": after.accuracy,
            "n": after.n,
            "accuracy_before": self.before.accuracy,
            "accuracy_edited": self.edited.accuracy,
            "floor": floor.accuracy,
            "n_floor": floor.n,
            "ceiling": self.before.accuracy,
            **recovery(after, floor, self.before, seed=self.seed).columns(),
            **{f"control_{name}": value for name, value in control.columns().items()},
        }


def _share_said(model: LensModel, taught: Questions | Corpus, *, batch_size: int = 128) -> float:
    """The share of T that the model gives back: of questions those answered right, of texts the counted tokens that it
    would say next."""
    if isinstance(taught, Questions):
        return counted(model, taught).accuracy
    encoder = Encoder.for_model(model)
    right, total = 0, 0
    with frozen(model), torch.no_grad():
        for _, batch in in_order(encoder, encoder.encode(taught.documents), batch_size):
            said = predictions(model, batch).argmax(-1)
            right += int((said == targets(batch)).sum())
            total += len(said)
    return right / total
