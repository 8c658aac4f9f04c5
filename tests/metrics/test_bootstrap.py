from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from mrp_lens import metrics
from mrp_lens.metrics import value
from mrp_lens.metrics.bootstrap import (
    TokenMean,
    bootstrap_interval,
    drop_interval,
    effective_number,
    mean_interval,
    share_interval,
)
from mrp_lens.utils.validation import generator_for, int_seed

ROW = {"n": 4, "accuracy": 0.75, "low": 0.25, "high": 1.0, "chance": 0.5}


@pytest.mark.parametrize("groups", [["all"], ["forget"], ["all", "forget", "retain"]])
def test_the_value_of_a_frame_is_the_column_before_its_interval(groups: list[str]) -> None:
    frame = pd.DataFrame([{"group": group, **ROW} for group in groups])
    assert (value(frame), type(value(frame))) == (0.75, float)
    assert value(frame.iloc[:1].drop(columns=["group", "n"])) == 0.75


@pytest.mark.parametrize(
    ("frame", "message"),
    [
        (pd.DataFrame([{"group": "forget", **ROW}] * 2), r"has 2 rows; choose one, such as frame\[frame\['group'\]"),
        (pd.DataFrame([{"group": "all", "layer": layer, **ROW} for layer in (0, 1)]), "has 2 rows"),
        (pd.DataFrame([ROW]).iloc[:0], "has 0 rows"),
        (pd.DataFrame({"x": [1.0]}), "columns x has no interval `low`, `high` behind a value"),
        (pd.DataFrame(), "columns none has no interval"),
    ],
    ids=["groups", "layers", "no row", "no interval", "nothing"],
)
def test_a_frame_without_one_value_is_refused(frame: pd.DataFrame, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        value(frame)


def test_the_bootstrap_interval_covers_as_often_as_it_says() -> None:
    generator = np.random.default_rng(0)
    hits = 0
    for seed in range(200):
        low, high = metrics.bootstrap_interval(generator.binomial(1, 0.3, size=300).astype(float), seed=seed)
        hits += low <= 0.3 <= high
    assert 0.90 <= hits / 200 <= 0.99
    values = generator.normal(size=50)
    assert metrics.bootstrap_interval(values, seed=1) == metrics.bootstrap_interval(values, seed=1)


@pytest.mark.parametrize("n", [2, 6, 100])
def test_a_share_of_which_nothing_differs_is_as_sure_as_its_number_of_questions(n: int) -> None:
    low, high = share_interval(np.zeros(n))
    assert low == 0.0
    assert (1 - high) ** n == pytest.approx(0.025)  # with such a share, none of n would be right as rarely as that
    assert share_interval(np.ones(n)) == pytest.approx((1 - high, 1.0))
    mixed = np.arange(n) % 2 * 1.0
    assert share_interval(mixed, seed=3) == metrics.bootstrap_interval(mixed, seed=3)


UNIFORM, SPARSE = "known more or less", "one in ten is not known at all"


@pytest.mark.parametrize(("entities", "questions"), [(10, 20), (75, 5)])
@pytest.mark.parametrize("known", [UNIFORM, SPARSE])
def test_intervals_cover_where_answers_about_one_entity_go_together(entities: int, questions: int, known: str) -> None:
    """Taken for independent answers, they are off in one of seven or more."""
    generator = np.random.default_rng(0)
    clusters = np.repeat(np.arange(entities), questions).tolist()
    intervals: dict[str, Any] = {"share": share_interval}
    if known == UNIFORM:  # Student's t and a posterior are no exact intervals
        intervals |= {"mean": mean_interval, "drop": drop_interval}
    truth = 0.5 if known == UNIFORM else 0.9 * 0.99
    hits = dict.fromkeys([*intervals, "independent"], 0)
    for seed in range(200):
        shares = generator.beta(1, 1, entities) if known == UNIFORM else 0.99 * (generator.random(entities) > 0.1)
        right = (generator.random(len(clusters)) < np.repeat(shares, questions)).astype(float)
        for name, interval in intervals.items():
            low, high = interval(right, clusters, seed=seed)
            hits[name] += low <= truth <= high
        low, high = share_interval(right, seed=seed)
        hits["independent"] += low <= truth <= high
    assert all(hits[name] / 200 >= 0.91 for name in intervals)
    assert hits["independent"] / 200 < 0.86


@pytest.mark.parametrize("sizes", [[100] + [5] * 20, [100] + [1] * 100, [40] + [5] * 32])
def test_they_cover_where_a_quiz_is_mostly_about_one_entity(sizes: list[int]) -> None:
    generator = np.random.default_rng(1)
    clusters = np.repeat(np.arange(len(sizes)), sizes).tolist()
    hits = 0
    for _ in range(200):
        right = (generator.random(len(clusters)) < generator.beta(1, 1, len(sizes))[clusters]).astype(float)
        low, high = share_interval(right, clusters)
        hits += low <= 0.5 <= high
    assert hits / 200 >= 0.92


def test_where_no_two_go_together_or_all_do_clusters_change_nothing() -> None:
    values = np.array([0.0, 1.0, 1.0, 0.5, 0.0])
    for interval in (share_interval, mean_interval, drop_interval):
        for clusters in ([4, 0, 1, 2, 3], [7] * 5):  # of one person it is the questions that could have been others
            assert interval(values, clusters, seed=2) == interval(values, seed=2)
    assert effective_number(values, range(5)) == effective_number(values, [7] * 5) == 5
    for refused in (share_interval, mean_interval):
        with pytest.raises(ValueError, match="1 of 3 values are NaN"):
            refused(np.array([np.nan, 1.0, 0.0]), [0, 0, 1])


def test_the_effective_number_by_hand() -> None:
    fewer = (2.0686576 / 2.5705818) ** 2  # quantiles of t with 23 and 5 degrees of freedom
    # Entities of 4, each with answers that are all alike, are as good as one answer an entity.
    right, clusters = np.repeat([0.0, 1.0] * 3, 4), np.repeat(range(6), 4).tolist()
    assert effective_number(right, clusters) == pytest.approx(6 * fewer)
    # In entities that are alike nothing goes together; fewer degrees of freedom are all that is lost.
    assert effective_number(np.tile([0.0, 1.0], 12), clusters) == pytest.approx(24 * fewer)
    # 23 of 24: with half an entity of 4 wrong answers the mean is 23 / 26.
    mean = 23 / 26
    together = 5 * (4 * (1 - mean)) ** 2 + (3 - 4 * mean) ** 2 + 0.5 * (4 * mean) ** 2
    effect = together / (23 * (1 - mean) ** 2 + mean**2 + 2 * mean**2)
    one_wrong = np.array([0.0] + [1.0] * 23)
    assert 1 < effect < 4
    assert effective_number(one_wrong, clusters) == pytest.approx(24 / effect * fewer)
    assert share_interval(one_wrong, clusters)[0] < share_interval(np.ones(24), clusters)[0] + 0.02
    # Sizes 12, 6 and 6 are worth 24^2 / (144 + 36 + 36) clusters of one size.
    assert effective_number(np.ones(24), [0] * 12 + [1] * 6 + [2] * 6) == pytest.approx(576 / 216)


def test_shares_that_are_alike_or_nearly_are_no_sign_of_certainty() -> None:
    clusters = np.repeat(range(6), 4).tolist()
    assert share_interval(np.ones(24), clusters) == pytest.approx(share_interval(np.ones(6)))
    for values in (np.full(24, 1 / 3), np.array([1 / 3] * 23 + [1 / 3 + 1e-16]), np.full(24, 1 / 3) + 1e-12):
        low, high = share_interval(values, clusters)
        assert low < 0.1
        assert high > 0.7
    tiny = np.exp(-np.linspace(380.0, 400.0, 24))  # whose variance is 0 in double precision
    assert share_interval(tiny, clusters)[1] == pytest.approx(share_interval(np.zeros(6))[1])
    # Shares that spread a tenth as much as answers have a tenth of their interval, whatever they are shares of.
    right = np.repeat([0.0, 1.0] * 3, 4)
    few, many = (share_interval(0.5 + scale * (right - 0.5), clusters) for scale in (0.1, 1.0))
    assert few[1] - few[0] < 0.2 * (many[1] - many[0])


def test_token_means_know_that_tokens_of_a_document_go_together() -> None:
    """Documents of equal tokens: the interval is that of the documents, not of the tokens."""
    generator = np.random.default_rng(0)
    hits = 0
    for _ in range(300):
        mean = TokenMean()
        for start in range(0, 60, 20):
            lengths = generator.integers(1, 9, size=20)
            effects = generator.normal(2.0, 1.0, size=20)
            values = np.repeat(effects, lengths) + generator.normal(0, 0.1, size=lengths.sum())
            mean.add(torch.tensor(values), torch.tensor(np.repeat(np.arange(start, start + 20), lengths)))
        low, high = mean.interval()
        hits += low <= 2.0 <= high
    assert 0.90 <= hits / 300 <= 0.98
    assert mean.documents == 60


def test_seeds_of_numpy_are_seeds_and_others_are_refused() -> None:
    drawn_by = [torch.rand(3, generator=generator_for(seed)) for seed in (np.int64(3), 3)]  # type: ignore[arg-type]
    assert torch.equal(*drawn_by)
    assert type(int_seed(np.uint8(7))) is int  # type: ignore[arg-type]
    for seed in (True, np.True_, 1.5, "3", None):
        with pytest.raises(TypeError, match="seed must be an int"):
            generator_for(seed)  # type: ignore[arg-type]


def test_token_means_of_few_documents_are_as_unsure_as_students_t_and_stay_within_what_can_be() -> None:
    mean, values = TokenMean(), np.array([0.1, 0.4, 0.7])
    mean.add(torch.tensor(values), torch.arange(3))
    reach = 4.302653 * values.std(ddof=1) / 3**0.5  # t of 2 degrees of freedom
    assert mean.interval() == pytest.approx((0.4 - reach, 0.4 + reach))
    assert mean.interval(least=0.0, most=1.0) == (0.0, 1.0)


def test_the_interval_of_a_drop_has_a_width_where_all_questions_are_alike() -> None:
    intervals = {n: drop_interval(np.zeros(n), seed=0) for n in (6, 200)}
    assert intervals[6][0] < intervals[200][0] < 0.0 < intervals[200][1] < intervals[6][1]
    drops = np.repeat([1.0, 0.0, -1.0, 0.5], [60, 300, 20, 20])
    assert drop_interval(drops, seed=0) == pytest.approx(bootstrap_interval(drops), abs=0.01)
