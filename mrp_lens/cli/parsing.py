"""What the text of an option means."""

from typing import TypeVar

import torch

Number = TypeVar("Number", int, float)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def dtype_named(name: str) -> torch.dtype:
    """ "float32" -> torch.float32.

    Raises:
        ValueError: another name.
    """
    if name not in DTYPES:
        raise ValueError(f"unknown dtype {name!r}; choose {', '.join(DTYPES)}")
    return DTYPES[name]


def shard_of(text: str) -> tuple[int, int]:
    """ "2/4" -> (2, 4).

    Raises:
        ValueError: it is not two numbers.
    """
    parts = text.split("/")
    if len(parts) != 2 or not all(part.isdigit() for part in parts):
        raise ValueError(f"--shard takes i/n, such as 1/4, got {text!r}")
    return int(parts[0]), int(parts[1])


def numbers(text: str | None, kind: type[Number], option: str) -> tuple[Number, ...] | None:
    """ "3,5" -> (3, 5).

    Raises:
        ValueError: a part is not such a number.
    """
    try:
        return None if text is None else tuple(kind(part) for part in text.split(","))
    except ValueError as error:
        raise ValueError(f"{option} takes numbers separated by commas, got {text!r}") from error
