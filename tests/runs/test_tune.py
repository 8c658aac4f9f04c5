import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
import yaml

from mrp_lens import metrics
from mrp_lens.data import Corpus
from mrp_lens.data.task import UnlearningTask
from mrp_lens.data.tuning_split import tuning_split
from mrp_lens.edits import load_edit
from mrp_lens.edits.provenance import fingerprint
from mrp_lens.methods import METHODS, MRP, NPO, RMU, AdaptiveRMU, Depth, Factor, Fit, Range, register
from mrp_lens.methods.base import recorded
from mrp_lens.models import mlp_out_weight
from mrp_lens.models.finite import NonFiniteError
from mrp_lens.runs.front import on_front
from mrp_lens.runs.tune import Tuned, drawn_by_default, method_of, open_space, tune
from mrp_lens.training import NonFiniteLossError
from mrp_lens.training.loop import TooLittleMemoryError
from tests.support.quizzes import liked, quiz

STEPS = 2
ONE_CLASS = pytest.mark.parametrize("backend", ["bridge"], indirect=True)  # of no matter to what is tested


@pytest.fixture
def task(model: Any, texts: tuple[Corpus, Corpus]) -> UnlearningTask:
    """Quizzes of what the model prefers, so that there is something to lose."""
    held_out = Corpus.from_texts([f"The old man saw {n} houses near the bridge." for n in range(20)], name="held out")
    kept = quiz(40, 20, wording="House{} is", name="kept")
    return UnlearningTask((texts[0],), texts[1], held_out, liked(model, quiz(0, 40)), liked(model, kept))


def tuned(model: Any, task: UnlearningTask, out: Path, trials: int = 4, **settings: Any) -> Tuned:
    method = settings.pop("method", RMU(steps=STEPS, lr=0.3))
    return tune(model, task, method, out, trials=trials, progress=False, **settings)


@pytest.mark.slow
def test_every_trial_is_measured_on_the_tuning_part_and_the_chosen_one_on_the_rest(
    model: Any, task: UnlearningTask, tmp_path: Path, untouched: None
) -> None:
    found = tuned(model, task, tmp_path / "out", 5, seed=3, prune_above=50.0)
    tuning, rest = tuning_split(task, seed=3)
    assert list(found.trials["trial"]) == list(range(5))
    assert (found.trials["state"] == "complete").all()
    assert found.trials["forget_accuracy"].nunique() > 1
    for _, row in found.trials.iterrows():
        searched = {name: row[name] for name in ("layer", "budget", "steering_coeff")}
        method = RMU(steps=STEPS, lr=0.3, **searched)
        edit = method.fit(model, task.forget, task.retain, seed=3, progress=False).edit
        with edit.applied(model):
            for side, asked in tuning.quiz().items():
                assert row[f"{side}_accuracy"] == metrics.value(metrics.accuracy(model, asked, progress=False))
        assert row["damage"] == metrics.value(metrics.damage(model, edit, tuning.held_out, progress=False))
        if row["chosen"]:
            assert fingerprint(edit) == fingerprint(found.edit) == fingerprint(load_edit(tmp_path / "out" / "edit"))
            with edit.applied(model):
                assert found.reported["forget_accuracy"][1] == metrics.value(metrics.accuracy(model, rest.questions))
            assert found.reported["damage"][1] == metrics.value(metrics.damage(model, edit, rest.held_out))
    assert list(found.reported["method"]) == ["unedited", "rmu"]
    assert found.reported["forget_accuracy"][0] == found.controls["unedited_accuracy"] == 1.0
    assert found.controls["chance"] == 0.5
    figures = found.trials[["forget_accuracy", "damage"]].to_numpy(float)
    assert found.trials["on_front"].tolist() == on_front(figures).tolist()
    assert list(found.front["trial"]) == list(found.trials[found.trials["on_front"]].sort_values("damage")["trial"])
    best = yaml.safe_load((tmp_path / "out" / "best.yaml").read_text())
    assert (best["method"], best["seed"], best["lr"]) == ("rmu", 3, 0.3)
    assert best["layer"] == found.best["layer"] == found.method.layer  # type: ignore[attr-defined]
    assert "plotly" in (tmp_path / "out" / "pareto.html").read_text()
    assert not list((tmp_path / "out" / "fits").iterdir())
    assert not list((tmp_path / "out" / "workers").iterdir())


@pytest.mark.slow
@ONE_CLASS
def test_more_trials_add_to_a_search_and_the_seed_decides(
    model: Any, task: UnlearningTask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = tuned(model, task, tmp_path / "whole", 11)
    tuned(model, task, tmp_path / "parts", 3)
    parts = tuned(model, task, tmp_path / "parts", 11)
    timed = ["seconds"]
    pd.testing.assert_frame_equal(whole.trials.drop(columns=timed), parts.trials.drop(columns=timed))
    pd.testing.assert_frame_equal(whole.reported.drop(columns=timed), parts.reported.drop(columns=timed))
    assert fingerprint(whole.edit) == fingerprint(parts.edit)
    fewer = tuned(model, task, tmp_path / "parts", 3)
    assert len(fewer.trials) == 3
    other = tuned(model, task, tmp_path / "other", 3, seed=1)
    assert list(other.trials["budget"]) != list(fewer.trials["budget"])
    tuned(model, task, tmp_path / "parts", 11)
    monkeypatch.setattr(RMU, "fit", lambda *_, **__: pytest.fail("fitted again"))
    again = tuned(model, task, tmp_path / "parts", 11)
    pd.testing.assert_frame_equal(parts.trials, again.trials)
    assert fingerprint(again.edit) == fingerprint(whole.edit)


@pytest.mark.slow
@ONE_CLASS
def test_another_trial_may_be_chosen(model: Any, task: UnlearningTask, tmp_path: Path) -> None:
    first = tuned(model, task, tmp_path / "out")
    other = next(trial for trial in range(4) if trial != first.best["trial"])
    second = tuned(model, task, tmp_path / "out", choose=other)
    assert second.best["trial"] == other
    assert second.why == "it was asked for"
    assert second.best["budget"] == second.method.budget  # type: ignore[attr-defined]
    assert fingerprint(second.edit) != fingerprint(first.edit)
    assert fingerprint(load_edit(tmp_path / "out" / "edit")) == fingerprint(second.edit)
    with pytest.raises(ValueError, match="choose=4 is no trial; choose one from 0 to 3"):
        tuned(model, task, tmp_path / "out", choose=4)


@pytest.mark.slow
@ONE_CLASS
def test_a_budget_is_kept_to_where_one_can(model: Any, task: UnlearningTask, tmp_path: Path) -> None:
    free = tuned(model, task, tmp_path / "free", 6, prune_above=50.0)
    budget = float(free.trials["damage"].median())
    found = tuned(model, task, tmp_path / "bound", 6, budget=budget, prune_above=50.0)
    within = found.trials[found.trials["damage"] <= budget]
    assert found.best["forget_accuracy"] == within["forget_accuracy"].min()
    assert found.controls["budget"] == budget
    assert set(found.picture["budget"]) == {budget}  # and not that of each fit, which is searched
    assert "budget" not in free.picture
    assert list(free.picture["fit_budget"]) == list(free.trials["budget"])
    drawn = free.trials.drop(columns=["seconds", "chosen"])  # at random, as there are few: the same ones
    pd.testing.assert_frame_equal(drawn, found.trials.drop(columns=["seconds", "chosen"]))
    tight = tuned(model, task, tmp_path / "tight", 3, budget=1e-12, prune_above=50.0)
    assert tight.best["damage"] == tight.trials["damage"].min()
    assert "none kept to the budget" in tight.why


@pytest.mark.slow
@ONE_CLASS
def test_what_breaks_the_model_is_given_up_and_counts(
    model: Any, task: UnlearningTask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = tuned(model, task, tmp_path / "free", 5, prune_above=50.0).trials
    bound = float(free["damage"].median())
    found = tuned(model, task, tmp_path / "out", 5, prune_above=bound).trials
    assert list(found["state"] == "pruned") == list(free["damage"] > bound)
    given_up = found[found["state"] == "pruned"]
    assert given_up["forget_accuracy"].isna().all()
    assert given_up["damage"].notna().all()
    assert not given_up["on_front"].any()
    assert given_up["reason"].str.startswith("damage on 10 documents above").all()
    assert len(given_up) == 2
    with pytest.raises(ValueError, match=r"none of 2 trials was measured: damage .*Raise prune_above"):
        tuned(model, task, tmp_path / "none", 2, prune_above=1e-12)
    real, calls = RMU.fit, []

    def fit(self: RMU, *args: Any, **more: Any) -> Fit:
        calls.append(1)
        if len(calls) in (1, 2):
            raise (NonFiniteLossError if len(calls) == 1 else NonFiniteError)("it became NaN")
        return real(self, *args, **more)

    monkeypatch.setattr(RMU, "fit", fit)
    diverged = tuned(model, task, tmp_path / "diverged", 3, prune_above=50.0).trials
    assert list(diverged["state"]) == ["pruned", "pruned", "complete"]
    assert list(diverged["reason"]) == ["it became NaN", "it became NaN", ""]


@pytest.mark.slow
@ONE_CLASS
def test_what_a_method_refuses_is_given_up_and_the_search_goes_on(
    model: Any, task: UnlearningTask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(MRP, "space", {"rank": Range(5, 8, whole=True)})
    short = replace(task, forget=(Corpus.from_texts(["The colour red."], name="forget"),))
    found = tuned(model, short, tmp_path / "out", 5, method=MRP(steps=1, coverage=None), prune_above=50.0).trials
    given_up = found[found["rank"] > 5]  # of as many directions as the text has tokens
    assert 0 < len(given_up) < 5
    assert (given_up["state"] == "pruned").all()
    assert given_up["reason"].str.contains("is above the 5 directions that 5 states leave").all()
    assert (found[found["rank"] <= 5]["state"] == "complete").all()


@pytest.mark.slow
@ONE_CLASS
def test_so_is_what_it_refuses_before_anything_is_derived_or_has_no_memory_for(
    model: Any, task: UnlearningTask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = list(tuned(model, task, tmp_path / "free", 5, prune_above=50.0).trials["layer"])
    odd = next(layer for layer in drawn if layer != drawn[0])
    real, fitted = RMU.fit, []

    def check(self: RMU, model: Any) -> None:
        if self.layer == odd:
            raise ValueError(f"layer {odd} is odd")

    def fit(self: RMU, *args: Any, **more: Any) -> Fit:
        fitted.append(self)
        if len(fitted) == 2:
            raise TooLittleMemoryError("memory ran out")
        return real(self, *args, **more)

    monkeypatch.setattr(RMU, "check", check)
    monkeypatch.setattr(RMU, "fit", fit)
    found = tuned(model, task, tmp_path / "out", 5, prune_above=50.0).trials
    assert list(found["layer"]) == drawn
    refused = found["layer"] == odd
    assert set(found[refused]["reason"]) == {f"layer {odd} is odd"}
    assert found[refused]["steering_coeff"].isna().all()  # a factor on what was not derived
    without_memory = found[~refused].iloc[1]
    assert (without_memory["state"], without_memory["reason"]) == ("pruned", "memory ran out")
    assert (found["state"] == "complete").sum() == (~refused).sum() - 1


@pytest.mark.slow
@ONE_CLASS
def test_what_is_wrong_with_the_method_as_it_is_given_is_an_error(
    model: Any, task: UnlearningTask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fit(self: RMU, *args: Any, **more: Any) -> Fit:
        raise TooLittleMemoryError("memory ran out")

    with monkeypatch.context() as patch:
        patch.setattr(RMU, "fit", fit)
        for _ in range(2):
            with pytest.raises(TooLittleMemoryError, match="memory ran out"):
                tuned(model, task, tmp_path / "out", 2, prune_above=50.0)
    found = tuned(model, task, tmp_path / "out", 2, prune_above=50.0)
    assert list(found.trials["state"]) == ["complete", "complete"]


def test_a_model_that_is_damaged_itself_is_refused_before_any_trial(
    model: Any, task: UnlearningTask, tmp_path: Path
) -> None:
    matrix = mlp_out_weight(model, 2).parameter
    kept = matrix.detach().clone()
    try:
        with torch.no_grad():
            matrix.fill_(torch.nan)
        with pytest.raises(NonFiniteError, match="NaN"):
            tuned(model, task, tmp_path / "out")
    finally:
        with torch.no_grad():
            matrix.copy_(kept)
    assert (tmp_path / "out" / "study.journal").read_text().count("\n") == 1


@pytest.mark.slow
def test_an_interrupted_trial_goes_on_with_the_same_settings(
    model: Any, task: UnlearningTask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = tuned(model, task, tmp_path / "whole", 3)
    real, calls = RMU.fit, []

    def fit(self: RMU, *args: Any, **more: Any) -> Fit:
        calls.append(self)
        return replace(real(self, *args, **more), interrupted=len(calls) == 2)

    monkeypatch.setattr(RMU, "fit", fit)
    with pytest.raises(KeyboardInterrupt):
        tuned(model, task, tmp_path / "out", 3)
    assert not (tmp_path / "out" / "edit").exists()
    found = tuned(model, task, tmp_path / "out", 3)
    assert calls[1] == calls[2]
    pd.testing.assert_frame_equal(whole.trials.drop(columns="seconds"), found.trials.drop(columns="seconds"))


def test_settings_that_are_given_are_kept(model: Any) -> None:
    assert set(open_space(RMU())) == {"layer", "budget", "lr", "steering_coeff"}
    assert set(open_space(RMU(lr=1e-3, steps=7))) == {"layer", "budget", "steering_coeff"}
    assert "layers" not in open_space(MRP(layers=[1]))
    for method, lowest in (
        (RMU(), 0),
        (RMU(trained_layers=(1, 2)), 2),
        (RMU(trained_layers=(1, 2), site="resid_pre"), 3),
        (AdaptiveRMU(site="attn_out"), 1),
    ):
        assert open_space(method)["layer"] == replace(RMU.space["layer"], lowest=lowest)  # type: ignore[index, type-var]
    with pytest.raises(TypeError, match="trained_layers must be a list of whole numbers"):
        open_space(RMU(trained_layers=2))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="all settings that rmu has to search are given: layer, budget, lr"):
        open_space(RMU(layer=1, budget=0.1, lr=1e-3, steering_coeff=1.0))


def test_factors_are_on_what_the_method_derives(model: Any, task: UnlearningTask, untouched: None) -> None:
    drawn = {"layers.last": 2, "lr.factor": 2.0, "retain_weight": 3.0, "beta": 0.5}
    base = NPO(steps=STEPS)
    made = method_of(base, open_space(base), drawn, model, task)
    usual = NPO(layers=(0, 1, 2), steps=1).fit(model, task.forget, task.retain, progress=False).settings["lr"]
    assert made == NPO(layers=(0, 1, 2), steps=STEPS, lr=float(f"{2 * usual:.4g}"), retain_weight=3.0, beta=0.5)


def test_the_first_trial_is_the_method_by_default(model: Any, task: UnlearningTask) -> None:
    bases: list[Any] = [RMU(steps=STEPS), MRP(steps=STEPS), NPO(steps=STEPS)]
    for base in bases:
        space = open_space(base)
        drawn = drawn_by_default(base, space, model, task)
        assert drawn.keys() == {name + end for name, way in space.items() for end in way.draws(model)}
        first: Any = method_of(base, space, drawn, model, task)
        usual, made = (
            recorded(method, method.prepared(model, task.forget, task.retain, None, None)[1])
            for method in (base, first)
        )
        for name in space:
            assert made[name] == pytest.approx(usual[name], rel=1e-3), (base.name, name)


@pytest.mark.slow
def test_the_public_types_declare_the_space_of_a_method_of_ones_own(
    model: Any, task: UnlearningTask, tmp_path: Path
) -> None:
    try:

        @register("toy", summary="RMU.", source="nowhere")
        @dataclass(frozen=True, kw_only=True)
        class Toy(RMU):
            """A toy without a space."""

        with pytest.raises(
            ValueError, match=r"toy declares no search space: register it with space=.* mrp, mrp-unconditional, rmu"
        ):
            tune(model, task, "toy", tmp_path / "out")

        @register("ranged", summary="RMU.", source="nowhere", space={"layer": Depth(), "alpha": Factor(0.5, 2.0)})
        @dataclass(frozen=True, kw_only=True)
        class Ranged(RMU):
            """A toy."""

            steps: int = STEPS

        found = tune(model, task, "ranged", tmp_path / "out", trials=2, progress=False, prune_above=50.0)
        assert {"layer", "alpha"} <= set(found.trials)
        assert "lr" not in found.trials
    finally:
        METHODS._entries.pop("toy", None)
        METHODS._entries.pop("ranged", None)


@pytest.mark.slow
def test_another_search_in_the_folder_is_refused_and_the_difference_named(
    model: Any, task: UnlearningTask, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    tuned(model, task, out, 2)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    for change, message in (
        ({"seed": 1}, r"other settings: seed \(0 there, 1 now\)"),
        ({"budget": 0.1}, "other settings: budget"),
        ({"tuning_share": 0.4}, "other settings: tuning_share"),
        ({"prune_above": 3.0}, "other settings: prune_above"),
        ({"method": RMU(steps=STEPS)}, "other settings: settings"),
    ):
        with pytest.raises(ValueError, match=message):
            tuned(model, task, out, 2, **change)
    assert before == {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert json.loads((out / "tune.json").read_text())["method"] == "rmu"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": "nothing"}, "unknown method 'nothing'"),
        ({"trials": 0}, "trials must be at least 1"),
        ({"budget": 0.0}, "budget must be above 0"),
        ({"prune_above": -1.0}, "prune_above must be above 0"),
        ({"tuning_share": 1.0}, "a share must be between 0 and 1"),
    ],
)
def test_what_cannot_be_meant_is_refused(
    model: Any, task: UnlearningTask, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        tune(model, task, **{"out": tmp_path / "out", "method": "rmu", **change})
    with pytest.raises(ValueError, match="there is none for forget"):
        tune(model, replace(task, questions=None), "rmu", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_without_optuna_it_says_what_to_install(
    model: Any, task: UnlearningTask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "mrp_lens.runs.trials", raising=False)
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(ImportError, match=r"pip install 'mrp_lens\[tune\]'"):
        tune(model, task, "rmu", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert torch.is_grad_enabled()
