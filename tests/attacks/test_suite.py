"""Every attack on one edit: what is computed, gone on with, refused, and how it is put into a table."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from typing_extensions import override

from mrp_lens import attacks
from mrp_lens.attacks import (
    ATTACKS,
    Attack,
    Setting,
    SuiteConfig,
    notes_of,
    registry,
    relearn,
    rows_of_attacks,
    worst_attack,
)
from mrp_lens.attacks.base import Frames
from mrp_lens.attacks.evaluation import score
from mrp_lens.attacks.finetuning import possible_forms
from mrp_lens.attacks.gcg import TriggerSearch
from mrp_lens.data import Corpus, Questions
from mrp_lens.data.task import UnlearningTask
from mrp_lens.edits import ProjectionEdit
from mrp_lens.edits.provenance import fingerprint
from mrp_lens.edits.subspace import Subspace
from mrp_lens.models import identity_of, is_bridge, load_model
from mrp_lens.runs.report.table import table_of
from mrp_lens.training import loop as training
from tests.support import attack_frames
from tests.support.edits import conditional, projection, weight_edit
from tests.support.quizzes import liked, quiz, slow_right

RELEARN, PROBE, BYPASS, GCG, V_INFORMATION = (
    import_module(f"mrp_lens.attacks.{name}") for name in ("relearn", "probe", "bypass", "gcg", "v_information")
)
EVERY = SuiteConfig()


def configured(attacks: tuple[str, ...] | None = None, **budgets: Any) -> SuiteConfig:
    """From fields of the attacks side by side, as the command line has them."""
    kinds = {field.name: kind for kind in ATTACKS.values() for field in fields(kind)}
    given: dict[type[Any], dict[str, Any]] = {}
    others: dict[str, Any] = {}
    for name, value in budgets.items():
        (given.setdefault(kinds[name], {}) if name in kinds else others)[name] = value
    return SuiteConfig(attacks=attacks, budgets=tuple(kind(**values) for kind, values in given.items()), **others)


def quick(*names: str, **budgets: Any) -> SuiteConfig:
    """Next to no updates; all attacks, or these."""
    return configured(names or None, **{"steps": 2, "lr": (1e-3,), "search_steps": 1, **budgets})


def attack(*given: Any, name: str = "edited", reference: Any = None) -> dict[str, pd.DataFrame]:
    return attacks.run_suite(*given, name=name, reference=reference, progress=False)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Probes of one layer and searches among few tokens: what they find is tested elsewhere."""
    monkeypatch.setattr(PROBE, "probe", partial(attacks.probe, layers=[2]))
    monkeypatch.setattr(V_INFORMATION, "STEPS", (5, 20))
    monkeypatch.setattr(GCG, "jailbreak", partial(attacks.jailbreak, candidates=4, top=4, batch=4))


@pytest.fixture
def task(model: Any, texts: tuple[Corpus, Corpus]) -> UnlearningTask:
    forget, retain = texts
    asked, kept = liked(model, quiz(0, 44)), quiz(100, 20, wording="House {} is", name="kept")
    return UnlearningTask((forget,), retain, retain, asked, kept, quiz(200, 20, name="untaught"))


@pytest.mark.slow
def test_a_suite_makes_every_attack_with_its_controls_and_leaves_the_model(
    model: Any, task: UnlearningTask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small: None, untouched: None
) -> None:
    edit = projection(1, 2, rank=20)
    frames = attack(model, edit, task, quick(), tmp_path / "out", name="mrp")
    pictured = {"relearning_curves", "probe_bits", "logit_lens", "jailbreak_curve", "input_gradients"}
    assert set(frames) == {*pictured, "bypass"}
    assert set(frames["probe_bits"]["method"]) == {"unedited", "mrp", "mrp, relearned"}
    assert set(frames["probe_bits"]["group"]) == {"held-out", "shuffled", "never-taught"}
    assert set(frames["logit_lens"]["group"]) == {"forget", "never-taught"}
    assert set(frames["jailbreak_curve"]["objective"]) == {"answer", "representation"}
    rows = rows_of_attacks(frames, "mrp", EVERY)
    _, held_out = task.split(seed=0)
    before = np.mean(slow_right(model, held_out))
    with edit.applied(model):
        edited = np.mean(slow_right(model, held_out))
    assert edited < before == 1.0
    first, *others = rows
    assert (first["method"], first["attack"]) == ("mrp", "no attack")
    assert (first["accuracy_before"], first["accuracy_edited"], first["forget_accuracy"]) == (before, edited, edited)
    for row in (row for row in others if row.get("recovery") is not None and row["method"] == "mrp"):
        share = (row["accuracy_after"] - row["floor"]) / (row["ceiling"] - row["floor"])
        assert row["recovery"] == pytest.approx(share), row["attack"]
    assert {row["method"] for row in others} == {"mrp", "unedited", "never-taught", "random-trigger", "mrp, relearned"}
    named = {row["attack"] for row in others if row["method"] == "mrp"}
    assert named >= {
        "relearn, edit kept, 2 steps",
        "relearn, hooks stripped, 2 steps",
        "hook stripped",
        "jailbreak, answers",
        "jailbreak, states",
        "probe, linear",
    }
    functions = {RELEARN: ["relearn"], PROBE: ["probe", "logit_lens"], BYPASS: ["bypass"]}
    for module, names in {**functions, GCG: ["jailbreak", "input_gradients"]}.items():
        for function in names:
            monkeypatch.setattr(module, function, lambda *_, **__: pytest.fail("attacked again"))
    again = attack(model, edit, task, quick(), tmp_path / "out", name="mrp")
    assert rows_of_attacks(again, "mrp", EVERY) == rows
    with pytest.raises(ValueError, match=r"other settings: steps \(2 there, 3 now\)"):
        attack(model, edit, task, quick(steps=3), tmp_path / "out")
    with pytest.raises(ValueError, match="other settings: edit"):
        attack(model, projection(1, 2, seed=5), task, quick(), tmp_path / "out")


@pytest.mark.slow
def test_curves_are_those_of_relearn_and_the_unedited_model_is_retrained_likewise(
    model: Any, task: UnlearningTask, tmp_path: Path, untouched: None
) -> None:
    config = quick("relearn", lr=(1e-3, 3e-3), forms=("kept",), samples=10)
    edit = projection(1)
    curves = attack(model, edit, task, config, tmp_path / "out", name="mrp")["relearning_curves"]
    train, held_out = task.split(seed=0)
    untaught = task.untaught_questions
    assert untaught is not None
    for name, attacked in (("mrp", edit), ("unedited", None)):
        expected = relearn(
            model,
            attacked,
            train=train,
            held_out=held_out,
            untaught=untaught,
            new=untaught.halves(seed=0)[1],
            steps=2,
            lr=(1e-3, 3e-3),
            samples=10,
            progress=False,
        )
        found = curves[curves["method"] == name].reset_index(drop=True)
        for column in ("lr", "step", "train_accuracy", "held_out_accuracy", "new_accuracy", "floor", "recovery"):
            np.testing.assert_allclose(found[column].astype(float), expected[column], err_msg=column)
    assert len(list((tmp_path / "out" / "points").glob("*.json"))) == 4


@pytest.mark.slow
def test_with_a_reference_the_floor_is_what_it_comes_to(model: Any, task: UnlearningTask, tmp_path: Path) -> None:
    config = quick("relearn", forms=("kept",), parameters=("all", "before"))
    edit = projection(1, 2, rank=20)
    curves = attack(model, edit, task, config, tmp_path / "out", reference=model)["relearning_curves"]
    unedited = curves[(curves["method"] == "unedited")].set_index("step")["held_out_accuracy"]
    on_reference = curves[(curves["method"] == "edited") & (curves["parameters"] == "all")].set_index("step")
    assert on_reference["floor"].to_dict() == unedited.to_dict()
    assert (on_reference["n_floor"] == on_reference["n"]).all()
    before = curves[curves["parameters"] == "before"]  # which only an edited model has
    assert set(before["method"]) == {"edited"}
    assert (before["n_floor"] == 10).all()


def test_forms_are_those_that_the_edit_has(model: Any, untouched: None) -> None:
    assert possible_forms(model, projection(1), None) == ("kept", "stripped")
    assert possible_forms(model, conditional(1, site="mlp_out"), None) == ("kept", "stripped")
    assert possible_forms(model, projection(1, site="mlp_out"), None) == ("kept", "stripped", "weights")
    assert possible_forms(model, weight_edit(model, 2), None) == ("kept",)
    with pytest.raises(ValueError, match="cannot be written into weights"):
        possible_forms(model, projection(1), ("weights",))
    with pytest.raises(ValueError, match="no hooks that could be stripped"):
        possible_forms(model, weight_edit(model, 2), ("kept", "stripped"))


@pytest.mark.filterwarnings("ignore:only 4 held-out questions")
def test_nothing_is_written_where_something_cannot_be_done(model: Any, task: UnlearningTask, tmp_path: Path) -> None:
    narrow = ProjectionEdit({"blocks.1.hook_resid_post": Subspace.random(2, 16, seed=0)})
    edit, out = projection(1), tmp_path / "out"
    bad: list[tuple[Any, UnlearningTask, dict[str, Any], str]] = [
        (narrow, task, {}, "this edit was made for another model"),
        (edit, replace(task, questions=None), {}, "scored on a quiz on the forget set"),
        (edit, task, {"lr": (0.0,)}, "lr must be above 0"),
        (edit, task, {"split": "entity"}, "name that column with entity"),
        (edit, task, {"forms": ("weights",)}, "cannot be written into weights"),
        (projection(3), task, {"parameters": ("all", "lora")}, "HookedTransformer"),
        (edit, replace(task, untaught_questions=task.questions), {}, "are in train or held_out too"),
        (edit, replace(task, questions=quiz(0, 8)), {}, "'probe' needs 5 questions for its training"),
    ]
    for attacked, data, budgets, message in bad:
        if "lora" in budgets.get("parameters", ()) and is_bridge(model):
            continue
        with pytest.raises(ValueError, match=message):
            attack(model, attacked, data, quick(**budgets), out)
    assert not out.exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attacks": ("guess",)}, "unknown attack 'guess'; choose one of relearn, probe, bypass, jailbreak"),
        ({"forms": ("folded",)}, "unknown forms 'folded'"),
        ({"parameters": ("head",)}, "unknown parameters 'head'"),
        ({"probe_kind": "deep"}, "unknown probe_kind 'deep'"),
        ({"steps": 0}, "steps must be above 0, got 0"),
        ({"search_steps": 0}, "search_steps must be above 0"),
        ({"samples": 0}, "samples must be above 0"),
    ],
)
def test_a_configuration_names_what_is_wrong_with_it(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        configured(**change)


@pytest.mark.slow
def test_ctrl_c_keeps_whole_pieces_only(
    model: Any, task: UnlearningTask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, untouched: None
) -> None:
    edit, out = projection(1), tmp_path / "out"
    config = quick("relearn", forms=("kept",))
    whole = rows_of_attacks(attack(model, edit, task, config, tmp_path / "whole"), "edited", config)
    real, calls = training._accumulate, [0]

    def interrupted(*arguments: Any) -> Any:
        calls[0] += 1
        if calls[0] == 6:  # in the second curve: the first takes 2 updates on T and 2 on new facts
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(training, "_accumulate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        attack(model, edit, task, config, out)
    assert [file.name for file in (out / "points").iterdir()] == ["relearn-edited-kept-all-lr0.001.json"]
    monkeypatch.undo()
    found = rows_of_attacks(attack(model, edit, task, config, out), "edited", config)
    assert found == whole

    def stopped(*_: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(TriggerSearch, "step", stopped)
    with pytest.raises(KeyboardInterrupt):
        attack(model, edit, task, replace(config, attacks=("jailbreak",)), out)
    assert not list((out / "points").glob("jailbreak*"))


@pytest.mark.slow
def test_bf16_models_are_attacked_too(
    tiny_folder: Path, backend: Any, task: UnlearningTask, tmp_path: Path, small: None
) -> None:
    coarse = load_model(str(tiny_folder), backend=backend, dtype=torch.bfloat16)
    frames = attack(coarse, projection(1), task, quick("relearn", "probe", forms=("kept",)), tmp_path / "out")
    assert np.isfinite(frames["probe_bits"]["bits"]).all()
    assert frames["relearning_curves"]["step"].max() == 2


def test_the_table_takes_the_best_rate_and_has_the_keys_of_the_contract() -> None:
    curves = attack_frames.relearning(forms=("kept", "stripped", "weights")).assign(method="mrp")
    curves = curves.assign(accuracy_before=0.99, accuracy_edited=0.27, recovery_low=0.0, recovery_high=1.0)
    controls = {f"control_{end}": 0.03 for end in ("recovery", "recovery_low", "recovery_high")}
    rows = rows_of_attacks({"relearning_curves": curves.assign(**controls)}, "mrp", EVERY)
    best = curves[curves["lr"] == 1e-3].set_index(["form", "step"])["recovery"]
    assert rows[0]["recovery_5"] == best["kept", 5]
    assert rows[0]["recovery_20"] == best["kept", 20]
    assert rows[0]["recovery_100"] == best["kept", 100]
    assert rows[0]["recovery_100_stripped"] == best["stripped", 100]
    assert rows[0]["recovery_100_weights"] == best["weights", 100]
    assert [row["attack"] for row in rows if row["method"] == "mrp"] == [
        "no attack",
        *(f"relearn, edit kept, {steps} steps" for steps in (5, 20, 100)),
        "relearn, hooks stripped, 100 steps",
        "relearn, in the weights, 100 steps",
    ]
    assert [row["recovery"] for row in rows if row["method"] == "never-taught"] == [0.03] * 3
    page = table_of(rows)
    assert "recovery" in page.headings
    assert not {"recovery 5", "recovery_100", "accuracy on what must go"} & set(page.headings)
    assert f"{best['kept', 5]:.2f} [0.00, 1.00]" in list(map(str, page.rows[1][1]))


def test_notes_say_which_attacks_do_not_count_and_which_models_are_hard_to_train() -> None:
    edited = attack_frames.relearning().assign(method="mrp")
    unedited = edited.assign(method="unedited")
    slow = edited.assign(counts=False, train_accuracy=0.62, new_accuracy=edited["new_accuracy"] - 0.3)

    def notes(*curves: pd.DataFrame) -> list[str]:
        return notes_of({"relearning_curves": pd.concat(curves)}, "mrp", EVERY)

    assert notes(edited, unedited) == []
    first, second = notes(slow, unedited)
    assert "mrp: relearn, edit kept does not count: 62% of its own training questions" in first
    assert "learns new facts more slowly than the unedited one" in second
    unknown = edited.assign(new_accuracy=None)
    assert notes(unknown, unedited) == []
    assert notes_of({}, "mrp", EVERY) == []
    assert RELEARN.SLOWER == 0.2


def test_the_fingerprint_of_an_edit_changes_with_its_tensors_and_hooks() -> None:
    assert fingerprint(projection(1)) == fingerprint(projection(1))
    assert len({fingerprint(edit) for edit in (projection(1), projection(1, seed=1), projection(2))}) == 3


def test_never_taught_questions_are_those_of_the_same_groups(task: UnlearningTask) -> None:
    assert task.untaught_alike == task.untaught_questions
    world = UnlearningTask.from_world("potions")
    assert world.untaught_alike is not None
    assert world.untaught_alike.groups == ("potions",)
    other = Questions.from_rows([{"question": "?", "choices": ["a", "b"], "answer": 0, "g": "x"}], group="g")
    assert replace(world, untaught_questions=other).untaught_alike == other


OF_0_1 = {  # the budgets in a folder that version 0.1 wrote, in its order
    "forms": ["kept"],
    "parameters": ["all"],
    "steps": 2,
    "lr": [0.001],
    "samples": None,
    "probe_kind": "linear",
    "search_steps": 1,
    "split": None,
    "questions": None,
    "seed": 0,
}


def test_a_folder_of_version_0_1_is_gone_on_with(
    model: Any, task: UnlearningTask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    edit, out = projection(1), tmp_path / "out"
    train, held_out = task.split(seed=0)
    roles = {"train": train, "held_out": held_out, "untaught": task.untaught_questions}
    data = task.fingerprints() | {role: part.fingerprint for role, part in roles.items() if part is not None}
    settings = {"model": identity_of(model), "edit": fingerprint(edit), "reference": None, "data": data, **OF_0_1}
    (out / "points").mkdir(parents=True)
    (out / "campaign.json").write_text(json.dumps(settings))
    curves = attack_frames.relearning(steps=(0, 2), rates=(1e-3,)).assign(control_recovery=0.1)
    for role in ("edited", "unedited"):
        rows = {"rows": curves.to_dict("records")}
        (out / "points" / f"relearn-{role}-kept-all-lr0.001.json").write_text(json.dumps(rows))
    monkeypatch.setattr(RELEARN, "relearn", lambda *_, **__: pytest.fail("attacked again"))
    config = quick("relearn", forms=("kept",))
    found = attack(model, edit, task, config, out)["relearning_curves"]
    assert found["held_out_accuracy"].tolist() == curves["held_out_accuracy"].tolist() * 2
    attack(model, edit, task, replace(config, attacks=()), tmp_path / "new")
    written = (tmp_path / "new" / "campaign.json").read_text()
    assert json.loads(written) == json.loads(json.dumps(settings))
    assert list(json.loads(written)) == list(settings)


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is registered in a test is forgotten after it."""
    assert len(ATTACKS) == 4
    monkeypatch.setattr(ATTACKS, "_entries", dict(ATTACKS._entries))
    monkeypatch.setattr(registry, "_owners", dict(registry._owners))


def louder() -> type[Attack]:
    """What somebody else would write, in one file."""

    @attacks.register("louder", summary="Asks louder.", source="nowhere")
    @dataclass(frozen=True, kw_only=True)
    class Louder(Attack):
        marks: int = 1

        @override
        def run(self, setting: Setting) -> Frames:
            def asked() -> pd.DataFrame:
                with setting.edit.applied(setting.model):
                    found = score(setting.model, self._louder(setting.facts.held_out))
                return pd.DataFrame({"accuracy": [found.accuracy], "n": found.n})

            return {"loudness": setting.frame("louder", asked).assign(method=setting.name)}

        def _louder(self, asked: Questions) -> Questions:
            return replace(
                asked, questions=tuple(replace(q, prompt="!" * self.marks + q.prompt) for q in asked.questions)
            )

        @override
        def rows(self, frames: Frames, name: str) -> Iterator[Mapping[str, Any]]:
            for row in frames["loudness"].to_dict("records"):
                yield {"method": name, "attack": "louder", "n": row["n"], "accuracy_after": row["accuracy"]}

        @override
        def notes(self, frames: Frames, name: str) -> list[str]:
            return [f"{name} was asked with {self.marks} marks"]

    return Louder


@pytest.mark.slow
def test_somebody_elses_attack_is_one_file(
    model: Any, task: UnlearningTask, tmp_path: Path, small: None, registered: None, untouched: None
) -> None:
    louder()
    edit, out = projection(1, 2, rank=20), tmp_path / "out"
    assert tuple(ATTACKS) == ("relearn", "probe", "bypass", "jailbreak", "louder")
    attack(model, edit, task, quick("bypass"), out, name="mrp")
    config = quick(marks=3, forms=("kept",))
    frames = attack(model, edit, task, replace(config, attacks=("bypass", "louder")), tmp_path / "other", name="mrp")
    found = frames["loudness"]["accuracy"].item()
    everything = quick(marks=3)
    rows = rows_of_attacks(attack(model, edit, task, everything, out, name="mrp"), "mrp", everything)
    row = next(row for row in rows if row["attack"] == "louder")
    assert (row["method"], row["n"], row["accuracy_after"]) == ("mrp", 22, found)
    kinds = ["bits" in row for row in rows]
    assert kinds == sorted(kinds), "probes are a table of their own, behind the others"
    assert "mrp was asked with 3 marks" in notes_of(frames, "mrp", replace(config, attacks=("louder",)))
    _, held_out = task.split(seed=0)
    with edit.applied(model):
        loud = replace(held_out, questions=tuple(replace(q, prompt=f"!!!{q.prompt}") for q in held_out.questions))
        assert found == pytest.approx(np.mean(slow_right(model, loud)))
    with pytest.raises(ValueError, match=r"begun with another louder-settings: marks \(3 there, 4 now\)"):
        attack(model, edit, task, quick("louder", marks=4), out)


def test_an_attack_that_cannot_be_offered_beside_the_others_is_refused(registered: None) -> None:
    def refused(error: type[Exception], match: str, kind: Any) -> None:
        with pytest.raises(error, match=match):
            attacks.register("mine", summary="", source="")(kind)

    @dataclass(frozen=True, kw_only=True)
    class SameBudget(Attack):
        steps: int = 3

    @dataclass(frozen=True, kw_only=True)
    class NoDefault(Attack):
        mine: int

    class NoDataclass(Attack):
        mine: int = 3

    refused(ValueError, "'mine' has a budget steps, which is one of relearn; choose another name", SameBudget)
    refused(TypeError, "the budget mine of the attack 'mine' has no default", NoDefault)
    refused(TypeError, "NoDataclass is no dataclass of its own", NoDataclass)
    assert "mine" not in ATTACKS
    with pytest.raises(TypeError, match="attacks must be a tuple of names"):
        SuiteConfig(attacks="relearn")  # type: ignore[arg-type]
    relearn_twice = (ATTACKS["relearn"](), ATTACKS["relearn"]())
    with pytest.raises(ValueError, match="several budgets of one attack: relearn, relearn"):
        SuiteConfig(budgets=relearn_twice)


def test_the_worst_attack_is_the_one_that_is_certain_to_bring_most_back() -> None:
    def row(attack: str, *interval: float, method: str = "mrp") -> dict[str, Any]:
        low, high = interval
        ends = {"recovery": (low + high) / 2, "recovery_low": low, "recovery_high": high}
        return {"method": method, "attack": attack, "accuracy_after": 0.5, **ends}

    plain, stripped, few = row("no attack", -0.1, 0.1), row("hooks stripped", 0.8, 1.0), row("few-shot", 0.1, 1.9)
    control = row("relearn", 0.9, 1.0, method="unedited")
    probe = {"method": "mrp", "attack": "probe", "bits": 1.0}
    told = ["Worst of 2 attacks: hooks stripped, recovery 0.90 [0.80, 1.00], 50% right."]
    assert worst_attack([plain, few, control, stripped, probe], "mrp") == told
    known = worst_attack([row("no attack", 0.2, 0.6), stripped], "mrp")
    assert known[0] == "Not all was forgotten to begin with: without an attack recovery 0.40 [0.20, 0.60], 50% right."
    assert worst_attack([control, probe], "mrp") == []
