"""Position rules that look at the whole batch, made to look at each row alone."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor


@contextmanager
def each_row_alone(model: Any, attention_mask: Bool[Tensor, "batch seq"]) -> Iterator[None]:
    """Inside, a text has the positions that it has alone, whatever it is batched with.

    "longrope" (Phi-3 with long context) has two sets of frequencies, and transformers takes for a whole batch the one
    that its longest row calls for: a text up to `original_max_position_embeddings` would be read as another model's
    beside a longer one.

    Args:
        model: HookedTransformer (which has no such rule) or TransformerBridge.
        attention_mask: True at real tokens.
    """
    limit = _limit(model)
    short = attention_mask.sum(dim=1) <= limit
    if attention_mask.shape[1] <= limit or not bool(short.any()):
        yield
        return
    # Positions count from a row's first token: all differences are as before, and none is beyond the limit.
    places = (attention_mask.long().cumsum(dim=1) - 1).clamp(0, limit - 1)

    def of_each_row(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> tuple[Tensor, ...]:
        states = args[0] if args else kwargs["x"]
        with torch.no_grad():
            shorter = module.forward(states, places)
        return tuple(torch.where(short[:, None, None], own, whole) for own, whole in zip(shorter, output, strict=True))

    with ExitStack() as stack:
        for module in model.original_model.modules():
            if getattr(module, "rope_type", None) == "longrope":
                stack.callback(module.register_forward_hook(of_each_row, with_kwargs=True).remove)
        yield


def same_positions(model: Any, length: int, other: int) -> bool:
    """Whether the beginning of a text has the same states in two texts of these lengths, in tokens; False where
    "longrope" reads the longer one with its other frequencies."""
    limit = _limit(model)
    return (length <= limit) == (other <= limit)


def _limit(model: Any) -> int:
    """Tokens beyond which "longrope" takes its other frequencies; 0 for all other rules."""
    config = getattr(getattr(model, "original_model", None), "config", None)
    rule = getattr(config, "rope_parameters", None) or {}
    return int(rule.get("original_max_position_embeddings") or 0) if rule.get("rope_type") == "longrope" else 0
