"""The area under the ROC curve, against counting pairs and scikit-learn's where it is installed."""

import tracemalloc

import numpy as np
import pytest

from mrp_lens.metrics.auc import auc


def test_the_area_counts_all_pairs_of_scores_and_ties_by_half() -> None:
    draw = np.random.default_rng(0)
    inside, outside = ([draw.integers(0, 5, size) / 2 for size in sizes] for sizes in ((3, 1, 4), (2, 5)))
    pairs = [float(a > b) + 0.5 * float(a == b) for own in inside for a in own for other in outside for b in other]
    area, low, high = auc(inside, outside)
    assert area == pytest.approx(sum(pairs) / len(pairs), abs=1e-12)
    assert low <= area <= high


def test_the_area_is_that_of_scikit_learn() -> None:
    sklearn = pytest.importorskip("sklearn.metrics")
    draw = np.random.default_rng(0)
    inside, outside = draw.integers(0, 9, 40) / 3, draw.integers(0, 7, 30) / 3  # with ties
    expected = sklearn.roc_auc_score([1] * 40 + [0] * 30, [*inside, *outside])
    assert auc(list(inside[:, None]), list(outside[:, None]))[0] == pytest.approx(expected, abs=1e-12)


def test_the_interval_covers_the_true_area_as_often_as_it_says() -> None:
    draw, covered = np.random.default_rng(0), 0
    for seed in range(100):
        _, low, high = auc(list(draw.normal(1.0, 1.0, (60, 1))), list(draw.normal(0.0, 1.0, (60, 1))), seed=seed)
        covered += low <= 0.7602 <= high  # Phi(1 / sqrt 2)
    assert covered >= 88


def test_the_interval_knows_that_tokens_of_a_document_go_together() -> None:
    """Every score ten times: as sure as the scores alone, not as ten times as many."""
    draw = np.random.default_rng(0)
    inside, outside = draw.normal(0.5, 1.0, (30, 1)), draw.normal(0.0, 1.0, (30, 1))
    alone, repeated = (auc(*(list(side.repeat(times, axis=1)) for side in (inside, outside))) for times in (1, 10))
    assert repeated == pytest.approx(alone)


def test_a_single_document_has_no_interval() -> None:
    area, low, high = auc([np.array([1.0])], [np.array([0.0]), np.array([2.0])])
    assert area == 0.5
    assert np.isnan([low, high]).all()


def test_pairs_are_counted_exactly_and_never_held_all_at_once() -> None:
    draw = np.random.default_rng(0)
    inside, outside = ([draw.integers(0, 50, size) / 7 for size in sizes] for sizes in ((3000, 1, 40), (2000, 1500, 2)))
    inside[1], outside[2] = np.array([-np.inf]), np.array([np.inf, -np.inf])
    above = sum(int((own[:, None] > other).sum()) for own in inside for other in outside)
    equal = sum(int((own[:, None] == other).sum()) for own in inside for other in outside)
    tracemalloc.start()
    try:
        area = auc(inside, outside)[0]
        assert tracemalloc.get_traced_memory()[1] < 3000 * 3502 / 4  # bytes, of as many pairs for one document
    finally:
        tracemalloc.stop()
    assert area == (above + equal / 2) / (3041 * 3502)


def test_sides_that_are_all_told_apart_are_as_sure_as_their_number_of_documents() -> None:
    high, low = [np.array([1.0 + n]) for n in range(3)], [np.array([-1.0 - n]) for n in range(5)]
    area, least, most = auc(high, low)
    assert (area, most) == (1.0, 1.0)
    assert least**3 == pytest.approx(0.025)
    assert auc(low, high) == pytest.approx((0.0, 0.0, 1 - least))


def test_scores_that_are_no_number_are_refused() -> None:
    with pytest.raises(ValueError, match="some scores are NaN"):
        auc([np.array([np.nan]), np.array([1.0])], [np.array([0.0])])
