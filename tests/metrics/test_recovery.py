"""The share that comes back, and its interval."""

import math

import numpy as np
import pytest

from mrp_lens.metrics.recovery import Score, recovery


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
