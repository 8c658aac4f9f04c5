"""Whether a processor is any good at half precision."""

import logging
import time
from functools import cache

import torch

from mrp_lens.utils.processes import is_first

logger = logging.getLogger(__name__)

HALVES = (torch.bfloat16, torch.float16)
ROWS, WIDTH = 64, 1024  # of the matrices that are multiplied to find out
TIMES = 3  # the quickest of so many products counts
SLOW = 3.0  # times as long as in float32, from which on it is said


def warn_of_slow_half(dtype: torch.dtype, device: torch.device) -> None:
    """Log a warning where a model in half precision would run several times as slowly as in float32: a CPU without instructions
    for it, on which PyTorch falls back to plain loops (5 times as slow forward and 13 with the backward pass on an AMD EPYC with
    AVX2 alone)."""
    if device.type != "cpu" or dtype not in HALVES or not is_first():
        return
    slowness = product_seconds(dtype) / product_seconds(torch.float32)
    if slowness >= SLOW:
        name = str(dtype).removeprefix("torch.")
        logger.warning(
            "this processor multiplies matrices in %s %.0f times as slowly as in float32; leave dtype out where twice the memory is there",
            name,
            slowness,
        )


@cache
def product_seconds(dtype: torch.dtype) -> float:
    """How long a product of two matrices takes on the CPU, at best."""
    rows, weight = torch.ones(ROWS, WIDTH, dtype=dtype), torch.ones(WIDTH, WIDTH, dtype=dtype)
    taken = []
    for _ in range(TIMES):
        begun = time.perf_counter()
        torch.nn.functional.linear(rows, weight)
        taken.append(time.perf_counter() - begun)
    return min(taken)
