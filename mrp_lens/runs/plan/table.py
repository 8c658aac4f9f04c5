"""`plan`: what a fit will need, before any weights are loaded."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch

from mrp_lens.methods import METHODS, FitTemplate, Method
from mrp_lens.methods.base import LONGEST
from mrp_lens.models import available_backends, device_named, dtype_named
from mrp_lens.models.backends import Kind
from mrp_lens.models.load import Backend
from mrp_lens.models.sizes import ModelSizes, sizes_of
from mrp_lens.models.source import free_memory
from mrp_lens.runs.plan.devices import GIB, bytes_of, devices_needed, measured_tflops
from mrp_lens.runs.plan.memory import Setup, loading, weights
from mrp_lens.runs.plan.needs import Needs, NotPlannedError, needs, of_accuracy
from mrp_lens.utils.frames import Row, frame_of
from mrp_lens.utils.validation import PlainSettings, or_default

if TYPE_CHECKING:  # transformers takes seconds to import
    from transformers import PretrainedConfig

ACCURACY = "accuracy"  # the row of `metrics.accuracy`
TEXTS = 128  # that it reads at a time
SIZES = (24.0, 40.0, 80.0)  # GiB of devices that are counted, if no other size is given
OVERHEAD = 4 * 2**20  # bytes: masks, tokens and other small tensors that no formula counts
KEPT_BY_GLIBC = (
    "On the CPU a process grows beyond this, to about twice as much where most tensors are below 32 MiB: glibc keeps such blocks when "
    "they are freed; with MALLOC_MMAP_THRESHOLD_=65536 in the environment it returns them"
)
MOST_ROWS = 4096  # texts of a pass that are tried at most


@dataclass(frozen=True, kw_only=True)
class PlanConfig(PlainSettings):
    """What is planned for.

    Attributes:
        documents: Of each side, all of them as long as --max-length.
        max_length: Tokens at which documents are cut. Default: 512, or the context if that is shorter.
        batch_size: Documents an update on each side. Default: that of the method.
        micro_batch: Documents a pass. Default: that of the method, which is all of an update for RMU and as many as the logits fit into 2^24
            numbers for the others.
        steps: Updates. Default: those of the method.
        questions: Texts (prompt and choice) that accuracy is measured on.
        question_length: Tokens of one of them.
        answer_length: Tokens of its choice, on average.
        device_memory: Of one device, such as `24GiB`. Default: what is free on the present one.
        tflops: Thousand billion operations a second that are reached. Default: measured, in products of matrices.
    """

    documents: int = 1000
    max_length: int | None = None
    batch_size: int | None = None
    micro_batch: int | None = None
    steps: int | None = None
    questions: int = 1000
    question_length: int = 64
    answer_length: float = 4.0
    device_memory: str | None = None
    tflops: float | None = None

    def check(self, sizes: ModelSizes) -> None:
        """Refuse what cannot be meant.

        Raises:
            TypeError, ValueError: name the setting, its value and what is allowed.
        """
        counts = ("documents", "batch_size", "micro_batch", "steps", "questions", "question_length")
        self.check_values(above_0=("tflops", "answer_length"), counts=counts)
        if self.max_length is not None and not 2 <= self.max_length <= sizes.n_ctx:
            raise ValueError(f"max_length {self.max_length} must be from 2 to the model's context length {sizes.n_ctx}")
        if self.answer_length >= self.question_length:
            raise ValueError(
                f"answer_length {self.answer_length} must be below question_length {self.question_length}: a text is a prompt and a choice"
            )


@dataclass(frozen=True)
class Plan:
    """What fits of a model will need.

    Attributes:
        sizes: of the model.
        frame: a row for each method and class of TransformerLens, and one for `metrics.accuracy`. Columns: `method`, `form`;
            `why_not`, where the method cannot be fitted or nobody said what it needs, and nothing else is known then;
            `batch_size` and `rows` (documents of a pass), `length` (tokens of a text), `phase` (the part of the fit that holds
            most); in GiB `weights`, `caches`, `activations`, `logits`, `optimizer`, `overhead` in this part, `working` (all but the
            weights), `peak` (with them) and `loading` (while the model is loaded); `operations` (10^12) and `seconds`; `largest`,
            the documents that a pass can have on the device (0: not even one), and `fits`; `devices`, how many of each size.
        device_memory: bytes of the device.
        tflops: thousand billion operations a second.
        notes: sentences on where these two come from, and on what else a process takes.
    """

    sizes: ModelSizes
    frame: pd.DataFrame
    device_memory: float
    tflops: float
    notes: tuple[str, ...]


def plan(
    model: "str | Path | PretrainedConfig",
    methods: Sequence[str | Method] = (),
    *,
    backend: Backend | str = "auto",
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    **settings: Any,
) -> Plan:
    """Say what a fit will need, before any weights are loaded: memory by part, time, the batch that fits, the number of devices.

    Of the model nothing but the configuration is read. Memory follows from counts of tensors (`mrp_lens.runs.plan.memory`); time is
    the arithmetic alone at the speed given, which a loaded machine or a small model does not reach.

    Args:
        model: "demo", a folder with a `config.json`, a name on the Hub, or a configuration of transformers.
        methods: names, or methods with their settings. Empty: all.
        backend: as in `load_model`; "auto": both classes of TransformerLens, where both exist.
        dtype: of the weights. None: float32.
        device: whose memory and speed count where none are given. None: a GPU if there is one, else the CPU.
        settings: the fields of `mrp_lens.runs.plan.PlanConfig`.

    Raises:
        TypeError, ValueError: no such model or method, or a setting that cannot be meant.

    Example:
        >>> plan("demo", ["rmu"], backend="bridge", tflops=0.05).frame["phase"].tolist()
        ['step', 'scoring choices']
    """
    unknown = set(settings) - {each.name for each in fields(PlanConfig)}
    if unknown:
        raise TypeError(
            f"plan has no setting {min(unknown)!r}; it has {', '.join(each.name for each in fields(PlanConfig))}"
        )
    config = PlanConfig(**settings)
    if backend not in ("auto", "hooked", "bridge"):
        raise ValueError(f"unknown backend {backend!r}; choose 'auto', 'hooked' or 'bridge'")
    precision, where = dtype_named(torch.float32 if dtype is None else dtype), device_named(device)
    memory = None if config.device_memory is None else bytes_of(config.device_memory)
    sizes = sizes_of(model)
    config.check(sizes)
    chosen = [METHODS[each]() if isinstance(each, str) else each for each in methods or METHODS]
    fitted = [_with(method, config) for method in chosen]
    notes = []
    if config.tflops is None:
        speed = measured_tflops(where, precision)
        notes.append(f"{speed:.3g} TFLOP/s: measured here ({where}), in products of matrices")
    else:
        speed = config.tflops
    if memory is None:
        memory = float(free_memory(where))
        notes.append(f"{memory / GIB:.1f} GiB: free here ({where})")
    if where.type == "cpu":
        notes.append(KEPT_BY_GLIBC)
    forms: tuple[Kind, ...] = available_backends() if backend == "auto" else (backend,)  # type: ignore[assignment]
    length = or_default(config.max_length, min(LONGEST, sizes.n_ctx))
    sized = _Sized(memory, SIZES if config.device_memory is None else (memory / GIB,))
    rows: list[Row] = []
    for form in forms:
        setup = Setup(sizes, form, precision.itemsize, length, config.documents)
        rows += [_row(method, setup, speed, sized) for method in fitted]
        rows.append(_accuracy_row(setup, config, speed, sized))
    return Plan(sizes, frame_of(rows), memory, speed, tuple(notes))


def _with(method: Method, config: PlanConfig) -> Method:
    """The method with the settings of the plan that it has."""
    given = {name: getattr(config, name) for name in ("batch_size", "micro_batch", "steps", "max_length")}
    known = {each.name for each in fields(method)}
    return replace(method, **{name: value for name, value in given.items() if name in known and value is not None})


def _row(method: Method, setup: Setup, speed: float, sized: "_Sized") -> Row:
    """Of a method in one class; why it cannot be planned, where that is so."""
    own = getattr(method, "max_length", None)
    setup = replace(setup, length=min(or_default(own, setup.length), setup.sizes.n_ctx))
    row = {"method": method.name, "form": setup.form, "length": setup.length}
    if isinstance(method, FitTemplate):
        method.check(setup.sizes.stand_in)
    try:
        found = needs(method, setup)
    except NotPlannedError as error:
        return {**row, "why_not": str(error)}
    batch = getattr(method, "batch_size", None)

    def with_rows(rows: int) -> Needs:
        return needs(
            replace(method, batch_size=max(rows, batch or 1), micro_batch=rows),
            replace(setup, documents=max(rows, setup.documents)),
        )

    return {**row, "batch_size": batch, **_figures(found, setup, speed, sized, with_rows if found.rows else None)}


def _accuracy_row(setup: Setup, config: PlanConfig, speed: float, sized: "_Sized") -> Row:
    """Of `metrics.accuracy`."""
    length = min(config.question_length, setup.sizes.n_ctx)
    asked = replace(setup, length=length, documents=config.questions)

    def with_rows(rows: int) -> Needs:
        return of_accuracy(asked, texts=rows, answer=config.answer_length)

    texts = min(TEXTS, config.questions)
    row = {"method": ACCURACY, "form": setup.form, "length": length, "batch_size": texts}
    return {**row, **_figures(with_rows(texts), asked, speed, sized, with_rows)}


@dataclass(frozen=True)
class _Sized:
    """Bytes of the device, and the sizes in GiB of which devices are counted."""

    memory: float
    counted: tuple[float, ...]


def _figures(
    found: Needs, setup: Setup, speed: float, sized: "_Sized", with_rows: Callable[[int], Needs] | None
) -> Row:
    peak, model = found.peak, weights(setup)
    working = peak.total + OVERHEAD
    count = {size: devices_needed(setup, model, peak, size * GIB - OVERHEAD) for size in sized.counted}
    parts = {name: getattr(peak, name) / GIB for name in ("caches", "activations", "logits", "optimizer")}
    return {
        "rows": found.rows or None,
        "phase": peak.name,
        "weights": model / GIB,
        **parts,
        "overhead": OVERHEAD / GIB,
        "working": working / GIB,
        "peak": (model + working) / GIB,
        "loading": loading(setup) / GIB,
        "operations": found.operations / 1e12,
        "seconds": found.operations / 1e12 / speed,
        "largest": None if with_rows is None else _largest(with_rows, sized.memory - model - OVERHEAD),
        "fits": max(model + working, loading(setup)) <= sized.memory,
        "devices": ", ".join(
            f"{'none' if number is None else number} x {size:g} GiB" for size, number in count.items()
        ),
    }


def _largest(with_rows: Callable[[int], Needs], room: float) -> int:
    """Texts of the largest pass that there is room for, 4096 at most; 0: not even for one."""
    least, most = 0, MOST_ROWS + 1
    while most - least > 1:
        middle = (least + most) // 2
        least, most = (middle, most) if with_rows(middle).peak.total <= room else (least, middle)
    return least
