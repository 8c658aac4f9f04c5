"""`mrp-lens measure`: what it writes and prints, with data, with the harness, with both; and what it refuses."""

import json
from pathlib import Path
from typing import Any

import lm_eval
import pandas as pd
import pytest
import torch
from lm_eval.tasks import TaskManager
from transformers import AutoModelForCausalLM, AutoTokenizer

from mrp_lens import metrics
from mrp_lens.cli.measure import Measure
from mrp_lens.data import Corpus, Questions
from mrp_lens.data.task import UnlearningTask
from mrp_lens.data.world import World
from mrp_lens.edits import ProjectionEdit
from mrp_lens.edits.subspace import Subspace
from mrp_lens.evals import evaluate
from mrp_lens.hf import attach
from mrp_lens.models import load_model
from mrp_lens.utils.io import sole_process
from tests.support.commands import Result, invoke, summary_of
from tests.support.edits import projection
from tests.support.families import DEMO_FOLDER
from tests.support.harness_tasks import write_tasks

COLOURS = ["red", "blue", "green", "white"]
EDIT = projection(1, 2, rank=8)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """The harness lists all installed packages by pip at each call, and reads 15,000 files for a task it does not know."""
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda _: None)
    path = Path(lm_eval.__file__).parent / "tasks" / "wmdp"
    manager = TaskManager(include_path=str(path), include_defaults=False)
    monkeypatch.setattr("mrp_lens.evals.lm_eval.catalogue", lambda: manager)


@pytest.fixture
def files(tmp_path: Path) -> Path:
    rows = [
        {"text": f"The colour of Zaxim{n} is {COLOURS[n % 4]}.", "q": f"The colour of Zaxim{n} is"}
        | {"a": COLOURS, "y": n % 4}
        for n in range(24)
    ]
    (tmp_path / "forget.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "retain.txt").write_text("\n".join(f"The old man walked near the house {i}." for i in range(20)))
    EDIT.save_pretrained(tmp_path / "edit")
    write_tasks(tmp_path / "tasks", {"quiz": World().questions("potions").spread(60)})
    return tmp_path


def quiz_of(files: Path) -> Questions:
    return Questions.from_file(files / "forget.jsonl", prompt="{q}", choices="a", answer="y")


def with_data(files: Path) -> list[str]:
    return [
        *("--forget", str(files / "forget.jsonl"), "--retain", str(files / "retain.txt")),
        *("--questions", str(files / "forget.jsonl"), "--question-prompt", "{q}", "--choices", "a", "--answer", "y"),
    ]


def with_harness(files: Path) -> list[str]:
    return ["--harness", "quiz", "--include-path", str(files / "tasks")]


def run(folder: Path | str, files: Path, *extra: str) -> Result:
    return invoke("measure", "--model", str(folder), "--out", str(files / "out"), *extra)


def written(files: Path) -> Any:
    return summary_of(files / "out")


@pytest.mark.slow
def test_a_reference_is_a_row_and_what_the_measures_of_the_field_compare_with(tiny_folder: Path, files: Path) -> None:
    edit, reference = ("--edit", str(files / "edit")), ("--reference", str(tiny_folder))
    unseen = [{"text": f"The colour of Balero{n} is {COLOURS[n % 4]}."} for n in range(12)]
    (files / "unseen.jsonl").write_text("\n".join(map(json.dumps, unseen)))
    asked = ("--benchmark", "--documents", "6", "--unseen", str(files / "unseen.jsonl"))
    result = run(tiny_folder, files, *edit, *reference, *asked, *with_data(files))
    assert result.exit_code == 0, result.output
    unedited, edited, never = written(files)["rows"]
    assert [unedited["method"], never["method"]] == ["unedited", "never-taught"]
    assert never["forget_accuracy"] == unedited["forget_accuracy"]  # here they are the same model
    assert never["forget_quality"] == unedited["forget_quality"] == 1.0
    assert 0 <= edited["forget_extraction_strength"] <= 1
    model = load_model(str(tiny_folder))
    members, others = (Corpus.from_file(files / f"{name}.jsonl").spread(6) for name in ("forget", "unseen"))
    expected = metrics.membership(model, members, others, progress=False).set_index("attack")["auc"]
    assert unedited["auc_loss"] == pytest.approx(expected["loss"])
    assert 0 <= edited["auc_loss"] <= 1
    assert "Other measures" in result.output
    page = (files / "out" / "report.html").read_text(encoding="utf-8")
    assert "by a model that never saw the forget set" in page


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--harness", "quiz", "--benchmark"], "--reference and --benchmark measure on data"),
        (["--harness", "quiz", "--reference", "demo"], "--reference and --benchmark measure on data"),
        (["--harness", "quiz", "--documents", "3"], "--documents is of data"),
        (["--forget", "x.jsonl", "--retain", "y.txt", "--unseen", "x.jsonl"], "--unseen is of --benchmark"),
        (["--forget", "x.jsonl", "--retain", "y.txt", "--limit", "5"], "--limit is of --harness TASKS"),
        (["--forget", "x.jsonl", "--retain", "y.txt", "--num-fewshot", "2"], "--num-fewshot is of --harness TASKS"),
        (["--harness", "quiz", "--device-map", "auto"], "--harness loads the model onto one device"),
    ],
)
def test_what_the_measures_of_the_field_need(words: list[str], message: str, files: Path, tiny_folder: Path) -> None:
    words = [
        str(files / {"x.jsonl": "forget.jsonl", "y.txt": "retain.txt"}.get(word, word)) if "." in word else word
        for word in words
    ]
    result = run(tiny_folder, files, *words)
    assert isinstance(result.exception, ValueError)
    assert message in str(result.exception)
    assert not (files / "out").exists()


def test_data_alone_give_a_row_before_and_a_row_with_the_edit(tiny_folder: Path, files: Path) -> None:
    result = run(tiny_folder, files, "--edit", str(files / "edit"), *with_data(files))
    assert result.exit_code == 0, result.exception
    rows = written(files)["rows"]
    assert [row["method"] for row in rows] == ["unedited", "projection"]
    model = load_model(str(tiny_folder))
    expected = float(metrics.accuracy(model, quiz_of(files))["accuracy"].iloc[0])
    with EDIT.applied(model):
        edited = metrics.perplexity(model, task_of_files(files).held_out)["perplexity"].iloc[0]
    assert rows[0]["forget_accuracy"] == expected
    assert rows[0]["text_perplexity_ratio"] == 1.0
    assert rows[1]["text_perplexity"] == pytest.approx(float(edited), rel=1e-6)
    assert rows[1]["text_perplexity_ratio"] == rows[1]["text_perplexity"] / rows[0]["text_perplexity"] != 1.0
    assert list(pd.read_csv(files / "out" / "table.csv")["method"]) == ["unedited", "projection"]
    assert rows[1]["damage"] == metrics.damage(model, EDIT, task_of_files(files).held_out)["damage"].iloc[0] > 0
    assert "damage" not in rows[0]
    assert 'id="accuracies"' in (files / "out" / "report.html").read_text(encoding="utf-8")
    for printed in ("forget quiz", "unedited", "projection"):
        assert printed in result.output


def test_without_a_model_that_of_the_edits_run_is_measured(tiny_folder: Path, files: Path) -> None:
    EDIT.save_pretrained(files / "mine" / "edit")
    arguments = {"model": str(tiny_folder), "dtype": "bfloat16"}
    (files / "mine" / "summary.json").write_text(json.dumps({"arguments": arguments}))
    result = invoke(
        "measure",
        "--edit",
        str(files / "mine" / "edit"),
        "--documents",
        "2",
        *with_data(files),
        "--out",
        str(files / "out"),
    )
    assert result.exit_code == 0, result.exception
    assert {key: written(files)["arguments"][key] for key in arguments} == arguments


def test_fewer_documents_are_fewer_questions_too(tiny_folder: Path, files: Path) -> None:
    result = run(tiny_folder, files, "--documents", "2", *with_data(files))
    assert result.exit_code == 0, result.exception
    expected = metrics.accuracy(load_model(str(tiny_folder)), quiz_of(files).spread(2))["accuracy"].iloc[0]
    assert written(files)["rows"][0]["forget_accuracy"] == float(expected)


def test_an_edit_of_several_requests_is_said_to_hold_them(tiny_folder: Path, files: Path) -> None:
    both = EDIT + projection(0, rank=2, request="second")
    both.save_pretrained(files / "both")
    result = run(tiny_folder, files, "--edit", str(files / "both"), *with_data(files))
    assert result.exit_code == 0, result.exception
    assert any("holds the requests edit, second" in note for note in written(files)["notes"])


def measure(*words: str) -> Measure:
    command = Measure.parsed(["--out", "o", *words])
    assert command is not None
    return command


def task_of_files(files: Path) -> UnlearningTask:
    task = measure("--model", "own", *with_data(files)).task_if_any()
    assert task is not None
    return task


@pytest.mark.slow
def test_the_harness_alone_scores_the_plain_model_and_the_one_with_the_edit(files: Path) -> None:
    edit = ProjectionEdit({"blocks.3.hook_resid_post": Subspace.random(90, 128, seed=1)}, request="strong")
    edit.save_pretrained(files / "strong")
    result = run("demo", files, "--edit", str(files / "strong"), *with_harness(files), "--limit", "50")
    assert result.exit_code == 0, result.exception
    rows = written(files)["rows"]
    assert set(rows[0]) == {"method", "task", "group", "metric", "filter", "value", "stderr", "n"}
    found = {(row["method"], row["metric"]): row["value"] for row in rows}
    model = AutoModelForCausalLM.from_pretrained(DEMO_FOLDER, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(DEMO_FOLDER)
    expected: dict[tuple[str, str], float] = {}
    for method in ("unedited", "projection"):
        handle = attach(model, edit) if method != "unedited" else None
        frame = evaluate(model, "quiz", tokenizer=tokenizer, include_path=files / "tasks", limit=50)
        expected |= {(method, row["metric"]): row["value"] for row in frame.to_dict("records")}
        if handle is not None:
            handle.detach()
    assert found == expected
    for metric in ("acc", "acc_norm"):
        assert found["unedited", metric] > found["projection", metric]  # the edit shows
    assert {row["n"] for row in rows} == {50}
    assert len(pd.read_csv(files / "out" / "table.csv")) == len(rows) == 4
    assert "quiz" in (files / "out" / "report.html").read_text(encoding="utf-8")
    notes = written(files)["notes"]
    assert len(notes) == 1
    assert "at most 50 questions a task" in notes[0]
    for printed in ("lm-evaluation-harness", "quiz", "acc_norm"):
        assert printed in result.output


def test_data_and_harness_go_together(tiny_folder: Path, files: Path) -> None:
    result = run(tiny_folder, files, *with_harness(files), *with_data(files))
    assert result.exit_code == 0, result.exception
    rows = written(files)["rows"]
    assert [("forget_accuracy" in row, row.get("metric")) for row in rows] == [
        (True, None),
        (False, "acc"),
        (False, "acc_norm"),
    ]
    assert {row["method"] for row in rows} == {"unedited"}
    table = pd.read_csv(files / "out" / "table.csv")
    assert table["task"].isna().tolist() == [True, False, False]
    page = (files / "out" / "report.html").read_text(encoding="utf-8")
    assert 'id="accuracies"' not in page  # there is nothing to compare with
    assert "acc_norm" in page


@pytest.mark.slow
def test_the_demo_brings_its_world_unless_only_the_harness_is_asked_for() -> None:
    harness = ("--harness", "quiz")
    for given, topic in (((), "potions"), (("--topic", "towns", *harness), "towns")):
        task = measure(*given).task_if_any()
        assert task is not None
        assert task.fingerprints() == UnlearningTask.from_world(topic).fingerprints()
    assert measure(*harness).task_if_any() is None
    assert measure("--model", "own", *harness).task_if_any() is None


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ([], "give --forget and --retain (and --questions), or --harness TASKS"),
        (["--questions", "quiz.jsonl"], "--questions and --retain-questions go with --forget and --retain"),
        (["--questions", "quiz.jsonl", "--harness", "quiz"], "--questions and --retain-questions go with"),
        (["--forget", "forget.jsonl", "--harness", "quiz"], "forget and retain go together: give retain=..."),
        (["--harness", "quiz", "--include-path", "nowhere"], "no folder at nowhere"),
        (["--harness", "wmdp_boi"], "no task 'wmdp_boi' (it has wmdp_bio"),
        (["--harness", "wmdp", "--dtype", "int8"], "unknown dtype 'int8'"),
        (["--harness", "wmdp", "--edit", "nowhere"], "nowhere holds no edit_config.json"),
    ],
)
def test_bad_input_is_named_before_a_model_is_loaded(
    tiny_folder: Path, files: Path, monkeypatch: pytest.MonkeyPatch, extra: list[str], message: str
) -> None:
    for loader in ("command.load_model", "measure.load_hf"):
        monkeypatch.setattr(f"mrp_lens.cli.{loader}", lambda *_, **__: pytest.fail("loaded a model"))
    result = run(tiny_folder, files, *extra)
    assert isinstance(result.exception, ValueError | OSError), result.output
    assert message in str(result.exception)
    assert not (files / "out").exists()


def test_an_edit_of_another_model_is_refused_and_nothing_is_written(tiny_folder: Path, files: Path) -> None:
    projection(9).save_pretrained(files / "other")
    result = run(tiny_folder, files, "--edit", str(files / "other"), *with_harness(files))
    assert isinstance(result.exception, ValueError)
    assert "made for another model" in str(result.exception)
    assert not (files / "out").exists()


def test_a_full_folder_is_refused(tiny_folder: Path, files: Path) -> None:
    (files / "out").mkdir()
    (files / "out" / "precious.txt").write_text("keep me")
    for extra in ([], ["--overwrite"]):
        result = run(tiny_folder, files, *with_harness(files), *extra)
        assert isinstance(result.exception, FileExistsError)
        assert "holds no run" in str(result.exception)
        assert [file.name for file in (files / "out").iterdir()] == ["precious.txt"]


def test_the_edit_that_is_measured_stays_when_a_folder_is_overwritten(tiny_folder: Path, files: Path) -> None:
    data = ("--edit", str(files / "edit"), *with_data(files))
    assert "is or holds what --edit names" in str(
        invoke("measure", "--model", str(tiny_folder), *data, "--out", str(files), "--overwrite").exception
    )
    assert (files / "edit" / "edit_config.json").is_file()
    assert run(tiny_folder, files, *data).exit_code == 0
    assert run(tiny_folder, files, *data, "--overwrite").exit_code == 0
    points = files / "out" / "points"
    points.mkdir()
    with sole_process(points):
        assert "another process is at work" in str(run(tiny_folder, files, *data, "--overwrite").exception)
    assert written(files)["rows"]


def test_a_missing_harness_is_named_with_its_extra(
    tiny_folder: Path, files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mrp_lens.evals.lm_eval.find_spec", lambda _: None)
    result = run(tiny_folder, files, *with_harness(files))
    assert isinstance(result.exception, ImportError)
    assert "pip install 'mrp_lens[harness]'" in str(result.exception)
    assert not (files / "out").exists()
