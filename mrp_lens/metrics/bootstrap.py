"""How sure a figure is."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float, Int
from numpy.typing import NDArray
from scipy.special import betaincinv, stdtrit
from torch import Tensor

from mrp_lens.utils.validation import int_seed

RESAMPLES = 2000
CONFIDENCE = 0.95


def bootstrap_interval(
    values: NDArray[np.float64],
    statistic: Callable[[NDArray[np.float64]], NDArray[np.float64]] = lambda resampled: resampled.mean(axis=1),
    *,
    seed: int = 0,
) -> tuple[float, float]:
    """Percentile bootstrap over the first axis: 95% interval from 2,000 resamples; NaN, NaN from a single row.

    Args:
        values: [n, ...], one row a question or document. Infinities are taken as they are.
        statistic: maps resamples [r, n, ...] to [r].
        seed: of the resampling.

    Raises:
        TypeError: the seed is no integer.
        ValueError: no values, or NaN among them.
    """
    generator = np.random.default_rng(int_seed(seed))
    _check_values(values)
    if len(values) == 1:  # nothing tells how far another one would be off
        return float("nan"), float("nan")
    estimates = np.concatenate(
        [statistic(values[generator.integers(len(values), size=(100, len(values)))]) for _ in range(RESAMPLES // 100)]
    )
    tail = (1 - CONFIDENCE) / 2
    if np.isfinite(estimates).all():
        low, high = np.quantile(estimates, [tail, 1 - tail])
    else:  # between infinities there is nothing to interpolate
        low, high = np.sort(estimates)[[round(share * (RESAMPLES - 1)) for share in (tail, 1 - tail)]]
    return float(low), float(high)


def _check_values(values: NDArray[np.float64]) -> None:
    if not len(values):
        raise ValueError("no values to take an interval of; give one for each question or document")
    if np.isnan(values).any():
        raise ValueError(
            f"{int(np.isnan(values).sum())} of {np.size(values)} values are NaN, of which no interval can be made"
        )


def share_interval(
    values: NDArray[np.float64], clusters: Sequence[int] | None = None, *, seed: int = 0
) -> tuple[float, float]:
    """`bootstrap_interval` of the mean of values from 0 to 1. Where all are 0, or all are 1, resampling finds nothing else, however few
    they are: then the end beyond is the exact one of a share of n (Clopper and Pearson 1934), 0.46 for 6 wrong answers of 6.

    Values that go together, such as answers about one entity, tell less than as many others, and there may be too few entities to
    resample: then it is the exact interval of a share of `effective_number` (Korn and Graubard 1998).

    Args:
        values: [n], one a question or document.
        clusters: [n], the number of what each value belongs to; a single one for all is the same as None: nothing goes together.
        seed: of the resampling.

    Raises:
        TypeError, ValueError: as `bootstrap_interval`.
    """
    _check_values(values)
    if groups := _Clusters.of(clusters):
        mean, size = float(values.mean()), groups.effective_number(values)
        if not _alike(values):
            size *= mean * (1 - mean) / float(values.var())  # shares between 0 and 1 spread less than answers do
        low, high = _exact_interval(mean, size)
        return min(low, mean), max(high, mean)
    low, high = bootstrap_interval(values, seed=seed)
    if low == high == 0.0:
        return 0.0, reach_of_none(len(values))
    return (1 - reach_of_none(len(values)), 1.0) if low == high == 1.0 else (low, high)


def mean_interval(
    values: NDArray[np.float64], clusters: Sequence[int] | None = None, *, seed: int = 0
) -> tuple[float, float]:
    """`bootstrap_interval` of the mean; where values go together, that of Student's t over clusters (never narrower than over values).

    Args:
        values: [n], one a question; finite where some go together.
        clusters: as of `share_interval`.
        seed: of the resampling.

    Raises:
        TypeError, ValueError: as `bootstrap_interval`.
    """
    _check_values(values)
    groups = _Clusters.of(clusters)
    if not groups:
        return bootstrap_interval(values, seed=seed)
    mean, n = float(values.mean()), len(values)
    totals = groups.totals(values - mean)
    variance = max(float((totals**2).sum()) / n**2, float(values.var()) / n) * groups.number / (groups.number - 1)
    reach = groups.quantile * variance**0.5
    return mean - reach, mean + reach


def effective_number(values: NDArray[np.float64], clusters: Sequence[int]) -> float:
    """How many independent answers would tell as much about the mean as these, of which those of a cluster go together.

    n over the design effect (Kish 1965), times the squared ratio of the t quantiles of n and of as many clusters, which makes up for
    how little few clusters tell of it (Korn and Graubard 1998). A prior of half a cluster more, all of whose values are of the rarer
    kind, keeps one wrong answer among many right ones from looking as if wrong ones came alone. Clusters of different sizes count as
    n^2 / (sum of squared sizes) of one size (Kish 1965), and as two at least.

    Args:
        values: [n], from 0 to 1.
        clusters: [n], the number of what each value belongs to, such as `Questions.entities`.

    Returns:
        n where no two values go together, and where all have one cluster: then it is the questions that could have been others. The
        number of clusters where all values are alike, which tells nothing of how they go together.
    """
    groups = _Clusters.of(clusters)
    return groups.effective_number(values) if groups else float(len(values))


@dataclass(frozen=True)
class _Clusters:
    """What values belong to, some of them together."""

    place: NDArray[np.int64]
    number: float  # of clusters of one size that are worth as much

    @classmethod
    def of(cls, clusters: Sequence[int] | None) -> "_Clusters | None":
        """None where no two values go together, or all do."""
        if clusters is None:
            return None
        _, place, sizes = np.unique(clusters, return_inverse=True, return_counts=True)
        if len(sizes) in (0, 1, len(place)):
            return None
        return cls(place, max(2.0, float(len(place) ** 2 / (sizes**2).sum())))

    def effective_number(self, values: NDArray[np.float64]) -> float:
        """As the function of that name."""
        if _alike(values):
            return self.number
        n = len(values)
        rarer, prior = float(values.mean() < 0.5), 0.5 * n / self.number
        mean = float(values.sum() + prior * rarer) / (n + prior)
        apart = float(((values - mean) ** 2).sum()) + prior * (rarer - mean) ** 2
        together = float((self.totals(values - mean) ** 2).sum()) + 2 * (prior * (rarer - mean)) ** 2
        effect = min(max(1.0, together / apart), n / self.number)
        return n / effect * (_t_quantile(n - 1) / self.quantile) ** 2

    def totals(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """Of each cluster."""
        return np.bincount(self.place, weights=values).astype(np.float64)

    @property
    def quantile(self) -> float:
        """Of Student's t for a mean over as many clusters."""
        return _t_quantile(self.number - 1)


def _t_quantile(freedom: float) -> float:
    return float(stdtrit(freedom, (1 + CONFIDENCE) / 2))


def _alike(values: NDArray[np.float64]) -> bool:
    """Whether values differ by rounding at most."""
    return bool(np.ptp(values) < 1e-9)


def _exact_interval(share: float, size: float) -> tuple[float, float]:
    """The exact 95% interval of a share of `size` values, which need be no whole number (Clopper and Pearson 1934)."""
    tail, found = (1 - CONFIDENCE) / 2, share * size
    low = float(betaincinv(found, size - found + 1, tail)) if share > 1e-12 else 0.0
    return low, float(betaincinv(found + 1, size - found, 1 - tail)) if share < 1 - 1e-12 else 1.0


def reach_of_none(n: int) -> float:
    """The upper end of the exact 95% interval of a share of which none was found among n (Clopper and Pearson 1934)."""
    return _exact_interval(0.0, n)[1]


def drop_interval(
    drops: NDArray[np.float64], clusters: Sequence[int] | None = None, *, seed: int = 0
) -> tuple[float, float]:
    """95% interval of the mean of differences between answers, each -1, 0 or 1: each value's share is drawn from its posterior with
    Jeffreys' prior (Dirichlet, 1/2 a value), so that the interval has a width even where all differences are alike.

    Args:
        drops: [n], one a question. Values between (of questions that were asked several times) count as values of their own.
        clusters: [n], the number of what each question is about: n questions then count as `effective_number`. None: nothing goes together.
        seed: of the 2,000 draws.

    Raises:
        TypeError: the seed is no integer.
    """
    values = np.union1d(drops, (-1.0, 0.0, 1.0))
    counts = (drops[:, None] == values).mean(axis=0)
    counts *= len(drops) if clusters is None else effective_number((drops + 1) / 2, clusters)
    shares = np.random.default_rng(int_seed(seed)).dirichlet(counts + 0.5, RESAMPLES)
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(shares @ values, [tail, 1 - tail])
    return float(low), float(high)


def value(frame: pd.DataFrame) -> float:
    """The number that a metric's frame is about: the column before its interval `low`, `high`, as a float.

    For frames with one row (`perplexity`, `answer_probability`, `accuracy` of one group), or whose first row is "all".
    A function and no kind of frame: it also reads frames that were stored, joined or made by a metric of one's own.

    Raises:
        ValueError: several rows, none of them for all, or no interval.

    Example:
        >>> value(pd.DataFrame([{"group": "all", "n": 4, "accuracy": 0.75, "low": 0.25, "high": 1.0}]))
        0.75
    """
    columns = [str(column) for column in frame]
    if "low" not in columns[1:]:
        raise ValueError(
            f"a frame with the columns {', '.join(columns) or 'none'} has no interval `low`, `high` behind a value"
        )
    of_all = list(frame["group"] == "all") if "group" in frame else []
    if len(frame) != 1 and (of_all[:1] != [True] or any(of_all[1:])):
        raise ValueError(f"the frame has {len(frame)} rows; choose one, such as frame[frame['group'] == 'forget']")
    number: Any = frame.iloc[0, columns.index("low") - 1]
    return float(number)


@dataclass
class TokenMean:
    """Mean over tokens of a stream of values, with an interval that knows that tokens of a document go together.

    Keeps seven numbers, however many tokens it has seen.
    """

    documents: int = 0
    tokens: float = 0.0
    total: float = 0.0
    squares: float = 0.0
    document_squares: float = 0.0  # of each document's total
    document_products: float = 0.0  # of its total and its number of tokens
    token_squares: float = 0.0

    def add(self, values: Float[Tensor, " tokens"], rows: Int[Tensor, " tokens"]) -> None:
        """Values of whole documents: `rows` says to which of them each value belongs.

        Raises:
            ValueError: one that is NaN or infinite, which would make the mean so.
        """
        wide = values.detach().double().cpu().numpy()
        if not np.isfinite(wide).all():
            raise ValueError("a figure of a token is NaN or infinite: it was divided by 0, or the model overflows")
        places = rows.cpu().numpy()
        totals, counts = np.bincount(places, weights=wide), np.bincount(places).astype(float)
        self.documents += int((counts > 0).sum())
        self.tokens += float(counts.sum())
        self.total += float(totals.sum())
        self.squares += float((wide**2).sum())
        self.document_squares += float((totals**2).sum())
        self.document_products += float((totals * counts).sum())
        self.token_squares += float((counts**2).sum())

    @property
    def mean(self) -> float:
        """Over tokens."""
        return self.total / self.tokens

    @property
    def std(self) -> float:
        """Spread over tokens."""
        return float(max(self.squares / self.tokens - self.mean**2, 0.0) ** 0.5)

    def interval(self, *, least: float = -math.inf, most: float = math.inf) -> tuple[float, float]:
        """95%, from the spread between documents (ratio estimator, t with documents - 1 degrees of freedom); NaN with a single document.

        Args:
            least, most: what the mean can be, beyond which the interval does not go.
        """
        if self.documents < 2:
            return float("nan"), float("nan")
        rest = self.document_squares - 2 * self.mean * self.document_products + self.mean**2 * self.token_squares
        variance = max(rest, 0.0) / self.tokens**2 * self.documents / (self.documents - 1)
        reach = _t_quantile(self.documents - 1) * variance**0.5
        return max(least, self.mean - reach), min(most, self.mean + reach)
