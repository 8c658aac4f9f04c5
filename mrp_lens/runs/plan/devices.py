"""Sizes of memory as people write them, how fast a device multiplies, and how many devices a model takes."""

import math
import re
import time
from statistics import median

import torch

from mrp_lens.runs.plan.memory import Phase, Setup

GIB = 2**30
SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(GiB|GB|MiB|MB)?", re.IGNORECASE)
UNITS = {"gib": 2**30, "gb": 10**9, "mib": 2**20, "mb": 10**6}
MATRIX, LARGE_MATRIX = 1024, 8192  # sides of the matrices that are multiplied, on the CPU and on a GPU
REPEATS = 5


def bytes_of(size: str | float) -> float:
    """ "24GiB" -> 25769803776; a number without a unit is GiB.

    Raises:
        ValueError: it is no size, or not above 0.
    """
    found = SIZE.fullmatch(str(size).strip())
    value = 0.0 if found is None else float(found[1]) * UNITS[(found[2] or "GiB").lower()]
    if not value > 0.0:
        raise ValueError(f"device memory must be a size above 0 such as '24GiB' or '80GB', got {size!r}")
    return value


def measured_tflops(device: torch.device, dtype: torch.dtype) -> float:
    """Thousand billion operations a second in products of square matrices on a device: the median of five."""
    side = LARGE_MATRIX if device.type == "cuda" else MATRIX
    matrix = torch.ones(side, side, device=device, dtype=dtype)

    def seconds() -> float:
        begun = time.perf_counter()
        float((matrix @ matrix)[0, 0])  # on a GPU, waits for the product
        return time.perf_counter() - begun

    seconds()
    return 2 * side**3 / median(seconds() for _ in range(REPEATS)) / 1e12


def devices_needed(setup: Setup, weights: float, peak: Phase, memory: float) -> int | None:
    """Devices of one size over which whole blocks are spread, with what each holds for its backward pass. None: none are enough.

    All else that a fit holds has to find room on each of them: on one it is logits, on another the embedding.
    """
    depth, rest = setup.sizes.n_layers, peak.total - peak.spread
    block = (weights + peak.spread) / depth
    each = int((memory - rest) // block)
    return None if each < 1 else math.ceil(depth / each)
