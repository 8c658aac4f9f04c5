"""What a notebook's first cell may have set does not reach the library's arithmetic."""

import pytest
import torch

from mrp_lens.utils.torch_state import ordinary_torch


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
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16), torch.device("meta"), ordinary_torch(gradients=False):
            drawn = torch.randn(3, 3)
            assert (drawn.dtype, drawn.device.type) == (torch.float32, "cpu")
            assert (drawn @ drawn).dtype == torch.float32
        assert torch.get_default_dtype() == torch.bfloat16
    finally:
        torch.set_default_dtype(torch.float32)


def test_everything_is_as_before_after_an_error() -> None:
    torch.set_default_dtype(torch.float64)
    try:
        with pytest.raises(RuntimeError, match="inside"), torch.no_grad(), ordinary_torch(gradients=True):
            raise RuntimeError("inside")
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.is_grad_enabled()


def test_it_is_a_decorator_as_well() -> None:
    @ordinary_torch(gradients=True)
    def enabled() -> bool:
        return torch.is_grad_enabled()

    with torch.no_grad():
        assert enabled()
        assert enabled()
