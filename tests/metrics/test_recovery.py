"""The share that comes back, and its interval."""

import math

import numpy as np
import pandas as pd
import pytest

from mrp_lens.metrics.recovery import Recovery, Score, best, recovery


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


def test_all_or_no_answers_of_few_questions_are_less_certain_than_of_many() -> None:
    few, many = (recovery(Score(n, n), Score(0, n), Score(n, n)) for n in (6, 200))
    for found in (few, many):
        assert found.value == 1.0
        assert found.low < 1.0 < found.high
    assert few.low < 0.8 < many.low
    nothing = recovery(Score(0, 6), Score(0, 6), Score(6, 6))
    assert nothing.low < 0.0 < nothing.high
    assert recovery(Score(0, 0), Score(0, 6), Score(6, 6)).columns() == pytest.approx(Recovery().columns(), nan_ok=True)


def test_answers_about_one_entity_count_as_fewer() -> None:
    right, entities = np.repeat([0.0, 1.0, 1.0, 0.0, 1.0] * 2, 20), np.repeat(np.arange(10), 20).tolist()
    after, alone = Score.of(right, entities), Score.of(right, range(200))
    assert (after.right, after.n, after.accuracy, alone.independent) == (120.0, 200, 0.6, 200.0)
    assert 5 < after.independent < 10
    floor, ceiling = Score(50, 200), Score(200, 200)
    wide, narrow = (recovery(score, floor, ceiling) for score in (after, alone))
    assert wide.value == narrow.value
    assert wide.high - wide.low > 3 * (narrow.high - narrow.low)


def test_the_best_rate_is_that_of_the_highest_recovery_and_the_controls_its_own() -> None:
    """A rate that lifts never-taught facts as well is not the best, though it has the highest accuracy."""
    curves = pd.DataFrame(
        {
            "lr": [1e-3, 3e-3, 1e-2],
            "step": 100,
            "counts": [True, True, False],
            "held_out_accuracy": [0.48, 0.50, 0.90],
            "floor": [0.20, 0.45, 0.20],
            "recovery": [0.35, 0.09, 0.88],
            "control_recovery": [0.01, 0.12, 0.50],
        }
    )
    assert best(curves)["lr"].tolist() == [1e-3]
    assert best(curves, by="control_recovery")["lr"].tolist() == [3e-3]
    assert best(curves.drop(columns="recovery"))["lr"].tolist() == [3e-3]
    unknown = curves.assign(recovery=pd.Series([None, None, 0.88], dtype=object))  # as stored frames have it
    assert best(unknown)["lr"].tolist() == [3e-3]
    assert best(curves.assign(recovery=[0.35, math.nan, math.nan]))["lr"].tolist() == [1e-3]
