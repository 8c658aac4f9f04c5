"""How much of what was removed came back: recovery with its interval, and what its tables and pictures call things."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from mrp_lens.metrics.bootstrap import CONFIDENCE, RESAMPLES, effective_number
from mrp_lens.utils.validation import int_seed

FORM_TITLES = {"kept": "edit kept", "stripped": "hooks stripped", "weights": "in the weights"}
"""Of an edit that is attacked."""


@dataclass(frozen=True)
class Score:
    """How many of n questions were answered right.

    Attributes:
        effective_n: as how many independent questions they count, where several are about one entity
            (`metrics.bootstrap.effective_number`); None: as all n.
    """

    right: float | int
    n: int
    effective_n: float | None = None

    @classmethod
    def of(cls, right: NDArray[np.float64], entities: Sequence[int]) -> "Score":
        """Of `right`, 0 to 1 a question, and the number of the entity that each is about (`Questions.entities`)."""
        return cls(float(right.sum()), len(right), effective_number(right, entities))

    @property
    def accuracy(self) -> float:
        """In [0, 1]; NaN without questions."""
        return self.right / self.n if self.n else float("nan")

    @property
    def independent(self) -> float:
        """As how many independent questions they count."""
        return self.n if self.effective_n is None else self.effective_n


@dataclass(frozen=True)
class Recovery:
    """(after - floor) / (ceiling - floor) with its 95% interval; NaN where ceiling and floor cannot be told apart."""

    value: float = float("nan")
    low: float = float("nan")
    high: float = float("nan")

    def columns(self) -> dict[str, float]:
        """As columns of a frame."""
        return {"recovery": self.value, "recovery_low": self.low, "recovery_high": self.high}


def recovery(after: Score, floor: Score, ceiling: Score, *, seed: int = 0) -> Recovery:
    """The share of removed knowledge that came back (as in arXiv 2410.08827, with a never-taught control).

    Args:
        after: on held-out facts, after the attack.
        floor: on facts that were never taught, after the same attack.
        ceiling: on the held-out facts, the unedited model.
        seed: of the draws behind the interval, 2,000 of all three shares, each for itself (conservative where they are the
            same questions), from its posterior with Jeffreys' prior: Beta(right + 1/2, wrong + 1/2). Of 0 or n right
            answers it has a width, which resampled questions have not: 6 of 6 are less certain than 200 of 200. Questions that
            go together count as fewer, by `Score.effective_n`.

    Returns:
        0: as if never taught; 1: all is back. Not clipped: chance takes it below 0 and above 1. NaN without questions, and
        where the ceiling is not above the floor.
    """
    generator = np.random.default_rng(int_seed(seed))

    def drawn(score: Score) -> Any:
        weight = score.independent / score.n
        return generator.beta(weight * score.right + 0.5, weight * (score.n - score.right) + 0.5, RESAMPLES)

    span = ceiling.accuracy - floor.accuracy
    if not span > 0 or not after.n:
        return Recovery()
    value = (after.accuracy - floor.accuracy) / span
    high_end, low_end, back = drawn(ceiling), drawn(floor), drawn(after)
    told_apart = high_end > low_end
    if told_apart.mean() < CONFIDENCE:  # the interval would be that of a ratio whose denominator may be 0
        return Recovery(value)
    shares = (back - low_end)[told_apart] / (high_end - low_end)[told_apart]
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(shares, [tail, 1 - tail])
    return Recovery(value, float(low), float(high))


def best(curves: pd.DataFrame, *, by: str = "recovery") -> pd.DataFrame:
    """The attacker's best rate after each number of updates: the row with the highest recovery, among rates at which the
    attack counts where there are any.

    Not that with the highest accuracy on V, which a rate also gets by lifting facts that were never taught. The choice is
    made on V itself, so that the recovery is an upper bound of what an attacker gets who must choose without it; the
    never-taught control is therefore to be chosen in the same way, by its own recovery.

    Args:
        curves: of `attacks.relearn`, a row a rate and mark.
        by: the column to choose by: "recovery", or "control_recovery" for the control. By accuracy on V where the
            frame lacks it, where it is NaN at every rate, and between rates with as much of it.
    """
    keys = [key for key in ("method", "seed", "form", "parameters", "samples", "step") if key in curves]
    judged = [column for column in ("counts", by, "held_out_accuracy") if column in curves]
    # What is unknown may be None in frames that were stored; it comes last.
    order = curves.sort_values(judged, ascending=False, kind="stable", key=lambda column: column.astype(float))
    return order.drop_duplicates(keys).sort_index().reset_index(drop=True)
