"""`mrp-lens attack`: what it writes and prints, that it goes on after Ctrl-C, and what it refuses."""

import json
import re
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from mrp_lens.attacks import FactSplit, Relearn
from mrp_lens.attacks.base import HALVED_BY_QUESTION
from mrp_lens.cli.attack import AttackEdit
from mrp_lens.data.task import TaskConfig
from mrp_lens.edits.provenance import label_of
from mrp_lens.training import loop
from tests.support.commands import data_words, invoke, summary_of
from tests.support.edits import projection, weight_edit


@pytest.fixture
def attacked(files: Path) -> Path:
    """The files, and an edit."""
    projection(1, 2).save_pretrained(files / "edit")
    return files


def words(folder: Path, files: Path, *extra: str) -> list[str]:
    return [
        *("attack", *data_words(folder, files), "--edit", str(files / "edit")),
        *("--attack", "relearn", "--steps", "2", "--lr", "1e-3", *extra),
    ]


def test_the_command_writes_a_table_a_page_and_a_summary_and_goes_on_after_ctrl_c(
    tiny_folder: Path, attacked: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = ("--untaught-questions", str(attacked / "untaught.jsonl"), "--entity", "who")

    def stopped(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(loop, "_accumulate", stopped)
    result = invoke(*words(tiny_folder, attacked, *more))
    assert result.exit_code == 130, result.output
    assert "the same command goes on" in " ".join(result.output.split())
    monkeypatch.undo()
    result = invoke(*words(tiny_folder, attacked, *more))
    assert result.exit_code == 0, result.output
    summary = summary_of(attacked / "out")
    assert summary["command"] == "attack"
    assert [row["method"] for row in summary["rows"]][:2] == ["projection", "projection"]
    assert {"recovery", "recovery_low", "floor", "ceiling"} <= set(summary["rows"][1])
    assert any("does not count" in note for note in summary["notes"])
    assert not any("the same entity" in note for note in summary["notes"])
    assert len(pd.read_csv(attacked / "out" / "table.csv")) == len(summary["rows"])
    page = (attacked / "out" / "report.html").read_text(encoding="utf-8")
    assert 'id="relearning_curves"' in page
    for printed in ("What survives projection", "recovery", "floor", "does not count"):
        assert printed in result.output


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--steps", "0"], "steps must be above 0"),
        (["--lr", "fast"], "--lr takes numbers"),
        (["--attack", "guess"], "unknown attack 'guess'; choose one of relearn"),
        (["--split", "half"], "unknown split 'half'"),
        (["--probe-kind", "deep"], "unknown probe kind 'deep'"),
        (["--forms", "kept,folded"], "unknown forms 'folded'"),
        (["--parameters", "some"], "unknown parameters 'some'"),
        (["--dtype", "int8"], "unknown dtype 'int8'"),
        (["--edit", "nowhere"], "nowhere holds no edit_config.json"),
        (["--entity", "whom"], "no field 'whom'"),
        (["--untaught-questions", "none.jsonl"], "no file at none.jsonl"),
    ],
)
def test_the_command_names_what_is_wrong_before_it_loads_a_model(
    attacked: Path, monkeypatch: pytest.MonkeyPatch, extra: list[str], message: str
) -> None:
    monkeypatch.setattr("mrp_lens.cli.command.load_model", lambda *_, **__: pytest.fail("loaded a model"))
    result = invoke(*words(Path("nowhere"), attacked, *extra))
    assert isinstance(result.exception, ValueError | OSError)
    assert message in str(result.exception)
    assert not (attacked / "out").exists()


def test_without_a_model_it_is_that_of_the_run_which_left_the_edit(
    tiny_folder: Path, attacked: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (attacked / "run").mkdir()
    (attacked / "edit").rename(attacked / "run" / "edit")
    arguments = {"model": str(tiny_folder), "dtype": "bfloat16"}
    (attacked / "run" / "summary.json").write_text(json.dumps({"arguments": arguments}))
    loaded: list[tuple[str, Any]] = []

    def load(name: str, **options: Any) -> Any:
        loaded.append((name, options["dtype"]))
        raise FloatingPointError("far enough")

    monkeypatch.setattr("mrp_lens.cli.command.load_model", load)
    line = words(tiny_folder, attacked, "--edit", str(attacked / "run" / "edit"))
    without = line[: line.index("--model")] + line[line.index("--model") + 2 :]
    assert "far enough" in str(invoke(*without).exception)
    assert loaded == [(str(tiny_folder), "bfloat16")]
    (attacked / "out").rmdir()
    bare = ("attack", "--edit", str(attacked / "run" / "edit"), "--out", str(attacked / "out"))
    assert "give forget=... and retain=..." in str(invoke(*bare).exception)  # the demo's world is not for this model
    assert not (attacked / "out").exists()


@pytest.mark.parametrize(
    ("of_run", "typed", "found"),
    [
        ({"topic": "towns"}, [], {"topic": "towns"}),
        ({"topic": "towns"}, ["--topic", "beasts"], {"topic": "beasts"}),
        (
            {"forget": ["f"], "retain": "r", "choices": ["a", "b"]},
            [],
            {"forget": ("f",), "retain": "r", "choices": ("a", "b")},
        ),
        ({"forget": ["f"], "retain": "r"}, ["--topic", "beasts"], {"topic": "beasts", "forget": ()}),
        ({"model": "own", "topic": "towns"}, [], {"topic": None}),
        ({}, [], {"topic": None, "forget": ()}),
    ],
)
def test_without_data_they_are_those_of_the_run_which_left_the_edit(
    of_run: dict[str, Any], typed: list[str], found: dict[str, Any], attacked: Path
) -> None:
    (attacked / "summary.json").write_text(json.dumps({"arguments": of_run}))
    edit = attacked / "edit"
    command = AttackEdit.parsed(["--edit", str(edit), "--out", "out", *typed])
    assert command is not None
    known = command.of_edit(edit)
    assert {name: getattr(known if name == "topic" else known.data, name) for name in found} == found
    assert command.of_edit(edit, with_data=False).data == command.data
    assert known.of_edit(edit) == known


def test_halves_that_may_share_an_entity_are_told(tiny_folder: Path, attacked: Path) -> None:
    result = invoke(*words(tiny_folder, attacked, "--forms", "kept", "--lr", "1e-3"))
    assert result.exit_code == 0, result.output
    assert HALVED_BY_QUESTION in summary_of(attacked / "out")["notes"]


def test_a_quiz_is_asked_for_before_a_folder_is_made(tiny_folder: Path, attacked: Path) -> None:
    data = ("--forget", str(attacked / "forget.jsonl"), "--retain", str(attacked / "retain.txt"))
    line = ("attack", "--model", str(tiny_folder), "--edit", str(attacked / "edit"), *data)
    result = invoke(*line, "--out", str(attacked / "out"))
    assert isinstance(result.exception, ValueError)
    assert "give --questions, too" in str(result.exception)
    assert not (attacked / "out").exists()


def test_every_budget_is_an_option_and_the_summary_of_a_run_is_a_configuration(
    tiny_folder: Path, attacked: Path
) -> None:
    more = ("--forms", "kept,stripped", "--parameters", "all,lora", "--samples", "3", "--lr", "1e-3,2e-3")
    line = words(tiny_folder, attacked, *more, "--split", "question", "--questions-limit", "20", "--seed", "4")
    command = AttackEdit.parsed(line[1:])
    assert command is not None
    config = command.config
    assert (config.attacks, config.split, config.questions, config.seed) == (("relearn",), "question", 20, 4)
    wanted = Relearn(forms=("kept", "stripped"), parameters=("all", "lora"), steps=2, lr=(1e-3, 2e-3), samples=3)
    assert config.budget("relearn") == wanted
    summary = {"command": "attack", "arguments": command.arguments(), "seed": 4}
    (attacked / "summary.json").write_text(json.dumps(summary))
    assert AttackEdit.parsed(["--config", str(attacked / "summary.json")]) == command
    assert AttackEdit.parsed(["--edit", "e", "--out", "o"]).config.attacks is None  # type: ignore[union-attr]


def test_entities_and_untaught_questions_come_from_files(files: Path) -> None:
    quizzes = {"questions": "forget.jsonl", "untaught_questions": "untaught.jsonl", "retain_questions": "kept.jsonl"}
    options = {name: str(files / file) for name, file in quizzes.items()}
    columns = {"question_prompt": "{q}", "choices": "a", "answer": "y", "entity": "who"}
    sources = {"forget": (str(files / "forget.jsonl"),), "retain": str(files / "retain.txt")}
    task = TaskConfig(**sources, **options, **columns).load()
    assert task.untaught_questions is not None
    assert task.retain_questions is not None
    assert [q.entity for q in task.untaught_questions.questions][:3] == ["Zaxim50", "Zaxim50", "Zaxim51"]
    assert {q.entity for q in task.retain_questions.questions[:2]} == {"House 0"}
    anonymous = files / "anonymous.jsonl"  # a retain quiz need not say whom it is about, but has to be one
    anonymous.write_text(re.sub(r'"who": "[^"]*"', '"nobody": 1', (files / "kept.jsonl").read_text()))
    unnamed = TaskConfig(**sources, **{**options, "retain_questions": str(anonymous)}, **columns).load()
    assert unnamed.retain_questions is not None
    assert {q.entity for q in unnamed.retain_questions.questions} == {""}
    with pytest.raises(ValueError, match="no field"):
        TaskConfig(**sources, **{**options, "retain_questions": str(files / "retain.txt")}, **columns).load()
    with pytest.raises(ValueError, match="no field 'who'"):
        TaskConfig(**sources, **{**options, "questions": str(anonymous)}, **columns).load()
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
