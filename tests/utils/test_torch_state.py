"""What a notebook's first cell did to torch does not reach the library: every figure is the same, bit for bit."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from mrp_lens import attacks, metrics
from mrp_lens.metrics import sensitivity as derivatives
from mrp_lens.models import load_model, modules_of
from mrp_lens.utils.torch_state import ordinary_torch, refuse_inference_tensors
from tests.conftest import assert_same_state, state_of
from tests.support.every_measure import LEARN, NO_FIGURES, OF_A_MODEL, PROJECTION, WITHOUT_MODEL
from tests.support.families import save_family
from tests.support.switches import default_dtype


@contextmanager
def gradients_off() -> Iterator[None]:
    torch.set_grad_enabled(False)
    try:
        yield
    finally:
        torch.set_grad_enabled(True)


ONE_BY_ONE: dict[str, Callable[[], Any]] = {
    "grad": gradients_off,
    "no_grad": torch.no_grad,
    "inference": torch.inference_mode,
    "float64": lambda: default_dtype(torch.float64),
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "meta": lambda: torch.device("meta"),
}


@contextmanager
def everything() -> Iterator[None]:
    with ExitStack() as stack:
        for name in ("inference", "bfloat16", "autocast", "meta"):
            stack.enter_context(ONE_BY_ONE[name]())
        yield


def test_inside_gradients_are_recorded_whatever_was_switched_off_outside() -> None:
    x = torch.ones(2, requires_grad=True)
    with torch.no_grad(), ordinary_torch(gradients=True):
        assert (x * 2).requires_grad
    with torch.inference_mode():
        with ordinary_torch(gradients=True):
            assert (x * 2).requires_grad
            assert not torch.is_inference_mode_enabled()
        assert torch.is_inference_mode_enabled()


def test_new_tensors_are_float32_on_the_cpu_and_products_are_not_rounded() -> None:
    with default_dtype(torch.bfloat16):
        with ONE_BY_ONE["autocast"](), torch.device("meta"), ordinary_torch(gradients=False):
            drawn = torch.randn(3, 3)
            assert (drawn.dtype, drawn.device.type) == (torch.float32, "cpu")
            assert (drawn @ drawn).dtype == torch.float32
        assert torch.get_default_dtype() == torch.bfloat16


def test_everything_is_as_before_after_an_error() -> None:
    with default_dtype(torch.float64):
        with pytest.raises(RuntimeError, match="inside"), torch.no_grad(), ordinary_torch(gradients=True):
            raise RuntimeError("inside")
        assert torch.get_default_dtype() == torch.float64
    assert torch.is_grad_enabled()


def test_it_is_a_decorator_as_well() -> None:
    enabled = ordinary_torch(gradients=True)(torch.is_grad_enabled)
    with torch.no_grad():
        assert enabled()
        assert enabled()


def assert_equal(found: Any, expected: Any) -> None:
    if isinstance(expected, pd.DataFrame):
        pd.testing.assert_frame_equal(found, expected, check_exact=True)
    else:
        np.testing.assert_array_equal(found, expected)


def test_there_is_a_call_of_every_public_metric_and_attack() -> None:
    assert OF_A_MODEL.keys() | WITHOUT_MODEL.keys() == {*metrics.__all__, *attacks.__all__} - NO_FIGURES


@pytest.mark.slow
@pytest.mark.parametrize("name", OF_A_MODEL)
def test_torch_settings_change_no_figure(
    name: str, model: Any, untouched: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(derivatives, "ITERATIONS", 3)  # of the 100 that a figure takes; what they do is the same
    expected = OF_A_MODEL[name](model)
    with everything():
        found = OF_A_MODEL[name](model)
        assert torch.is_inference_mode_enabled()
        assert (torch.get_default_dtype(), torch.get_default_device().type) == (torch.bfloat16, "meta")
    assert_equal(found, expected)


@pytest.mark.long
@pytest.mark.parametrize("setting", ONE_BY_ONE)
@pytest.mark.parametrize("name", OF_A_MODEL)
def test_nor_does_any_setting_by_itself(name: str, setting: str, model: Any, untouched: None) -> None:
    expected = OF_A_MODEL[name](model)
    with ONE_BY_ONE[setting]():
        found = OF_A_MODEL[name](model)
    assert_equal(found, expected)


@pytest.mark.parametrize("name", WITHOUT_MODEL)
def test_nor_one_that_comes_from_frames_alone(name: str) -> None:
    expected = WITHOUT_MODEL[name]()
    with everything():
        assert_equal(WITHOUT_MODEL[name](), expected)


@pytest.mark.parametrize("settings", [torch.no_grad, torch.inference_mode, gradients_off], ids=lambda s: s.__name__)
def test_retraining_learns_with_gradients_off_and_the_block_sees_its_own_settings(
    settings: Callable[[], Any], model: Any, untouched: None
) -> None:
    tokens = torch.tensor([[1, 5, 6]])
    before = model(tokens).detach()
    with attacks.relearned(model, PROJECTION, lr=1e-2, **LEARN):
        expected = model(tokens).detach()
    with settings(), default_dtype(torch.float64):
        with attacks.relearned(model, PROJECTION, lr=1e-2, **LEARN):
            assert not torch.is_grad_enabled()
            assert torch.get_default_dtype() == torch.float64
            found = model(tokens).clone()
        assert not torch.is_grad_enabled()
    assert torch.equal(found, expected)
    assert float((expected - before).abs().max()) > 0.01


@pytest.mark.slow
def test_a_model_loaded_in_inference_mode_is_measured_but_neither_trained_nor_differentiated(
    model: Any, backend: Any, tiny_folder: Path
) -> None:
    loaded = load_model(str(tiny_folder), backend=backend)
    with torch.inference_mode():  # as if it had been loaded there
        for module in loaded.modules():
            for key, parameter in module._parameters.items():
                if parameter is not None and not parameter.is_inference():
                    module._parameters[key] = torch.nn.Parameter(parameter.clone())
    assert all(parameter.is_inference() for parameter in loaded.parameters())
    for name in ("accuracy", "predicted_coefficient", "noise_sensitivity", "probe"):
        assert_equal(OF_A_MODEL[name](loaded), OF_A_MODEL[name](model))
    for name in ("relearn", "relearned", "jailbreak", "input_gradients", "bypass", "proposition_1"):
        with pytest.raises(ValueError, match=r"loaded inside torch\.inference_mode\(\)"):
            OF_A_MODEL[name](loaded)


def test_inference_tensors_are_told_from_others() -> None:
    with torch.inference_mode():
        tensor = torch.ones(2)
    refuse_inference_tensors([torch.ones(2)])
    with pytest.raises(ValueError, match="load it outside"):
        refuse_inference_tensors([torch.ones(2), tensor])


@pytest.fixture(scope="module")
def with_dropout(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """GPT-2 as the Bridge runs it drops a tenth of what it computes while it is in training mode."""
    return load_model(str(save_family("gpt2", tmp_path_factory.mktemp("gpt2"))), backend="bridge")


@pytest.mark.parametrize("name", ["accuracy", "confidence", "noise_sensitivity", "predicted_coefficient", "relearned"])
def test_a_model_in_training_mode_is_measured_without_dropout_and_stays_in_it(name: str, with_dropout: Any) -> None:
    tokens = torch.tensor([[1, 5, 6]])
    expected = OF_A_MODEL[name](with_dropout)
    with_dropout.train()
    try:
        assert not torch.equal(with_dropout(tokens), with_dropout(tokens))
        before = state_of(with_dropout)
        assert_equal(OF_A_MODEL[name](with_dropout), expected)
        assert_same_state(before, state_of(with_dropout))
        assert all(module.training for module in modules_of(with_dropout))
    finally:
        with_dropout.eval()
