"""Bypasses: each against a slow calculation of its own, one text at a time, and with nothing left on the model."""

import re
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pandas as pd
import pytest
import torch

from mrp_lens.attacks import evaluation
from mrp_lens.attacks.ablation import ablated, junk_directions
from mrp_lens.attacks.bypass import Kind, bypass
from mrp_lens.attacks.gcg import jailbreak
from mrp_lens.attacks.quantization import quantized
from mrp_lens.data import Corpus, Questions
from mrp_lens.edits import Edit
from mrp_lens.edits.subspace import random_units
from mrp_lens.models import LensModel, load_model
from mrp_lens.utils import progress
from tests.conftest import D_MODEL, LAYERS, assert_same_state, state_of
from tests.support.edits import all_kinds, projection, weight_edit
from tests.support.quizzes import liked, quiz, slow_right


@pytest.fixture(scope="module")
def data(model: LensModel) -> dict[str, Any]:
    return data_for(model)


def data_for(model: LensModel) -> dict[str, Any]:
    """Everything that `bypass` can use."""
    held_out = liked(model, quiz(0, 24, name="held out"))
    forget = [f"The colour of Zaxim{i} is {colour}." for i, colour in enumerate(["red", "blue", "green", "white"] * 4)]
    retain = [f"The old man walked slowly {word} near the house." for word in ["today", "again", "late", "early"] * 4]
    return {
        "held_out": held_out,
        "untaught": quiz(100, 8, name="untaught"),
        "shots": liked(model, quiz(50, 12, name="shots")),
        "forget": Corpus.from_texts(forget, name="forget"),
        "retain": Corpus.from_texts(retain, name="retain"),
        "retain_questions": liked(model, quiz(0, 20, wording="{}:", name="retain questions")),
        "paraphrased": replace(
            held_out, questions=tuple(replace(q, prompt=f"Behold: {q.prompt}") for q in held_out.questions)
        ),
    }


COLUMNS = (
    "attack kind variant layer n accuracy_before accuracy_edited accuracy_after floor ceiling recovery recovery_low "
    "recovery_high drop drop_low drop_high"
).split()


@pytest.mark.slow
@pytest.mark.parametrize("number", range(4))
def test_every_kind_has_its_rows_and_leaves_nothing_on_the_model(
    model: LensModel, data: dict[str, Any], untouched: None, number: int
) -> None:
    edit = all_kinds(model, 1)[number]
    frame = bypass(model, edit, **data, progress=False)
    assert list(frame.columns) == COLUMNS
    rows = dict.fromkeys(get_args(Kind), 1) | {"direction ablated": 3, "weights rounded": 2, "noise": 3, "few-shot": 2}
    if number == 2:  # weights alone
        del rows["hook stripped"]
    assert frame.groupby("kind", sort=False).size().to_dict() == rows
    assert (frame["attack"] == "bypass").all()
    facts = frame[frame["drop"].isna()]
    assert (facts["n"] == 24).all()
    assert (facts["accuracy_before"] == 1.0).all()
    assert facts["accuracy_edited"].nunique() == 1
    assert facts[["accuracy_after", "floor", "ceiling"]].notna().all(axis=None)
    assert frame["layer"].notna().sum() == 1
    assert set(frame["layer"].dropna()) <= {1.0, 2.0, 3.0}
    retained = frame[frame["drop"].notna()].iloc[0]
    assert retained["n"] == 20
    assert np.isnan(retained["floor"])
    assert np.isnan(retained["recovery"])
    if number == 3:
        pd.testing.assert_frame_equal(bypass(model, edit, **data, progress=False), frame)


@pytest.mark.slow
def test_rows_equal_the_slow_calculation(model: LensModel, data: dict[str, Any], untouched: None) -> None:
    edit = projection(1, rank=20) + weight_edit(model, 2, scale=-4.0)
    wanted: list[Kind] = ["no attack", "hook stripped", "direction ablated", "weights rounded", "noise", "paraphrased"]
    frame = bypass(model, edit, **data, kinds=wanted, progress=False).set_index("variant")
    own = junk_directions(model, edit, data["shots"].right_answers())
    drawn = random_units(len(own), D_MODEL, "gaussian", torch.Generator().manual_seed(0))
    best = int(frame["layer"].dropna().iloc[0])
    attacks: dict[str, tuple[Edit, Any, Questions]] = {
        "no attack": (edit, nullcontext, data["held_out"]),
        "hook stripped": (weight_edit(model, 2, scale=-4.0), nullcontext, data["held_out"]),
        "direction ablated, each layer's own": (edit, lambda m: ablated(m, own), data["held_out"]),
        "direction ablated, random ones": (
            edit,
            lambda m: ablated(m, dict(zip(own, drawn, strict=True))),
            data["held_out"],
        ),
        "direction ablated, one for all layers": (
            edit,
            lambda m: ablated(m, dict.fromkeys(range(LAYERS), own[best])),
            data["held_out"],
        ),
        "weights rounded to 4 bits": (edit, lambda m: quantized(m, 4), data["held_out"]),
        "paraphrased": (edit, nullcontext, data["paraphrased"]),
    }
    for name, (on, change, asked) in attacks.items():
        with on.applied(model), change(model):
            after = slow_right(model, asked)
            floor = slow_right(model, data["untaught"])
        with change(model):
            ceiling = slow_right(model, asked)
        assert frame.loc[name, "accuracy_after"] == pytest.approx(np.mean(after)), name
        assert frame.loc[name, "floor"] == pytest.approx(np.mean(floor)), name
        assert frame.loc[name, "ceiling"] == pytest.approx(np.mean(ceiling if name != "hook stripped" else 1.0)), name
    with edit.applied(model):
        assert frame["accuracy_edited"].iloc[0] == pytest.approx(np.mean(slow_right(model, data["held_out"])))
        right = {}
        for layer, direction in own.items():
            with ablated(model, dict.fromkeys(range(LAYERS), direction)):
                right[layer] = sum(slow_right(model, data["shots"]))
    assert right[best] == max(right.values())
    assert frame["accuracy_edited"].iloc[0] < 1.0, "the edit would not be seen"
    assert frame["accuracy_after"].nunique() > 2, "the attacks would not be told apart"


def test_the_drop_is_how_much_more_the_token_hurts_the_edited_model(
    model: LensModel, data: dict[str, Any], untouched: None
) -> None:
    edit = projection(1, rank=20) + weight_edit(model, 2, scale=-4.0)
    row = bypass(model, edit, **data, kinds=["forget token in a retain question"], progress=False).iloc[0]
    word = re.findall("'(.*)'", row["variant"])[0]
    plain = data["retain_questions"]
    given = replace(plain, questions=tuple(replace(q, prompt=f" {word} {q.prompt}") for q in plain.questions))
    before, ceiling = slow_right(model, plain), slow_right(model, given)
    with edit.applied(model):
        edited, after = slow_right(model, plain), slow_right(model, given)
    for column, right in {
        "accuracy_before": before,
        "accuracy_edited": edited,
        "accuracy_after": after,
        "ceiling": ceiling,
    }.items():
        assert row[column] == pytest.approx(np.mean(right)), column
    drops = [(e - a) - (b - c) for b, c, e, a in zip(before, ceiling, edited, after, strict=True)]
    assert row["drop"] == pytest.approx(np.mean(drops))
    low, drop, high = (float(row[column]) for column in ("drop_low", "drop", "drop_high"))
    assert low < drop < high
    assert len(set(drops)) > 1
    assert before != ceiling, "what the token does to the unedited model would not be seen"


@pytest.mark.slow
def test_both_classes_give_the_same_frame(both: list[LensModel]) -> None:
    data = data_for(both[0])
    first, second = (
        bypass(model, projection(1, rank=20) + weight_edit(model, 2, scale=-4.0), **data, progress=False)
        for model in both
    )
    pd.testing.assert_frame_equal(first, second)


@pytest.mark.slow
def test_bfloat16_models_can_be_attacked_and_are_left_as_they_were(
    tiny_folder: Path, backend: Any, data: dict[str, Any]
) -> None:
    model = load_model(str(tiny_folder), backend=backend, dtype=torch.bfloat16)
    before = state_of(model)
    edit = projection(1, rank=20) + weight_edit(model, 2, scale=-4.0)
    frame = bypass(model, edit, **data, progress=False).set_index("kind")
    assert_same_state(before, state_of(model))
    with edit.applied(model):
        # bfloat16 scores differ with the batch: the nearly equal choices of some questions may change places
        assert frame.loc["no attack", "accuracy_after"] == pytest.approx(
            np.mean(slow_right(model, data["held_out"])), abs=0.13
        )


def test_the_unedited_model_has_rows_as_well(model: LensModel, data: dict[str, Any], untouched: None) -> None:
    frame = bypass(model, None, **data, progress=False)
    assert not {"hook stripped", "direction ablated"} & set(frame["kind"])
    facts = frame[frame["drop"].isna()]
    assert (facts["accuracy_edited"] == facts["accuracy_before"]).all()
    assert (facts["accuracy_after"] == facts["ceiling"]).all()
    assert frame["drop"].dropna().tolist() == [0.0]


@pytest.mark.slow
def test_without_other_data_the_floor_is_guessing_and_the_kinds_are_those_that_need_none(
    model: LensModel, data: dict[str, Any], untouched: None
) -> None:
    frame = bypass(model, projection(1), held_out=data["held_out"], progress=False)
    assert list(dict.fromkeys(frame["kind"])) == [
        "no attack",
        "hook stripped",
        "weights rounded",
        "weights in NF4",
        "noise",
    ]
    assert (frame["floor"] == 0.5).all()
    with_texts = bypass(
        model,
        projection(1),
        held_out=data["held_out"],
        forget=data["forget"],
        kinds=["direction ablated"],
        progress=False,
    )
    assert len(with_texts) == 3


def test_no_bar_is_shown_where_none_is_wanted(
    model: LensModel, data: dict[str, Any], capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "DELAY", 0.0)
    kind: list[Kind] = ["forget token in a retain question"]
    bypass(model, None, **data, kinds=kind, progress=False)
    searched = {name: data[name] for name in ("held_out", "untaught")} | {"train": data["shots"]}
    jailbreak(model, None, **searched, steps=1, candidates=2, length=2, progress=False)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("failing", [1, 3, 5, 8, 20])
def test_nothing_is_left_when_it_is_interrupted(
    model: LensModel, data: dict[str, Any], untouched: None, monkeypatch: pytest.MonkeyPatch, failing: int
) -> None:
    calls = []
    original = evaluation.score

    def interrupted(*arguments: Any, **options: Any) -> Any:
        calls.append(arguments)
        if len(calls) == failing:
            raise KeyboardInterrupt
        return original(*arguments, **options)

    monkeypatch.setattr(sys.modules[bypass.__module__], "score", interrupted)
    with pytest.raises(KeyboardInterrupt):
        bypass(model, projection(1) + weight_edit(model, 2), **data, progress=False)
    assert len(calls) == failing


def test_a_model_whose_matrices_cannot_be_rounded_is_bypassed_otherwise(
    model: LensModel, data: dict[str, Any], monkeypatch: pytest.MonkeyPatch, untouched: None
) -> None:
    def unknown(_model: LensModel) -> None:
        raise ValueError("a layout that is not known")

    monkeypatch.setattr(sys.modules[bypass.__module__], "block_matrices", unknown)
    frame = bypass(model, projection(1), held_out=data["held_out"], progress=False)
    assert "noise" in set(frame["kind"])
    assert not {"weights rounded", "weights in NF4"} & set(frame["kind"])
    with pytest.raises(ValueError, match="'weights rounded' needs matrices of a known layout that are not quantised"):
        bypass(model, projection(1), held_out=data["held_out"], kinds=["weights rounded"], progress=False)


def test_what_is_wrong_is_named(model: LensModel, data: dict[str, Any], untouched: None) -> None:
    edit = projection(1)
    held_out = data["held_out"]

    def refused(error: type[Exception], match: str, **changes: Any) -> None:
        with pytest.raises(error, match=match):
            bypass(model, changes.pop("edit", edit), **{"held_out": held_out, "progress": False, **changes})

    refused(ValueError, "unknown kind 'magic'", kinds=["magic"])
    refused(ValueError, "'few-shot' needs shots", kinds=["few-shot"])
    refused(ValueError, "'direction ablated' needs shots or forget", kinds=["direction ablated"])
    refused(ValueError, "'hook stripped' needs an edit with hooks", kinds=["hook stripped"], edit=weight_edit(model, 1))
    refused(ValueError, "needs retain_questions, forget, retain", kinds=["forget token in a retain question"])
    refused(ValueError, "shots and held_out overlap", shots=held_out)
    refused(TypeError, "retain must be Corpus or None, got list", retain=["text"])
    refused(TypeError, "shots must be Questions or None, got Corpus", shots=data["forget"])
    refused(ValueError, "forget .* is empty", forget=Corpus((), "none"))
    refused(ValueError, "paraphrased has 8 questions and held_out 24", paraphrased=data["untaught"])
    turned = replace(held_out, questions=held_out.questions[::-1])
    refused(ValueError, "other choices or another right answer", paraphrased=turned)
