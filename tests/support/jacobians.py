"""Jacobians of the layers above, taken one coordinate at a time: slow, and independent of the library's."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mrp_lens.models import LensModel
from tests.conftest import D_MODEL, LAYERS

Array = NDArray[np.float64]
PROMPTS = ["The colour of Zaxim is", "Question: What is the taste of Xim Oline? Answer:"]
LAYER, COEFFICIENT = 1, 1.5
DIRECTION = torch.rand(D_MODEL, generator=torch.Generator().manual_seed(3))
SMALL = 1e-5  # of the noise: 0.02 in length, against 1.5 for the state


def outputs_with(
    model: LensModel, ids: list[int], layer: int, put: Callable[[torch.Tensor], torch.Tensor], rows: int = 1
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and final stream of copies of a row at its last position, where `put` makes the states at a layer."""
    seen: dict[str, torch.Tensor] = {}
    names = [f"blocks.{layer}.hook_resid_post", f"blocks.{LAYERS - 1}.hook_resid_post"]
    points = [model.hook_dict[name] for name in names]
    points[0].add_hook(lambda activation, hook: put(activation))
    points[1].add_hook(lambda activation, hook: seen.update(stream=activation[:, -1]))
    tokens = torch.tensor([ids]).repeat(rows, 1)
    logits = model(tokens, attention_mask=torch.ones_like(tokens))[:, -1]
    for point in points:
        point.fwd_hooks.pop().hook.remove()
    return logits, seen["stream"]


def jacobians(
    model: LensModel, ids: list[int], layer: int, places: list[int], base: torch.Tensor | None
) -> list[Array]:
    """Of logits and final stream in the states at `places`, which are `base` (None: the model's own), by central
    differences: [outputs, places * d_model]."""
    step = 1e-3
    columns: list[list[Array]] = [[], []]
    for place in places:

        def put(states: torch.Tensor, place: int = place) -> torch.Tensor:
            states = states.clone()
            if base is not None:
                states[:, places] = base.to(states)
            for coordinate in range(D_MODEL):
                states[2 * coordinate, place, coordinate] += step
                states[2 * coordinate + 1, place, coordinate] -= step
            return states

        with torch.no_grad():
            for column, ends in zip(columns, outputs_with(model, ids, layer, put, 2 * D_MODEL), strict=True):
                column.append(((ends[::2] - ends[1::2]) / (2 * step)).T.double().numpy())
    return [np.concatenate(column, axis=1) for column in columns]


def relative(found: Any, expected: Any) -> float:
    found, expected = np.asarray(found, float), np.asarray(expected, float)
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))
