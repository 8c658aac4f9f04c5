"""`mrp-lens attack`: what it writes and prints, that it goes on after Ctrl-C, and what it refuses."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from typer.testing import CliRunner

from mrp_lens.attacks import FactSplit
from mrp_lens.cli.app import app
from mrp_lens.data.task import TaskConfig
from mrp_lens.edits.provenance import label_of
from mrp_lens.training import loop as training
from tests.support.edits import projection, weight_edit

COLOURS = ["red", "blue", "green", "white"]


@pytest.fixture
def files(tmp_path: Path) -> Path:
    def write(name: str, first: int, count: int, thing: str = "Zaxim") -> None:
        rows = [
            {"text": f"The colour of {thing}{n} is {COLOURS[n % 4]}.", "q": f"The colour of {thing}{n} is"}
            | {"a": COLOURS, "y": n % 4, "who": f"{thing}{n // 2}"}
            for n in range(first, first + count)
        ]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))

    write("forget", 0, 44)
    write("untaught", 100, 20)
    write("kept", 0, 20, "House ")
    (tmp_path / "retain.txt").write_text("\n".join(f"The old man walked near the house {i}." for i in range(20)))
    projection(1, 2).save_pretrained(tmp_path / "edit")
    return tmp_path


def command(folder: Path, files: Path, *extra: str) -> list[str]:
    return [
        *("attack", "--model", str(folder), "--edit", str(files / "edit"), "--out", str(files / "out")),
        *("--forget", str(files / "forget.jsonl"), "--retain", str(files / "retain.txt")),
        *("--questions", str(files / "forget.jsonl"), "--retain-questions", str(files / "kept.jsonl")),
        *("--question-prompt", "{q}", "--choices", "a", "--answer", "y", "--attack", "relearn", "--steps", "2"),
        *("--lr", "1e-3", *extra),
    ]


def test_the_command_writes_a_table_a_page_and_a_summary_and_goes_on_after_ctrl_c(
    tiny_folder: Path, files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = ("--untaught-questions", str(files / "untaught.jsonl"), "--entity", "who")

    def stopped(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(training, "_accumulate", stopped)
    result = CliRunner().invoke(app, command(tiny_folder, files, *more))
    assert result.exit_code == 130, result.output + str(result.exception)
    assert "the same command goes on" in " ".join(result.output.split())
    monkeypatch.undo()
    result = CliRunner().invoke(app, command(tiny_folder, files, *more))
    assert result.exit_code == 0, result.output + str(result.exception)
    summary = json.loads((files / "out" / "summary.json").read_text())
    assert summary["command"] == "attack"
    assert [row["method"] for row in summary["rows"]][:2] == ["projection", "projection"]
    assert {"recovery", "recovery_low", "floor", "ceiling"} <= set(summary["rows"][1])
    assert any("does not count" in note for note in summary["notes"])
    assert len(pd.read_csv(files / "out" / "table.csv")) == len(summary["rows"])
    page = (files / "out" / "report.html").read_text(encoding="utf-8")
    assert 'id="relearning_curves"' in page
    for printed in ("What survives projection", "recovery", "floor", "does not count"):
        assert printed in result.output


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--steps", "0"], "steps must be above 0"),
        (["--lr", "fast"], "--lr takes numbers"),
        (["--forms", "kept,folded"], "unknown forms 'folded'"),
        (["--parameters", "some"], "unknown parameters 'some'"),
        (["--dtype", "int8"], "unknown dtype 'int8'"),
        (["--edit", "nowhere"], "nowhere holds no edit_config.json"),
        (["--entity", "whom"], "no field 'whom'"),
        (["--untaught-questions", "none.jsonl"], "no file at none.jsonl"),
    ],
)
def test_the_command_names_what_is_wrong_before_it_loads_a_model(
    files: Path, monkeypatch: pytest.MonkeyPatch, extra: list[str], message: str
) -> None:
    monkeypatch.setattr("mrp_lens.cli.attack.load_model", lambda *_, **__: pytest.fail("loaded a model"))
    result = CliRunner().invoke(app, command(Path("nowhere"), files, *extra))
    assert isinstance(result.exception, ValueError | OSError)
    assert message in str(result.exception)
    assert not (files / "out").exists()


def test_entities_and_untaught_questions_come_from_files(files: Path) -> None:
    quizzes = {"questions": "forget.jsonl", "untaught_questions": "untaught.jsonl", "retain_questions": "kept.jsonl"}
    options = {name: str(files / file) for name, file in quizzes.items()}
    columns = {"question_prompt": "{q}", "choices": "a", "answer": "y", "entity": "who"}
    sources = {"forget": (str(files / "forget.jsonl"),), "retain": str(files / "retain.txt")}
    task = TaskConfig(**sources, **options, **columns).load()
    assert task.untaught_questions is not None
    assert task.retain_questions is not None
    assert [q.entity for q in task.untaught_questions.questions][:3] == ["Zaxim50", "Zaxim50", "Zaxim51"]
    assert {q.entity for q in task.retain_questions.questions} == {""}
    train, held_out = task.split(limit=30)
    assert len(train) + len(held_out) == 30
    assert not {q.entity for q in train.questions} & {q.entity for q in held_out.questions}
    facts = FactSplit.of(task, seed=3)
    assert facts.untaught is not None
    assert facts.new == facts.untaught.halves(seed=3)[1]


def test_an_edit_is_called_by_its_method(model: Any) -> None:
    assert label_of(projection(1)) == "projection"
    assert label_of(projection(1) + weight_edit(model, 2)) == "stack"
    fitted = weight_edit(model, 2)
    fitted.provenance = {"method": "rmu"}
    assert label_of(fitted) == "rmu"
    twice = projection(1)
    twice.provenance = {"requests": {"first": {"method": "mrp"}, "second": {"method": "mrp"}}}
    assert label_of(twice) == "mrp"
    assert label_of(twice + weight_edit(model, 2)) == "mrp"


def test_help_answers_without_importing_torch_or_transformer_lens() -> None:
    code = (
        "import sys\nfrom mrp_lens.cli import main\ntry:\n    main()\nexcept SystemExit:\n    pass\n"
        "heavy = [name for name in ('torch', 'transformer_lens', 'pandas') if name in sys.modules]\nassert not heavy, heavy"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, "attack", "--help"], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert "never-taught" in result.stdout or "never taught" in result.stdout
