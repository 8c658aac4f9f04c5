"""Fits within a budget of damage: the damage itself, the multiplier, the ends of a fit, and what is said of them."""

import math
from contextlib import nullcontext
from copy import copy
from typing import Any

import pytest
import torch

from mrp_lens.data import Corpus, Document
from mrp_lens.methods import MRP, RMU, Fit, GradientAscent, Outcome
from mrp_lens.methods.base import prepare
from mrp_lens.methods.budget import EVERY, LIMITS, PATIENCE, SETTLING, Budget, Damage, damage_of
from mrp_lens.methods.control import FORMS, ControlQuestions, control_accuracy, parted
from mrp_lens.methods.coverage import FRAMES
from mrp_lens.models import LensModel, encoder_for
from mrp_lens.training.callbacks import TrainingState
from tests.support.edits import logits, projection

Texts = tuple[Corpus, Corpus]
FIT: dict[str, Any] = {"seed": 0, "progress": False}


class Known(Damage):
    """A damage that is given."""

    def __init__(self, *values: float) -> None:
        self.values = list(values)

    def __call__(self) -> float:
        return self.values.pop(0) if len(self.values) > 1 else self.values[0]


class Answers(ControlQuestions):
    """Control questions whose accuracy is given."""

    def __init__(self, *values: float) -> None:
        self.values, self.choices, self.rows, self.forms = list(values), 4, [[]], FORMS[:1]

    def known_to(self, model: Any) -> tuple[ControlQuestions, float]:
        return self, self.accuracy(model)

    def accuracy(self, model: Any) -> float:
        return self.values.pop(0) if len(self.values) > 1 else self.values[0]


def run(budget: Budget, steps: int) -> TrainingState:
    """What the training loop does with a governor, without training."""
    state = TrainingState("test", steps, torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0))
    state.shown = nullcontext
    budget.on_start(state)
    while not state.last:
        state.rows.append({})
        budget.on_step(state.done - 1, {})
    return state


def test_damage_is_the_mean_divergence_of_every_counted_token(model: LensModel, texts: Texts) -> None:
    edit = projection(1, rank=2)
    encoder = encoder_for(model)
    rows = encoder.encode(texts[1].documents[:7])
    damage = Damage(model, encoder, [rows])
    assert damage() == pytest.approx(0.0, abs=1e-6)
    expected = []
    for row in rows:
        tokens = torch.tensor([row.ids])
        before = logits(model, tokens)[0].double().log_softmax(-1)
        with edit.applied(model):
            after = logits(model, tokens)[0].double().log_softmax(-1)
        places = [place for place in range(len(row.ids) - 1) if row.in_loss[place + 1]]
        expected += [float((before[p].exp() * (before[p] - after[p])).sum()) for p in places]
    with edit.applied(model):
        assert damage() == pytest.approx(sum(expected) / len(expected), rel=1e-3)


def test_the_kind_of_text_with_most_damage_counts(model: LensModel, texts: Texts) -> None:
    encoder = encoder_for(model)
    kinds = [encoder.encode(documents) for documents in (texts[0].documents[:5], texts[1].documents[:5])]
    damages = [Damage(model, encoder, chosen) for chosen in (kinds[:1], kinds[1:], kinds)]
    with projection(1, rank=2).applied(model):
        one, other, both = (damage() for damage in damages)
    assert both == pytest.approx(max(one, other), rel=1e-4)
    assert one != pytest.approx(other, rel=1e-2)


def test_the_retain_texts_that_no_update_sees_are_read_as_questions_too(model: LensModel, texts: Texts) -> None:
    data = prepare(model, *texts)
    (plain, asked), left = data.held_out(torch.Generator().manual_seed(0))
    spoken = model.tokenizer.decode([token for row in asked for token in row.ids])
    assert any(frame.split("{}")[0] and frame.split("{}")[0].strip() in spoken for frame in FRAMES)
    assert len(plain) + len(left.retain) == len(data.retain)
    long = Corpus.from_texts([" ".join(["the"] * 50) + f" {n}" for n in range(20)], name="long")
    kinds, _ = prepare(model, texts[0], long).held_out(torch.Generator().manual_seed(0))
    assert len(kinds) == 1


def test_the_multiplier_follows_the_damage() -> None:
    budget = Budget(None, Known(1.0), Answers(1.0), nats=0.1, target=None)  # type: ignore[arg-type]
    run(budget, 2 * EVERY + 1)
    assert budget.multiplier == pytest.approx(math.exp(0.5) ** 2)
    budget = Budget(None, Known(1e-9), Answers(1.0), nats=0.1, target=None)  # type: ignore[arg-type]
    run(budget, 400)
    assert budget.multiplier == LIMITS[0]
    even = Budget(None, Known(0.1), Answers(1.0), nats=0.1, target=None)  # type: ignore[arg-type]
    run(even, 30)
    assert even.multiplier == pytest.approx(1.0)


def test_a_fit_at_its_target_has_half_as_many_updates_more_to_settle() -> None:
    budget = Budget(None, Known(0.0), Answers(1.0, 0.9, 0.2, 0.2), nats=0.1, target=0.25)  # type: ignore[arg-type]
    assert (PATIENCE, SETTLING) == (3, 0.5)
    assert run(budget, 300).done == 80 + 40


def test_the_multiplier_falls_no_more_once_the_target_is_reached() -> None:
    budget = Budget(None, Known(0.09), Answers(1.0, 0.2), nats=0.1, target=0.25)  # type: ignore[arg-type]
    assert run(budget, 300).done == 60 + 30
    assert budget.multiplier == 1.0
    budget = Budget(None, Known(*[0.09] * (60 // EVERY), 0.2), Answers(1.0, 0.2), nats=0.1, target=0.25)  # type: ignore[arg-type]
    run(budget, 300)
    assert budget.multiplier > 1.0


@pytest.mark.parametrize(("looks", "falls"), [((1.0, 0.9, 0.8), 0), ((1.0, 0.99, 0.98), 7), ((1.0, 1.0, 0.6), 4)])
def test_the_multiplier_falls_only_while_the_forget_set_stays_where_it_is(looks: tuple[float, ...], falls: int) -> None:
    budget = Budget(None, Known(0.09), Answers(*looks), nats=0.1, target=0.25)  # type: ignore[arg-type]
    state = TrainingState("test", 300, torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0))
    state.shown = nullcontext
    budget.on_start(state)
    for step in range(55):
        budget.on_step(step, {})
    assert budget.multiplier == pytest.approx(0.9 ** (0.5 * falls))


def test_a_fit_that_can_still_push_harder_is_not_stalled() -> None:
    spent = Budget(None, Known(0.09), Answers(1.0), nats=0.1, target=0.25)  # type: ignore[arg-type]
    assert run(spent, 1000).done == 100 + 50
    sparing = Budget(None, Known(0.079), Answers(1.0), nats=0.1, target=0.25)  # type: ignore[arg-type]
    assert run(sparing, 1000).done > 300
    assert sparing.multiplier == LIMITS[0]


def test_a_fit_that_no_longer_moves_ends() -> None:
    budget = Budget(None, Known(0.0), Answers(1.0, 0.7), nats=0.1, target=0.25)  # type: ignore[arg-type]
    assert run(budget, 1000).done < 300


def test_without_a_retain_loss_the_budget_is_the_end() -> None:
    budget = Budget(None, Known(0.05, 0.05, 0.2), Answers(1.0), nats=0.1, target=None, holds=False)  # type: ignore[arg-type]
    assert run(budget, 100).done == 3 * EVERY


@pytest.mark.parametrize(
    ("left", "damage", "there", "stalled", "ended"),
    [
        (0.25, 0.01, True, False, "target"),
        (0.25, 0.9, True, False, "budget"),
        (0.32, 0.01, True, False, "returned"),
        (0.6, 0.1, False, True, "budget"),
        (0.6, 0.01, False, False, "steps"),
        (0.6, 0.01, False, True, "stalled"),
        (0.99, 0.1, False, True, "unmoved"),
    ],
)
def test_what_is_said_of_a_fit(left: float, damage: float, there: bool, stalled: bool, ended: str) -> None:
    outcome = Outcome.of(
        left=left,
        before=1.0,
        target=0.3,
        damage=damage,
        budget=0.1,
        total=0.3,
        steps=7,
        there=there,
        stalled=stalled,
        interrupted=False,
    )
    assert outcome.ended == ended
    assert bool(outcome) == (ended == "target")
    assert f"{left:.2f} of 1.00 left" in str(outcome)
    assert Outcome.from_json(outcome.to_json()) == outcome


def test_control_questions_offer_endings_of_the_forget_set(model: LensModel, texts: Texts) -> None:
    questions = ControlQuestions(encoder_for(model), [texts[0]], seed=0)
    assert questions.choices == 4
    in_one_form = ControlQuestions(encoder_for(model), [texts[0]], seed=0, forms=FORMS[:1])
    assert questions.chance == 0.25 < in_one_form.target < 0.4
    assert in_one_form.target < questions.target
    again = ControlQuestions(encoder_for(model), [texts[0]], seed=0)
    assert questions.rows == again.rows
    assert questions.rows != ControlQuestions(encoder_for(model), [texts[0]], seed=1).rows
    assert 0.0 <= questions.accuracy(model) <= 1.0
    assert control_accuracy(model, texts[0]) == questions.accuracy(model)


def test_they_are_asked_in_forms_that_the_model_answers_and_the_highest_counts(model: LensModel, texts: Texts) -> None:
    assert not set(FORMS) & set(FRAMES)  # no fit reads them
    questions = ControlQuestions(encoder_for(model), [texts[0]], seed=0)
    assert [len(rows) for rows in questions.rows] == [len(questions.rows[0])] * len(FORMS)
    accuracies = questions.accuracies(model)
    assert questions.accuracy(model) == max(accuracies)

    def scored(*given: float) -> ControlQuestions:
        known = copy(questions)
        known.accuracies = lambda model: list(given)  # type: ignore[method-assign]
        chosen, accuracy = known.known_to(model)
        assert accuracy == max(given)
        return chosen

    assert scored(0.9, 0.8).forms == FORMS
    assert scored(0.9, 0.25).forms == FORMS[:1]
    assert scored(0.25, 0.9).rows == [questions.rows[1]]
    assert scored(0.25, 0.25).forms == FORMS[:1]
    assert scored(questions.target, questions.target + 0.01).forms == FORMS[1:]


def test_guessing_is_below_the_target_as_often_whatever_the_number_of_forms(model: LensModel) -> None:
    chance = torch.Generator().manual_seed(0)
    forget = Corpus.from_texts([f"the number of {n} is {n * n}" for n in range(60)])
    for forms in (FORMS[:1], FORMS, (*FORMS, "{}!", "{}?")):
        questions = ControlQuestions(encoder_for(model), [forget], seed=0, forms=forms)
        count = len(questions.rows[0]) // questions.choices
        guessed = torch.rand(4000, len(forms), count, generator=chance) < questions.chance
        reached = guessed.float().mean(dim=-1).amax(dim=-1) <= questions.target
        assert 0.78 < reached.float().mean() < 0.92


def test_a_document_is_parted_where_its_prompt_ends_or_before_its_last_third() -> None:
    assert parted(Document("Q:", " a b c")) == ("Q:", " a b c")
    assert parted(Document("", "one two three four five six")) == ("one two three four", " five six")
    assert parted(Document("", "word")) is None


def test_fits_report_what_they_reached(model: LensModel, texts: Texts, tmp_path: Any) -> None:
    settings: dict[str, Any] = {"steps": 4, "batch_size": 4}
    first = MRP(layers=[1], rank=2, **settings).fit(model, *texts, **FIT)
    assert first.outcome is not None
    assert first.outcome.steps == 4
    first.save(tmp_path / "fit")
    assert Fit.load(tmp_path / "fit").outcome == first.outcome
    later = Corpus(texts[0].documents[::2], "later")
    second = MRP(layers=[1], rank=2, **settings).fit(model, later, texts[1], after=first.edit, **FIT)
    assert second.outcome is not None
    assert second.outcome.total == pytest.approx(first.outcome.damage + second.outcome.damage)
    assert damage_of(second.edit) == pytest.approx(second.outcome.total)
    assert RMU(budget=None, **settings).fit(model, *texts, **FIT).outcome is None
    assert GradientAscent(budget=1e-6, lr=0.05, steps=30, batch_size=4).fit(model, *texts, **FIT).log.shape[0] == EVERY
