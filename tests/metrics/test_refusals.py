"""What all metrics of states refuse alike, by name, and the model is as it was."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from mrp_lens import metrics
from mrp_lens.data import Corpus
from mrp_lens.edits import ProjectionEdit, SteeringEdit
from mrp_lens.edits.subspace import Subspace
from mrp_lens.models.hooks import hook_name
from tests.conftest import D_MODEL, LAYERS
from tests.support.edits import projection
from tests.support.states import GROUPS

U = torch.ones(D_MODEL)
EDIT = projection(1)
BLANK = Corpus.from_texts(["", ""], name="blank")


def with_direction(metric: Callable[..., Any]) -> Callable[..., Any]:
    return lambda model, texts, direction=U, **settings: metric(model, texts, direction, **settings)


def with_edit(metric: Callable[..., Any], **usual: Any) -> Callable[..., Any]:
    return lambda model, texts, edit=EDIT, **settings: metric(model, texts, edit, **(usual | settings))


OF_DIRECTIONS = {
    "alignment": with_direction(metrics.alignment),
    "predicted_coefficient": with_direction(metrics.predicted_coefficient),
}
OF_EDITS = {
    "geometry": with_edit(metrics.geometry),
    "propagation": with_edit(metrics.propagation),
    "principal_angles": with_edit(metrics.principal_angles, rank=2),
    "principal_plane": with_edit(metrics.principal_plane, layer=1),
}
OF_TEXTS = {"noise_sensitivity": metrics.noise_sensitivity, **OF_DIRECTIONS, **OF_EDITS}


@pytest.mark.parametrize("name", OF_TEXTS)
@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ({}, "no texts given"),
        (Corpus((), "none"), "no documents in 'none'"),
        ({"blank": BLANK, **GROUPS}, "no document in 'blank' holds a token besides BOS"),
        (BLANK, "no document in 'blank' holds a token besides BOS|nothing to compare"),
    ],
    ids=["nothing", "no documents", "a blank corpus", "blank"],
)
def test_texts_that_hold_nothing(model: Any, untouched: None, name: str, texts: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        OF_TEXTS[name](model, texts)


@pytest.mark.parametrize("name", OF_TEXTS)
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layers": [1, LAYERS]}, f"layer {LAYERS} is out of range"),
        ({"layers": []}, "no layers given"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"max_length": 1}, "max_length 1"),
    ],
    ids=str,
)
def test_settings_that_no_model_can_be_read_with(
    model: Any, untouched: None, name: str, settings: dict[str, Any], message: str
) -> None:
    if name in ("propagation", "principal_plane") and "layers" in settings:
        pytest.skip("takes no layers")
    with pytest.raises(ValueError, match=message):
        OF_TEXTS[name](model, GROUPS, **settings)


@pytest.mark.parametrize("name", OF_DIRECTIONS)
@pytest.mark.parametrize(
    ("direction", "message"),
    [
        (torch.ones(D_MODEL + 1), f"{D_MODEL + 1} entries, the model's stream {D_MODEL}"),
        (torch.zeros(D_MODEL), "non-zero vector"),
        (torch.full((D_MODEL,), float("nan")), "finite"),
    ],
    ids=["too wide", "zero", "NaN"],
)
def test_directions_that_are_none(model: Any, untouched: None, name: str, direction: Any, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        OF_DIRECTIONS[name](model, GROUPS, direction)


@pytest.mark.parametrize("name", OF_EDITS)
def test_edits_that_cannot_be_compared(model: Any, untouched: None, name: str) -> None:
    wide = ProjectionEdit({hook_name(1): Subspace.random(3, 48)})
    with pytest.raises(ValueError, match="the projection has d_model 48, the model 32"):
        OF_EDITS[name](model, GROUPS, wide)
    if name != "principal_plane":  # which reads as many documents as it has points
        with pytest.raises(ValueError, match="documents must be at least 1"):
            OF_EDITS[name](model, GROUPS, documents=0)
    with EDIT.applied(model), pytest.raises(ValueError, match="attached to this model already or applied"):
        OF_EDITS[name](model, GROUPS)
    if name != "propagation":  # which follows projections alone
        endless = SteeringEdit.towards(U, layer=1, coefficient=1e39)
        with pytest.raises(ValueError, match=r"states at blocks\.1\.hook_resid_post hold NaN or infinity"):
            OF_EDITS[name](model, GROUPS, endless)
