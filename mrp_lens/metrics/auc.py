"""The area under the ROC curve: how often something inside scores above something outside."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from mrp_lens.metrics.bootstrap import CONFIDENCE, RESAMPLES, reach_of_none
from mrp_lens.utils.validation import int_seed

Values = NDArray[np.float64]


def auc(inside: Sequence[Values], outside: Sequence[Values], *, seed: int = 0) -> tuple[float, float, float]:
    """The AUC over all scores, and its 95% interval: a percentile bootstrap over documents, each side resampled for itself.

    Of 0 and of 1 resampling finds nothing else, however few the documents are: then the end beyond is that of a share of as many as
    the smaller side has, 0.29 for three on a side that are all told apart.

    Args:
        inside: the scores of each document that should have high ones: one, or one for each of its tokens; at least one.
        outside: likewise of those that should have low ones.
        seed: of the resampling.

    Returns:
        AUC, low, high; the ends are NaN with a single document on a side.

    Raises:
        ValueError: a score is NaN, which is neither above nor below another.
    """
    if any(np.isnan(scores).any() for side in (inside, outside) for scores in side):
        raise ValueError("some scores are NaN and can be ranked with no others; the model overflows or divides by 0")
    first_sizes, second_sizes = (np.array([len(scores) for scores in side]) for side in (inside, outside))
    others, starts = np.concatenate(outside), np.cumsum(second_sizes) - second_sizes
    wins = np.stack([_wins(scores, others, starts) for scores in inside])
    found = wins.sum() / (first_sizes.sum() * second_sizes.sum())
    if min(wins.shape) < 2:
        return float(found), float("nan"), float("nan")
    generator = np.random.default_rng(int_seed(seed))
    first, second = (
        generator.multinomial(count, np.full(count, 1 / count), size=RESAMPLES) / count for count in wins.shape
    )
    drawn = ((first @ wins) * second).sum(axis=1) / ((first @ first_sizes) * (second @ second_sizes))
    tail = (1 - CONFIDENCE) / 2
    low, high = (float(end) for end in np.quantile(drawn, [tail, 1 - tail]))
    if found == 1.0:
        low = 1 - reach_of_none(min(wins.shape))
    if found == 0.0:
        high = reach_of_none(min(wins.shape))
    return float(found), low, high


def _wins(scores: Values, others: Values, starts: NDArray[np.int64]) -> Values:
    """Against each of the other documents: the pairs in which the score is above the other's, and half of those in which they are equal."""
    ordered = np.sort(scores)
    below, not_above = (np.searchsorted(ordered, others, side=side) for side in ("left", "right"))
    return np.add.reduceat(len(scores) - (below + not_above) / 2, starts)
