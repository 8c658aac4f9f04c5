"""`mrp-lens tune`: what it leaves, what it refuses, and several processes of which some are killed."""

import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml

from mrp_lens.cli.tune import Tune
from tests.support.commands import completed, data_words, in_process, invoke, summary_of
from tests.support.kills import prepared, start, wait


def words(folder: Path, files: Path, out: str, *extra: str) -> list[str]:
    return ["tune", *data_words(folder, files, out=out), "--method", "rmu", "--steps", "2", "--trials", "3", *extra]


def bits(folder: Path) -> list[bytes]:
    return [(folder / "edit" / name).read_bytes() for name in ("edit.safetensors", "edit_config.json")]


@pytest.mark.slow
def test_the_command_leaves_a_table_a_picture_and_a_config_that_gives_the_same_bits(
    tiny_folder: Path, files: Path
) -> None:
    result = completed(*words(tiny_folder, files, "out"))
    assert "The front of 3 trials" in result.said
    assert "add up to the least" in result.said
    out = files / "out"
    summary = summary_of(out)
    rows = summary["rows"]
    assert [row["split"] for row in rows] == ["reported"] * 2 + ["tuning"] * 3
    assert len(pd.read_csv(out / "table.csv")) == len(rows)
    assert sum(bool(row.get("chosen")) for row in rows) == 1
    assert "was chosen: " in summary["notes"][0]
    (chosen,) = [row for row in rows if row.get("chosen")]
    assert chosen["forget_accuracy"] > 0.9 * rows[0]["forget_accuracy"]  # after two updates
    assert "The chosen trial forgot nothing" in summary["notes"][1]
    assert "The chosen trial forgot nothing" in result.said
    assert "Forgetting against damage" in (out / "report.html").read_text()
    assert "Forgetting against damage" in (out / "pareto.html").read_text()
    completed("unlearn", "--config", str(out / "best.yaml"))
    assert bits(files / "out-best") == bits(out)
    best = yaml.safe_load((out / "best.yaml").read_text())
    assert best["steps"] == 2
    assert best["layer"] == next(row["layer"] for row in rows if row.get("chosen"))
    before = {path: path.read_bytes() for path in (out / "study.journal", out / "edit" / "edit.safetensors")}
    again = Tune.parsed(["--config", str(out / "summary.json")])
    assert again is not None
    assert again.execute().rows[2:] == rows[2:]
    assert before == {path: path.read_bytes() for path in before}


def test_the_budget_of_the_search_is_not_that_of_each_fit(files: Path) -> None:
    line = ["--model", "demo", "--method", "mrp-unconditional", "--out", str(files / "out"), "--budget", "0.07"]
    for given, budget in (([], None), (["--mrp-unconditional-budget", "0.01"], 0.01)):
        parsed = Tune.parsed([*line, *given])
        assert parsed is not None
        assert (parsed.budget, parsed.fitter.budget) == (0.07, budget)  # type: ignore[attr-defined]
        (files / "again.yaml").write_text(yaml.safe_dump(parsed.arguments()))
        assert Tune.parsed(["--config", str(files / "again.yaml")]) == parsed


def test_the_demo_is_tuned_without_data(files: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parsed = Tune.parsed(["--model", "demo", "--topic", "potions", "--out", str(files / "out"), "--lr", "0.001"])
    assert parsed is not None
    assert parsed.method == "rmu"
    assert not parsed.data.names_data
    assert parsed.fitter.lr == 0.001  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--trials", "0"], "trials must be at least 1"),
        (["--budget", "x"], "--budget must be"),
        (["--tuning-share", "2"], "a share must be between 0 and 1"),
        (["--method", "nothing"], "unknown method 'nothing'"),
        (["--layer", "1", "--rmu-budget", "0.1", "--lr", "1", "--steering-coeff", "1"], "all settings that rmu has"),
        (["--choose", "3"], "choose one from 0 to 2"),
    ],
)
def test_the_command_names_what_is_wrong(tiny_folder: Path, files: Path, extra: list[str], message: str) -> None:
    result = invoke(*words(tiny_folder, files, "out", *extra))
    assert isinstance(result.exception, ValueError)
    assert message in str(result.exception)
    assert not list((files / "out").rglob("*"))


def test_a_task_without_a_quiz_is_refused_before_anything_is_loaded(tiny_folder: Path, files: Path) -> None:
    line = words(tiny_folder, files, "out")
    place = line.index("--retain-questions")
    del line[place : place + 2]
    result = invoke(*line)
    assert "there is none for retain; give questions=... and retain_questions=..." in str(result.exception)
    assert "Loading" not in result.output


@pytest.mark.slow
def test_without_optuna_the_command_ends_with_one_line(tiny_folder: Path, files: Path) -> None:
    code = "import sys; sys.modules['optuna'] = None; from mrp_lens.cli import main; main()"
    ended = in_process(*words(tiny_folder, files, "out"), code=code)
    assert ended.returncode == 2
    assert ended.stderr.splitlines()[-1].endswith("install it with: pip install 'mrp_lens[tune]'")
    assert not (files / "out").exists()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_three_processes_of_which_three_are_killed_end_with_all_trials(tmp_path: Path) -> None:
    model, trials = prepared(tmp_path), 14
    line: Any = [*words(model, tmp_path, "out", "--steps", "20", "--seed", "1"), "--trials", str(trials)]
    log, out, rng = tmp_path / "log.txt", tmp_path / "out", random.Random(0)
    running = [start(line, log) for _ in range(3)]
    journal = out / "study.journal"
    while not journal.exists():
        time.sleep(0.05)
    for _ in range(3):
        time.sleep(rng.uniform(0.2, 1.5))
        victim = running.pop(rng.randrange(3))
        assert os.waitpid(victim, os.WNOHANG)[0] == 0, "it was done before the blow fell"
        os.kill(victim, signal.SIGKILL)
        assert wait(victim) == -signal.SIGKILL
        running.append(start(line, log))
    assert [wait(process) for process in running] == [0, 0, 0], log.read_text()[-3000:]
    rows = [row for row in summary_of(out)["rows"] if row["split"] == "tuning"]
    assert [row["trial"] for row in rows] == list(range(trials))
    import optuna

    storage = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(journal)))
    states = [trial.state.name for trial in optuna.load_study(study_name="tune", storage=storage).trials]
    assert states.count("COMPLETE") + states.count("PRUNED") == trials
    assert set(states) <= {"COMPLETE", "PRUNED", "FAIL"}
    assert not list((out / "workers").iterdir())
    assert not list((out / "fits").iterdir())
    completed("unlearn", "--config", str(out / "best.yaml"))
    assert bits(tmp_path / "out-best") == bits(out)
