"""Retraining attacks: their rows, what they refuse, and nothing left behind."""

import math
import signal
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from mrp_lens.attacks import Relearn, best, relearn, relearned, with_floor
from mrp_lens.data import Corpus
from mrp_lens.data.tokenization import Encoder
from mrp_lens.edits import Edit, SteeringEdit
from mrp_lens.models import LensModel, checkpoint_tensors, is_bridge, load_model
from tests.conftest import D_MODEL, assert_same_state, state_of
from tests.support.edits import projection, weight_edit
from tests.support.families import save_family
from tests.support.quizzes import colours

TAUGHT, ASKED, UNTAUGHT = colours(100), colours(200), colours(300, 40)
SMALL: dict[str, Any] = {"steps": 3, "lr": 1e-3, "batch_size": 8, "marks": (0, 1), "progress": False}


def run(model: LensModel, edit: Edit | None, **options: Any) -> pd.DataFrame:
    return relearn(model, edit, train=TAUGHT, held_out=ASKED, **{**SMALL, **options})


def reachable(model: LensModel) -> list[str]:
    return ["all", "before", "at", "after", *(["lora"] if is_bridge(model) else [])]


def test_rows_controls_and_the_model_is_untouched(model: LensModel, untouched: None) -> None:
    frame = run(model, projection(1), untaught=UNTAUGHT, new=colours(400), lr=(1e-4, 1e-3))
    assert frame[["lr", "step"]].to_numpy().tolist() == [
        [rate, float(step)] for rate in (1e-4, 1e-3) for step in (0, 1, 3)
    ]
    assert frame["accuracy_edited"].tolist() == [frame["held_out_accuracy"].iloc[0]] * 6
    assert frame["ceiling"].equals(frame["accuracy_before"])
    assert set(frame["n"]) == {20}
    assert set(frame["n_floor"]) == {20}
    assert frame["untaught_floor"].tolist() == frame["floor"].tolist()
    assert frame["new_accuracy"].notna().all()
    assert not frame.attrs["interrupted"]
    expected = (frame["held_out_accuracy"] - frame["floor"]) / (frame["ceiling"] - frame["floor"])
    known = frame["recovery"].notna()
    assert frame.loc[known, "recovery"].to_numpy() == pytest.approx(expected[known].to_numpy())


@pytest.mark.parametrize("kind", ["projection", "weights", "steering"])
def test_the_model_is_untouched_whatever_is_retrained(model: LensModel, kind: str, untouched: None) -> None:
    edits = {
        "projection": projection(1, 2, site="mlp_out"),
        "weights": weight_edit(model, 2),
        "steering": SteeringEdit.towards(torch.ones(D_MODEL), layer=1, coefficient=3.0),
    }
    forms = {"projection": ["kept", "stripped", "weights"], "weights": ["kept", "weights"], "steering": ["kept"]}
    before = state_of(model)
    for parameters in reachable(model):
        with relearned(model, edits[kind], train=TAUGHT, steps=2, lr=1e-2, parameters=parameters, progress=False):
            pass
    for form in forms[kind]:
        with relearned(model, edits[kind], train=TAUGHT, steps=2, lr=1e-2, form=form, progress=False):
            assert any(not torch.equal(t.parameter, before["weights"][t.name]) for t in checkpoint_tensors(model))
        assert_same_state(before, state_of(model))


def test_an_exception_inside_leaves_nothing(model: LensModel, untouched: None) -> None:
    for parameters in reachable(model):
        with (
            pytest.raises(RuntimeError, match="inside"),
            relearned(model, projection(1), train=TAUGHT, steps=1, lr=1e-2, parameters=parameters, progress=False),
        ):
            raise RuntimeError("inside")


def test_ctrl_c_gives_the_rows_until_then(model: LensModel, untouched: None, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = Encoder.collate, [0]

    def collate(self: Encoder, rows: Any, **options: Any) -> Any:
        calls[0] += len(rows) == 8  # the batches of the training
        if calls[0] == 2:
            signal.raise_signal(signal.SIGINT)
        return real(self, rows, **options)

    monkeypatch.setattr(Encoder, "collate", collate)
    frame = run(model, projection(1), lr=(1e-4, 1e-3), steps=6)
    assert frame.attrs["interrupted"]
    assert frame["step"].tolist() == [0, 1]
    assert set(frame["lr"]) == {1e-4}


def test_a_rate_that_diverges_keeps_its_rows_and_the_others_go_on(model: LensModel, untouched: None) -> None:
    frame = run(model, None, lr=(1e30, 1e-3))
    assert frame.loc[frame["lr"] == 1e-3, "step"].tolist() == [0, 1, 3]
    assert 3 not in set(frame.loc[frame["lr"] == 1e30, "step"])


@pytest.mark.slow
def test_the_same_attack_gives_the_same_curve_on_both_classes(both: list[LensModel]) -> None:
    hooked, bridge = (run(model, projection(1), untaught=UNTAUGHT).drop(columns="seconds") for model in both)
    pd.testing.assert_frame_equal(hooked, bridge, check_exact=False, atol=0.05)


@pytest.mark.slow
def test_stripping_the_hooks_is_the_unedited_model(model: LensModel) -> None:
    edit = projection(0, 1, 2, rank=20)
    options = {**SMALL, "marks": (0, 1, 3)}
    bare, unedited = (
        relearn(model, e, train=TAUGHT, held_out=ASKED, form=form, **options)
        for e, form in ((edit, "stripped"), (None, "kept"))
    )
    same = ["held_out_accuracy", "train_accuracy", "recovery"]
    pd.testing.assert_frame_equal(bare[same], unedited[same])


def test_forms_and_parameters_that_an_edit_does_not_have(model: LensModel, untouched: None) -> None:
    with pytest.raises(ValueError, match="no hooks that could be stripped"):
        run(model, weight_edit(model, 1), form="stripped")
    with pytest.raises(ValueError, match="cannot be written into weights"):
        run(model, projection(1), form="weights")
    with pytest.raises(ValueError, match="cannot be written into weights: steering overwrites states"):
        run(model, SteeringEdit.towards(torch.ones(D_MODEL), layer=1, coefficient=3.0), form="weights")
    with pytest.raises(ValueError, match="'before' needs an edit"):
        run(model, None, parameters="before")
    if not is_bridge(model):
        with pytest.raises(ValueError, match="backend='bridge'"):
            run(model, None, parameters="lora")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps must be above 0, got 0"),
        ({"samples": 0}, "samples must be at least 1, got 0"),
        ({"batch_size": 0}, "batch_size must be above 0"),
        ({"lr": 0.0}, "lr must be above 0"),
        ({"lr": ()}, "lr must be above 0"),
        ({"form": "folded"}, "unknown form 'folded'; choose one of kept, stripped, weights"),
        ({"parameters": "some"}, "unknown parameters 'some'"),
    ],
)
def test_budgets_of_nothing_and_unknown_words_are_refused(
    model: LensModel, options: dict[str, Any], message: str, untouched: None
) -> None:
    with pytest.raises(ValueError, match=message):
        run(model, None, **options)


def test_data_that_cannot_show_anything_are_refused(model: LensModel, untouched: None) -> None:
    with pytest.raises(ValueError, match="train and held_out overlap in 20 questions"):
        relearn(model, None, train=ASKED, held_out=ASKED, **SMALL)
    with pytest.raises(TypeError, match="train must be Questions or a Corpus, got list"):
        relearn(model, None, train=["a text"], held_out=ASKED, **SMALL)
    with pytest.warns(UserWarning, match="only 5 held-out questions"):
        relearn(model, None, train=TAUGHT, held_out=colours(200, 5), **SMALL)


def test_an_edit_of_another_model_is_refused(tmp_path: Path, model: LensModel) -> None:
    foreign = weight_edit(load_model(save_family("gpt2", tmp_path), backend="bridge"), 1)
    before = state_of(model)
    with pytest.raises(ValueError, match=r"no tensor .* can be edited"):
        run(model, foreign)
    assert_same_state(before, state_of(model))


def test_the_attacker_takes_the_best_rate_that_counts() -> None:
    curves = pd.DataFrame(
        {
            "form": "kept",
            "parameters": "all",
            "samples": 20,
            "lr": [1e-4, 1e-4, 1e-3, 1e-3],
            "step": [5, 20, 5, 20],
            "counts": [True, True, False, False],
            "held_out_accuracy": [0.3, 0.4, 0.9, 0.2],
        }
    )
    assert best(curves)["lr"].tolist() == [1e-4, 1e-4]
    assert best(curves.assign(counts=True))["held_out_accuracy"].tolist() == [0.4, 0.9]


@pytest.mark.slow
def test_a_reference_model_is_another_floor(model: LensModel) -> None:
    curves, reference = run(model, projection(1)), run(model, projection(2))
    found = with_floor(curves, reference)
    assert found["untaught_floor"].isna().all()  # there are no such questions
    assert found["floor"].tolist() == reference["held_out_accuracy"].tolist()
    for row in found.to_dict("records"):
        if row["ceiling"] > row["floor"]:
            share = (row["held_out_accuracy"] - row["floor"]) / (row["ceiling"] - row["floor"])
            assert row["recovery"] == pytest.approx(share)
        else:
            assert math.isnan(row["recovery"])
    with pytest.raises(ValueError, match=r"the reference has no row for lr 0\.001 and step 3"):
        with_floor(curves, reference[reference["step"] < 3])


def test_text_as_training_data_is_scored_by_the_tokens_said(model: LensModel) -> None:
    texts = Corpus.from_texts(["The colour of Zaxim1 is red, seen from the tower near the harbour."])
    frame = relearn(model, None, train=texts, held_out=ASKED, **{**SMALL, "steps": 60, "lr": 1e-2})
    assert frame["train_accuracy"].iloc[-1] == 1.0 > frame["train_accuracy"].iloc[0]
    few = relearn(model, None, train=texts, held_out=ASKED, **{**SMALL, "steps": 1, "lr": 1e-6})
    assert few["counts"].all()
    assert few["train_accuracy"].max() < 0.95


CURVES = pd.DataFrame(
    {
        **{"form": "kept", "parameters": "all", "samples": 20, "lr": [1e-3, 1e-3, 1e-2, 1e-2], "step": [0, 5, 0, 5]},
        **{"counts": True, "held_out_accuracy": [0.3, 0.6, 0.3, 0.7], "n": 20, "ceiling": 1.0, "accuracy_edited": 0.3},
        **{"floor": [0.2, 0.1, 0.2, 0.3], "n_floor": 10, "recovery": [0.1, 0.5, 0.1, 0.4], "train_accuracy": 1.0},
        **{"control_recovery": [0.0, 0.1, 0.0, 0.2], "control_recovery_low": -0.1, "control_recovery_high": 0.3},
    }
)


def test_a_rate_at_which_the_reference_diverged_has_no_floor() -> None:
    reference = CURVES.assign(held_out_accuracy=0.4)
    diverged = reference[(reference["lr"] < 1e-2) | (reference["step"] == 0)]
    found = with_floor(CURVES, diverged)
    assert found["lr"].tolist() == [1e-3, 1e-3]
    assert (found["floor"] == 0.4).all()
    pd.testing.assert_frame_equal(with_floor(CURVES, reference[reference["step"] == 0], steps=5), CURVES)


def test_with_a_reference_questions_about_one_entity_still_count_as_fewer() -> None:
    curves = CURVES.assign(effective_n=6.0, effective_n_ceiling=7.0, effective_n_floor=8.0)
    reference = curves.assign(held_out_accuracy=0.2, effective_n=5.0)
    found, alone = with_floor(curves, reference), with_floor(CURVES, CURVES.assign(held_out_accuracy=0.2))
    assert found["recovery"].tolist() == alone["recovery"].tolist()
    assert (found["effective_n_floor"] == 5.0).all()
    assert (alone["effective_n_floor"] == 20).all()  # curves of earlier versions
    mixed = with_floor(pd.concat([curves.iloc[:2], CURVES.iloc[2:]]), reference)  # gone on with
    assert mixed["effective_n"].isna().tolist() == [False, False, True, True]
    assert mixed["recovery_low"].notna().all()
    width = {name: frame["recovery_high"] - frame["recovery_low"] for name, frame in (("f", found), ("a", alone))}
    assert (width["f"] > 1.5 * width["a"]).all()


def test_with_a_reference_the_never_taught_rows_keep_their_own_floor() -> None:
    known = CURVES.assign(untaught_floor=CURVES["floor"])
    for curves in (known, CURVES):  # the latter as version 0.1 kept them
        on_reference = with_floor(curves, CURVES.assign(held_out_accuracy=0.4)).assign(method="mrp")
        rows = list(Relearn().rows({"relearning_curves": on_reference}, "mrp"))
        assert (rows[0]["attack"], rows[0]["floor"], rows[0]["untaught_accuracy"]) == ("no attack", 0.4, 0.2)
        (control,) = (row for row in rows if row["method"] == "never-taught")
        assert (control["floor"], control["recovery"]) == (0.3, 0.2)  # at its own best rate
    chance = CURVES.assign(method="mrp", untaught_floor=math.nan, control_recovery=math.nan)
    rows = list(Relearn().rows({"relearning_curves": chance}, "mrp"))
    assert "untaught_accuracy" not in rows[0]
    assert {row["method"] for row in rows} == {"mrp"}
