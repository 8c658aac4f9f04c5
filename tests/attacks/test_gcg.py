"""What the search for a trigger reports, on the tiny model, against loops over single prompts."""

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from mrp_lens.attacks.gcg import TriggerSearch, jailbreak
from mrp_lens.data import Questions
from mrp_lens.edits import SteeringEdit
from mrp_lens.models import LensModel, available_backends, load_model
from tests.conftest import D_MODEL
from tests.support.edits import all_kinds, projection
from tests.support.families import save_family
from tests.support.states import PRECISIONS, Subject, subject_in
from tests.support.triggers import HELD_OUT, LENGTH, TRAIN, UNTAUGHT, plain_accuracy

pytestmark = pytest.mark.filterwarnings("ignore:only .* held-out questions:UserWarning")

SMALL: dict[str, Any] = {
    "train": TRAIN,
    "held_out": HELD_OUT,
    "untaught": UNTAUGHT,
    "length": LENGTH,
    "steps": 3,
    "candidates": 6,
    "top": 5,
    "batch": 3,
    "batch_size": 64,
    "progress": False,
}


@pytest.fixture(params=PRECISIONS)
def subject(request: pytest.FixtureRequest, model: Any, tiny_folder: Path, backend: str) -> Iterator[Subject]:
    yield from subject_in(request.param, model, tiny_folder, backend)


def test_the_frame_holds_every_scored_trigger_and_its_controls(subject: Subject) -> None:
    model, edit = subject.model, projection(1, 2)
    table = jailbreak(model, edit, **SMALL, every=2, marker=" Answer:")
    assert list(table["kind"]) == ["none", "random", "found", "found"]
    assert list(table["step"]) == [0, 0, 2, 3]
    assert (table["n"] == len(HELD_OUT)).all()
    assert table["trigger"].iloc[0] == ""
    assert table["trigger"].iloc[1:].str.len().gt(0).all()
    if subject.relative < 1e-4:
        assert table["accuracy_before"].iloc[0] == plain_accuracy(model, HELD_OUT, [], None)
        with edit.applied(model):
            for column, questions in (
                ("train_accuracy", TRAIN),
                ("held_out_accuracy", HELD_OUT),
                ("untaught_accuracy", UNTAUGHT),
            ):
                assert table[column].iloc[0] == plain_accuracy(model, questions, [], None)
    for row in table.to_dict("records"):
        span = row["accuracy_before"] - row["untaught_accuracy"]
        if span > 0:
            assert row["recovery"] == pytest.approx((row["held_out_accuracy"] - row["untaught_accuracy"]) / span)
        else:
            assert np.isnan(row["recovery"])


def test_without_untaught_questions_guessing_is_the_floor(model: LensModel, untouched: None) -> None:
    table = jailbreak(model, projection(2), **{**SMALL, "untaught": None, "steps": 1})
    assert table["untaught_accuracy"].to_numpy() == pytest.approx(1 / 3)


@pytest.mark.parametrize("loss", ["answer", "representation"])
def test_both_classes_search_alike(tiny_folder: Path, loss: Any) -> None:
    if len(available_backends()) < 2:
        pytest.skip("needs HookedTransformer (TransformerLens 3)")
    first, second = (
        jailbreak(model, projection(1), **{**SMALL, "steps": 5}, loss=loss, every=1)
        for model in (load_model(str(tiny_folder), backend=backend) for backend in ("hooked", "bridge"))
    )
    assert list(first["trigger"]) == list(second["trigger"])
    np.testing.assert_allclose(first["loss"], second["loss"], rtol=1e-5)


@pytest.mark.parametrize("loss", ["answer", "representation"])
def test_every_kind_of_edit_is_attacked(model: LensModel, untouched: None, loss: Any) -> None:
    pinned = SteeringEdit.towards(torch.ones(D_MODEL), layer=1, coefficient=4.0)  # no gradient at all: chance decides
    for edit in (pinned, *all_kinds(model, 1)):
        table = jailbreak(model, edit, **{**SMALL, "steps": 1}, loss=loss)
        assert np.isfinite(table["loss"]).all()


def test_the_seed_decides(model: LensModel, untouched: None) -> None:
    first, second, other = (jailbreak(model, None, **SMALL, seed=seed) for seed in (1, 1, 2))
    pd.testing.assert_frame_equal(first, second)
    assert other["trigger"].iloc[1] != first["trigger"].iloc[1]


def test_the_unedited_model_without_a_trigger_matches_itself(model: LensModel, untouched: None) -> None:
    table = jailbreak(model, None, **{**SMALL, "steps": 1}, loss="representation", layer=1)
    assert table["loss"].iloc[0] == pytest.approx(0.0, abs=1e-9)
    assert table["loss"].iloc[1] > 1e-4


def test_a_search_over_the_trained_prompts_lowers_the_loss(model: LensModel, untouched: None) -> None:
    settings = {**SMALL, "steps": 10, "candidates": 16, "top": 24, "batch": 5, "batch_size": 128}
    for loss in ("answer", "representation"):
        table = jailbreak(model, projection(1), **settings, loss=loss).set_index("kind")
        assert float(table.loc["found", "loss"]) < float(table.loc["random", "loss"])


@pytest.mark.parametrize("family", ["gpt2", "gemma2"])
def test_other_families_can_be_searched(tmp_path: Path, family: str) -> None:
    """gpt2: positions are absolute. gemma2: embeddings are scaled."""
    model = load_model(str(save_family(family, tmp_path)), backend="bridge")
    for loss in ("answer", "representation"):
        table = jailbreak(model, projection(1), **SMALL, loss=loss)  # type: ignore[arg-type]
        assert np.isfinite(table["loss"]).all()


def test_ctrl_c_keeps_what_was_found(
    model: LensModel, untouched: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    full = jailbreak(model, projection(1), **SMALL, every=1)
    steps, step = [0], TriggerSearch.step

    def interrupted(self: TriggerSearch, trigger: torch.Tensor) -> torch.Tensor:
        steps[0] += 1
        if steps[0] == 3:
            search_losses = self.losses(trigger[None], [0])
            assert search_losses.isfinite().all()
            raise KeyboardInterrupt
        return step(self, trigger)

    monkeypatch.setattr(TriggerSearch, "step", interrupted)
    with caplog.at_level(logging.WARNING):
        table = jailbreak(model, projection(1), **SMALL)
    assert "interrupted after 2 of 3 steps" in caplog.text
    assert list(table["step"]) == [0, 0, 2]
    pd.testing.assert_frame_equal(table, full[full["step"].isin([0, 2])].reset_index(drop=True))


def test_an_exception_in_a_pass_leaves_the_model_alone(
    model: LensModel, untouched: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> torch.Tensor:
        raise RuntimeError("broken")

    for edit in all_kinds(model, 1):
        with monkeypatch.context() as patch:
            patch.setattr(TriggerSearch, "replacements", broken)
            with pytest.raises(RuntimeError, match="broken"):
                jailbreak(model, edit, **SMALL)


def test_bad_input_is_refused_and_says_why(model: LensModel, untouched: None) -> None:
    cases: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"held_out": TRAIN}, ValueError, "train and held_out overlap in 5 questions"),
        ({"untaught": TRAIN}, ValueError, "5 untaught questions are in train or held_out too"),
        ({"train": []}, TypeError, "train must be Questions, got list"),
        ({"train": Questions((), "none")}, ValueError, "no questions in train, 'none'"),
        ({"untaught": Questions((), "none")}, ValueError, "no questions in untaught, 'none'"),
        ({"loss": "margin"}, ValueError, "unknown loss 'margin'; choose one of answer, representation"),
        ({"layer": 1}, ValueError, "layer=1 has no effect with loss='answer'"),
        ({"loss": "representation", "layer": 9}, ValueError, "layer 9 is out of range"),
        ({"steps": 0}, ValueError, "steps must be at least 1, got 0"),
        ({"batch_size": 0}, ValueError, "batch_size must be at least 1, got 0"),
        ({"length": 0}, ValueError, "length must be from 1 to 62"),
        ({"length": 63}, ValueError, "length must be from 1 to 62"),
        ({"marker": "Reply:"}, ValueError, "holds no 'Reply:' for a trigger to stand before"),
        ({"marker": ""}, ValueError, "marker is empty"),
    ]
    for changed, error, message in cases:
        with pytest.raises(error, match=message):
            jailbreak(model, projection(1), **{**SMALL, **changed})
