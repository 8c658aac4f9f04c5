import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from typer.testing import CliRunner

from mrp_lens.cli.app import app
from mrp_lens.edit import load_edit
from mrp_lens.training import NonFiniteLossError
from tests.conftest import state_of


@pytest.fixture
def data(tmp_path: Path) -> Path:
    rows = [
        {"text": f"The colour of Zaxim{i} is red.", "q": f"The colour of Zaxim{i} is", "a": ["red", "blue"], "y": 0}
        for i in range(12)
    ]
    for name in ("forget", "more", "quiz"):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    (tmp_path / "retain.txt").write_text("\n".join(f"The old man walked near the house {i}." for i in range(20)))
    return tmp_path


def unlearn(folder: Path, data: Path, *extra: str, method: str = "mrp") -> Any:
    arguments = ["unlearn", "--model", str(folder), "--method", method, "--forget", str(data / "forget.jsonl")]
    arguments += [
        "--retain",
        str(data / "retain.txt"),
        "--out",
        str(data / "out"),
        "--steps",
        "2",
        "--batch-size",
        "4",
        *extra,
    ]
    return CliRunner().invoke(app, arguments)


QUIZ = ["--question-prompt", "{q}", "--choices", "a", "--answer", "y"]


@pytest.mark.parametrize(
    ("method", "extra"), [("mrp", ["--layers", "1,2", "--rank", "2"]), ("rmu", ["--layers", "2"]), ("adaptive-rmu", [])]
)
def test_unlearn_writes_what_it_promises(tiny_folder: Path, data: Path, method: str, extra: list[str]) -> None:
    more = [] if method == "mrp" else ["--forget", str(data / "more.jsonl")]
    result = unlearn(tiny_folder, data, "--questions", str(data / "quiz.jsonl"), *QUIZ, *extra, *more, method=method)
    assert result.exit_code == 0, result.output + str(result.exception)
    summary = json.loads((data / "out" / "summary.json").read_text())
    assert set(summary) >= {"command", "arguments", "versions", "seed", "seconds", "rows"}
    assert [row["method"] for row in summary["rows"]] == ["unedited", method]
    assert {"forget_accuracy", "text_perplexity_ratio", "seconds"} <= set(summary["rows"][0])
    assert list(pd.read_csv(data / "out" / "table.csv")["method"]) == ["unedited", method]
    assert len(pd.read_csv(data / "out" / "log.csv")) == 2
    edit = load_edit(data / "out" / "edit")
    record = edit.provenance if method != "mrp" else edit.provenance["requests"]["forget"]
    assert record["method"] == method
    for printed in ("Generated answers", "forget quiz", "unedited", method):
        assert printed in result.output


def test_unlearn_refuses_a_full_folder_before_it_does_anything(tiny_folder: Path, data: Path) -> None:
    (data / "out").mkdir()
    (data / "out" / "precious.txt").write_text("keep me")
    result = unlearn(tiny_folder, data)
    assert isinstance(result.exception, FileExistsError)
    assert "--overwrite" in str(result.exception)
    assert [file.name for file in (data / "out").iterdir()] == ["precious.txt"]
    assert unlearn(tiny_folder, data, "--overwrite").exit_code == 0
    assert (data / "out" / "edit").is_dir()


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--layers", "one"], "--layers takes numbers"),
        (["--layers", "9"], "layer 9 is out of range"),
        (["--beta", "2"], "mrp has no --beta"),
        (["--dtype", "int8"], "unknown dtype 'int8'"),
        (["--field", "body"], "no field 'body'; the row has 'text'"),
        (["--rank", "32"], "must be below d_model 32"),
    ],
)
def test_unlearn_names_what_is_wrong(tiny_folder: Path, data: Path, extra: list[str], message: str) -> None:
    result = unlearn(tiny_folder, data, *extra)
    assert isinstance(result.exception, ValueError)
    assert message in str(result.exception)
    assert not (data / "out").exists()


def test_an_interrupted_fit_is_measured_and_saved(
    tiny_folder: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import mrp_lens.training as training

    def interrupt(*_: Any) -> Any:
        raise KeyboardInterrupt

    real = training._accumulate
    calls: list[int] = []

    def second(*arguments: Any) -> Any:
        calls.append(1)
        return real(*arguments) if len(calls) == 1 else interrupt()

    monkeypatch.setattr(training, "_accumulate", second)
    result = unlearn(tiny_folder, data)
    assert result.exit_code == 0
    assert "interrupted after 1 steps" in result.output
    assert json.loads((data / "out" / "summary.json").read_text())["notes"]
    load_edit(data / "out" / "edit")


def run_command(*arguments: str, code: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)


MAIN = "import sys; from mrp_lens.cli import main; main()"


def test_help_answers_without_importing_torch_or_transformer_lens() -> None:
    code = (
        "import sys\nfrom mrp_lens.cli import main\ntry:\n    main()\nexcept SystemExit:\n    pass\n"
        "heavy = [name for name in ('torch', 'transformer_lens', 'transformers', 'pandas') if name in sys.modules]\nassert not heavy, heavy"
    )
    for command in ([], ["demo"], ["unlearn"]):
        result = run_command(*command, "--help", code=code)
        assert result.returncode == 0, result.stderr
    assert "mrp-lens unlearn --model ./my-checkpoint" in result.stdout


def test_bad_input_ends_with_its_message_and_code_2() -> None:
    result = run_command(
        "unlearn",
        "--model",
        "/nowhere",
        "--method",
        "mrp",
        "--forget",
        "none.jsonl",
        "--retain",
        "r.txt",
        "--out",
        "o",
        code=MAIN,
    )
    assert result.returncode == 2
    assert "no file at none.jsonl" in result.stderr
    assert "Traceback" not in result.stderr


def test_a_failed_fit_leaves_no_folder(tiny_folder: Path, data: Path) -> None:
    result = unlearn(tiny_folder, data, "--lr", "1e30", method="rmu")
    assert isinstance(result.exception, NonFiniteLossError)
    assert not (data / "out").exists()


@pytest.mark.slow
def test_the_demo_runs_the_whole_job(tmp_path: Path, demo_model: Any) -> None:
    before = state_of(demo_model)
    assert before
    result = CliRunner().invoke(app, ["demo", "--out", str(tmp_path / "demo")])
    assert result.exit_code == 0, result.output + str(result.exception)
    rows = {row["method"]: row for row in json.loads((tmp_path / "demo" / "summary.json").read_text())["rows"]}
    assert list(rows) == ["unedited", "random-projection", "untrained-start", "mrp", "rmu", "adaptive-rmu"]
    assert rows["unedited"]["forget_accuracy"] >= 0.97
    assert rows["random-projection"]["forget_accuracy"] > rows["mrp"]["forget_accuracy"] + 0.1
    for method in ("mrp", "rmu", "adaptive-rmu"):
        load_edit(tmp_path / "demo" / method / "edit")
        assert (tmp_path / "demo" / method / "log.csv").is_file()
