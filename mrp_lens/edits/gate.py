"""What decides, state by state, how much of a subspace is removed: the angle between the state and one direction."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mrp_lens.edits.exported_hooks import shares
from mrp_lens.edits.subspace import unit

__all__ = ["Gate", "shares"]


@dataclass(frozen=True, eq=False)
class Gate:
    """sigmoid(sharpness * (cos(h, w) - threshold)) of a state h, between 0 (left alone) and 1 (all is removed).

    Two gates are equal if their directions and numbers are.

    Attributes:
        direction: w, [d_model]; brought to length 1, in float32.
        threshold: the cosine at which half is removed.
        sharpness: how quickly the gate opens there.
        hard: 1 where the cosine is above the threshold and else 0, whatever the sharpness.

    Raises:
        TypeError: a direction that is no floating point tensor, text in the place of a number, a `hard` that is no bool.
        ValueError: a direction that is not a finite non-zero vector, a number that is not finite, a sharpness of 0 or less.

    Example:
        >>> import torch
        >>> gate = Gate(torch.tensor([1.0, 0.0]), threshold=0.5, hard=True)
        >>> gate(torch.tensor([[[3.0, 0.0], [0.0, 3.0]]]))
        tensor([[1., 0.]])
    """

    direction: Float[Tensor, " d_model"]
    threshold: float
    sharpness: float = 20.0
    hard: bool = False

    def __post_init__(self) -> None:
        for name in ("threshold", "sharpness"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise TypeError(f"{name} must be a number, got {value!r}")
            if not math.isfinite(value):
                raise ValueError(f"{name} must be a finite number, got {value!r}")
            object.__setattr__(self, name, float(value))
        if not self.sharpness > 0.0:
            raise ValueError(f"sharpness must be above 0, got {self.sharpness}; a gate that opens at once is hard=True")
        if not isinstance(self.hard, bool):
            raise TypeError(f"hard must be True or False, got {self.hard!r}")
        object.__setattr__(self, "direction", unit(self.direction))

    @property
    def d_model(self) -> int:
        """Width of the stream."""
        return len(self.direction)

    @property
    def numbers(self) -> Mapping[str, Any]:
        """All but the direction, by name."""
        return {"threshold": self.threshold, "sharpness": self.sharpness, "hard": self.hard}

    def __call__(self, states: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch"]:
        """How much is removed of each state, in float32 or better."""
        return shares(states, self.direction, **self.numbers)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Gate):
            return NotImplemented
        return self.numbers == other.numbers and torch.equal(self.direction.cpu(), other.direction.cpu())

    def __hash__(self) -> int:
        return hash((self.threshold, self.sharpness, self.hard))
