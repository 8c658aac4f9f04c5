"""What is read once for several metrics is what each would have read."""

from typing import Any

import pandas as pd
import pytest
import torch

from mrp_lens import metrics
from mrp_lens.data import Corpus
from mrp_lens.edits import SteeringEdit
from mrp_lens.metrics import shared_states
from mrp_lens.metrics.shared_states import states_shared
from mrp_lens.models import LensModel
from mrp_lens.models.hooks import hook_name, read_states
from tests.conftest import D_MODEL, LAYERS
from tests.support.edits import projection

Texts = tuple[Corpus, Corpus]


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of hooks of each pass."""
    found: list[int] = []

    def counted(model: Any, batch: Any, hooks: Any) -> Any:
        found.append(len(hooks))
        return read_states(model, batch, hooks)

    monkeypatch.setattr(shared_states, "read_states", counted)
    return found


def look(model: LensModel, texts: Texts) -> list[pd.DataFrame]:
    groups, found = {"forget": texts[0], "retain": texts[1]}, list[pd.DataFrame]()
    quick: dict[str, Any] = {"batch_size": 8, "progress": False}
    noisy = SteeringEdit(hook_name(1), torch.ones(D_MODEL), 2.0, noise=0.5, seed=3)
    for edit in (projection(1), noisy):
        with edit.applied(model):
            found.append(metrics.alignment(model, groups, torch.ones(D_MODEL), **quick))
        found.append(metrics.geometry(model, groups, edit, spread=False, **quick))
        found.append(metrics.principal_plane(model, groups, edit, layer=LAYERS - 1, **quick))
    return found


@pytest.mark.parametrize("room", [2**30, 0])
def test_metrics_that_share_states_find_the_same(
    model: LensModel, texts: Texts, monkeypatch: pytest.MonkeyPatch, room: int, passes: list[int], untouched: None
) -> None:
    alone = look(model, texts)
    every = len(passes)
    monkeypatch.setattr(shared_states, "BYTES", room)
    with states_shared():
        together = look(model, texts)
    for one, other in zip(alone, together, strict=True):
        pd.testing.assert_frame_equal(one, other)
    assert (len(passes) < 2 * every) == bool(room)


def test_a_text_is_read_once_without_an_edit_and_once_with_it(
    model: LensModel, texts: Texts, passes: list[int], untouched: None
) -> None:
    groups, edit = {"forget": texts[0], "retain": texts[1]}, projection(1)
    quick: dict[str, Any] = {"batch_size": 16, "progress": False}
    with states_shared():
        metrics.alignment(model, groups, torch.ones(D_MODEL), layers=[0], **quick)
        assert passes == [1, 1]  # of two groups
        with edit.applied(model):
            metrics.alignment(model, groups, torch.ones(D_MODEL), **quick)
        assert passes == [1, 1, LAYERS, LAYERS]
        metrics.geometry(model, groups, edit, **quick)
        assert passes[4:] == [LAYERS - 1, LAYERS - 1]  # without the edit, the layers that were not asked for
        metrics.geometry(model, groups, edit, **quick)
        metrics.principal_plane(model, groups, edit, layer=1, **quick)
        assert len(passes) == 6
