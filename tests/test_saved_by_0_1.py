"""What version 0.1 wrote loads, and its run folders are gone on with."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import mrp_lens as ml
from mrp_lens.cli.attack import AttackEdit
from mrp_lens.cli.command import Command
from mrp_lens.cli.sweep import Sweep
from mrp_lens.cli.unlearn import Unlearn
from mrp_lens.runs.report import report

SAVED = Path(__file__).parent / "support" / "saved_by_0_1"
COMMON = [
    *("--model", "model", "--forget", "data/forget-1.jsonl", "--forget", "data/forget-2.jsonl"),
    *("--retain", "data/retain.txt", "--questions", "data/quiz.jsonl", "--retain-questions", "data/kept.jsonl"),
    *("--question-prompt", "{q}", "--choices", "a", "--answer", "y"),
]
SWEEP = ["--methods", "mrp,rmu,adaptive-rmu", "--layers", "1,2", "--coefficients", "3", "--steps", "4"]
ATTACK = [
    *("--untaught-questions", "data/untaught.jsonl", "--entity", "who", "--edit", "unlearn/edit", "--attack", "all"),
    *("--steps", "5", "--lr", "1e-3", "--search-steps", "1", "--questions-limit", "24"),
]


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A copy, with the working folder in it, as when it was written."""
    return Path(shutil.copytree(SAVED, tmp_path / "saved"))


def run(saved: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    """A command that runs where version 0.1 did."""
    line = [sys.executable, "-c", "from mrp_lens.cli import main; main()", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(SAVED.parents[2])}
    return subprocess.run(line, cwd=saved, env=environment, capture_output=True, text=True, check=False)


def command(saved: Path, *arguments: str) -> str:
    """What it prints."""
    ended = run(saved, *arguments)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout


def close(found: Any, wanted: Any) -> bool:
    """The same figures, but for times and what another machine's last digits are."""
    if isinstance(wanted, dict):
        same = {key for key in wanted if key != "seconds"}
        return same <= set(found) and all(close(found[key], wanted[key]) for key in same)
    if isinstance(wanted, list):
        return len(found) == len(wanted) and all(map(close, found, wanted))
    return (
        bool(found == pytest.approx(wanted, rel=1e-3, abs=1e-4)) if isinstance(wanted, float) else bool(found == wanted)
    )


@pytest.mark.slow
def test_attacks_on_a_saved_edit_are_gone_on_with(saved: Path) -> None:
    name, missing = "attack", ["gradients", "relearn-edited-kept-all-lr0.001"]
    points = saved / name / "points"
    before = {path.name: path.read_bytes() for path in points.iterdir()}
    for result in missing:
        (points / f"{result}.json").unlink()
    command(saved, name, *COMMON, *ATTACK, "--out", name)
    after = {path.name: path.read_bytes() for path in points.iterdir() if path.suffix == ".json"}
    assert set(before) <= set(after)
    for file, content in before.items():
        if file.removesuffix(".json") in missing:
            assert close(json.loads(after[file]), json.loads(content)), file
        else:
            assert after[file] == content


@pytest.mark.slow
def test_a_sweep_is_not_gone_on_with_by_methods_of_other_defaults(saved: Path) -> None:
    files = {path: path.read_bytes() for path in (saved / "sweep").rglob("*") if path.is_file()}
    ended = run(saved, "sweep", *COMMON, *SWEEP, "--out", "sweep")
    assert ended.returncode == 2
    assert "defaults" in " ".join(ended.stderr.split())
    assert files == {path: path.read_bytes() for path in (saved / "sweep").rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", ["unlearn", "sweep", "attack"])
def test_a_page_is_made_of_its_run_folders(name: str, saved: Path) -> None:
    page = report(saved / name).read_text()
    assert json.loads((saved / name / "summary.json").read_text())["title"] in page


def test_its_exported_model_loads_in_plain_transformers_and_computes_what_the_edit_does() -> None:
    from transformers import AutoModelForCausalLM

    exported = AutoModelForCausalLM.from_pretrained(SAVED / "export", trust_remote_code=True)
    model = ml.load_model(str(SAVED / "model"), backend="bridge")
    tokens = torch.arange(5, 25)[None]
    with ml.load_edit(SAVED / "unlearn" / "edit").applied(model), torch.no_grad():
        difference = (model(tokens).log_softmax(-1) - exported(tokens).logits.log_softmax(-1)).abs().max()
    assert difference < 1e-4


@pytest.mark.slow
def test_a_summary_of_it_is_a_configuration(saved: Path) -> None:
    command(saved, "unlearn", "--config", "unlearn/summary.json", "--out", "again")
    for side in ("unlearn", "again"):
        assert (saved / side / "edit" / "edit.safetensors").is_file()
    again, before = (ml.load_edit(saved / side / "edit") for side in ("again", "unlearn"))
    for name, tensor in before.to_parts()[1].items():
        torch.testing.assert_close(again.to_parts()[1][name], tensor, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("name", "kind"), [("unlearn", Unlearn), ("sweep", Sweep), ("attack", AttackEdit)])
def test_settings_of_its_summaries_are_understood(name: str, kind: type[Command]) -> None:
    summary = json.loads((SAVED / name / "summary.json").read_text())
    command = kind.parsed(["--config", str(SAVED / name / "summary.json"), "--out", "out"])
    assert command is not None
    told = command.arguments()
    for key in ("model", "retain", "steps", "question_prompt", "choices", "backend", "dtype"):
        assert told[key] == summary["arguments"][key]
    assert told["forget"] == list(summary["arguments"]["forget"])
