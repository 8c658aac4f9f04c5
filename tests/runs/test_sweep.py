from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from mrp_lens import metrics, plots
from mrp_lens.data import Corpus, Questions
from mrp_lens.data.task import UnlearningTask
from mrp_lens.methods import METHODS, MRP, RMU, AdaptiveRMU, DirectionAblation, NoisyRMU, Swept
from mrp_lens.methods.registry import register
from mrp_lens.models import load_model
from mrp_lens.models.finite import NonFiniteError
from mrp_lens.runs import sweep as module
from mrp_lens.runs.record import Run
from mrp_lens.runs.report import report
from mrp_lens.runs.sweep import Point, SweepConfig, default_coefficient, default_layers, sweep
from mrp_lens.training.checkpoints import CheckpointError
from mrp_lens.training.loop import TooLittleMemoryError
from mrp_lens.utils.frames import rows_of
from tests.conftest import LAYERS
from tests.support.families import save_family
from tests.support.quizzes import liked
from tests.support.quizzes import quiz as questions_of

CONFIG = SweepConfig(layers=(1, 2), coefficients=(3.0,), steps=2)


@pytest.fixture
def task(texts: tuple[Corpus, Corpus]) -> UnlearningTask:
    forget, retain = texts
    quiz = Questions.from_rows(
        [
            {"q": f"The colour of Zaxim{i} is", "choices": ["red", "blue", "green", "white"], "answer": i % 4}
            for i in range(8)
        ],
        prompt="{q}",
    )
    return UnlearningTask((forget,), retain, retain, quiz, quiz, quiz)


@pytest.mark.slow
def test_a_sweep_measures_every_point_beside_the_unedited_model(
    model: Any, task: UnlearningTask, tmp_path: Path, untouched: None
) -> None:
    frame = sweep(model, task, CONFIG, tmp_path / "sweep", progress=False)
    assert frame is not None
    assert list(frame["method"]) == ["unedited", "mrp", "mrp", "rmu", "rmu", "adaptive-rmu", "adaptive-rmu"]
    assert list(frame["layer"])[1:] == [1, 2] * 3
    row = frame[(frame["method"] == "rmu") & (frame["layer"] == 2)].iloc[0]
    fit = RMU(layer=2, steering_coeff=3.0, steps=2).fit(model, task.forget, task.retain, progress=False)
    with fit.edit.applied(model):
        assert task.questions is not None
        assert row["forget_accuracy"] == metrics.accuracy(model, task.questions)["accuracy"].iloc[0]
        aligned = metrics.alignment(model, task.texts()["forget"], fit.direction, layers=[2]).iloc[0]
        sure = metrics.confidence(model, task.questions, mode="forced").set_index("measure")["mean"]
    norm = metrics.alignment(model, task.texts()["forget"], fit.direction, layers=[2])["norm"].iloc[0]
    assert row["forget_cosine"] == pytest.approx(aligned["cosine"], abs=1e-6)
    assert row["null_mean"] == pytest.approx(aligned["null_mean"], abs=1e-6)
    assert row["forget_max_logit"] == pytest.approx(sure["max_logit"], rel=1e-5)
    assert row["relative_coefficient"] == pytest.approx(3.0 / norm, rel=1e-5)
    assert frame["text_perplexity_ratio"].iloc[0] == 1.0
    assert (frame["chance"] == 0.25).all()
    assert fit.outcome is not None
    assert (row["outcome"], row["updates"]) == (fit.outcome.ended, 2)


def test_fits_of_a_sweep_can_take_less_memory(model: Any, task: UnlearningTask) -> None:
    plan = replace(CONFIG, micro_batch=4, max_length=16).resolved(model, task)
    for method in ("mrp", "rmu"):
        fitter: Any = plan.fitter(Point(method, 1, 3.0 if method == "rmu" else None, 0))
        assert (fitter.micro_batch, fitter.max_length) == (4, 16)
    usual = CONFIG.resolved(model, task)
    assert {"micro_batch", "max_length"} == plan.settings().keys() - usual.settings().keys()
    with pytest.raises(ValueError, match="micro_batch"):
        replace(CONFIG, micro_batch=0)


@pytest.mark.slow
def test_points_that_are_there_are_skipped_and_shards_fill_one_folder(
    model: Any, task: UnlearningTask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = sweep(model, task, CONFIG, tmp_path / "whole", progress=False)
    assert whole is not None
    assert sweep(model, task, CONFIG, tmp_path / "shards", shard=(1, 2), progress=False) is None
    assert len(list((tmp_path / "shards" / "points").glob("*.json"))) == 1 + 3
    joined = sweep(model, task, CONFIG, tmp_path / "shards", shard=(2, 2), progress=False)
    assert joined is not None
    pd.testing.assert_frame_equal(whole, joined)
    monkeypatch.setattr(RMU, "fit", lambda *_, **__: pytest.fail("fitted again"))
    again = sweep(model, task, CONFIG, tmp_path / "whole", progress=False)
    assert again is not None
    pd.testing.assert_frame_equal(whole, again)


def test_a_folder_of_other_settings_is_refused_and_the_difference_named(
    model: Any, task: UnlearningTask, tmp_path: Path
) -> None:
    out = tmp_path / "sweep"
    plan = replace(CONFIG, methods=("rmu",), layers=(1,))
    sweep(model, task, plan, out, progress=False)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match=r"other settings: steps \(2 there, 3 now\)"):
        sweep(model, task, replace(plan, steps=3), out, progress=False)
    with pytest.raises(ValueError, match=r"layers .*; seeds "):
        sweep(model, task, replace(plan, layers=(2,), seeds=(0, 1)), out, progress=False)
    with pytest.raises(ValueError, match="other settings: data"):
        sweep(model, replace(task, retain=task.forget[0]), plan, out, progress=False)
    assert before == {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep me")
    with pytest.raises(FileExistsError, match="holds no sweep"):
        sweep(model, task, plan, tmp_path / "mine", progress=False)


def test_an_interrupted_fit_leaves_no_point(
    model: Any, task: UnlearningTask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = RMU.fit
    monkeypatch.setattr(RMU, "fit", lambda *a, **k: replace(real(*a, **k), interrupted=True))
    with pytest.raises(KeyboardInterrupt):
        sweep(model, task, replace(CONFIG, methods=("rmu",)), tmp_path / "sweep", progress=False)
    assert [path.name for path in (tmp_path / "sweep" / "points").iterdir()] == ["unedited.json"]


@pytest.mark.slow
def test_a_point_that_becomes_infinite_is_told_and_the_others_are_measured(
    model: Any, task: UnlearningTask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(CONFIG, methods=("rmu", "mrp"), layers=(2,), coefficients=(1e30, 3.0))
    frame = sweep(model, task, config, tmp_path / "sweep", progress=False)
    assert frame is not None
    failed, measured = frame[1:2], frame[2:]
    assert list(failed["method"]) == ["rmu"]
    assert failed["outcome"].str.startswith("failed: rmu: the ").all()
    assert not measured["outcome"].str.startswith("failed").any()
    known = ["method", "layer", "coefficient", "seed", "norm", "relative_coefficient", "outcome"]
    known += ["untaught_accuracy", "chance"]
    assert failed[known].notna().all(axis=None)
    assert failed.drop(columns=known).isna().all(axis=None)
    whole = sweep(model, task, replace(config, coefficients=(3.0,)), tmp_path / "whole", progress=False)
    assert whole is not None
    assert list(frame) == list(whole)
    pd.testing.assert_frame_equal(measured.reset_index(drop=True), whole[1:].reset_index(drop=True), check_dtype=False)
    run = Run("sweep", {}, 0, rows=list(rows_of(frame)), frames={"layer_effects": frame})
    run.write_into(tmp_path / "sweep")
    assert "failed: rmu: the " in report(tmp_path / "sweep").read_text()
    assert plots.coefficient_effects(frame).data
    monkeypatch.setattr(RMU, "fit", lambda *_, **__: pytest.fail("fitted again"))
    again = sweep(model, task, config, tmp_path / "sweep", progress=False)
    assert again is not None
    pd.testing.assert_frame_equal(frame, again)


def test_a_sweep_without_any_figure_says_why(
    model: Any, task: UnlearningTask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fit(*_: Any, **__: Any) -> Any:
        raise NonFiniteError("it became NaN")

    monkeypatch.setattr(RMU, "fit", fit)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"none of 2 points gave figures, the last failed: it became NaN\. Sweep"):
            sweep(model, task, replace(CONFIG, methods=("rmu",)), tmp_path / "sweep", progress=False)
    assert len(list((tmp_path / "sweep" / "points").glob("rmu-*.json"))) == 2


def test_what_is_refused_at_one_layer_is_a_row_unless_it_is_the_first(
    model: Any, task: UnlearningTask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = RMU.fit

    def fit(self: RMU, *arguments: Any, **options: Any) -> Any:
        if self.layer == refused:
            raise ValueError(f"layer {self.layer} is too much")
        return real(self, *arguments, **options)

    monkeypatch.setattr(RMU, "fit", fit)
    refused = 1
    config = replace(CONFIG, methods=("rmu",))
    with pytest.raises(ValueError, match="layer 1 is too much"):
        sweep(model, task, config, tmp_path / "first", progress=False)
    assert not list((tmp_path / "first" / "points").glob("rmu-*.json"))
    refused = 2
    frame = sweep(model, task, config, tmp_path / "later", progress=False)
    assert frame is not None
    assert frame["outcome"].iloc[2] == "failed: layer 2 is too much"
    assert frame["forget_accuracy"].notna().tolist() == [True, True, False]


@pytest.mark.parametrize("error", [CheckpointError("other versions"), TooLittleMemoryError("memory ran out")])
def test_what_another_run_would_not_find_is_no_outcome_of_a_point(
    error: ValueError, model: Any, task: UnlearningTask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, out, config = RMU.fit, tmp_path / "sweep", replace(CONFIG, methods=("rmu",))

    def fit(self: RMU, *arguments: Any, **options: Any) -> Any:
        if self.layer == 2:
            options["checkpoint"].mkdir(parents=True, exist_ok=True)
            (options["checkpoint"] / "state").write_text("of an hour")
            raise error
        return real(self, *arguments, **options)

    monkeypatch.setattr(RMU, "fit", fit)
    with pytest.raises(type(error), match=str(error)):
        sweep(model, task, config, out, progress=False)
    assert len(list((out / "points").glob("rmu-*.json"))) == 1
    assert len(list(out.rglob("state"))) == 1
    with pytest.raises(ValueError, match="shard 1/2 would remove what the other shards have done"):
        sweep(model, task, config, out, shard=(1, 2), overwrite=True, progress=False)
    monkeypatch.setattr(RMU, "fit", real)
    for path in out.rglob("state"):
        path.unlink()
    frame = sweep(model, task, config, out, progress=False)
    assert frame is not None
    assert frame["forget_accuracy"].notna().all()


def test_of_several_forget_corpora_with_a_direction_each_no_cosine_is_told(
    model: Any, task: UnlearningTask, tmp_path: Path
) -> None:
    half = len(task.forget[0]) // 2
    documents = task.forget[0].documents
    two = replace(task, forget=(Corpus(documents[:half], "one"), Corpus(documents[half:], "two")))
    frame = sweep(model, two, replace(CONFIG, methods=("rmu",), layers=(1,)), tmp_path / "sweep", progress=False)
    assert frame is not None
    assert frame[["forget_cosine", "null_mean"]].iloc[1].isna().all()
    assert frame[["forget_accuracy", "forget_norm"]].iloc[1].notna().all()


def test_coefficients_are_derived_for_methods_that_take_them_alone(
    task: UnlearningTask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mixture = load_model(str(save_family("mixtral", tmp_path / "model")), backend="bridge")
    config = replace(CONFIG, methods=("mrp",), layers=(1,), coefficients=None)
    with pytest.warns(UserWarning, match="cannot be exported"):
        frame = sweep(mixture, task, config, tmp_path / "sweep", progress=False)
    assert frame is not None
    assert list(frame["method"]) == ["unedited", "mrp"]
    monkeypatch.setattr(module, "default_coefficient", lambda *_, **__: 5.0)
    for methods, strengths, coefficients in (
        (("mrp", "adaptive-rmu"), {}, None),
        (("rmu",), {"rmu": (2.0,)}, None),
        (("rmu", "rmu-noise"), {"rmu": (2.0,)}, (5.0,)),
        (("mrp", "rmu"), {}, (5.0,)),
    ):
        plan = replace(config, methods=methods, strengths=strengths).resolved(mixture, task)
        assert plan.coefficients == coefficients
        assert ("coefficients" in plan.settings()) == (coefficients is not None)


def test_every_method_for_sweeps_is_fitted_as_what_it_is(model: Any, task: UnlearningTask) -> None:
    plan = replace(CONFIG, strengths={"adaptive-rmu": (4.0,)}).resolved(model, task)
    swept = {name: kind for name, kind in METHODS.items() if kind.swept is not None}
    for name, kind in swept.items():
        point = next(point for point in replace(plan, methods=(name,)).points())
        assert type(plan.fitter(point)) is kind
    made = {name: plan.fitter(replace(plan, methods=(name,)).points()[0]) for name in swept}
    assert made["mrp"] == MRP(layers=[1], steps=2)
    assert made["rmu"] == RMU(layer=1, steps=2, steering_coeff=3.0)
    assert made["rmu-noise"] == NoisyRMU(layer=1, steps=2, steering_coeff=3.0)
    assert made["adaptive-rmu"] == AdaptiveRMU(layer=1, steps=2, beta=4.0)
    assert made["direction-ablation"] == DirectionAblation(layers=[1])
    for name, strength in (("mrp", 3.0), ("npo", None)):
        with pytest.raises(ValueError, match=f"a sweep cannot fit '{name}' with coefficient {strength}"):
            plan.fitter(Point(name, 1, strength, 0))
    with pytest.raises(ValueError, match="unknown method 'mrp-new'"):
        plan.fitter(Point("mrp-new", 1, None, 0))


@pytest.mark.slow
def test_a_method_of_another_package_is_swept_by_its_own_strength(
    model: Any, task: UnlearningTask, tmp_path: Path
) -> None:
    try:

        @register("toy", summary="RMU.", source="nowhere", swept=Swept(layer="layer", strength="alpha"))
        @dataclass(frozen=True, kw_only=True)
        class Toy(RMU):
            """A toy."""

        config = replace(CONFIG, methods=("toy", "rmu-noise"), layers=(2,), strengths={"toy": (7.0, 8.0)})
        frame = sweep(model, task, config, tmp_path / "sweep", progress=False)
        assert frame is not None
        assert list(zip(frame["method"], frame["coefficient"], strict=True))[1:] == [
            *(("toy", 7.0), ("toy", 8.0), ("rmu-noise", 3.0))
        ]
        assert (tmp_path / "sweep" / "points" / "toy-layer2-c7-seed0.json").is_file()
        fit = Toy(layer=2, alpha=8.0, steps=2).fit(model, task.forget, task.retain, progress=False)
        with fit.edit.applied(model):
            expected = metrics.perplexity(model, task.held_out)["perplexity"].iloc[0]
        base = metrics.perplexity(model, task.held_out)["perplexity"].iloc[0]
        assert frame["text_perplexity_ratio"][2] == pytest.approx(expected / base, rel=1e-6)
        derived = replace(config, strengths={}, methods=("toy",)).resolved(model, task)
        assert derived.fitter(derived.points()[0]) == Toy(layer=2, steps=2)
    finally:
        METHODS._entries.pop("toy", None)


def test_the_settings_of_a_sweep_are_those_of_version_0_1(model: Any, task: UnlearningTask, tmp_path: Path) -> None:
    resolved = CONFIG.resolved(model, task)
    assert resolved.settings() == {
        **{"methods": ("mrp", "rmu", "adaptive-rmu"), "layers": (1, 2), "coefficients": (3.0,), "betas": (2.0,)},
        **{"seeds": (0,), "steps": 2, "questions": 150, "documents": 100},
    }
    full = replace(CONFIG, full=True, steps=None, layers=None).resolved(model, task)
    assert (full.seeds, full.steps, full.questions, full.documents) == ((0, 1, 2), None, None, 200)
    assert full.fitter(Point("adaptive-rmu", 1, 4.0, 0)) == AdaptiveRMU(layer=1, beta=4.0)
    assert full.layers == tuple(range(LAYERS))
    usual = default_coefficient(model, task, layer=2)
    assert replace(CONFIG, coefficients=None, full=True).resolved(model, task).coefficients == tuple(
        usual * share for share in (0.25, 1.0, 4.0)
    )


def test_two_coefficients_never_share_a_file(model: Any, task: UnlearningTask, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="2 points would be kept as 'rmu-layer1-c1-seed0'"):
        replace(CONFIG, methods=("rmu",), coefficients=(1.0, 1.0000001)).resolved(model, task)
    assert len(replace(CONFIG, layers=(1, 1)).resolved(model, task).points()) == 3  # a point named twice is one


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"methods": ("npo",)}, r"unknown methods \['npo'\]; choose among .*rmu, .*adaptive-rmu"),
        ({"coefficients": (0.0,)}, "coefficients must be above 0"),
        ({"betas": (-1.0,)}, "betas must be above 0"),
        ({"strengths": {"rmu": (0.0,)}}, "rmu must be above 0"),
        ({"strengths": {"mrp": (1.0,)}}, "mrp has no strength to vary"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"layers": (LAYERS,)}, "layer 4 is out of range"),
    ],
)
def test_bad_plans_are_named(
    model: Any, task: UnlearningTask, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        sweep(model, task, replace(CONFIG, **change), tmp_path / "sweep", progress=False)
    assert not (tmp_path / "sweep").exists()


def test_bad_shards_and_missing_questions_are_named(model: Any, task: UnlearningTask, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="shard 3/2 does not exist; write 1/2 to 2/2"):
        sweep(model, task, CONFIG, tmp_path / "sweep", shard=(3, 2))
    with pytest.raises(ValueError, match=r"needs questions on both sides; give retain_questions=\.\.\., too"):
        sweep(model, replace(task, retain_questions=None), CONFIG, tmp_path / "sweep")


def test_defaults_come_from_the_model(model: Any, task: UnlearningTask) -> None:
    assert default_layers(model, 4) == (2, 3)
    assert default_layers(model, 1) == (2,)
    fit = RMU(layer=2, steps=1).fit(model, task.forget, task.retain, progress=False)
    assert default_coefficient(model, task, layer=2) == pytest.approx(fit.settings["steering_coeff"], rel=0.01)
    assert Point("rmu", 3, 6.5, 1).name == "rmu-layer3-c6.5-seed1"
    assert Point("mrp", 3, None, 0).name == "mrp-layer3-seed0"


def test_the_never_taught_level_is_that_of_questions_like_those_of_the_forget_set(
    model: Any, task: UnlearningTask
) -> None:
    known = liked(model, questions_of(0, 20))
    wrong = [replace(q, answer=1 - q.answer, group="of another topic") for q in known.questions]
    untaught = replace(known, questions=(*known.questions, *wrong))
    asked = replace(task, questions=questions_of(100, 20), untaught_questions=untaught)
    controls = module._measure_unedited(model, asked, CONFIG.resolved(model, asked))["controls"]
    assert controls["untaught_accuracy"] == 1.0
