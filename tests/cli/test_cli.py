import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import pandas as pd
import pytest
from datasets import Dataset
from typer.testing import CliRunner

from mrp_lens.cli.app import app
from mrp_lens.cli.unlearn import make_method
from mrp_lens.data.task import TaskConfig, hub_parts
from mrp_lens.edits import load_edit
from mrp_lens.methods import METHODS, MRP, RMU, AdaptiveRMU
from mrp_lens.training.loop import NonFiniteLossError
from mrp_lens.utils.io import sole_process


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
    assert 'id="norms"' in (data / "out" / "report.html").read_text(encoding="utf-8")
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
        (["--released"], "mrp has no released recipe"),
        (["--forget-schema", "tofu"], "unknown schema 'tofu'"),
        (["--retain-schema", "tofu"], "unknown schema 'tofu'"),
        (["--forget", "hub:a:b:c:d"], "write hub:NAME, hub:NAME:CONFIG or hub:NAME:CONFIG:SPLIT"),
        (["--forget", "hub:cais/wmdp-corpora"], "give config= one of bio-retain-corpus"),
        (["--prompt", "{text}"], "prompt and completion go together"),
        (["--prompt", "{body}", "--completion", "{text}"], "no field 'body'"),
    ],
)
def test_unlearn_names_what_is_wrong(tiny_folder: Path, data: Path, extra: list[str], message: str) -> None:
    result = unlearn(tiny_folder, data, *extra)
    assert isinstance(result.exception, ValueError)
    assert message in str(result.exception)
    assert not (data / "out" / "edit").exists()


def test_hub_names_have_up_to_three_parts() -> None:
    assert hub_parts("hub:wikitext") == ("wikitext", None, None)
    assert hub_parts("hub:cais/wmdp:wmdp-bio") == ("cais/wmdp", "wmdp-bio", None)
    assert hub_parts("hub:cais/mmlu::dev") == ("cais/mmlu", None, "dev")
    with pytest.raises(ValueError, match=r"'hub:' is no data set of the Hub; write hub:NAME"):
        hub_parts("hub:")


def test_data_sets_of_the_hub_are_read_in_place_of_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def load(path: str, config: str | None, *, split: str) -> Dataset:
        calls.append((path, config, split))
        return Dataset.from_list(
            [{"text": "x" * 60, "question": "?", "choices": ["p", "q"], "answer": 1, "subject": "s"}]
        )

    monkeypatch.setattr(datasets, "load_dataset", load)
    options = TaskConfig(("hub:cais/wmdp-corpora:cyber-forget-corpus",), "hub:wikitext", "hub:cais/mmlu::dev", None)
    assert len(options.corpus(options.forget[0], None)) == len(options.corpus(options.retain, None)) == 1
    quiz = options.quiz(options.questions)
    assert quiz is not None
    assert quiz.groups == ("s",)
    assert calls == [
        ("cais/wmdp-corpora", "cyber-forget-corpus", "train"),
        ("Salesforce/wikitext", "wikitext-2-raw-v1", "test"),
        ("cais/mmlu", "all", "dev"),
    ]


def test_files_of_known_data_sets_are_read_by_their_schema(tmp_path: Path) -> None:
    rows = [
        {"question": "Who?", "answer": "He.", "option1": "She.", "option2": "He.", "option3": "I.", "option4": "It."}
    ]
    path = tmp_path / "tofu.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    name = "locuslab/TOFU"
    options = TaskConfig((str(path),), str(path), str(path), None, questions_schema=name, question_prompt="{question}")
    assert options.corpus(str(path), name).documents[0].prompt == "Question: Who?\nAnswer:"
    quiz = options.quiz(str(path))
    assert quiz is not None
    assert quiz.questions[0].prompt == "Who?"
    assert quiz.questions[0].choices[quiz.questions[0].answer] == " He."


def test_unlearn_reads_known_schemas(tiny_folder: Path, data: Path) -> None:
    rows = [{"question": f"Who is Zaxim{i}?", "answer": "He."} for i in range(12)]
    (data / "tofu.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    quiz = [{"question": "It is?", "choices": ["red", "blue", "green", "old"], "answer": 3}]
    (data / "wmdp.jsonl").write_text("\n".join(json.dumps(row) for row in quiz))
    extra = ["--forget-schema", "locuslab/TOFU", "--retain-questions", str(data / "wmdp.jsonl")]
    result = CliRunner().invoke(
        app,
        [
            *("unlearn", "--model", str(tiny_folder), "--method", "rmu", "--steps", "1", "--layers", "2", "--released"),
            *("--forget", str(data / "tofu.jsonl"), "--retain", str(data / "retain.txt"), "--out", str(data / "out")),
            *(*extra, "--questions-schema", "cais/wmdp"),
        ],
    )
    assert result.exit_code == 0, result.output + str(result.exception)
    summary = json.loads((data / "out" / "summary.json").read_text())
    assert summary["arguments"]["forget_schema"] == "locuslab/TOFU"
    assert summary["rows"][0]["retain_chance"] == 0.25
    settings = load_edit(data / "out" / "edit").provenance["settings"]
    assert (settings["layer"], settings["steps"], settings["alpha"], settings["positions"]) == (2, 1, 1200.0, "all")


def test_released_settings_give_way_to_those_that_are_given() -> None:
    assert make_method("rmu", None, {}, released=True) == RMU.released()
    assert make_method("adaptive-rmu", None, {}, released=True) == AdaptiveRMU.released()
    assert make_method("rmu", "3", {"alpha": 2.0}, released=True) == RMU.released(layer=3, alpha=2.0)
    assert make_method("mrp", "1,2", {}) == MRP(layers=[1, 2])


def test_the_published_settings_of_the_help_are_those_of_the_library() -> None:
    published = {"steering_coeff": 6.5, "alpha": 1200.0, "lr": 5e-5, "batch_size": 4, "steps": 150}
    assert make_method("rmu", "7", published, released=True) == RMU.released()
    assert make_method("adaptive-rmu", None, {"beta": 5.0, "steps": 500}, released=True) == AdaptiveRMU.released()


def test_max_length_reaches_the_method(tiny_folder: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    @dataclass(frozen=True, kw_only=True)
    class Cut(RMU):
        max_length: int | None = None

        def fit(self, *_: Any, **__: Any) -> Any:
            raise ValueError(f"max_length is {self.max_length}")

    monkeypatch.setitem(METHODS._entries, "rmu", Cut)
    result = unlearn(tiny_folder, data, "--max-length", "9", method="rmu")
    assert str(result.exception) == "max_length is 9"


def test_an_interrupted_fit_ends_the_command_and_the_same_command_goes_on(
    tiny_folder: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import mrp_lens.training.loop as training

    assert unlearn(tiny_folder, data).exit_code == 0
    undisturbed = results(data / "out")
    shutil.rmtree(data / "out")
    real, steps = training._accumulate, []

    def second(*arguments: Any) -> Any:
        steps.append(arguments[1])
        if arguments[1] == 1:
            os.kill(os.getpid(), signal.SIGINT)
        return real(*arguments)

    def noted(*arguments: Any) -> Any:
        steps.append(arguments[1])
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(training, "_accumulate", second)
        stopped = unlearn(tiny_folder, data, "--steps", "4")
    assert stopped.exit_code == 130
    assert "Interrupted. What is done stays in" in stopped.output
    assert steps == [0, 1]
    assert not (data / "out" / "edit").exists()
    with monkeypatch.context() as patch:
        patch.setattr(training, "_accumulate", noted)
        assert unlearn(tiny_folder, data, "--steps", "4").exit_code == 0
    assert steps == [0, 1, 2, 3]
    assert set(results(data / "out")) == set(undisturbed)
    assert not (data / "out" / "checkpoint").exists()


def results(out: Path) -> dict[str, Any]:
    """What a run found, but for how long it took."""
    table = pd.read_csv(out / "table.csv").drop(columns="seconds")
    return {
        "edit": (out / "edit" / "edit.safetensors").read_bytes(),
        "table": table.to_csv(),
        "log": pd.read_csv(out / "log.csv").drop(columns="seconds").to_csv(),
        **{path.name: path.read_text() for path in sorted((out / "frames").iterdir()) if path.stem != "training"}
        | {"accuracies.csv": ""},
    }


@pytest.mark.parametrize(
    "place",
    [
        "measure",
        pytest.param("continuations", marks=pytest.mark.slow),
        "looks",
        pytest.param("write_report", marks=pytest.mark.slow),
        pytest.param("show_table", marks=pytest.mark.slow),
    ],
)
def test_a_command_that_fails_after_its_fit_has_the_edit_and_goes_on_from_there(
    place: str, tiny_folder: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mrp_lens.cli import unlearn as module

    assert unlearn(tiny_folder, data, "--out", str(data / "other")).exit_code == 0
    real = getattr(module, place)
    calls: list[int] = []

    def fails(*arguments: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == (2 if place in ("measure", "continuations") else 1):  # the first is of the unedited model
            raise RuntimeError("the power went")
        return real(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(module, place, fails)
        assert isinstance(unlearn(tiny_folder, data).exception, RuntimeError)
    load_edit(data / "out" / "edit")
    with monkeypatch.context() as patch:
        patch.setattr(RMU, "fit", None)
        patch.setattr(MRP, "fit", None)  # it is not made again
        assert unlearn(tiny_folder, data).exit_code == 0
    assert results(data / "out") == results(data / "other")


def test_the_same_command_on_a_finished_run_does_nothing_again(
    tiny_folder: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mrp_lens.cli import unlearn as module

    assert unlearn(tiny_folder, data).exit_code == 0
    monkeypatch.setattr(MRP, "fit", None)
    monkeypatch.setattr(module, "measure", None)
    assert unlearn(tiny_folder, data).exit_code == 0
    other = unlearn(tiny_folder, data, "--seed", "1")
    assert isinstance(other.exception, ValueError)
    assert "holds a run with other settings: seed (0 there, 1 now)" in str(other.exception)


def test_a_folder_that_is_at_work_or_cannot_be_made_is_refused_before_the_model_is_loaded(
    tiny_folder: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mrp_lens.cli import unlearn as module

    assert unlearn(tiny_folder, data).exit_code == 0
    monkeypatch.setattr(module, "load_model", None)
    with sole_process(data / "out" / "points"):
        assert "another process is at work in" in str(unlearn(tiny_folder, data).exception)
    result = unlearn(tiny_folder, data, "--out", str(data / "retain.txt" / "out"))
    assert isinstance(result.exception, NotADirectoryError)
    assert "retain.txt is a file" in str(result.exception)


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
    printed = " ".join(result.stdout.split())
    assert "mrp-lens unlearn --model ./my-checkpoint" in printed
    for setting in ("--layers 7 --steering-coeff 6.5 --alpha 1200 --lr 5e-5", "--batch-size 4 --steps 150"):
        assert setting in printed
    for setting in (
        "HuggingFaceH4/zephyr-7b-beta",
        "--beta 5 --steps 500",
        "hub:cais/wmdp-corpora:cyber-forget-corpus",
    ):
        assert setting in printed


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


def test_a_failed_fit_leaves_no_edit(tiny_folder: Path, data: Path) -> None:
    result = unlearn(tiny_folder, data, "--lr", "1e30", method="rmu")
    assert isinstance(result.exception, NonFiniteLossError)
    assert not (data / "out" / "edit").exists()
    assert not (data / "out" / "summary.json").exists()


@pytest.mark.slow
def test_the_demo_runs_the_whole_job(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["demo", "--out", str(tmp_path / "demo")])
    assert result.exit_code == 0, result.output + str(result.exception)
    rows = {row["method"]: row for row in json.loads((tmp_path / "demo" / "summary.json").read_text())["rows"]}
    assert list(rows) == ["unedited", "random-projection", "untrained-start", "mrp", "rmu", "adaptive-rmu"]
    assert rows["unedited"]["forget_accuracy"] >= 0.97
    assert rows["random-projection"]["forget_accuracy"] > rows["mrp"]["forget_accuracy"] + 0.1
    for method in ("mrp", "rmu", "adaptive-rmu"):
        assert rows[method]["verdict"] == "absent"
        assert rows[method]["worst_topic_accuracy"] >= 0.97
        assert rows[method]["text_perplexity_ratio"] < 1.1
        load_edit(tmp_path / "demo" / method / "edit")
        assert (tmp_path / "demo" / method / "log.csv").is_file()
        assert rows[method]["recovery_20_low"] < rows[method]["recovery_20"] < rows[method]["recovery_20_high"]
    assert rows["unedited"]["recovery_20"] > rows["mrp"]["recovery_20"]
    assert "recovery_20" not in rows["untrained-start"]
    page = (tmp_path / "demo" / "report.html").read_text(encoding="utf-8")
    for picture in ("accuracies", "alignment_by_layer", "confidence_by_method", "displacement", "relearning_curves"):
        assert f'id="{picture}"' in page
