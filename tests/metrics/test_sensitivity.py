"""How the layers above react, on the tiny model, against one document at a time and full Jacobians."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from mrp_lens.data import Corpus
from mrp_lens.edits import SteeringEdit
from mrp_lens.metrics.sensitivity import noise_sensitivity, predicted_coefficient
from mrp_lens.models import LensModel
from tests.conftest import D_MODEL, LAYERS
from tests.support.states import GROUPS, PRECISIONS, Subject, subject_in

BATCH = 4
DRAWS = 2
DIRECTION = torch.rand(D_MODEL, generator=torch.Generator().manual_seed(3))
FINAL = f"blocks.{LAYERS - 1}.hook_resid_post"


@pytest.fixture(params=PRECISIONS)
def subject(request: pytest.FixtureRequest, model: Any, tiny_folder: Path, backend: str) -> Iterator[Subject]:
    yield from subject_in(request.param, model, tiny_folder, backend)


def token_rows(model: LensModel, corpus: Corpus) -> list[list[int]]:
    """Of the documents that hold a token, shortest first, which is the order in which they are read."""
    rows = [model.tokenizer(d.prompt + d.completion, add_special_tokens=False)["input_ids"] for d in corpus.documents]
    return sorted(([model.tokenizer.bos_token_id, *row] for row in rows if row), key=len)


def streams(
    model: LensModel, ids: list[int], names: list[str], layer: int = 0, shift: torch.Tensor | None = None
) -> dict[str, torch.Tensor]:
    """States of one document at the hooks, BOS included, with a shift of the states at a layer."""
    seen: dict[str, torch.Tensor] = {}
    moved = model.hook_dict[f"blocks.{layer}.hook_resid_post"]
    if shift is not None:
        moved.add_hook(lambda activation, hook: (activation.float() + shift).to(activation.dtype))
    for name in names:
        model.hook_dict[name].add_hook(lambda activation, hook, name=name: seen.update({name: activation[0]}))
    tokens = torch.tensor([ids])
    model(tokens, attention_mask=torch.ones_like(tokens))
    for name in names:
        model.hook_dict[name].fwd_hooks.pop().hook.remove()
    if shift is not None:
        moved.fwd_hooks.pop().hook.remove()
    return seen


def plain_sensitivity(
    model: LensModel, corpus: Corpus, layer: int, *, noise: float | None, relative: float | None
) -> dict[str, float]:
    name = f"blocks.{layer}.hook_resid_post"
    rows = token_rows(model, corpus)
    generator = torch.Generator().manual_seed(5)
    found: dict[str, list[float]] = {"sensitivity": [], "input_ratio": [], "norm": [], "noise": []}
    for start in range(0, len(rows), BATCH):
        batch = rows[start : start + BATCH]
        clean = [streams(model, ids, [name, FINAL]) for ids in batch]
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
                after = streams(model, ids, [FINAL], layer, shift)[FINAL].float()
                stream = before[FINAL].float()
                reactions.append((((after - stream) ** 2).sum(1) / (stream**2).sum(1))[1:].double().numpy())
                ratios.append(((shift**2).sum(1) / (before[name].float() ** 2).sum(1))[1:].double().numpy())
            found["sensitivity"] += list(np.mean(reactions, axis=0))
            found["input_ratio"] += list(np.mean(ratios, axis=0))
            found["norm"] += before[name][1:].float().norm(dim=1).tolist()
            found["noise"] += [variance] * (len(ids) - 1)
    return {key: float(np.mean(values)) for key, values in found.items()} | {"tokens": len(found["norm"])}


@pytest.mark.parametrize("padding", ["right", pytest.param("left", marks=pytest.mark.slow)])
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
                states = streams(subject.model, ids, ["blocks.0.hook_resid_post"])["blocks.0.hook_resid_post"]
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
        state = streams(model, ids, [name])[name][-1].float()

    def stream(shift: torch.Tensor) -> torch.Tensor:
        whole = torch.cat([torch.zeros(len(ids) - 1, D_MODEL), shift[None]])
        return streams(model, ids, [FINAL], layer, whole)[FINAL][-1].float()

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
        ({"layers": [LAYERS]}, "out of range"),
    ],
)
def test_bad_settings_of_the_noise_are_named(
    model: LensModel, settings: dict[str, Any], message: str, untouched: None
) -> None:
    with pytest.raises(ValueError, match=message):
        noise_sensitivity(model, GROUPS, **settings)


def test_texts_and_directions_that_are_none_are_refused(model: LensModel, untouched: None) -> None:
    def coefficient(texts: Corpus) -> pd.DataFrame:
        return predicted_coefficient(model, texts, DIRECTION)

    def sensitivity(texts: Corpus) -> pd.DataFrame:
        return noise_sensitivity(model, texts)

    for measure in (coefficient, sensitivity):
        with pytest.raises(ValueError, match="no documents in 'none'"):
            measure(Corpus((), "none"))
        with pytest.raises(ValueError, match="no document in 'blank' holds a token"):
            measure(Corpus.from_texts(["", ""], name="blank"))
    for direction, message in ((torch.zeros(D_MODEL), "non-zero"), (torch.ones(7), "7 entries")):
        with pytest.raises(ValueError, match=message):
            predicted_coefficient(model, GROUPS, direction)
