"""Settings: defaults filled in, and values refused that cannot be meant."""

from numbers import Integral
from typing import Any, get_args

import torch


def generator_for(seed: int) -> torch.Generator:
    """A generator of its own, so that the global one stays as it is.

    Raises:
        TypeError: the seed is no integer.
    """
    return torch.Generator().manual_seed(int_seed(seed))


def int_seed(seed: Any) -> int:
    """The seed as a plain int; numpy's integers are as good.

    Raises:
        TypeError: it is no integer.
    """
    if isinstance(seed, bool) or not isinstance(seed, Integral):
        raise TypeError(f"seed must be an int, got {seed!r}")
    return int(seed)


def given(value: Any, default: Any) -> Any:
    """The value, or the derived default where it is None."""
    return default if value is None else value


def positive(**values: float | int | None) -> None:
    """Refuse hyperparameters that are not above 0.

    Raises:
        ValueError: names the value.
    """
    for name, value in values.items():
        if value is not None and not value > 0:
            raise ValueError(f"{name} must be above 0, got {value}")


def one_of(allowed: Any, **values: str) -> None:
    """Refuse a value that its `Literal` type does not list.

    Raises:
        ValueError: names the value and what is allowed.
    """
    choices = get_args(allowed)
    for name, value in values.items():
        if value not in choices:
            raise ValueError(f"unknown {name} {value!r}; choose one of {', '.join(choices)}")
