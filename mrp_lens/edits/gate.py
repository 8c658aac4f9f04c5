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

    A gate may have several directions, each with its threshold: it is open as far as the one that opens it furthest. Two gates
    are equal if their directions and numbers are.

    Attributes:
        direction: w, [d_model] or [directions, d_model]; brought to length 1, in float32.
        threshold: the cosine at which half is removed; as many as directions.
        sharpness: how quickly the gate opens there; as many as directions, or one for all.
        hard: 1 where the cosine is above the threshold and else 0, whatever the sharpness.

    Raises:
        TypeError: a direction that is no floating point tensor, text in the place of a number, a `hard` that is no bool.
        ValueError: directions that are not finite non-zero vectors, a number that is not finite, a sharpness of 0 or less,
            or not as many numbers as directions.

    Example:
        >>> import torch
        >>> gate = Gate(torch.tensor([1.0, 0.0]), threshold=0.5, hard=True)
        >>> gate(torch.tensor([[[3.0, 0.0], [0.0, 3.0]]]))
        tensor([[1., 0.]])
    """

    direction: Float[Tensor, "*directions d_model"]
    threshold: float | tuple[float, ...]
    sharpness: float | tuple[float, ...] = 20.0
    hard: bool = False

    def __post_init__(self) -> None:
        direction = self.direction
        if isinstance(direction, Tensor) and direction.ndim == 2 and len(direction):
            with torch.inference_mode(False):  # what is made inside of it is never differentiated through
                object.__setattr__(self, "direction", torch.stack([unit(each) for each in direction]))
        else:
            object.__setattr__(self, "direction", unit(direction))
        several = len(self.direction) if self.direction.ndim == 2 else None
        for name in ("threshold", "sharpness"):
            object.__setattr__(self, name, _numbers(name, getattr(self, name), several))
        if not all(each > 0.0 for each in _each(self.sharpness)):
            raise ValueError(f"sharpness must be above 0, got {self.sharpness}; a gate that opens at once is hard=True")
        if not isinstance(self.hard, bool):
            raise TypeError(f"hard must be True or False, got {self.hard!r}")

    @property
    def d_model(self) -> int:
        """Width of the stream."""
        return int(self.direction.shape[-1])

    @property
    def rows(self) -> Float[Tensor, "directions d_model"]:
        """The directions, one a row."""
        return self.direction.reshape(-1, self.d_model)

    @property
    def numbers(self) -> Mapping[str, Any]:
        """All but the direction, by name; several numbers as a list."""
        lists = {name: getattr(self, name) for name in ("threshold", "sharpness")}
        return {
            **{name: list(each) if isinstance(each, tuple) else each for name, each in lists.items()},
            "hard": self.hard,
        }

    def __call__(self, states: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch"]:
        """How much is removed of each state, in float32 or better."""
        return shares(states, self.direction, **self.numbers)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Gate):
            return NotImplemented
        return self.numbers == other.numbers and torch.equal(self.direction.cpu(), other.direction.cpu())

    def __hash__(self) -> int:
        return hash((self.threshold, self.sharpness, self.hard))


def _each(value: float | tuple[float, ...]) -> tuple[float, ...]:
    return value if isinstance(value, tuple) else (value,)


def _numbers(name: str, value: Any, several: int | None) -> float | tuple[float, ...]:
    """A number, or one for each of several directions, as floats."""
    listed = isinstance(value, list | tuple)
    for each in value if listed else [value]:
        if isinstance(each, bool) or not isinstance(each, int | float):
            raise TypeError(f"{name} must be a number, got {each!r}")
        if not math.isfinite(each):
            raise ValueError(f"{name} must be a finite number, got {each!r}")
    count = len(value) if listed else None
    if several is None and not listed:
        return float(value)
    if several is not None and name == "sharpness" and not listed:
        return (float(value),) * several
    if count != several:
        raise ValueError(f"{name} must be one number for each of {several or 1} directions, got {value!r}")
    return tuple(float(each) for each in value)
