"""Truth ratio and forget quality, against a calculation by hand and against scipy on plain numbers."""

from typing import Any

import numpy as np
import pytest
from scipy.stats import ks_2samp

from mrp_lens import metrics
from mrp_lens.data import Question, Questions
from mrp_lens.metrics.truth_ratio import closeness, compared, log_ratios, nulls, true_better
from mrp_lens.models import LensModel
from tests.support.plain import log_probability
from tests.support.quizzes import WORDS

QUIZ = Questions(
    tuple(
        Question(
            f"Zaxim{number} is",
            (f" a{WORDS[number % 10]}", WORDS[(number + 3) % 10], f"{WORDS[(number * 3 + 1) % 10]} of old"),
            number % 3,
            group=("even", "odd")[number % 2],
        )
        for number in range(8)
    ),
    "three choices",
)


def slow(model: LensModel, question: Question) -> tuple[float, float]:
    """R, and its control, from probabilities per token."""
    own = [float(np.exp(np.mean(log_probability(model, question.prompt, choice)))) for choice in question.choices]
    right = own.pop(question.answer)
    ratio = float(np.sqrt(own[0] * own[1])) / right
    swapped = own[0] / own[1]
    return ratio, float(np.mean([min(swapped, 1 / swapped), min(1 / swapped, swapped)]))


def test_truth_ratio_equals_the_calculation_choice_by_choice(model: LensModel, untouched: None) -> None:
    ratios, null = (np.array(part) for part in zip(*(slow(model, q) for q in QUIZ.questions), strict=True))
    frame = metrics.truth_ratio(model, QUIZ, batch_size=5, progress=False)
    assert list(frame["group"]) == ["all", "even", "odd"]
    for group, which in (("all", slice(None)), ("even", slice(0, None, 2)), ("odd", slice(1, None, 2))):
        row = frame.set_index("group").loc[group]
        assert row["truth_ratio"] == pytest.approx(np.minimum(ratios, 1 / ratios)[which].mean(), rel=1e-5)
        assert row["true_better"] == pytest.approx(np.maximum(0, 1 - ratios)[which].mean(), rel=1e-4, abs=1e-7)
        assert row["null"] == pytest.approx(null[which].mean(), rel=1e-5)
        assert row["low"] <= row["truth_ratio"] <= row["high"]
        assert row["n"] == len(ratios[which])


def test_forget_quality_is_the_test_on_the_ratios_of_both(model: LensModel, other: LensModel, untouched: None) -> None:
    own, theirs = (np.array([slow(it, question)[0] for question in QUIZ.questions]) for it in (model, other))
    expected = ks_2samp(1 / own, 1 / theirs)
    frame = metrics.forget_quality(model, QUIZ, reference=other, progress=False)
    assert frame["forget_quality"].iloc[0] == pytest.approx(expected.pvalue)
    assert metrics.value(frame) == pytest.approx(expected.statistic)
    assert expected.statistic > 0
    assert frame["low"].iloc[0] <= metrics.value(frame) <= frame["high"].iloc[0]
    same = metrics.forget_quality(model, QUIZ, reference=model, progress=False)
    assert (same["forget_quality"].iloc[0], metrics.value(same)) == (1.0, 0.0)


def test_the_distance_of_chance_is_exceeded_by_one_in_twenty_and_the_interval_holds() -> None:
    """Two samples of one distribution, of which the true distance is 0."""
    draw = np.random.default_rng(0)
    rows = [compared(draw.normal(size=60), draw.normal(size=60)) for _ in range(200)]
    beyond = np.mean([row["distance"] > row["null"] for row in rows])
    assert 0.01 < beyond < 0.09
    assert np.mean([row["forget_quality"] < 0.05 for row in rows]) == pytest.approx(beyond, abs=0.03)
    assert all(row["low"] == 0.0 for row in rows)


def test_ratios_by_hand() -> None:
    logs = np.log([0.5, 1.0, 2.0])
    assert closeness(logs) == pytest.approx([0.5, 1.0, 0.5])
    assert true_better(logs) == pytest.approx([0.5, 0.0, 0.0])
    ruled_out = Questions((Question("p", ("a", "b"), 0),))
    assert log_ratios([np.array([-1.0, -np.inf])], ruled_out)[0] == -np.inf  # knows for certain
    assert closeness(np.array([-np.inf, np.inf])) == pytest.approx([0.0, 0.0])
    assert true_better(np.array([-np.inf, np.inf])) == pytest.approx([1.0, 0.0])
    with pytest.raises(ValueError, match="probability 0 to the right choice of 'p'"):
        log_ratios([np.array([-np.inf, -np.inf])], ruled_out)
    assert np.isnan(nulls([np.array([-1.0, -2.0])], ruled_out, closeness)).all()


def test_what_is_missing_is_named(model: Any, untouched: None) -> None:
    with pytest.raises(ValueError, match=r"a model that never saw the forget set; give reference="):
        metrics.forget_quality(model, QUIZ, reference=None)
    for metric in (metrics.truth_ratio, lambda *a: metrics.forget_quality(*a, reference=model)):
        with pytest.raises(ValueError, match="no questions in 'none'"):
            metric(model, Questions((), "none"))
