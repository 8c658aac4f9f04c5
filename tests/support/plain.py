"""What metrics are checked against: one text at a time, without batch, padding or code of the library."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from mrp_lens.models import LensModel


def ids_of(model: LensModel, text: str) -> list[int]:
    """With BOS."""
    return [model.tokenizer.bos_token_id, *model.tokenizer(text, add_special_tokens=False)["input_ids"]]


def plain_logits(model: LensModel, ids: Sequence[int]) -> list[float]:
    """At the last of the ids."""
    tokens = torch.tensor([list(ids)])
    with torch.no_grad():
        logits: Any = model(tokens, attention_mask=torch.ones_like(tokens))
    return logits[0, -1].double().tolist()


def log_probability(model: LensModel, prompt: str, completion: str) -> list[float]:
    """Of the completion's tokens, one token at a time."""
    ids, start = ids_of(model, prompt + completion), len(ids_of(model, prompt))
    return [
        float(torch.tensor(plain_logits(model, ids[:position])).log_softmax(-1)[ids[position]])
        for position in range(start, len(ids))
    ]


def states_at(
    model: LensModel,
    ids: Sequence[int],
    hooks: Sequence[str],
    layer: int = 0,
    put: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> dict[str, torch.Tensor]:
    """Hook -> states of one row, [seq, d_model], BOS included; `put` makes those at a layer's resid_post."""
    seen: dict[str, torch.Tensor] = {}
    points = [model.hook_dict[name] for name in hooks]
    if put is not None:
        points.insert(0, model.hook_dict[f"blocks.{layer}.hook_resid_post"])
        points[0].add_hook(lambda activation, hook: put(activation))
    for name in hooks:
        model.hook_dict[name].add_hook(lambda activation, hook, name=name: seen.update({name: activation[0].clone()}))
    tokens = torch.tensor([list(ids)])
    model(tokens, attention_mask=torch.ones_like(tokens))
    for point in reversed(points):
        point.fwd_hooks.pop().hook.remove()
    return seen
