"""What sequences have in common."""

from collections.abc import Iterable, Sequence
from itertools import takewhile
from typing import Any


def common_start(sequences: Iterable[Sequence[Any]]) -> int:
    """How many items all of them begin with; 0 of none."""
    return sum(1 for _ in takewhile(lambda items: len(set(items)) == 1, zip(*sequences, strict=False)))


def spread_over(first: int, last: int, count: int) -> tuple[int, ...]:
    """At most so many whole numbers, at least one, evenly spread from the first to the last, such as layers."""
    steps = max(1, count - 1)
    return tuple(sorted({round(first + i * (last - first) / steps) for i in range(count)}))
