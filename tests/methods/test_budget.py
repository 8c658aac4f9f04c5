"""Fits within a budget of damage: the damage itself, the multiplier, the ends of a fit, and what is said of them."""

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from mrp_lens.data import Corpus
from mrp_lens.data.tokenization import Encoded
from mrp_lens.methods import MRP, RMU, Fit, GradientAscent, Outcome
from mrp_lens.methods import budget as budgets
from mrp_lens.methods.base import prepare
from mrp_lens.methods.budget import (
    DAMPING,
    EVERY,
    FASTEST,
    LIMITS,
    LOOK,
    PATIENCE,
    RATE,
    SETTLING,
    SHORT,
    STALLED,
    Budget,
    Damage,
    damage_of,
)
from mrp_lens.methods.control import FORMS, Answered, ControlQuestions
from mrp_lens.methods.coverage import FRAMES
from mrp_lens.models import LensModel, encoder_for
from mrp_lens.training.callbacks import TrainingState
from tests.support.edits import log_probabilities, logits, projection

Texts = tuple[Corpus, Corpus]
FIT: dict[str, Any] = {"seed": 0, "progress": False}


class Known(Damage):
    """A damage that is given."""

    def __init__(self, *values: float) -> None:
        self.values = list(values)

    def __call__(self) -> float:
        return self.values.pop(0) if len(self.values) > 1 else self.values[0]


class Alone(Damage):
    """One of the two kinds of text that a damage is measured on."""

    def __init__(self, of: Damage, kind: int) -> None:
        self.model, self.reference = of.model, of.reference[kind : kind + 1]


UNREAD: Any = None  # a row of questions whose answers are given


class Answers(ControlQuestions):
    """Control questions whose accuracy is given, and the margin if it is not the same."""

    def __init__(self, *values: float, margins: Sequence[float] = ()) -> None:
        self.values, self.choices, self.rows, self.forms = list(values), 4, [[UNREAD]], FORMS[:1]
        self.margins = list(margins)

    def known_to(self, model: Any) -> tuple[ControlQuestions, Answered]:
        return self, self.asked_of(model)

    def asked_of(self, model: Any) -> Answered:
        accuracy = self.values.pop(0) if len(self.values) > 1 else self.values[0]
        return Answered(accuracy, self.margins.pop(0) if self.margins else accuracy)


def divergence(before: Tensor, after: Tensor) -> list[float]:
    """KL at each place."""
    found: list[float] = (before.exp() * (before - after)).sum(dim=-1).tolist()
    return found


def rightly(model: LensModel, row: Encoded) -> list[bool]:
    """Whether the model predicts the token, for each that counts."""
    counted = torch.tensor([token for token, within in zip(row.ids[1:], row.in_loss[1:], strict=True) if within])
    found: list[bool] = (log_probabilities(model, row).argmax(dim=-1) == counted).tolist()
    return found


def known(model: LensModel, row: Encoded) -> Encoded:
    """The row with what the model would say as its last token."""
    said = logits(model, torch.tensor([row.ids[:-1]]))[0, -1].argmax()
    return replace(row, ids=(*row.ids[:-1], int(said)))


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
    damage = Damage(model, encoder, rows)
    assert damage() == pytest.approx(0.0, abs=1e-6)
    expected = []
    for row in rows:
        with edit.applied(model):
            after = log_probabilities(model, row)
        expected += divergence(log_probabilities(model, row), after)
    with edit.applied(model):
        assert damage() == pytest.approx(sum(expected) / len(expected), rel=1e-3)


def test_where_not_all_texts_fit_each_counts_at_some_of_its_tokens(
    model: LensModel, texts: Texts, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder, edit = encoder_for(model), projection(1, rank=2)
    sentences = [document.completion for document in texts[1].documents]
    long = Corpus.from_texts([" ".join(sentences[n : n + 5]) for n in range(12)], name="long")
    rows = encoder.encode(long.documents)
    expected = []
    for row in rows[:8]:
        with edit.applied(model):
            after = log_probabilities(model, row)
        every = divergence(log_probabilities(model, row), after)
        assert len(every) > 12
        expected += [every[(2 * n + 1) * len(every) // 24] for n in range(12)]
    monkeypatch.setattr(budgets, "NUMBERS", 96 * int(model.cfg.d_vocab))
    damage = Damage(model, encoder, rows)
    with edit.applied(model):
        assert damage() == pytest.approx(sum(expected) / 96, rel=1e-3)


def test_the_larger_of_the_damage_on_documents_and_on_answers_counts(model: LensModel, texts: Texts) -> None:
    encoder = encoder_for(model)
    documents, answers = (encoder.encode(side.documents[:12]) for side in texts)
    answers = [known(model, row) for row in answers]
    damage = Damage(model, encoder, documents, answers)
    with projection(1, rank=2).applied(model):
        on_documents = Alone(damage, 0)()
        on_answers = Alone(damage, 1)()
        assert damage() == max(on_documents, on_answers)
    assert on_documents != pytest.approx(on_answers, rel=1e-2)


def test_of_answers_those_tokens_count_that_the_model_predicts_rightly(model: LensModel, texts: Texts) -> None:
    encoder = encoder_for(model)
    answers = [known(model, row) for row in encoder.encode(texts[0].documents[:12])]
    edit = projection(1, rank=2)
    expected = []
    for row in answers:
        with edit.applied(model):
            after = log_probabilities(model, row)
        divergences = divergence(log_probabilities(model, row), after)
        expected += [value for value, right in zip(divergences, rightly(model, row), strict=True) if right]
    damage = Alone(Damage(model, encoder, encoder.encode(texts[1].documents[:1]), answers), 1)
    with edit.applied(model):
        assert damage() == pytest.approx(0.25 * sum(expected) / len(expected), rel=1e-3)


def test_answers_that_the_model_does_not_know_are_not_looked_at(model: LensModel, texts: Texts) -> None:
    encoder = encoder_for(model)
    documents = encoder.encode(texts[1].documents[:3])
    answers = [row for row in encoder.encode(texts[0].documents) if not any(rightly(model, row))][:1]
    assert answers
    unknown = Damage(model, encoder, documents, answers)
    with projection(1, rank=2).applied(model):
        assert unknown() == Alone(unknown, 0)()
    assert len(unknown.reference) == 1


def test_the_retain_texts_that_no_update_sees_are_read_as_questions_too(model: LensModel, texts: Texts) -> None:
    data = prepare(model, *texts)
    plain, answers, left = data.held_out(torch.Generator().manual_seed(0))
    spoken = model.tokenizer.decode([token for row in answers for token in row.ids])
    assert any(frame.split("{}")[0] and frame.split("{}")[0].strip() in spoken for frame in FRAMES)
    own, kept = ([tuple(row.ids) for row in rows] for rows in (plain, left.retain))
    assert not set(own) & set(kept)  # no copy of what is held out is learned from
    assert set(own) | set(kept) == {tuple(row.ids) for row in data.retain}
    assert len(left.retain_corpus) == len(kept)
    alike = Corpus.from_texts(["The old man walked."] * 12, name="alike")
    assert len(prepare(model, texts[0], alike).held_out(torch.Generator().manual_seed(0))[2].retain) == 12
    long = Corpus.from_texts([" ".join(["the"] * 50) + f" {n}" for n in range(20)], name="long")
    assert prepare(model, texts[0], long).held_out(torch.Generator().manual_seed(0))[1] == []


def multiplier(*off: float) -> float:
    """After so many looks at a damage off by these factors of e: dual ascent, and the damping of the last."""
    level = sum(RATE * max(-1.0, min(1.0, each)) for each in off)
    return math.exp(level + DAMPING * max(-1.0, min(2.0, off[-1])))


def test_the_multiplier_follows_the_damage() -> None:
    budget = Budget(None, Known(0.15), Answers(1.0), nats=0.1, target=None)  # type: ignore[arg-type]
    run(budget, 2 * EVERY + 1)
    assert budget.multiplier == pytest.approx(multiplier(*[math.log(1.5)] * 2))
    budget = Budget(None, Known(10.0), Answers(1.0), nats=0.1, target=None)  # type: ignore[arg-type]
    run(budget, 2 * EVERY + 1)
    assert budget.multiplier == pytest.approx(math.exp(2 * RATE + 2 * DAMPING))
    budget = Budget(None, Known(1e-9), Answers(1.0), nats=0.1, target=None)  # type: ignore[arg-type]
    run(budget, 400)
    assert budget.multiplier == pytest.approx(LIMITS[0])
    even = Budget(None, Known(0.1), Answers(1.0), nats=0.1, target=None)  # type: ignore[arg-type]
    run(even, 30)
    assert even.multiplier == pytest.approx(1.0)


class Follows(Damage):
    """A damage that follows the multiplier with a delay: it grows by a share under a small one, and falls under a large one."""

    def __init__(self) -> None:
        self.values, self.speed = [1e-3], 0.0
        self.multiplier = 1.0

    def __call__(self) -> float:
        self.speed = 0.6 * self.speed - 0.4 * 0.5 * math.log(self.multiplier / 2.0)
        self.values.append(self.values[-1] * math.exp(self.speed))
        return self.values[-1]


def swings(monkeypatch: pytest.MonkeyPatch, *, rate: float, damping: float) -> float:
    """How far the damage is off the budget at most, in factors of e, once it has come to it."""
    monkeypatch.setattr("mrp_lens.methods.budget.RATE", rate)
    monkeypatch.setattr("mrp_lens.methods.budget.DAMPING", damping)
    damage = Follows()
    budget = Budget(None, damage, Answers(1.0), nats=0.02, target=0.25)  # type: ignore[arg-type]
    state = TrainingState("test", 2000, torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0))
    state.shown = nullcontext
    budget.on_start(state)
    for step in range(600):
        state.steps = 2000
        state.rows.append({})
        budget.on_step(step, {})
        damage.multiplier = budget.multiplier
    return max(abs(math.log(value / 0.02)) for value in damage.values[60:])


def test_the_damage_comes_to_the_budget_where_dual_ascent_alone_would_swing(monkeypatch: pytest.MonkeyPatch) -> None:
    assert swings(monkeypatch, rate=RATE, damping=DAMPING) < 0.2
    assert swings(monkeypatch, rate=0.5, damping=0.0) > 1.0


def test_a_fit_at_its_target_has_half_as_many_updates_more_to_settle() -> None:
    budget = Budget(None, Known(0.0), Answers(1.0, 0.9, 0.2, 0.2), nats=0.1, target=0.25)  # type: ignore[arg-type]
    assert (PATIENCE, SETTLING) == (3, 0.5)
    assert run(budget, 300).done == 80 + 40


def test_a_fit_aims_at_chance_where_no_target_is_given() -> None:
    told_apart = Budget(None, Known(0.09), Answers(1.0, 0.3), nats=0.1, target=None)  # type: ignore[arg-type]
    assert told_apart.aim == 0.25 < 0.3 < told_apart.target
    state = run(told_apart, 80)
    assert state.done == 80
    assert told_apart.multiplier == pytest.approx(
        multiplier(*[math.log(0.9)] * (80 // EVERY - 1))
    )  # it never stops to fall
    at_chance = Budget(None, Known(0.09), Answers(1.0, 0.3, 0.25, 0.2), nats=0.1, target=None)  # type: ignore[arg-type]
    assert run(at_chance, 300).done == 60 + 30  # .3, .25 and .2 are .25


def test_a_fit_whose_questions_the_model_cannot_answer_ends_soon_and_says_how_it_goes_on(
    caplog: pytest.LogCaptureFixture,
) -> None:
    guessing = Budget(None, Known(0.05), Answers(0.25, 0.2), nats=0.1, target=None)  # type: ignore[arg-type]
    assert "answers 0.25 of the control questions on the forget set, which is what guessing gives" in caplog.text
    assert run(guessing, 300).done == 60 + 30
    caplog.clear()
    told = Budget(None, Known(0.05), Answers(0.25, 0.2), nats=0.1, target=0.001)  # type: ignore[arg-type]
    assert run(told, 200).done == 200
    assert told.multiplier < 1.0  # it pushes as long as there is less damage than is allowed
    assert not caplog.text


def test_the_multiplier_falls_no_more_once_the_target_is_reached() -> None:
    budget = Budget(None, Known(0.09), Answers(1.0, 0.2), nats=0.1, target=0.25)  # type: ignore[arg-type]
    assert run(budget, 300).done == 60 + 30
    # 5, 10, 15, 20: the first look comes after; from then on what is below the budget is not answered
    assert budget.multiplier == pytest.approx(multiplier(*[math.log(0.9)] * 4, 0.0))
    budget = Budget(None, Known(*[0.09] * (60 // EVERY), 0.2), Answers(1.0, 0.2), nats=0.1, target=0.25)  # type: ignore[arg-type]
    run(budget, 300)
    assert budget.multiplier > 1.0


def test_the_multiplier_falls_while_there_is_less_damage_until_the_target_is_reached() -> None:
    budget = Budget(None, Known(0.09), Answers(1.0, 0.9, 0.2), nats=0.1, target=0.25)  # type: ignore[arg-type]
    state = TrainingState("test", 300, torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0))
    state.shown = nullcontext
    budget.on_start(state)
    for step in range(55):
        state.rows.append({})
        budget.on_step(step, {})
    # falls at 5, 10, ..., 40: the look that sees the target comes after
    assert budget.multiplier == pytest.approx(multiplier(*[math.log(0.9)] * 8, 0.0))


def test_the_log_says_what_was_left_and_what_it_cost_as_last_looked_at() -> None:
    budget = Budget(None, Known(0.05, 0.2), Answers(1.0, 0.7), nats=0.1, target=0.25)  # type: ignore[arg-type]
    rows = run(budget, 30).rows
    assert [row["left"] for row in rows] == [1.0] * (LOOK - 1) + [0.7] * (31 - LOOK)
    assert [row["damage"] for row in rows] == [0.0] * (EVERY - 1) + [0.05] * EVERY + [0.2] * (31 - 2 * EVERY)
    factors = [row["retain_factor"] for row in rows]
    assert factors[:EVERY] == [1.0] * EVERY  # each is that of its own update
    assert factors[EVERY] < 1.0 < factors[2 * EVERY]
    assert {(row["target"], row["allowed"], row["budget"]) for row in rows} == {(0.25, 0.1, 0.1)}


def test_a_fit_that_can_still_push_harder_is_not_stalled() -> None:
    spent = Budget(None, Known(0.09), Answers(1.0), nats=0.1, target=0.25)  # type: ignore[arg-type]
    assert run(spent, 1000).done == 1.5 * STALLED * LOOK
    sparing = Budget(None, Known(0.07), Answers(1.0, 0.8), nats=0.1, target=0.25)  # type: ignore[arg-type]
    state = run(sparing, 1000)
    at_its_floor = EVERY * math.ceil((math.log(LIMITS[0]) / math.log(0.7) - DAMPING) / RATE)
    assert state.done == pytest.approx(1.5 * at_its_floor, abs=30)


def allowed(damage: float, *answers: float, first: float = 0.3, margins: Sequence[float] = ()) -> list[float]:
    """What of a budget of .1 a fit may spend, look by look, until it ends."""
    budget = Budget(None, Known(damage), Answers(*answers, margins=margins), nats=0.1, target=0.4, first=first)  # type: ignore[arg-type]
    return [row["allowed"] for row in run(budget, 1000).rows[LOOK - 1 :: LOOK]]


def test_a_fit_that_is_too_slow_for_its_target_is_allowed_more_of_its_budget() -> None:
    found = allowed(0.09, 1.0)
    assert found[: 2 * SHORT] == pytest.approx([0.03] * (SHORT - 1) + [0.06] * (SHORT + 1))
    assert found[2 * SHORT :] == pytest.approx([0.1] * (len(found) - 2 * SHORT))
    assert len(found) == 1.5 * STALLED
    slowly = [6.0 - 0.1 * look for look in range(60)]  # 46 looks are left after the fourth: down to 1 by the last
    assert allowed(0.09, 1.0, margins=slowly)[SHORT] == pytest.approx(0.06)
    fast = [6.0 - 0.14 * look for look in range(60)]
    for spared in (
        allowed(0.02, 1.0),  # it has not spent what it may
        allowed(0.09, 1.0, 0.45),  # it has come nine tenths of the way
        allowed(0.09, 1.0, margins=fast)[: 2 * SHORT],
    ):
        assert spared == pytest.approx([0.03] * len(spared))


def test_a_fit_whose_margin_still_falls_is_not_stalled() -> None:
    """Texts known by heart are above all others long before the first of them is not: accuracy alone tells nothing until then."""
    falling = [6.0 - 0.1 * look for look in range(40)]
    moving = Budget(None, Known(0.09), Answers(1.0, margins=falling), nats=0.1, target=0.25)  # type: ignore[arg-type]
    assert run(moving, 600).done == 600
    barely = [6.0 - 0.01 * look for look in range(40)]
    none_left = [0.0] * 40
    for margins in (barely, none_left):
        stopped = Budget(None, Known(0.09), Answers(1.0, margins=margins), nats=0.1, target=0.25)  # type: ignore[arg-type]
        assert run(stopped, 600).done == 1.5 * STALLED * LOOK


def test_a_fit_in_which_nothing_happens_takes_larger_steps() -> None:
    unmoved = Budget(None, Known(0.0), Answers(1.0), nats=0.1, target=0.25)  # type: ignore[arg-type]
    state = run(unmoved, 1000)
    assert state.pace == FASTEST
    looks = math.ceil((-math.log(LIMITS[0]) - DAMPING) / RATE) + math.ceil(
        2 * math.log(FASTEST)
    )  # to the floor; to 16 times
    assert state.done == 1.5 * LOOK * max(STALLED, math.ceil(EVERY * looks / LOOK))
    for known, answers in ((Known(0.0), Answers(1.0, 0.9)), (Known(0.2), Answers(1.0))):  # it moves; it does damage
        budget = Budget(None, known, answers, nats=0.1, target=0.25)  # type: ignore[arg-type]
        assert run(budget, 200).pace == 1.0
    pausing = Budget(None, Known(0.0), Answers(1.0), nats=0.1, target=0.25)  # type: ignore[arg-type]
    begun = run(pausing, 145)
    again = Budget(None, Known(0.0), Answers(1.0), nats=0.1, target=0.25)  # type: ignore[arg-type]
    again.on_start(TrainingState("test", 70, torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)))
    again.load_state_dict(pausing.state_dict())
    assert 1.0 < again.state_dict()["pace"] == begun.pace < FASTEST


def test_a_fit_that_no_longer_moves_ends() -> None:
    budget = Budget(None, Known(0.0), Answers(1.0, 0.7), nats=0.1, target=0.25)  # type: ignore[arg-type]
    assert run(budget, 1000).done < 1000


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
        (0.99, 0.01, False, True, "unmoved"),
        (0.99, 0.01, False, False, "steps"),
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
    assert bool(outcome) == (outcome.remedy is None) == (ended == "target")
    assert ("smaller lr" in str(outcome.remedy)) == (damage == 0.9)  # it was overshot, not spent
    assert f"{left:.2f} of 1.00 left" in str(outcome)
    assert Outcome.from_json(outcome.to_json()) == outcome


@pytest.mark.parametrize(
    ("before", "left", "ended"), [(0.25, 0.25, "interrupted"), (1.0, 0.6, "interrupted"), (1.0, 0.25, "target")]
)
def test_an_interrupted_fit_forgot_only_what_was_known_before(before: float, left: float, ended: str) -> None:
    said = {"target": 0.3, "damage": 0.01, "budget": 0.1, "total": 0.01, "steps": 7, "there": False, "stalled": False}
    outcome = Outcome.of(before=before, left=left, interrupted=True, **said)  # type: ignore[arg-type]
    assert outcome.ended == ended
    assert bool(outcome) == (ended == "target")


def test_what_the_control_questions_cannot_tell_is_said() -> None:
    known = Outcome("unmoved", left=0.9, before=0.9, target=0.3, damage=0.01, budget=0.1, total=0.01, steps=7)
    assert "before the fit" not in str(known)
    untold = replace(known, ended="unknown", before=0.25, left=0.25)
    assert "before the fit 0.25 of the control questions were answered, and the target is 0.30" in str(untold)
    assert "quiz of your own" in str(untold.remedy)
    assert "end too much alike" in str(replace(untold, before=1.0, left=1.0, target=1.0))
    assert not untold


def test_where_nothing_is_asked_no_target_makes_it_known_what_was_forgotten(model: LensModel, texts: Texts) -> None:
    alone = Corpus(texts[0].documents[:1], "alone")
    fit = MRP(layers=[1], rank=2, steps=4, batch_size=4, target=0.001).fit(model, alone, texts[1], **FIT)
    assert fit.outcome is not None
    assert (fit.outcome.ended, fit.outcome.target) == ("unknown", 1.0)
    assert "several short texts" in str(fit.outcome.remedy)


def test_damage_above_the_budget_is_said() -> None:
    outcome = Outcome("budget", left=0.5, before=0.9, target=0.3, damage=0.1, budget=0.1, total=0.1, steps=7)
    assert "damage 0.100 of 0.1 nats a token" in str(outcome)
    assert "damage 0.500, over its budget of 0.1 nats a token" in str(replace(outcome, damage=0.5))


def test_fits_report_what_they_reached(model: LensModel, texts: Texts, tmp_path: Any) -> None:
    settings: dict[str, Any] = {"steps": 4, "batch_size": 4}
    first = MRP(layers=[1], rank=2, **settings).fit(model, *texts, **FIT)
    assert first.outcome is not None
    assert first.outcome.steps == 4
    first.save(tmp_path / "fit")
    assert Fit.load(tmp_path / "fit").outcome == first.outcome
    (tmp_path / "fit" / "log.csv").unlink()
    (tmp_path / "fit" / "log.csv").mkdir()  # the next one cannot write its log
    with pytest.raises(OSError, match=r"log\.csv"):
        first.save(tmp_path / "fit")
    with pytest.raises(FileNotFoundError, match="holds no fit"):
        Fit.load(tmp_path / "fit")
    later = Corpus(texts[0].documents[::2], "later")
    second = MRP(layers=[1], rank=2, **settings).fit(model, later, texts[1], after=first.edit, **FIT)
    assert second.outcome is not None
    assert second.outcome.total == pytest.approx(first.outcome.damage + second.outcome.damage)
    assert damage_of(second.edit) == pytest.approx(second.outcome.total)
    assert RMU(budget=None, **settings).fit(model, *texts, **FIT).outcome is None
    assert GradientAscent(budget=1e-6, lr=0.05, steps=30, batch_size=4).fit(model, *texts, **FIT).log.shape[0] == EVERY
