"""What an attacked model is asked, and what its answers mean."""

import re
import warnings
from dataclasses import dataclass
from typing import Any

import torch

from mrp_lens.data import Corpus, Document, Questions
from mrp_lens.data.kinds import check_questions
from mrp_lens.data.tokenization import in_order
from mrp_lens.edits import Edit, edit_on
from mrp_lens.metrics.multiple_choice import answered_right, choice_scores
from mrp_lens.metrics.recovery import Recovery, Score, recovery
from mrp_lens.models import LensModel, encoder_for
from mrp_lens.models.hooks import frozen
from mrp_lens.training.losses import predictions, targets

FEW = 20
"""Below so many held-out questions an interval tells next to nothing."""
BATCH = 128
"""Texts at a time."""
ASKED_OF_T = 100
"""Of T, at most so many are asked to see whether it was learned."""


def score(model: LensModel, questions: Questions, *, batch_size: int = BATCH) -> Score:
    """How many questions the model answers right, by length-normalised likelihood as in `metrics.accuracy`."""
    scores = choice_scores(model, questions, batch_size=batch_size, progress=False)
    return Score.of(answered_right(scores, questions), questions.entities)


def chance(questions: Questions) -> Score:
    """What blind guessing gives: the floor where there are no never-taught questions."""
    return Score(sum(1 / len(q.choices) for q in questions.questions), len(questions))


def check_held_out(held_out: Questions, **seen: Any) -> None:
    """Refuse held-out questions that the attacker has seen; warn where texts may state them in other words, and where there are too few.

    Args:
        held_out: what recovery is measured on.
        **seen: what the attacker gets, by its argument's name: Questions, a Corpus, or None.

    Raises:
        TypeError: held_out is no Questions.
        ValueError: no held-out questions, or some of them, prompt or whole text, are among what the attacker gets.
    """
    check_questions(held_out=held_out)
    if not len(held_out):
        raise ValueError(f"no held-out questions in {held_out.name!r}")
    answers: dict[str, set[str]] = {}
    for question in held_out.questions:
        answers.setdefault(question.prompt, set()).add(question.choices[question.answer])
    # A prompt that several questions have, such as "Which of these is true?", gives none of them away.
    texts = {prompt for prompt, right in answers.items() if len(right) == 1}
    texts |= {prompt + answer for prompt, right in answers.items() for answer in right}
    for name, given in seen.items():
        if given is None:
            continue
        if isinstance(given, Corpus):
            _warn_of_stated(held_out, name, given)
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


def check_untaught(untaught: Any, **taught: Any) -> None:
    """Refuse never-taught questions that the model was taught or will be: they would lift the floor of what comes back.

    Args:
        untaught: the questions; None: there are none.
        **taught: what was forgotten and what the attacker gets, by its argument's name: Questions, a Corpus, or None.

    Raises:
        TypeError: untaught is no Questions.
        ValueError: some of them, prompt and right answer together, are among the others.
    """
    if untaught is None:
        return
    check_questions(untaught=untaught)
    told = {
        (document.prompt + document.completion).strip()
        for given in taught.values()
        if given is not None
        for document in (given.right_answers() if isinstance(given, Questions) else given).documents
    }
    shared = [q for q in untaught.questions if (q.prompt + q.choices[q.answer]).strip() in told]
    if shared:
        raise ValueError(
            f"{len(shared)} questions of untaught {untaught.name!r} are in {' or '.join(taught)} too, such as {shared[0].prompt!r}: facts "
            "that the model was taught do not show what absent looks like; leave them out"
        )


def _warn_of_stated(held_out: Questions, name: str, given: Corpus) -> None:
    """Warn of documents that name both what a question is about and its right answer."""
    answers: dict[str, set[str]] = {}
    for question in held_out.questions:
        if question.entity:
            answers.setdefault(question.entity.lower(), set()).add(question.choices[question.answer].strip().lower())
    stated = []
    for document in given.documents:
        text = (document.prompt + document.completion).lower()
        entities = [entity for entity in answers if entity in text and _named(entity, text)]
        if any(_named(answer, text) for entity in entities for answer in answers[entity]):
            stated.append(text)
    if stated:
        warnings.warn(
            f"{len(stated)} documents of {name} {given.name!r} name what a held-out question is about and its right answer, such as "
            f"{stated[0][:200]!r}: where they state the fact, what comes back was read there, and need not have been left in the model. "
            "Leave them out",
            stacklevel=4,
        )


def _named(words: str, text: str) -> bool:
    """Whether the text has these words, and not as a part of others."""
    return re.search(rf"(?<!\w){re.escape(words)}(?!\w)", text) is not None


def _texts_of(document: Document) -> set[str]:
    whole = (document.prompt + document.completion).strip()
    return {text for text in (document.prompt, whole, whole.rstrip(".")) if text}


@dataclass(frozen=True)
class Evaluator:
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
    before: Score
    edited: Score
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
    ) -> "Evaluator":
        """Check the data, and score the model without attack."""
        check_held_out(held_out, train=taught)
        check_untaught(untaught, train=taught, held_out=held_out)
        floor, control = untaught.halves(seed=seed) if untaught is not None else (None, None)
        before = score(model, held_out)
        with edit_on(model, edit):
            return cls(taught, held_out, floor, control, before, score(model, held_out), seed)

    def figures(self, model: LensModel) -> dict[str, Any]:
        """Of the model as it is now."""
        after = score(model, self.held_out)
        floor = score(model, self.floor) if self.floor is not None else chance(self.held_out)
        control = Recovery()
        if self.control is not None:
            control = recovery(score(model, self.control), floor, self.before, seed=self.seed)
        return {
            "train_accuracy": _share_learned(model, self.taught.spread(ASKED_OF_T)),
            "held_out_accuracy": after.accuracy,
            "n": after.n,
            "effective_n": after.independent,
            "accuracy_before": self.before.accuracy,
            "accuracy_edited": self.edited.accuracy,
            "floor": floor.accuracy,
            "n_floor": floor.n,
            "effective_n_floor": floor.independent,
            "untaught_floor": float("nan") if self.floor is None else floor.accuracy,
            "ceiling": self.before.accuracy,
            "effective_n_ceiling": self.before.independent,
            **recovery(after, floor, self.before, seed=self.seed).columns(),
            **{f"control_{name}": value for name, value in control.columns().items()},
        }


def _share_learned(model: LensModel, taught: Questions | Corpus) -> float:
    """The share of T that the model gives back: of questions those answered right, of texts the counted tokens that it
    would say next."""
    if isinstance(taught, Questions):
        return score(model, taught).accuracy
    encoder = encoder_for(model)
    right, total = 0, 0
    with frozen(model), torch.no_grad():
        for _, batch in in_order(encoder, encoder.encode(taught.documents), BATCH, logits=True):
            said = predictions(model, batch).argmax(-1)
            right += int((said == targets(batch)).sum())
            total += len(said)
    return right / total if total else float("nan")
