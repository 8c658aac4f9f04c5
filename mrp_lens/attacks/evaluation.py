"""What an attacked model is asked, and what its answers mean."""

import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from mrp_lens.data import Corpus, Document, Questions
from mrp_lens.data.tokenization import in_order
from mrp_lens.edits import Edit, edit_on
from mrp_lens.metrics.bootstrap import CONFIDENCE, RESAMPLES
from mrp_lens.metrics.multiple_choice import answered_right, choice_scores
from mrp_lens.models import LensModel, encoder_for
from mrp_lens.models.hooks import frozen
from mrp_lens.training.losses import predictions, targets
from mrp_lens.utils.validation import int_seed

FEW = 20
"""Below so many held-out questions an interval tells next to nothing."""


UNKNOWN = float("nan")
RECITED = 100  # of T, at most so many are asked to see whether it was learned


@dataclass(frozen=True)
class Counted:
    """How many of n questions were answered right."""

    right: float
    n: int

    @property
    def accuracy(self) -> float:
        """In [0, 1]; NaN without questions."""
        return self.right / self.n if self.n else float("nan")


@dataclass(frozen=True)
class Recovery:
    """(after - floor) / (ceiling - floor) with its 95% interval; NaN where ceiling and floor cannot be told apart."""

    value: float
    low: float
    high: float

    def columns(self) -> dict[str, float]:
        """As columns of a frame."""
        return {"recovery": self.value, "recovery_low": self.low, "recovery_high": self.high}


def counted(model: LensModel, questions: Questions, *, batch_size: int = 128, progress: bool = False) -> Counted:
    """How many questions the model answers right, by length-normalised likelihood as in `metrics.accuracy`."""
    scores = choice_scores(model, questions, batch_size=batch_size, progress=progress)
    return Counted(float(answered_right(scores, questions).sum()), len(questions))


def guessed(questions: Questions) -> Counted:
    """What blind guessing gives: the floor where there are no never-taught questions."""
    return Counted(sum(1 / len(q.choices) for q in questions.questions), len(questions))


def recovery(after: Counted, floor: Counted, ceiling: Counted, *, seed: int = 0) -> Recovery:
    """The share of removed knowledge that came back (as in arXiv 2410.08827, with a never-taught control).

    Args:
        after: on held-out facts, after the attack.
        floor: on facts that were never taught, after the same attack.
        ceiling: on the held-out facts, the unedited model.
        seed: of the bootstrap, which resamples the questions of all three, each for itself (conservative where they
            are the same questions).

    Returns:
        0: as if never taught; 1: all is back. Not clipped: chance takes it below 0 and above 1.
    """
    generator = np.random.default_rng(int_seed(seed))

    def resampled(count: Counted) -> Any:
        return generator.binomial(count.n, count.accuracy, RESAMPLES) / count.n

    span = ceiling.accuracy - floor.accuracy
    if not span > 0:
        return Recovery(float("nan"), float("nan"), float("nan"))
    high_end, low_end, back = resampled(ceiling), resampled(floor), resampled(after)
    told_apart = high_end > low_end
    if told_apart.mean() < CONFIDENCE:  # the interval would be that of a ratio whose denominator may be 0
        return Recovery((after.accuracy - floor.accuracy) / span, float("nan"), float("nan"))
    shares = (back - low_end)[told_apart] / (high_end - low_end)[told_apart]
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(shares, [tail, 1 - tail])
    return Recovery((after.accuracy - floor.accuracy) / span, float(low), float(high))


def check_held_out(held_out: Questions, **seen: Any) -> None:
    """Refuse held-out questions that the attacker has seen; warn where there are too few for a useful interval.

    Args:
        held_out: what recovery is measured on.
        **seen: what the attacker gets, by its argument's name: Questions, a Corpus, or None.

    Raises:
        TypeError: held_out is no Questions.
        ValueError: no held-out questions, or some of them, prompt or whole text, are among what the attacker gets.
    """
    if not isinstance(held_out, Questions):
        raise TypeError(f"held_out must be Questions, got {type(held_out).__name__}")
    if not len(held_out):
        raise ValueError(f"no held-out questions in {held_out.name!r}")
    texts = {text for q in held_out.questions for text in (q.prompt, q.prompt + q.choices[q.answer])}
    for name, given in seen.items():
        if given is None:
            continue
        documents = given.right_answers().documents if isinstance(given, Questions) else given.documents
        shared = [document for document in documents if texts & _texts_of(document)]
        if shared:
            raise ValueError(
                f"{name} and held_out overlap in {len(shared)} questions, such as {shared[0].prompt or shared[0].completion!r}: what an "
                "attacker has seen shows nothing about what was removed. Split them, with questions.halves()"
            )
    if len(held_out) < FEW:
        warnings.warn(
            f"only {len(held_out)} held-out questions in {held_out.name!r}: the interval of the recovery will be wide; use {FEW} or more",
            stacklevel=3,
        )


def _texts_of(document: Document) -> set[str]:
    whole = (document.prompt + document.completion).strip()
    return {text for text in (document.prompt, whole, whole.rstrip(".")) if text}


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
    encoder = encoder_for(model)
    right, total = 0, 0
    with frozen(model), torch.no_grad():
        for _, batch in in_order(encoder, encoder.encode(taught.documents), batch_size):
            said = predictions(model, batch).argmax(-1)
            right += int((said == targets(batch)).sum())
            total += len(said)
    return right / total
