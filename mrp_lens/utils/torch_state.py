"""torch's process-wide switches, put where this library's arithmetic needs them, whatever a notebook's first cell has set."""

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext

import torch
from torch import Tensor

AUTOCAST_DEVICES = ("cpu", "cuda")


@contextmanager
def ordinary_torch(*, gradients: bool) -> Iterator[None]:
    """Inside, torch is as it comes: no inference mode, no autocast, new tensors in float32 on the CPU. All as before on exit.

    `torch.set_grad_enabled(False)` at the top of a notebook would make a fit learn nothing and an attack find nothing, in
    silence; `torch.set_default_dtype(torch.bfloat16)` would draw other directions from the same seed.

    Args:
        gradients: whether operations are recorded for a backward pass.

    Example:
        >>> with torch.no_grad(), ordinary_torch(gradients=True):
        ...     torch.is_grad_enabled()
        True
    """
    dtype = torch.get_default_dtype()
    with ExitStack() as stack:
        if torch.get_default_dtype() != torch.float32:
            stack.callback(torch.set_default_dtype, dtype)
            torch.set_default_dtype(torch.float32)
        if torch.is_inference_mode_enabled():
            stack.enter_context(torch.inference_mode(False))
        for kind in AUTOCAST_DEVICES:
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        if torch.get_default_device() != torch.device("cpu"):
            stack.enter_context(torch.device("cpu"))
        stack.enter_context(torch.set_grad_enabled(gradients))
        yield


def without_autocast(states: Tensor) -> AbstractContextManager[object]:
    """Inside, products are computed in the precision of what is multiplied; all else, gradients included, as it is outside.

    Under autocast to bfloat16 a projection in float32 would leave 3e-6 of what it removes.
    """
    kind = states.device.type
    return torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext()


def refuse_inference_tensors(tensors: Iterable[Tensor]) -> None:
    """Refuse what was made inside `torch.inference_mode()`: torch never differentiates through it, nor lets it be changed.

    Raises:
        ValueError: one of the tensors is such a one.
    """
    if any(tensor.is_inference() for tensor in tensors):
        raise ValueError(
            "the model was loaded inside torch.inference_mode(), so that its weights can be neither trained nor differentiated through; "
            "load it outside (torch.no_grad() does no harm)"
        )
