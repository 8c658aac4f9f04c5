"""What sequences have in common."""

from collections.abc import Iterable, Sequence
from itertools import takewhile
from typing import Any


def common_start(sequences: Iterable[Sequence[Any]]) -> int:
    """How many items all of them begin with; 0 of none."""
    return sum(1 for _ in takewhile(lambda items: len(set(items)) == 1, zip(*sequences, strict=False)))
