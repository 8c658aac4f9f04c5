"""Rounding a model's weights to few bits, as who deploys it may: knowledge that an edit hid has come back that way."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from mrp_lens.models import LensModel, restored
from mrp_lens.models.quantised import refuse_packed
from mrp_lens.utils.torch_state import refuse_inference_tensors

# HookedTransformer's matrices -> the axes that they sum over; the others are output channels.
_INPUT_AXES = {
    **dict.fromkeys(["W_Q", "W_K", "W_V", "_W_K", "_W_V"], (1,)),  # [heads, d_model, d_head]
    "W_O": (0, 1),  # [heads, d_head, d_model]
    **dict.fromkeys(["W_in", "W_gate", "W_out"], (0,)),  # [in, out]
}
_FEWEST_BITS = 2
_BLOCK = 64  # numbers of NF4 that share a scale


@contextmanager
def quantized(model: LensModel, bits: int) -> Iterator[None]:
    """Every matrix of the blocks rounded to `bits` bits; embeddings, norms and biases stay. On exit all is as before, bit for bit.

    Symmetric rounding to the nearest, one scale an output channel, none left out: what bitsandbytes and others do
    without calibration data. Both classes round the same channels of the checkpoint.

    Raises:
        ValueError: fewer than 2 bits, or a block with a matrix whose layout is not known (a mixture of experts, perhaps).
    """
    if isinstance(bits, bool) or not isinstance(bits, int) or bits < _FEWEST_BITS:
        raise ValueError(f"bits must be an int of at least {_FEWEST_BITS}, got {bits!r}")
    with _rounded(model, partial(round_channels, bits=bits)):
        yield


@contextmanager
def quantized_to_nf4(model: LensModel) -> Iterator[None]:
    """Every matrix of the blocks as bitsandbytes gives it back from NF4 (QLoRA, arXiv 2305.14314), blocks of 64 numbers along the
    inputs; embeddings, norms and biases stay. On exit all is as before, bit for bit.

    Raises:
        ImportError: bitsandbytes is not installed.
        ValueError: a block with a matrix whose layout is not known.
    """
    with _rounded(model, to_nf4_and_back):
        yield


@contextmanager
def _rounded(model: LensModel, change: Callable[[Tensor, tuple[int, ...]], Tensor]) -> Iterator[None]:
    matrices = block_matrices(model)
    refuse_inference_tensors(matrix for matrix, _ in matrices)
    with restored(matrix for matrix, _ in matrices):
        with torch.no_grad():
            for matrix, inputs in matrices:
                matrix.copy_(change(matrix, inputs))
        yield


def to_nf4_and_back(weights: Float[Tensor, "..."], inputs: tuple[int, ...]) -> Float[Tensor, "..."]:
    """The weights, of any layout, from NF4 of their output channels one after another, each along the axes `inputs`; float32."""
    from bitsandbytes import functional

    order = (*(axis for axis in range(weights.ndim) if axis not in inputs), *inputs)
    channels = weights.detach().float().permute(order)
    # As one row: of a matrix with rows that are no multiple of 64, bitsandbytes 0.50 gives back other values on a CPU.
    packed, state = functional.quantize_4bit(channels.reshape(-1).contiguous(), blocksize=_BLOCK, quant_type="nf4")
    back: Tensor = functional.dequantize_4bit(packed, state)
    return back.reshape(channels.shape).permute([order.index(axis) for axis in range(weights.ndim)])


def round_channels(weights: Float[Tensor, "..."], inputs: tuple[int, ...], bits: int) -> Float[Tensor, "..."]:
    """Each output channel w as s * round(w / s), s = max |w| / (2^(bits - 1) - 1); float32.

    Args:
        weights: of any layout.
        inputs: the axes that a channel runs along.
        bits: per weight; 8 gives the integers -127..127.
    """
    wide = weights.detach().float()
    scale = wide.abs().amax(dim=inputs, keepdim=True) / (2 ** (bits - 1) - 1)
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))  # a channel of zeros stays one
    return (wide / scale).round() * scale


def block_matrices(model: LensModel) -> list[tuple[torch.nn.Parameter, tuple[int, ...]]]:
    """Every matrix in the blocks once, with the axes that it sums over.

    Raises:
        ValueError: the layout of one is not known, or it is quantised already.
    """
    found: dict[int, tuple[torch.nn.Parameter, tuple[int, ...]]] = {}
    for block in model.blocks:
        for name, module in block.named_modules():
            for key, parameter in module.named_parameters(recurse=False):
                refuse_packed(parameter, f"{name}.{key}")
                if parameter.ndim > 1 and not _is_bias(key):
                    found[id(parameter)] = (parameter, _input_axes(module, f"{name}.{key}"))
    return list(found.values())


def _is_bias(key: str) -> bool:
    """Of heads they are [heads, d_head], of experts [experts, out]."""
    return key.lstrip("_").startswith("b") or key.endswith("_bias")


def _input_axes(module: torch.nn.Module, name: str) -> tuple[int, ...]:
    key = name.rsplit(".", 1)[-1]
    if isinstance(module, torch.nn.Linear):
        return (1,)
    if type(module).__name__ == "Conv1D":  # GPT-2's [in, out]
        return (0,)
    if key == "weight" and type(module).__name__.endswith("Router"):  # [experts, in]
        return (1,)
    if key in ("gate_up_proj", "down_proj") and hasattr(module, "is_transposed"):  # all experts: [experts, out, in]
        return (1,) if module.is_transposed else (2,)
    if key in _INPUT_AXES:
        return _INPUT_AXES[key]
    raise ValueError(
        f"the matrix {name} of a {type(module).__name__} has a layout that is not known, so its output channels cannot be told; "
        "leave rounding out with kinds=..."
    )
