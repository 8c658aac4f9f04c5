"""How the layers above react, on the tiny model, against one document at a time, differences and full Jacobians."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from mrp_lens.data import Corpus
from mrp_lens.edits import SteeringEdit
from mrp_lens.metrics.sensitivity import (
    JacobianSize,
    LayersAbove,
    jacobian_size,
    noise_sensitivity,
    predicted_coefficient,
)
from mrp_lens.models import LensModel
from tests.conftest import D_MODEL, LAYERS
from tests.support.jacobians import DIRECTION, LAYER, PROMPTS, jacobians, outputs_with, relative
from tests.support.plain import ids_of, states_at
from tests.support.states import GROUPS, Subject

BATCH = 4
DRAWS = 2
FINAL = f"blocks.{LAYERS - 1}.hook_resid_post"


def token_rows(model: LensModel, corpus: Corpus) -> list[list[int]]:
    """Of the documents that hold a token, shortest first, which is the order in which they are read."""
    rows = [ids_of(model, document.prompt + document.completion) for document in corpus.documents]
    return sorted((row for row in rows if len(row) > 1), key=len)


def shifted(shift: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda states: (states.float() + shift).to(states.dtype)


def plain_sensitivity(
    model: LensModel, corpus: Corpus, layer: int, *, noise: float | None, relative: float | None
) -> dict[str, float]:
    name = f"blocks.{layer}.hook_resid_post"
    rows = token_rows(model, corpus)
    generator = torch.Generator().manual_seed(5)
    found: dict[str, list[float]] = {"sensitivity": [], "input_ratio": [], "norm": [], "noise": []}
    for start in range(0, len(rows), BATCH):
        batch = rows[start : start + BATCH]
        clean = [states_at(model, ids, [name, FINAL]) for ids in batch]
        states = torch.cat([c[name][1:].float() for c in clean])
        variance = (
            noise if noise is not None else float(relative or 0) ** 2 * float((states**2).sum(1).mean()) / D_MODEL
        )
        units = torch.randn(DRAWS, len(states), D_MODEL, generator=generator)
        first = 0
        for ids, before in zip(batch, clean, strict=True):
            mine = units[:, first : first + len(ids) - 1]
            first += len(ids) - 1
            reactions, ratios = [], []
            for unit in mine:
                shift = torch.cat([torch.zeros(1, D_MODEL), variance**0.5 * unit])
                after = states_at(model, ids, [FINAL], layer, shifted(shift))[FINAL].float()
                stream = before[FINAL].float()
                reactions.append((((after - stream) ** 2).sum(1) / (stream**2).sum(1))[1:].double().numpy())
                ratios.append(((shift**2).sum(1) / (before[name].float() ** 2).sum(1))[1:].double().numpy())
            found["sensitivity"] += list(np.mean(reactions, axis=0))
            found["input_ratio"] += list(np.mean(ratios, axis=0))
            found["norm"] += before[name][1:].float().norm(dim=1).tolist()
            found["noise"] += [variance] * (len(ids) - 1)
    return {key: float(np.mean(values)) for key, values in found.items()} | {"tokens": len(found["norm"])}


@pytest.mark.slow
@pytest.mark.parametrize("padding", ["right", "left"])
@pytest.mark.parametrize("law", [{"noise": 0.004}, {"relative": 0.3}], ids=["fixed", "relative"])
def test_noise_sensitivity_is_that_of_one_document_at_a_time(
    subject: Subject, law: dict[str, float], padding: Any
) -> None:
    layers = [0, 2, LAYERS - 1]
    frame = noise_sensitivity(
        subject.model, GROUPS, layers=layers, **law, draws=DRAWS, seed=5, batch_size=BATCH, padding=padding
    )
    assert list(zip(frame["group"], frame["layer"], strict=True)) == [(g, layer) for g in GROUPS for layer in layers]
    for _, row in frame.iterrows():
        with torch.no_grad():
            plain = plain_sensitivity(
                subject.model,
                GROUPS[row["group"]],
                row["layer"],
                noise=law.get("noise"),
                relative=law.get("relative"),
            )
        assert row["tokens"] == plain["tokens"]
        assert row["documents"] == len(token_rows(subject.model, GROUPS[row["group"]]))
        for column in ("sensitivity", "input_ratio", "norm", "noise"):
            # squares double the rounding of what they are taken of, and so does a difference of what is near
            assert row[column] == pytest.approx(plain[column], rel=5 * subject.relative), column
        assert row["low"] < row["sensitivity"] < row["high"]
        if row["layer"] == LAYERS - 1:  # nothing is above
            assert row["sensitivity"] == pytest.approx(row["input_ratio"], rel=1e-5)
        else:
            assert row["sensitivity"] != pytest.approx(row["input_ratio"], rel=0.05)


def test_the_noise_of_no_law_is_a_tenth_of_the_norm_at_layer_0(subject: Subject) -> None:
    frame = noise_sensitivity(subject.model, GROUPS, layers=[1, 3], batch_size=BATCH)
    norms = []
    with torch.no_grad():
        for corpus in GROUPS.values():
            for ids in token_rows(subject.model, corpus):
                (states,) = states_at(subject.model, ids, ["blocks.0.hook_resid_post"]).values()
                norms += states[1:].float().norm(dim=1).tolist()
    assert frame["noise"].nunique() == 1
    assert frame["noise"].iloc[0] == pytest.approx((0.1 * np.mean(norms)) ** 2 / D_MODEL, rel=2 * subject.relative)


def test_relative_noise_has_the_share_that_was_asked_for(model: LensModel, untouched: None) -> None:
    frame = noise_sensitivity(model, GROUPS["retain"], relative=0.2, draws=20)
    length = (frame["noise"] * D_MODEL) ** 0.5
    assert list(frame["layer"]) == list(range(LAYERS))
    np.testing.assert_allclose(length / frame["norm"], 0.2, rtol=0.05)  # a root mean square against a mean
    # The mean of a ratio is above the ratio of the means, the more so the more the norms differ.
    assert frame["input_ratio"].between(0.039, 0.06).all()


def test_what_layers_see_does_not_depend_on_which_layers_are_asked_for(model: LensModel, untouched: None) -> None:
    both = noise_sensitivity(model, GROUPS["forget"], layers=[1, 2], noise=0.01, seed=1)
    one = noise_sensitivity(model, GROUPS["forget"], layers=[2], noise=0.01, seed=1)
    pd.testing.assert_frame_equal(both[both["layer"] == 2].reset_index(drop=True), one)
    other = noise_sensitivity(model, GROUPS["forget"], layers=[2], noise=0.01, seed=2)
    assert other["sensitivity"].iloc[0] != one["sensitivity"].iloc[0]


def test_the_sensitivity_of_an_edited_model_is_that_of_the_edited_model(model: LensModel, untouched: None) -> None:
    edit = SteeringEdit.towards(DIRECTION, layer=2, coefficient=2.0)  # what comes below layer 2 no longer matters
    with edit.applied(model):
        frame = noise_sensitivity(model, GROUPS["forget"], layers=[0, 2], noise=0.01).set_index("layer")
    assert frame["sensitivity"][0] == 0.0
    assert frame["sensitivity"][2] > 0.0
    assert frame["norm"][2] == pytest.approx(2.0, rel=1e-5)


def plain_coefficient(model: LensModel, ids: list[int], layer: int) -> tuple[float, float, float]:
    """c, u . h and |h| at the last token, from the full Jacobian at its state."""
    name = f"blocks.{layer}.hook_resid_post"
    with torch.no_grad():
        state = states_at(model, ids, [name])[name][-1].float()

    def stream(shift: torch.Tensor) -> torch.Tensor:
        whole = torch.cat([torch.zeros(len(ids) - 1, D_MODEL), shift[None]])
        return states_at(model, ids, [FINAL], layer, shifted(whole))[FINAL][-1].float()

    jacobian: Any = torch.autograd.functional.jacobian(stream, torch.zeros(D_MODEL))
    u = DIRECTION / DIRECTION.norm()
    of_state, of_direction = jacobian.double() @ state.double(), jacobian.double() @ u.double()
    cosine = of_state @ of_direction / (of_state.norm() * of_direction.norm())
    return float(of_state.norm() / of_direction.norm() * cosine), float(u @ state), float(state.norm())


@pytest.mark.slow
@pytest.mark.parametrize("padding", ["right", "left"])
def test_the_predicted_coefficient_is_that_of_the_full_jacobian(subject: Subject, padding: Any) -> None:
    layers = [0, 2, LAYERS - 1]
    frame = predicted_coefficient(
        subject.model, GROUPS, 3.0 * DIRECTION, layers=layers, batch_size=BATCH, padding=padding
    )
    for _, row in frame.iterrows():
        rows = token_rows(subject.model, GROUPS[row["group"]])
        plain = np.array([plain_coefficient(subject.model, ids, row["layer"]) for ids in rows])
        assert row["documents"] == len(rows)
        spread = float(np.abs(plain[:, 0]).max())
        assert row["coefficient"] == subject.close(plain[:, 0].mean(), scale=spread)
        assert row["std"] == subject.close(plain[:, 0].std(), scale=spread)
        assert row["projection"] == subject.close(plain[:, 1].mean(), scale=spread)
        assert row["norm"] == subject.close(plain[:, 2].mean())
        assert row["low"] < row["coefficient"] < row["high"]
        if row["layer"] == LAYERS - 1:  # nothing is above
            assert row["coefficient"] == subject.close(row["projection"])


def test_of_states_that_are_multiples_of_the_direction_the_coefficient_is_theirs(
    model: LensModel, untouched: None
) -> None:
    with SteeringEdit.towards(DIRECTION, layer=1, coefficient=2.5).applied(model):
        frame = predicted_coefficient(model, GROUPS, DIRECTION, layers=[1])
        other = predicted_coefficient(model, GROUPS, torch.ones(D_MODEL), layers=[1])
    np.testing.assert_allclose(frame["coefficient"], 2.5, rtol=1e-5)
    np.testing.assert_allclose(frame["std"], 0.0, atol=1e-5)
    assert (abs(other["coefficient"] - 2.5) > 0.05).all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"noise": 0.1, "relative": 0.1}, "noise or relative, not both"),
        ({"noise": 0.0}, "noise must be a finite number above 0, got 0.0"),
        ({"relative": -1.0}, "relative must be a finite number above 0, got -1.0"),
        ({"noise": float("nan")}, "noise must be"),
        ({"draws": 0}, "draws must be at least 1, got 0"),
    ],
)
def test_bad_settings_of_the_noise_are_named(
    model: LensModel, settings: dict[str, Any], message: str, untouched: None
) -> None:
    with pytest.raises(ValueError, match=message):
        noise_sensitivity(model, GROUPS, **settings)


def above_all(model: LensModel, ids: list[int], output: Any = "logits") -> LayersAbove:
    """All positions are moved, the last is read."""
    tokens = torch.tensor([ids])
    ones = torch.ones_like(tokens, dtype=torch.bool)
    return LayersAbove(model, LAYER, tokens, ones, ones, torch.tensor([len(ids) - 1]), output)


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
    above = above_all(model, ids, "stream")

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
    above = above_all(model, ids)
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
