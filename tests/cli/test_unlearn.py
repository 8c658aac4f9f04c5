"""`mrp-lens unlearn`: what it writes, how it goes on, what it refuses."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from mrp_lens.cli import unlearn as module
from mrp_lens.cli.unlearn import has_target
from mrp_lens.data import Corpus
from mrp_lens.edits import load_edit
from mrp_lens.edits.provenance import fingerprint
from mrp_lens.export.measurements import Measurements, check_record
from mrp_lens.methods import METHODS, MRP, NPO, RMU, AdaptiveRMU, Fit, control_accuracy
from mrp_lens.models import load_model
from mrp_lens.training import loop
from mrp_lens.training.loop import NonFiniteLossError
from mrp_lens.utils.io import sole_process
from mrp_lens.utils.processes import ENVIRONMENT
from tests.support.commands import Result, completed, data_words, fitter, invoke, summary_of

FEW = ["--steps", "2", "--batch-size", "4"]


def unlearn(folder: Path, files: Path, *extra: str, method: str = "mrp") -> Result:
    return invoke("unlearn", "--method", method, *data_words(folder, files), *FEW, *extra)


@pytest.mark.parametrize(
    ("method", "extra"), [("mrp", ["--layers", "1,2", "--rank", "2"]), ("rmu", ["--layers", "2"]), ("adaptive-rmu", [])]
)
def test_unlearn_writes_what_it_promises(tiny_folder: Path, files: Path, method: str, extra: list[str]) -> None:
    shutil.copy(files / "forget.jsonl", files / "more.jsonl")
    more = [] if method == "mrp" else ["--forget", str(files / "more.jsonl")]
    result = completed("unlearn", "--method", method, *data_words(tiny_folder, files), *FEW, *extra, *more)
    out = files / "out"
    summary = summary_of(out)
    assert set(summary) >= {"command", "arguments", "versions", "seed", "seconds", "rows"}
    assert [row["method"] for row in summary["rows"]] == ["unedited", method]
    keys = ["method", "forget_probability", "forget_probability_low", "forget_probability_high", "text_perplexity"]
    sides = [f"{side}_{key}" for side in ("forget", "retain") for key in ("accuracy", "low", "high", "chance")]
    assert list(summary["rows"][0]) == [*keys, *sides, "text_perplexity_ratio", "outcome", "seconds"]
    assert list(pd.read_csv(out / "table.csv")["method"]) == ["unedited", method]
    assert len(pd.read_csv(out / "log.csv")) == 2
    assert 'id="norms"' in (out / "report.html").read_text(encoding="utf-8")
    outcome = Fit.load(out).outcome
    assert outcome is not None
    assert [row["outcome"] for row in summary["rows"]] == [None, outcome.ended]
    assert list(pd.read_csv(out / "table.csv")["outcome"].fillna("")) == ["", outcome.ended]
    assert summary["notes"] == [f"{method} {outcome}."]
    assert f"{method} {outcome}." in " ".join(result.output.split())
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "end of the fit" in page
    assert f"{method} {outcome}." in page
    edit = load_edit(out / "edit")
    record = edit.provenance if method != "mrp" else edit.provenance["requests"]["forget"]
    assert record["method"] == method
    assert len(record["data"]["forget"]) == (1 if method == "mrp" else 2)
    for printed in ("Generated answers", "forget quiz", "unedited", method):
        assert printed in result.output


@pytest.mark.slow
def test_a_model_that_never_saw_the_forget_set_is_the_target_and_a_row(tiny_folder: Path, files: Path) -> None:
    unlearn(tiny_folder, files, "--reference", str(tiny_folder))
    out = files / "out"
    unedited, never, edited = summary_of(out)["rows"]
    assert [never["method"], edited["method"]] == ["never-taught", "mrp"]
    assert never["forget_accuracy"] == unedited["forget_accuracy"]  # here they are the same model
    (record,) = load_edit(out / "edit").provenance["requests"].values()
    model = load_model(tiny_folder)
    assert record["settings"]["target"] == control_accuracy(model, Corpus.from_file(files / "forget.jsonl"))


def test_a_reference_is_refused_where_there_is_no_target(tiny_folder: Path, files: Path) -> None:
    words = data_words(tiny_folder, files)
    result = invoke("unlearn", "--method", "direction-ablation", *words, "--reference", str(tiny_folder))
    assert isinstance(result.exception, ValueError)
    assert "--reference gives a fit its target, and direction-ablation has none" in str(result.exception)
    assert not has_target(NPO())
    assert has_target(NPO(budget=0.05))
    assert not (files / "out").exists()


@pytest.mark.slow
def test_the_run_of_a_request_upon_another_methods_edit_is_that_of_both(tiny_folder: Path, files: Path) -> None:
    assert unlearn(tiny_folder, files).exit_code == 0
    later = ("--after", str(files / "out" / "edit"), "--request", "second", "--out", str(files / "second"))
    assert unlearn(tiny_folder, files, *later, method="rmu").exit_code == 0
    assert [row["method"] for row in summary_of(files / "second")["rows"]] == ["unedited", "mrp + rmu"]
    check_record(load_edit(files / "second" / "edit"), Measurements.read(files / "second"))


@pytest.mark.slow
def test_a_later_request_is_fitted_on_top_of_an_earlier_edit_and_holds_both(tiny_folder: Path, files: Path) -> None:
    assert unlearn(tiny_folder, files).exit_code == 0
    first, second = files / "out" / "edit", files / "second"
    later = ("--after", str(first), "--out", str(second))
    refused = unlearn(tiny_folder, files, *later)
    assert "the earlier edit has a request 'forget' already" in str(refused.exception)
    assert not second.exists()
    assert unlearn(tiny_folder, files, *later, "--request", "again").exit_code == 0
    both: Any = load_edit(second / "edit")
    assert both.requests == ("forget", "again")
    assert fingerprint(both.without("again")) == fingerprint(load_edit(first))
    other = unlearn(tiny_folder, files, *later, "--request", "third")
    assert 'request ("again" there, "third" now)' in str(other.exception)


def test_an_earlier_edit_that_is_not_there_is_refused_before_anything_is_done(tiny_folder: Path, files: Path) -> None:
    result = unlearn(tiny_folder, files, "--after", str(files / "nothing"))
    assert isinstance(result.exception, OSError)
    assert not (files / "out").exists()


def test_a_full_folder_is_refused_before_anything_is_done(tiny_folder: Path, files: Path) -> None:
    (files / "out").mkdir()
    (files / "out" / "precious.txt").write_text("keep me")
    for extra in ([], ["--overwrite"]):
        result = unlearn(tiny_folder, files, *extra)
        assert isinstance(result.exception, FileExistsError)
        assert "holds no run" in str(result.exception)
        assert "--overwrite" not in str(result.exception)
        assert [file.name for file in (files / "out").iterdir()] == ["precious.txt"]


def test_what_fails_before_a_fit_costs_no_earlier_run(tiny_folder: Path, files: Path) -> None:
    out = files / "out"
    out.mkdir()
    (out / "summary.json").write_text(json.dumps({"command": "unlearn", "versions": {}, "rows": []}))
    for extra in (["--layers", "40"], ["--model", str(files / "nowhere")], ["--reference", str(files / "nowhere")]):
        result = unlearn(tiny_folder, files, "--overwrite", *extra)
        assert isinstance(result.exception, ValueError | OSError)
        assert [file.name for file in out.iterdir()] == ["summary.json"]


@pytest.mark.slow
def test_another_run_is_refused_and_replaced_when_that_is_asked_for(tiny_folder: Path, files: Path) -> None:
    out = files / "out"
    out.mkdir()
    (out / "summary.json").write_text(json.dumps({"command": "measure", "versions": {}, "rows": []}))
    result = unlearn(tiny_folder, files)
    assert isinstance(result.exception, FileExistsError)
    assert "or replace this one with --overwrite" in str(result.exception)
    assert [file.name for file in out.iterdir()] == ["summary.json"]
    assert unlearn(tiny_folder, files, "--overwrite").exit_code == 0
    assert (out / "edit").is_dir()
    with sole_process(out / "points"):
        other = unlearn(tiny_folder, files, "--seed", "1", "--overwrite")
    assert "another process is at work in" in str(other.exception)
    load_edit(out / "edit")


@pytest.mark.slow
def test_figures_that_are_not_known_are_null_in_json_and_empty_cells(tiny_folder: Path, files: Path) -> None:
    row = json.loads((files / "forget.jsonl").read_text().splitlines()[0])
    (files / "one.jsonl").write_text(json.dumps(row))
    result = unlearn(tiny_folder, files, "--questions", str(files / "one.jsonl"))  # of which no interval can be made
    assert result.exit_code == 0, result.exception

    def no_json(constant: str) -> Any:
        raise AssertionError(constant)

    for path in (files / "out").rglob("*.json"):
        json.loads(path.read_text(encoding="utf-8"), parse_constant=no_json)
    rows = summary_of(files / "out")["rows"]
    assert [(row["forget_low"], row["forget_high"]) for row in rows] == [(None, None)] * 2
    assert "nan" not in result.output.lower()
    page = (files / "out" / "report.html").read_text(encoding="utf-8")
    assert "nan" not in re.sub(r"<script\b.*?</script>", "", page[page.index("<body>") :], flags=re.DOTALL)
    assert "too few questions" in page
    assert completed("compare", str(files / "out")).exit_code == 0
    assert unlearn(tiny_folder, files, "--questions", str(files / "one.jsonl")).exit_code == 0  # goes on with it


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
def test_unlearn_names_what_is_wrong(tiny_folder: Path, files: Path, extra: list[str], message: str) -> None:
    result = unlearn(tiny_folder, files, *extra)
    assert isinstance(result.exception, ValueError)
    assert message in str(result.exception)
    assert not (files / "out" / "edit").exists()


@pytest.mark.slow
def test_unlearn_reads_known_schemas(tiny_folder: Path, files: Path) -> None:
    rows = [{"question": f"Who is Zaxim{i}?", "answer": "He."} for i in range(12)]
    (files / "tofu.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (files / "wmdp.jsonl").write_text(
        json.dumps({"question": "It is?", "choices": ["red", "blue", "green", "old"], "answer": 3})
    )
    completed(
        *("unlearn", "--model", str(tiny_folder), "--method", "rmu", "--steps", "1", "--layers", "2", "--released"),
        *("--forget", str(files / "tofu.jsonl"), "--retain", str(files / "retain.txt"), "--out", str(files / "out")),
        *("--forget-schema", "locuslab/TOFU", "--retain-questions", str(files / "wmdp.jsonl")),
        *("--questions-schema", "cais/wmdp"),
    )
    summary = summary_of(files / "out")
    assert summary["arguments"]["forget_schema"] == "locuslab/TOFU"
    assert summary["rows"][0]["retain_chance"] == 0.25
    assert [row["outcome"] for row in summary["rows"]] == [None, None]  # the released settings have no budget
    assert summary["notes"] == []
    settings = load_edit(files / "out" / "edit").provenance["settings"]
    assert (settings["layer"], settings["steps"], settings["alpha"], settings["positions"]) == (2, 1, 1200.0, "all")


def test_released_settings_give_way_to_those_that_are_given() -> None:
    assert fitter("--method", "rmu", "--released") == RMU.released()
    assert fitter("--method", "adaptive-rmu", "--released") == AdaptiveRMU.released()
    given = ("--layers", "3", "--alpha", "2.0")
    assert fitter("--method", "rmu", "--released", *given) == RMU.released(layer=3, alpha=2.0)
    assert fitter("--method", "mrp", "--layers", "1,2") == MRP(layers=[1, 2])


def test_the_published_settings_of_the_help_are_those_of_the_library() -> None:
    published = "--layer 7 --steering-coeff 6.5 --alpha 1200 --lr 5e-5 --batch-size 4 --steps 150"
    help_text = " ".join(invoke("unlearn", "--help").output.replace("\\", " ").split())
    assert published in help_text
    assert fitter("--method", "rmu", "--released", *published.split()) == RMU.released()
    assert "--released --beta 5 --steps 500" in help_text
    assert fitter(*"--method adaptive-rmu --released --beta 5 --steps 500".split()) == AdaptiveRMU.released()


def test_settings_reach_the_method(tiny_folder: Path, files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    @dataclass(frozen=True, kw_only=True)
    class Cut(RMU):
        max_length: int | None = None

        def fit(self, *_: Any, **__: Any) -> Any:
            raise ValueError(f"max_length is {self.max_length}")

    monkeypatch.setitem(METHODS._entries, "rmu", Cut)
    result = unlearn(tiny_folder, files, "--max-length", "9", method="rmu")
    assert str(result.exception) == "max_length is 9"


@pytest.mark.slow
def test_an_interrupted_fit_ends_the_command_and_the_same_command_goes_on(
    tiny_folder: Path, files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert unlearn(tiny_folder, files).exit_code == 0
    undisturbed = results(files / "out")
    shutil.rmtree(files / "out")
    real, steps = loop._accumulate, []

    def noted(*arguments: Any, stop: bool = False) -> Any:
        steps.append(arguments[1])
        if stop and arguments[1] == 1:
            os.kill(os.getpid(), signal.SIGINT)
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "_accumulate", lambda *arguments: noted(*arguments, stop=True))
        stopped = unlearn(tiny_folder, files, "--steps", "4")
    assert stopped.exit_code == 130
    assert "Interrupted. What is done stays in" in stopped.output
    assert steps == [0, 1]
    assert not (files / "out" / "edit").exists()
    with monkeypatch.context() as patch:
        patch.setattr(loop, "_accumulate", noted)
        assert unlearn(tiny_folder, files, "--steps", "4").exit_code == 0
    assert steps == [0, 1, 2, 3]
    assert set(results(files / "out")) == set(undisturbed)
    assert not (files / "out" / "checkpoint").exists()


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


@pytest.mark.slow
@pytest.mark.parametrize(
    "place",
    [
        "measure",
        "continuations",
        "diagnostics",
        "report",
        "show_figures",
    ],
)
def test_a_command_that_fails_after_its_fit_has_the_edit_and_goes_on_from_there(
    place: str, tiny_folder: Path, files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert unlearn(tiny_folder, files, "--out", str(files / "other")).exit_code == 0
    real = getattr(module, place)
    calls: list[int] = []

    def fails(*arguments: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == (2 if place in ("measure", "continuations") else 1):  # the first is of the unedited model
            raise RuntimeError("the power went")
        return real(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(module, place, fails)
        assert isinstance(unlearn(tiny_folder, files).exception, RuntimeError)
    load_edit(files / "out" / "edit")
    with monkeypatch.context() as patch:
        patch.setattr(MRP, "fit", None)  # it is not made again
        assert unlearn(tiny_folder, files).exit_code == 0
    assert results(files / "out") == results(files / "other")


@pytest.mark.slow
def test_the_same_command_on_a_finished_run_does_nothing_again(
    tiny_folder: Path, files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert unlearn(tiny_folder, files).exit_code == 0
    monkeypatch.setattr(MRP, "fit", None)
    monkeypatch.setattr(module, "measure", None)
    assert unlearn(tiny_folder, files).exit_code == 0
    other = unlearn(tiny_folder, files, "--seed", "1")
    assert isinstance(other.exception, ValueError)
    assert "holds a run with other settings: seed (0 there, 1 now)" in str(other.exception)


@pytest.mark.slow
def test_the_corrected_command_goes_on_where_nothing_was_learned_yet(
    tiny_folder: Path, files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = ["--layers", "1,2"]
    assert unlearn(tiny_folder, files, *given, "--rank", "2", "--out", str(files / "other")).exit_code == 0
    refused = unlearn(tiny_folder, files, *given, "--rank", "30")  # which the fit finds out
    assert "rank 30 is above the" in str(refused.exception)
    assert (files / "out" / "points" / "unedited.json").is_file()
    elsewhere = unlearn(tiny_folder, files, *given, "--rank", "2", "--retain", str(files / "forget.jsonl"))
    assert "holds a run with other settings: " in str(elsewhere.exception)
    assert "data.retain" in str(elsewhere.exception)
    real, asked = module.measure, []

    def measure(model: Any, task: Any, edit: Any) -> Any:
        asked.append(edit)
        return real(model, task, edit)

    monkeypatch.setattr(module, "measure", measure)
    assert unlearn(tiny_folder, files, *given, "--rank", "2").exit_code == 0
    assert len(asked) == 1  # the unedited model was measured already
    assert asked[0] is not None
    assert results(files / "out") == results(files / "other")
    learned = unlearn(tiny_folder, files, *given, "--rank", "3")
    assert "holds a run with other settings: settings.rank (2 there, 3 now)" in str(learned.exception)


def test_a_fit_that_was_stopped_is_not_given_up_for_another_one(
    tiny_folder: Path, files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = loop._accumulate

    def stopped(*arguments: Any) -> Any:
        os.kill(os.getpid(), signal.SIGINT)
        return real(*arguments)

    monkeypatch.setattr(loop, "_accumulate", stopped)
    assert unlearn(tiny_folder, files, "--steps", "4").exit_code == 130
    before = {path: path.read_bytes() for path in (files / "out").rglob("*") if path.is_file()}
    other = unlearn(tiny_folder, files, "--steps", "5")
    assert "holds a run with other settings: settings.steps (4 there, 5 now)" in str(other.exception)
    assert before == {path: path.read_bytes() for path in (files / "out").rglob("*") if path.is_file()}


@pytest.mark.slow
def test_a_folder_that_is_at_work_or_cannot_be_made_is_refused_before_the_model_is_loaded(
    tiny_folder: Path, files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert unlearn(tiny_folder, files).exit_code == 0
    monkeypatch.setattr("mrp_lens.cli.command.load_model", None)
    with sole_process(files / "out" / "points"):
        assert "another process is at work in" in str(unlearn(tiny_folder, files).exception)
    result = unlearn(tiny_folder, files, "--out", str(files / "retain.txt" / "out"))
    assert isinstance(result.exception, NotADirectoryError)
    assert "retain.txt is a file" in str(result.exception)


def test_a_failed_fit_leaves_no_edit(tiny_folder: Path, files: Path) -> None:
    result = unlearn(tiny_folder, files, "--lr", "1e30", method="rmu")
    assert isinstance(result.exception, NonFiniteLossError)
    assert not (files / "out" / "edit").exists()
    assert not (files / "out" / "summary.json").exists()


ODD = [
    *(
        "--layers",
        "2",
        "--trained-layers",
        "1,2",
        "--alpha",
        "7.3",
        "--eps",
        "1e-7",
        "--no-shuffle",
        "--padding",
        "left",
    ),
    *("--max-length", "40", "--seed", "11", "--steering-coeff", "2.1", "--retain-noise", "0.05"),
]


@pytest.mark.slow
def test_the_summary_of_a_run_is_a_configuration_that_gives_the_same_edit(tiny_folder: Path, files: Path) -> None:
    assert unlearn(tiny_folder, files, *ODD, method="rmu").exit_code == 0
    completed("unlearn", "--config", str(files / "out" / "summary.json"), "--out", str(files / "again"))
    assert results(files / "again") == results(files / "out")
    settings = [load_edit(files / name / "edit").provenance["settings"] for name in ("out", "again")]
    assert settings[0] == settings[1]
    assert (settings[0]["eps"], settings[0]["shuffle"], settings[0]["max_length"]) == (1e-7, False, 40)


@pytest.mark.slow
def test_so_is_one_that_version_0_1_wrote(tiny_folder: Path, files: Path) -> None:
    """It wrote layers as they were typed, only what was given of the method, and the seed beside the arguments."""
    given = ["--layers", "1,2", "--rank", "3", "--seed", "5"]
    assert unlearn(tiny_folder, files, *given, method="mrp-unconditional").exit_code == 0
    data = TASK_0_1 | {"forget": [str(files / "forget.jsonl")], "retain": str(files / "retain.txt")}
    arguments = {"model": str(tiny_folder), "method": "mrp", "layers": "1,2", "released": False, "rank": 3}
    arguments |= {"steps": 2, "batch_size": 4, **data, "backend": "auto", "dtype": "float32"}
    old = {"command": "unlearn", "title": "", "arguments": arguments, "seed": 5, "rows": []}
    (files / "old.json").write_text(json.dumps(old))
    completed("unlearn", "--config", str(files / "old.json"), "--out", str(files / "again"))
    edits = [(files / name / "edit" / "edit.safetensors").read_bytes() for name in ("out", "again")]
    assert edits[0] == edits[1]
    arguments |= {"method": "rmu", "layers": "2", "distillation": None}
    del arguments["rank"], arguments["distillation"]
    (files / "old.json").write_text(json.dumps(old))
    assert fitter("--config", str(files / "old.json")) == RMU(
        layer=2, steps=2, batch_size=4, errors="absolute", budget=None, coverage=None
    )
    arguments |= {"method": "mrp", "distillation": True}
    (files / "old.json").write_text(json.dumps(old))
    assert fitter("--config", str(files / "old.json")).distillation is not None


TASK_0_1: dict[str, Any] = dict.fromkeys(
    [
        *("questions", "retain_questions", "field", "prompt", "completion", "question_prompt", "choices", "answer"),
        *("forget_schema", "retain_schema", "questions_schema", "untaught_questions", "entity"),
    ]
)


@pytest.mark.slow
def test_processes_that_torchrun_starts_write_one_folder_with_the_edit_of_one(tiny_folder: Path, files: Path) -> None:
    words = ["unlearn", *data_words(tiny_folder, files, out=None), "--method", "rmu", "--no-coverage"]
    words += ["--steps", "4", "--batch-size", "5"]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "mrp_lens"]
    shared = subprocess.run(
        [*launcher, *words, "--out", str(files / "shared")], capture_output=True, text=True, check=False
    )
    assert shared.returncode == 0, shared.stderr
    assert shared.stdout.count("Loading") == shared.stdout.count("The edit is in") == 1
    completed(*words, "--out", str(files / "alone"))
    written = [
        sorted(path.relative_to(files / out).as_posix() for path in (files / out).rglob("*"))
        for out in ("shared", "alone")
    ]
    assert written[0] == written[1]
    found, wanted = (load_edit(files / out / "edit").to_parts()[1] for out in ("shared", "alone"))
    torch.testing.assert_close(dict(found), dict(wanted), rtol=0, atol=1e-6)


def test_torchrun_is_refused_for_commands_that_processes_cannot_share(
    tiny_folder: Path, files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in zip(ENVIRONMENT, ("1", "2", "localhost", "29500"), strict=True):
        monkeypatch.setenv(name, value)
    words = data_words(tiny_folder, files, out=None)
    result = invoke("measure", *words, "--out", str(files / "out"))
    assert "start `mrp-lens measure` without torchrun" in str(result.exception)
    assert not (files / "out").exists()
