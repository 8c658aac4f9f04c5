"""Products with Jacobians against differences of outputs and autograd's full Jacobian."""

from typing import Any

import numpy as np
import pytest
import torch

from mrp_lens.metrics.sensitivity import JacobianSize, LayersAbove, jacobian_size
from mrp_lens.models import LensModel
from tests.conftest import D_MODEL
from tests.support.jacobians import LAYER, PROMPTS, ids_of, jacobians, outputs_with, relative


@pytest.mark.parametrize("side", ["left", "right"])
def test_products_with_the_jacobian_are_those_of_differences_in_a_padded_batch(
    model: LensModel, double: Any, side: str, untouched: None
) -> None:
    rows = [ids_of(double, prompt) for prompt in PROMPTS]
    width = max(map(len, rows))
    starts = [width - len(row) if side == "left" else 0 for row in rows]
    tokens, mask = torch.zeros(2, width, dtype=torch.long), torch.zeros(2, width, dtype=torch.bool)
    for i, (row, start) in enumerate(zip(rows, starts, strict=True)):
        tokens[i, start : start + len(row)], mask[i, start : start + len(row)] = torch.tensor(row), True
    places = [[len(row) - 3, len(row) - 1] for row in rows]
    moved = torch.zeros_like(mask)
    for i, start in enumerate(starts):
        moved[i, [start + place for place in places[i]]] = True
    read = torch.tensor([start + len(row) - 1 for row, start in zip(rows, starts, strict=True)])
    generator = torch.Generator().manual_seed(0)
    tangents = torch.randn(2, width, D_MODEL, generator=generator)
    for output, which in (("logits", 0), ("stream", 1)):
        above = LayersAbove(model, LAYER, tokens, mask, moved, read, output)
        pushed = above.jvp(tangents)
        cotangents = torch.randn(pushed.shape, generator=generator)
        pulled = above.vjp(cotangents)
        assert float(pulled[~moved].abs().max()) == 0.0
        for i, row in enumerate(rows):
            plain = jacobians(double, row, LAYER, places[i], None)[which]
            assert relative(pushed[i], plain @ tangents[i, moved[i]].flatten().numpy()) < 1e-3
            assert relative(pulled[i, moved[i]].flatten(), plain.T @ cotangents[i].numpy()) < 1e-3
            wrong = jacobians(double, row, LAYER + 1, places[i], None)[which]
            assert relative(pushed[i], wrong @ tangents[i, moved[i]].flatten().numpy()) > 0.1


def test_products_with_the_jacobian_are_those_of_autograds_full_jacobian(model: LensModel, untouched: None) -> None:
    ids = ids_of(model, PROMPTS[0])
    tokens = torch.tensor([ids])
    ones = torch.ones_like(tokens, dtype=torch.bool)
    above = LayersAbove(model, LAYER, tokens, ones, ones, torch.tensor([len(ids) - 1]), "stream")

    def stream(shift: torch.Tensor) -> torch.Tensor:
        return outputs_with(model, ids, LAYER, lambda states: states + shift)[1]

    full: Any = torch.autograd.functional.jacobian(stream, torch.zeros(1, len(ids), D_MODEL))
    matrix = full.reshape(D_MODEL, -1)
    generator = torch.Generator().manual_seed(0)
    coordinates = torch.randn(5, above.inputs, generator=generator)  # five tangents on one row
    cotangents = torch.randn(5, D_MODEL, generator=generator)
    pushed, pulled = above.jvp(above.spread(coordinates)), above.vjp(cotangents)
    assert relative(pushed, coordinates @ matrix.T) < 1e-5
    assert relative(pulled.flatten(1), cotangents @ matrix) < 1e-5
    shifted = above.outputs(1e-3 * above.spread(coordinates)) - above.outputs(0 * above.spread(coordinates))
    assert relative(shifted, 1e-3 * pushed) < 0.02


def test_states_after_the_position_that_is_read_have_no_influence(model: LensModel, untouched: None) -> None:
    tokens = torch.tensor([ids_of(model, PROMPTS[0])])
    ones = torch.ones_like(tokens, dtype=torch.bool)
    later = torch.arange(tokens.shape[1])[None] > 2
    above = LayersAbove(model, LAYER, tokens, ones, later, torch.tensor([2]))
    assert float(above.jvp(torch.ones(1, tokens.shape[1], D_MODEL)).abs().max()) == 0.0
    assert float(above.vjp(torch.ones(1, model.cfg.d_vocab)).abs().max()) == 0.0


def test_the_size_of_a_jacobian_is_exact_with_enough_products_and_close_with_fewer(
    model: LensModel, double: Any
) -> None:
    ids = ids_of(model, PROMPTS[0])
    tokens = torch.tensor([ids])
    ones = torch.ones_like(tokens, dtype=torch.bool)
    above = LayersAbove(model, LAYER, tokens, ones, ones, torch.tensor([len(ids) - 1]))
    singular = np.linalg.svd(jacobians(double, ids, LAYER, list(range(len(ids))), None)[0], compute_uv=False)

    def size(probes: int) -> JacobianSize:
        return jacobian_size(above, probes=probes, batch_size=50, generator=torch.Generator().manual_seed(0))

    exact = size(above.inputs)
    assert exact.squared_norm == pytest.approx((singular**2).sum(), rel=1e-3)
    assert exact.top_eigenvalue == pytest.approx(singular[0] ** 2, rel=1e-3)
    # Hutchinson's variance with random signs is at most 2 ||A||_F^2 / probes; four standard deviations
    tolerance = 4 * (2 * (singular[8:] ** 4).sum() / 100) ** 0.5
    estimate = size(100)
    assert above.inputs > 100
    assert 0 < abs(estimate.squared_norm - (singular**2).sum()) < tolerance < 0.3 * (singular**2).sum()
    assert estimate.top_eigenvalue == exact.top_eigenvalue
