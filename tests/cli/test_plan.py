"""`mrp-lens plan`: tables, JSON, the folder it writes, and what it refuses."""

import json
import re
from pathlib import Path

import pandas as pd
import pytest
import torch

from mrp_lens.cli.console import console
from tests.support.commands import completed, invoke, summary_of
from tests.support.families import DEMO_FOLDER

FAST = ("--backend", "bridge", "--tflops", "0.5", "--device-memory", "1GiB", "--methods", "mrp,rmu")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A configuration without weights or tokenizer."""
    made = tmp_path / "model"
    made.mkdir()
    (made / "config.json").write_text((DEMO_FOLDER / "config.json").read_text())
    return made


def test_it_shows_parts_time_batch_and_devices_and_loads_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mrp_lens.models.source.read_weights", lambda *_: pytest.fail("weights were read"))
    monkeypatch.setattr(console, "_width", 200)
    said = completed("plan", "--model", str(folder), *FAST).said
    assert "1.81 million parameters, 8 layers." in said
    for heading in ("weights", "caches", "activations", "logits", "optimizer", "loading", "largest pass", "devices"):
        assert heading in said
    assert len(re.findall(r"\b1 x 1 GiB", said)) == 3  # MRP, RMU, accuracy


def test_json_and_the_folder_hold_the_same_rows(folder: Path, tmp_path: Path) -> None:
    said = completed("plan", "--model", str(folder), *FAST, "--json", "--out", str(tmp_path / "out")).output
    printed, written = json.loads(said), summary_of(tmp_path / "out")
    assert printed["rows"] == written["rows"]
    assert printed["model"]["n_layers"] == 8
    assert [row["method"] for row in printed["rows"]] == ["mrp", "rmu", "accuracy"]
    table = pd.read_csv(tmp_path / "out" / "table.csv")
    assert table["peak"].tolist() == pytest.approx([row["peak"] for row in printed["rows"]])
    again = completed(
        "plan", "--config", str(tmp_path / "out" / "summary.json"), "--json", "--out", str(tmp_path / "b")
    )
    assert json.loads(again.output)["rows"] == printed["rows"]


def test_what_is_not_given_is_measured_here_and_said(folder: Path) -> None:
    said = completed("plan", "--model", str(folder), "--backend", "bridge", "--methods", "rmu").said
    assert re.search(r"[\d.e-]+ TFLOP/s: measured here \(\w+\), in products of matrices\. [\d.]+ GiB: free here", said)
    assert ("glibc keeps such blocks" in said) == (not torch.cuda.is_available())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--device-memory", "much"), "device memory must be a size above 0 such as '24GiB' or '80GB', got 'much'"),
        (("--max-length", "129"), "max_length 129 must be from 2 to the model's context length 128"),
        (("--methods", "mrp,rum"), "rum"),
        (("--tflops", "fast"), "--tflops must be a number, got 'fast'"),
        (("--dtype", "int4"), "unknown dtype 'int4'"),
    ],
)
def test_what_cannot_be_meant_is_refused(words: tuple[str, ...], message: str, folder: Path, tmp_path: Path) -> None:
    result = invoke("plan", "--model", str(folder), *FAST, "--out", str(tmp_path / "out"), *words)
    assert isinstance(result.exception, ValueError)
    assert message in str(result.exception)
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_full_is_left_as_it_is(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    for extra in ([], ["--overwrite"]):
        result = invoke("plan", "--model", str(folder), *FAST, "--out", str(tmp_path / "out"), *extra)
        assert isinstance(result.exception, FileExistsError)
        assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine.txt"]
