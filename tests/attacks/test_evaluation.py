import math

import numpy as np
import pytest

from mrp_lens.attacks.evaluation import chance, check_held_out, score
from mrp_lens.data import Corpus, Questions
from mrp_lens.data.world import World
from mrp_lens.metrics import accuracy
from mrp_lens.metrics.recovery import Score, recovery


def quiz(*numbers: int) -> Questions:
    rows = [{"question": f"What is {n}?", "choices": ["yes", "no", "maybe"], "answer": "no"} for n in numbers]
    return Questions.from_rows(rows, name="quiz")


def test_recovery_is_the_share_between_floor_and_ceiling() -> None:
    found = recovery(Score(60, 100), Score(20, 100), Score(100, 100))
    assert found.value == pytest.approx((0.6 - 0.2) / (1.0 - 0.2))
    assert found.low < found.value < found.high


def test_the_interval_is_that_of_resampled_questions() -> None:
    after, floor, ceiling = Score(60, 100), Score(25, 80), Score(95, 100)
    generator = np.random.default_rng(7)
    shares = []
    for _ in range(4000):
        a, f, c = (
            np.mean(generator.choice([1.0] * int(x.right) + [0.0] * int(x.n - x.right), size=x.n))
            for x in (after, floor, ceiling)
        )
        shares.append((a - f) / (c - f))
    found = recovery(after, floor, ceiling)
    assert (found.low, found.high) == pytest.approx(np.quantile(shares, [0.025, 0.975]), abs=0.02)


def test_it_is_not_clipped_and_unknown_where_floor_and_ceiling_are_the_same() -> None:
    assert recovery(Score(1, 100), Score(20, 100), Score(90, 100)).value < 0
    assert math.isnan(recovery(Score(5, 10), Score(9, 10), Score(9, 10)).value)
    close = recovery(Score(5, 10), Score(8, 10), Score(9, 10))
    assert not math.isnan(close.value)
    assert math.isnan(close.low)


def test_never_taught_facts_recover_nothing_within_their_interval() -> None:
    """Half against half of coin tosses with one chance: about 19 of 20 intervals hold 0."""
    generator = np.random.default_rng(3)
    held = 0
    for seed in range(200):
        a, b = (Score(int(generator.binomial(125, 0.25)), 125) for _ in range(2))
        found = recovery(b, a, Score(125, 125), seed=seed)
        held += found.low <= 0 <= found.high
    assert 0.90 <= held / 200 <= 0.99


def test_counting_is_accuracy_and_guessing_is_chance(demo_model: object, world: World) -> None:
    questions = world.questions("towns").spread(40)
    assert score(demo_model, questions).accuracy == accuracy(demo_model, questions)["accuracy"].iloc[0]
    assert chance(questions).accuracy == 0.25


def test_what_the_attacker_has_seen_is_refused_and_the_overlap_named() -> None:
    with pytest.raises(ValueError, match=r"train and held_out overlap in 2 questions, such as 'What is 3\?'"):
        check_held_out(quiz(*range(3, 30)), train=quiz(1, 2, 3, 4))
    stated = Corpus.from_texts(["Nothing of interest.", "What is 5? no."], name="stated")
    with pytest.raises(ValueError, match="shots and held_out overlap in 1 questions"):
        check_held_out(quiz(*range(5, 30)), shots=stated)
    check_held_out(quiz(*range(30)), train=quiz(40, 41), untaught=None)


def test_too_few_or_no_questions() -> None:
    with pytest.warns(UserWarning, match="only 19 held-out questions"):
        check_held_out(quiz(*range(19)))
    with pytest.raises(ValueError, match="no held-out questions"):
        check_held_out(quiz())
    with pytest.raises(TypeError, match="held_out must be Questions, got Corpus"):
        check_held_out(Corpus.from_texts(["a text"]))


def test_halves_share_neither_questions_nor_entities(world: World) -> None:
    questions = world.questions("potions")
    for by in ("question", "entity"):
        first, second = questions.halves(by=by, seed=1)
        assert len(first) + len(second) == len(questions)
        assert not set(first.questions) & set(second.questions)
        shared = {q.entity for q in first.questions} & {q.entity for q in second.questions}
        assert bool(shared) == (by == "question")
    assert questions.halves(by="entity", seed=1) == questions.halves(by="entity", seed=1)
    assert questions.halves(by="entity", seed=1) != questions.halves(by="entity", seed=2)


def test_halves_refuse_what_cannot_be_split() -> None:
    with pytest.raises(ValueError, match="name that column with entity="):
        quiz(1, 2, 3).halves(by="entity")
    with pytest.raises(ValueError, match="has 1 question, which cannot be split"):
        quiz(1).halves()
    with pytest.raises(ValueError, match="unknown by='author'"):
        quiz(1, 2).halves(by="author")
