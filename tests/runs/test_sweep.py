import json
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from typer.testing import CliRunner

from mrp_lens import metrics
from mrp_lens.cli.app import app
from mrp_lens.cli.parsing import numbers, shard_of
from mrp_lens.data import Corpus, Questions
from mrp_lens.data.task import UnlearningTask
from mrp_lens.methods import RMU
from mrp_lens.runs.sweep import Plan, Point, _method, default_coefficient, default_layers, sweep
from tests.conftest import LAYERS

PLAN = Plan(("mrp", "rmu", "adaptive-rmu"), layers=(1, 2), coefficients=(3.0,), steps=2)


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


def test_a_sweep_measures_every_point_beside_the_unedited_model(
    model: Any, task: UnlearningTask, tmp_path: Path, untouched: None
) -> None:
    frame = sweep(model, task, PLAN, tmp_path / "sweep", progress=False)
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


def test_points_that_are_there_are_skipped_and_shards_fill_one_folder(
    model: Any, task: UnlearningTask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = sweep(model, task, PLAN, tmp_path / "whole", progress=False)
    assert whole is not None
    assert sweep(model, task, PLAN, tmp_path / "shards", shard=(1, 2), progress=False) is None
    assert len(list((tmp_path / "shards" / "points").glob("*.json"))) == 1 + 3
    joined = sweep(model, task, PLAN, tmp_path / "shards", shard=(2, 2), progress=False)
    assert joined is not None
    pd.testing.assert_frame_equal(whole, joined)
    monkeypatch.setattr(RMU, "fit", lambda *_, **__: pytest.fail("fitted again"))
    again = sweep(model, task, PLAN, tmp_path / "whole", progress=False)
    assert again is not None
    pd.testing.assert_frame_equal(whole, again)


def test_a_folder_of_other_settings_is_refused_and_the_difference_named(
    model: Any, task: UnlearningTask, tmp_path: Path
) -> None:
    out = tmp_path / "sweep"
    plan = replace(PLAN, methods=("rmu",), layers=(1,))
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
        sweep(model, task, replace(PLAN, methods=("rmu",)), tmp_path / "sweep", progress=False)
    assert [path.name for path in (tmp_path / "sweep" / "points").iterdir()] == ["unedited.json"]


def test_a_method_that_a_sweep_does_not_know_is_never_fitted_as_another() -> None:
    for name, strength in (("mrp", None), ("rmu", 3.0), ("adaptive-rmu", 5.0)):
        assert _method(PLAN, Point(name, 1, strength, 0)).name == name
    for name, strength in (("mrp-new", 3.0), ("mrp-new", None), ("rmu", None)):
        with pytest.raises(
            ValueError, match=f"a sweep cannot fit '{name}' with coefficient {strength}; choose among mrp, rmu"
        ):
            _method(PLAN, Point(name, 1, strength, 0))


def test_two_coefficients_never_share_a_file(model: Any, task: UnlearningTask, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="2 points would be kept as 'rmu-layer1-c1-seed0'"):
        replace(PLAN, methods=("rmu",), coefficients=(1.0, 1.0000001))
    assert len(replace(PLAN, layers=(1, 1)).points()) == 3  # a point that is named twice is one


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"methods": ("npo",)}, r"unknown methods \['npo'\]; choose among mrp, rmu, adaptive-rmu"),
        ({"coefficients": (0.0,)}, "coefficients must be above 0"),
        ({"betas": (-1.0,)}, "betas must be above 0"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"layers": (LAYERS,)}, "layer 4 is out of range"),
    ],
)
def test_bad_plans_are_named(
    model: Any, task: UnlearningTask, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        sweep(model, task, replace(PLAN, **change), tmp_path / "sweep", progress=False)
    assert not (tmp_path / "sweep").exists()


def test_bad_shards_and_missing_questions_are_named(model: Any, task: UnlearningTask, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="shard 3/2 does not exist; write 1/2 to 2/2"):
        sweep(model, task, PLAN, tmp_path / "sweep", shard=(3, 2))
    with pytest.raises(ValueError, match="there are none for retain"):
        sweep(model, replace(task, retain_questions=None), PLAN, tmp_path / "sweep")
    assert shard_of("2/4") == (2, 4)
    with pytest.raises(ValueError, match="--shard takes i/n"):
        shard_of("2")
    with pytest.raises(ValueError, match="--layers takes numbers separated by commas, got '1;2'"):
        numbers("1;2", int, "--layers")


def test_defaults_come_from_the_model(model: Any, task: UnlearningTask) -> None:
    assert default_layers(model, 4) == (2, 3)
    assert default_layers(model, 1) == (2,)
    norm = metrics.alignment(
        model,
        task.texts()["forget"],
        RMU(steps=1).fit(model, task.forget, task.retain, progress=False).direction,
        layers=[2],
    )["norm"].iloc[0]
    assert default_coefficient(model, task, layer=2) == pytest.approx(2 * norm, rel=0.01)
    assert Point("rmu", 3, 6.5, 1).name == "rmu-layer3-c6.5-seed1"
    assert Point("mrp", 3, None, 0).name == "mrp-layer3-seed0"


@pytest.fixture
def files(tmp_path: Path) -> Path:
    rows = [
        {"text": f"The colour of Zaxim{i} is red.", "q": f"The colour of Zaxim{i} is", "a": ["red", "blue"], "y": i % 2}
        for i in range(12)
    ]
    (tmp_path / "forget.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    (tmp_path / "retain.txt").write_text("\n".join(f"The old man walked near the house {i}." for i in range(20)))
    return tmp_path


def command(folder: Path, files: Path, out: str, *extra: str) -> list[str]:
    quiz = str(files / "forget.jsonl")
    return [
        *("sweep", "--model", str(folder), "--forget", quiz, "--retain", str(files / "retain.txt")),
        *("--questions", quiz, "--retain-questions", quiz),
        *("--question-prompt", "{q}", "--choices", "a", "--answer", "y"),
        *("--steps", "2", "--layers", "1,2", "--coefficients", "3,9", "--out", str(files / out), *extra),
    ]


def test_the_command_writes_a_table_once_all_shards_are_there(tiny_folder: Path, files: Path) -> None:
    first = CliRunner().invoke(app, command(tiny_folder, files, "out", "--shard", "1/2"))
    assert first.exit_code == 0, first.output + str(first.exception)
    assert "other points" in first.output
    assert not (files / "out" / "summary.json").exists()
    second = CliRunner().invoke(app, command(tiny_folder, files, "out", "--shard", "2/2"))
    assert second.exit_code == 0, second.output + str(second.exception)
    rows = json.loads((files / "out" / "summary.json").read_text())["rows"]
    assert len(rows) == len(pd.read_csv(files / "out" / "table.csv")) == 1 + 2 + 4 + 2
    assert rows[0]["layer"] is None
    assert (files / "out" / "frames" / "layer_effects.csv").is_file()


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--layers", "9"], "layer 9 is out of range"),
        (["--shard", "0/2"], "shard 0/2 does not exist"),
        (["--coefficients", "x"], "--coefficients takes numbers"),
    ],
)
def test_the_command_names_what_is_wrong(tiny_folder: Path, files: Path, extra: list[str], message: str) -> None:
    result = CliRunner().invoke(app, command(tiny_folder, files, "out", *extra))
    assert isinstance(result.exception, ValueError)
    assert message in str(result.exception)
    assert not list((files / "out").iterdir())


def test_a_model_of_ones_own_needs_data(tiny_folder: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["sweep", "--model", str(tiny_folder), "--out", str(tmp_path / "o")])
    assert "give forget=... and retain=..." in str(result.exception)
    result = CliRunner().invoke(app, ["sweep", "--forget", "x.jsonl", "--out", str(tmp_path / "o")])
    assert "forget and retain go together" in str(result.exception)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_sweep_killed_three_times_and_one_in_two_shards_end_as_an_undisturbed_one(
    tiny_folder: Path, files: Path
) -> None:
    main = [sys.executable, "-c", "from mrp_lens.cli import main; main()"]

    def start(*arguments: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen([*main, *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    steps = ("--steps", "40")
    began = time.monotonic()
    assert start(*command(tiny_folder, files, "whole", *steps)).wait() == 0
    whole = time.monotonic() - began
    rng = random.Random(time.time_ns())
    kills = 0
    while kills < 3:
        process = start(*command(tiny_folder, files, "killed", *steps))
        time.sleep(rng.uniform(0.3, 0.9) * whole)
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            kills += process.wait() == -signal.SIGKILL
        else:  # it was done before the blow fell
            break
    assert kills
    assert start(*command(tiny_folder, files, "killed", *steps)).wait() == 0
    shards = [start(*command(tiny_folder, files, "shards", *steps, "--shard", f"{i}/2")) for i in (1, 2)]
    assert [shard.wait() for shard in shards] == [0, 0]
    assert start(*command(tiny_folder, files, "shards", *steps)).wait() == 0
    tables = {name: (files / name / "table.csv").read_bytes() for name in ("whole", "killed", "shards")}
    assert tables["killed"] == tables["whole"]
    assert tables["shards"] == tables["whole"]
    assert not list((files / "killed").rglob("*.partial"))
