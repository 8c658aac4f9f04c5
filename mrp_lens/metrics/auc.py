"""The area under the ROC curve: how often something inside scores above something outside."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from mrp_lens.metrics.bootstrap import CONFIDENCE, RESAMPLES
from mrp_lens.utils.validation import int_seed

Values = NDArray[np.float64]


def auc(inside: Sequence[Values], outside: Sequence[Values], *, seed: int = 0) -> tuple[float, float, float]:
    """The AUC over all scores, and its 95% interval: a percentile bootstrap over documents, each side resampled for itself.

    Args:
        inside: the scores of each document that should have high ones: one, or one for each of its tokens; at least one.
        outside: likewise of those that should have low ones.
        seed: of the resampling.

    Returns:
        AUC, low, high; the ends are NaN with a single document on a side.
    """
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
    low, high = np.quantile(drawn, [tail, 1 - tail])
    return float(found), float(low), float(high)


def _wins(scores: Values, others: Values, starts: NDArray[np.int64]) -> Values:
    """Against each of the other documents: the pairs in which the score is above the other's, and half of those in which they are equal."""
    ordered = np.sort(scores)
    below, not_above = (np.searchsorted(ordered, others, side=side) for side in ("left", "right"))
    return np.add.reduceat(len(scores) - (below + not_above) / 2, starts)
