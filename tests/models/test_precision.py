"""Half precision on a processor that has no instructions for it is warned of when a model is loaded."""

import logging
from pathlib import Path

import pytest
import torch

from mrp_lens.models import load_model, precision
from mrp_lens.models.precision import warn_of_slow_half

CPU = torch.device("cpu")


@pytest.fixture
def taking(monkeypatch: pytest.MonkeyPatch) -> None:
    """A processor that is slow in bfloat16 and not in float16."""
    seconds = {torch.float32: 1.0, torch.bfloat16: 5.2, torch.float16: 1.1}
    monkeypatch.setattr(precision, "product_seconds", seconds.__getitem__)


@pytest.mark.usefixtures("taking")
def test_loading_in_a_slow_precision_is_warned_of(tiny_folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    load_model(str(tiny_folder), backend="bridge", dtype="bfloat16", device="cpu")
    assert "multiplies matrices in bfloat16 5 times as slowly as in float32; leave dtype out" in caplog.text
    assert [record.levelno for record in caplog.records] == [logging.WARNING]


@pytest.mark.usefixtures("taking")
def test_neither_a_quick_precision_nor_another_device_is(caplog: pytest.LogCaptureFixture) -> None:
    warn_of_slow_half(torch.float32, CPU)
    warn_of_slow_half(torch.float16, CPU)
    warn_of_slow_half(torch.bfloat16, torch.device("cuda"))
    assert not caplog.records


def test_a_product_is_timed_once() -> None:
    precision.product_seconds.cache_clear()
    assert precision.product_seconds(torch.float32) > 0
    assert precision.product_seconds(torch.float32) == precision.product_seconds(torch.float32)
    assert precision.product_seconds.cache_info().misses == 1
