"""`plan`: what a fit will need, before any weights are loaded."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch

from mrp_lens.methods import METHODS, Method
from mrp_lens.methods.base import LONGEST
from mrp_lens.models import available_backends, device_named, dtype_named
from mrp_lens.models.backends import Kind
from mrp_lens.models.load import Backend
from mrp_lens.models.sizes import ModelSizes, sizes_of
from mrp_lens.models.source import free_memory
from mrp_lens.runs.plan.devices import GIB, bytes_of, devices_needed, measured_tflops
from mrp_lens.runs.plan.memory import Setup, loading, weights
from mrp_lens.runs.plan.needs import Needs, needs, of_accuracy
from mrp_lens.utils.frames import Row, frame_of
from mrp_lens.utils.validation import check_one_of, check_positive, check_whole

if TYPE_CHECKING:  # transformers takes seconds to import
    from transformers import PretrainedConfig

ACCURACY = "accuracy"  # the row of `metrics.accuracy`
TEXTS = 128  # that it reads at a time
SIZES = (24, 40, 80)  # GiB of devices that are counted, if no other size is given
OVERHEAD = 32 * 2**20  # bytes: what is loaded with the first pass, and small tensors that nobody counts
MOST_ROWS = 4096


@dataclass(frozen=True, kw_only=True)
class PlanConfig:
    """What is planned for.

    Attributes:
        methods: Names of methods, separated by commas. Default: all.
        documents: Documents of each side.
        max_length: Tokens of a document, at which it is cut. Default: 512, or the context if that is shorter.
        batch_size: Documents an update on each side. Default: each method's.
        micro_batch: Documents a pass. Default: all of a batch.
        steps: Updates. Default: each method's.
        question_length, answer_length: Tokens of a question with its answer, and of that, where `metrics.accuracy` is planned.
        device_memory: Of one device, such as `24GiB`. Default: what is free on the present one.
        tflops: Thousand billion operations a second that are reached. Default: measured by multiplying matrices.
    """

    methods: tuple[str, ...] = ()
    documents: int = 1000
    max_length: int | None = None
    batch_size: int | None = None
    micro_batch: int | None = None
    steps: int | None = None
    question_length: int = 64
    answer_length: int = 4
    device_memory: str | None = None
    tflops: float | None = None
