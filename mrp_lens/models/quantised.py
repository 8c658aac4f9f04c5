"""Models whose matrices are packed integers: of those with 8 bits the states can be hooked and measured, no matrix can be edited.

bitsandbytes multiplies by 8-bit matrices as they are and passes gradients through to the states. Of other formats, and of 4 bits, whose
product for a single token has no gradient on a CPU, nothing is loaded.
"""

from typing import Any

import torch
from torch import Tensor

REMEDY = "Load the checkpoint in float32, bfloat16 or float16"


def refuse_quantised(setting: Any, name: str) -> None:
    """Edits need the weights themselves.

    Raises:
        ValueError: the configuration says that the weights are quantised.
    """
    if setting:
        raise ValueError(
            f"{name} is quantised ({_method(setting) or 'see quantization_config'}): its matrices are packed integers that can be "
            f"neither projected exactly nor trained. {REMEDY}"
        )


def is_eight_bit(setting: Any, name: str) -> bool:
    """Whether the configuration says that the weights are bitsandbytes' integers of 8 bits; False: they are not quantised.

    Raises:
        ValueError: they are quantised otherwise.
    """
    if not setting:
        return False
    if _method(setting) != "bitsandbytes" or not _value(setting, "load_in_8bit"):
        bits = " in 4 bits" if _value(setting, "load_in_4bit") else ""
        raise ValueError(
            f"{name} is quantised ({_method(setting) or 'see quantization_config'}{bits}): its matrices are packed integers. Those of "
            f"bitsandbytes in 8 bits can be hooked and measured, no others. {REMEDY}"
        )
    return True


def refuse_packed(values: Tensor, name: str) -> None:
    """Refuse a matrix that is to be edited or trained.

    Raises:
        ValueError: it holds integers.
    """
    if not values.is_floating_point():
        raise ValueError(
            f"{name} is quantised ({str(values.dtype).removeprefix('torch.')}): packed integers can be neither edited nor trained. "
            f"{REMEDY}; projections and steering, which change states, work on this model as it is"
        )


def holds_packed(model: torch.nn.Module) -> bool:
    """Whether some of its matrices are packed integers."""
    return not all(parameter.is_floating_point() for parameter in model.parameters())


def _method(setting: Any) -> str | None:
    method = _value(setting, "quant_method")
    return None if method is None else str(getattr(method, "value", method))


def _value(setting: Any, key: str) -> Any:
    return setting.get(key) if isinstance(setting, dict) else getattr(setting, key, None)
