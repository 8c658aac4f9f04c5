"""Settings: defaults filled in, and values refused that cannot be meant."""

import difflib
import operator
from collections.abc import Iterable, Sequence
from dataclasses import Field, fields
from numbers import Integral, Real
from typing import Any, ClassVar, Literal, TypeVar, get_args, get_origin, get_type_hints

import numpy as np
import torch

Given = TypeVar("Given")


class PlainSettings:
    """A settings dataclass whose numbers are Python's own, whatever they came as.

    A numpy number works in a fit and cannot be written as JSON when the edit is saved, hours later.
    """

    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]

    def __post_init__(self) -> None:
        for entry in fields(self):
            object.__setattr__(self, entry.name, as_python(getattr(self, entry.name)))

    def check_values(self, *, above_0: Sequence[str] = (), counts: Sequence[str] = ()) -> None:
        """Refuse settings that cannot be meant: choices that a `Literal` field does not list, and numbers as said.

        Args:
            above_0: fields that hold a number above 0, or None.
            counts: fields that hold a whole number of at least 1, or None.

        Raises:
            TypeError, ValueError: name the field, its value and what is allowed.
        """
        check_positive(**{name: getattr(self, name) for name in (*above_0, *counts)})
        check_whole(**{name: getattr(self, name) for name in counts})
        for name, kind in get_type_hints(type(self)).items():
            if get_origin(kind) is Literal:
                check_one_of(kind, **{name: getattr(self, name)})


def as_python(value: Any) -> Any:
    """The value with numpy's and torch's numbers and arrays, ranges included, as Python's own."""
    if isinstance(value, np.generic | np.ndarray):
        return as_python(value.tolist())
    if isinstance(value, torch.Tensor):
        return as_python(value.detach().cpu().tolist())
    if isinstance(value, range):
        return list(value)
    if isinstance(value, list | tuple):
        return type(value)(as_python(entry) for entry in value)
    return value


def generator_for(seed: int) -> torch.Generator:
    """A generator of its own, so that the global one stays as it is.

    Raises:
        TypeError: the seed is no integer.
        ValueError: it does not fit into 64 bits.
    """
    return torch.Generator().manual_seed(int_seed(seed))


def int_seed(seed: Any) -> int:
    """The seed as a plain int; numpy's integers are as good.

    Raises:
        TypeError: it is no integer.
        ValueError: it does not fit into 64 bits.
    """
    if not _is_a(Integral, seed):
        raise TypeError(f"seed must be an int, got {seed!r}")
    if not -(2**63) <= int(seed) < 2**64:
        raise ValueError(f"seed must fit into 64 bits, got {seed}")
    return int(seed)


def _is_a(kind: type, value: object) -> bool:
    """Whether it is such a number, numpy's included; True and False are none."""
    return isinstance(value, kind) and not isinstance(value, bool)


def whole_numbers(values: Iterable[Any], name: str) -> tuple[int, ...]:
    """Whole numbers of any kind (numpy's, a range) as plain ints.

    Raises:
        TypeError: it is one number instead of several, or one of them is no whole number.
    """
    if isinstance(values, str | bytes) or not isinstance(values, Iterable):
        raise TypeError(f"{name} must be a list of whole numbers such as [3, 5], got {values!r}")
    numbers = list(values)
    for number in numbers:
        if isinstance(number, bool | np.bool_) or not hasattr(number, "__index__"):
            raise TypeError(f"{name} must be a list of whole numbers such as [3, 5], got {number!r} in it")
    return tuple(operator.index(number) for number in numbers)


def or_default(value: Given | None, default: Given) -> Given:
    """The value, or the derived default where it is None."""
    return default if value is None else value


def meant(name: str, known: Iterable[str]) -> str:
    """ "did you mean rmu? ", or nothing where no known name is near."""
    near = difflib.get_close_matches(name, list(known), n=1)
    return f"did you mean {near[0]}? " if near else ""


def check_positive(**values: float | int | None) -> None:
    """Refuse hyperparameters that are not above 0.

    Raises:
        TypeError: one is not a number.
        ValueError: names the value.
    """
    for name, value in values.items():
        if value is None:
            continue
        if not _is_a(Real, value):
            raise TypeError(f"{name} must be a number, got {value!r}")
        if not value > 0:
            raise ValueError(f"{name} must be above 0, got {value}")
        if value == float("inf"):
            raise ValueError(f"{name} must be finite, got {value}")


def check_whole(**values: int | None) -> None:
    """Refuse counts that are not whole numbers of at least 1.

    Raises:
        TypeError: one is not a whole number.
        ValueError: one is below 1.
    """
    for name, value in values.items():
        if value is None:
            continue
        if not _is_a(Integral, value):
            raise TypeError(f"{name} must be a whole number, got {value!r}")
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")


def check_one_of(allowed: Any, **values: str) -> None:
    """Refuse a value that its `Literal` type does not list.

    Raises:
        ValueError: names the value and what is allowed.
    """
    choices = get_args(allowed)
    for name, value in values.items():
        if value not in choices:
            raise ValueError(f"unknown {name} {value!r}; choose one of {', '.join(choices)}")


def check_shard(number: int, count: int, *, overwrite: bool = False) -> None:
    """A process's part of the work is i of n.

    Args:
        number: i.
        count: n.
        overwrite: what the folder holds is to be removed first.

    Raises:
        ValueError: it is not 1 <= i <= n, or one of several and to overwrite.
    """
    if overwrite and count > 1:
        raise ValueError(
            f"shard {number}/{count} would remove what the other shards have done; remove the folder, and start all shards without "
            "overwrite"
        )
    if not 1 <= number <= count:
        raise ValueError(f"shard {number}/{count} does not exist; write 1/{count} to {count}/{count}")
