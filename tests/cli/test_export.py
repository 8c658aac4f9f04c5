"""`mrp-lens export`."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from mrp_lens.cli.export import Export
from mrp_lens.cli.run_folder import run_of
from mrp_lens.models import load_model
from tests.support.commands import Result, completed, invoke
from tests.support.edits import logits, weight_edit
from tests.support.export_edits import log_probabilities

TOKENS = torch.arange(3, 43).view(2, 20)


def export(*arguments: str) -> Result:
    return completed("export", *arguments)


@pytest.fixture
def edit_folder(tiny_folder: Path, tmp_path: Path) -> Path:
    model = load_model(tiny_folder, backend="bridge")
    weight_edit(model, 1).save_pretrained(tmp_path / "run" / "edit")
    return tmp_path / "run" / "edit"


@pytest.mark.slow
def test_it_writes_a_proved_folder_and_says_how(edit_folder: Path, tiny_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = export("--model", str(tiny_folder), "--edit", str(edit_folder), "--out", str(out), "--backend", "bridge")
    said = result.said
    assert "Form: folded (exact in plain weights)" in said
    assert "largest difference of" in said
    assert "Figures on the card: none" in said
    model = load_model(tiny_folder, backend="bridge")
    with weight_edit(model, 1).applied(model):
        wanted = logits(model, TOKENS).log_softmax(-1)
    got = log_probabilities(AutoModelForCausalLM.from_pretrained(out), TOKENS)
    torch.testing.assert_close(got, wanted, atol=1e-4, rtol=0)


def test_the_run_that_left_the_edit_fills_the_card(edit_folder: Path, tiny_folder: Path, tmp_path: Path) -> None:
    rows = [{"method": "unedited", "forget_accuracy": 0.98}, {"method": "weight", "forget_accuracy": 0.27}]
    summary: dict[str, Any] = {
        "command": "unlearn",
        "seed": 0,
        "finished": "then",
        "versions": {},
        "rows": rows,
        "notes": [],
    }
    (edit_folder.parent / "summary.json").write_text(json.dumps(summary))
    arguments = ["--model", str(tiny_folder), "--edit", str(edit_folder), "--form", "adapter", "--no-verify"]
    result = export(*arguments, "--out", str(tmp_path / "out"))
    assert "27" in (tmp_path / "out" / "README.md").read_text().split("## Figures")[1]
    assert "Not verified" in result.output

    summary["arguments"] = {"model": str(tiny_folder), "dtype": "float32"}  # which need not be said again
    (edit_folder.parent / "summary.json").write_text(json.dumps(summary))
    result = export("--edit", str(edit_folder), "--form", "adapter", "--no-verify", "--out", str(tmp_path / "again"))
    assert f"Loading {tiny_folder}" in result.output
    adapter = ("--edit", str(edit_folder), "--form", "adapter", "--no-verify", "--out", str(tmp_path / "again"))
    export(*adapter, "--overwrite")


@pytest.mark.parametrize(
    ("typed", "of_run", "loaded"),
    [
        ([], "bfloat16", "bfloat16"),
        (["--dtype", "float32"], "bfloat16", "float32"),
        (["--dtype", "float16"], "bfloat16", "float16"),
        ([], None, "float32"),
    ],
)
def test_a_typed_dtype_is_told_from_none(
    typed: list[str], of_run: str | None, loaded: str, edit_folder: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    arguments = {"model": str(tiny_folder), **({} if of_run is None else {"dtype": of_run})}
    (edit_folder.parent / "summary.json").write_text(json.dumps({"arguments": arguments}))
    command = Export.parsed(["--edit", str(edit_folder), "--out", str(tmp_path / "out"), *typed])
    assert command is not None
    options = command.loading.of_edit(edit_folder)
    assert (options.model, options.precision) == (str(tiny_folder), loaded)
    assert command.loading.precision == (typed[1] if typed else "float32")
    assert Export.parsed(["--edit", "e", "--out", "o", "--dtype", "none"]).loading.dtype is None  # type: ignore[union-attr]


def test_the_run_is_found_one_folder_up_or_two(tmp_path: Path) -> None:
    edit = tmp_path / "demo" / "mrp" / "edit"
    edit.mkdir(parents=True)
    assert run_of(edit) is None
    (tmp_path / "demo" / "summary.json").write_text("{}")
    assert run_of(edit) == tmp_path / "demo"
    (tmp_path / "demo" / "mrp" / "summary.json").write_text("{}")
    assert run_of(edit) == tmp_path / "demo" / "mrp"


def test_bad_input_ends_before_the_model_is_loaded(
    edit_folder: Path, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("loaded")

    monkeypatch.setattr("mrp_lens.cli.command.load_model", never)
    common = ["--model", str(tiny_folder), "--edit", str(edit_folder)]
    with pytest.raises(ValueError, match=r"is or holds what --edit names \(.*\), which would be deleted"):
        export(*common, "--out", str(edit_folder))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "model.safetensors").write_text("mine")
    for extra in ([], ["--overwrite"]):
        with pytest.raises(FileExistsError, match="full exists and holds no export"):
            export(*common, "--out", str(tmp_path / "full"), *extra)
    assert (tmp_path / "full" / "model.safetensors").read_text() == "mine"
    (tmp_path / "full" / "README.md").write_text("---\ntags:\n- mrp_lens\n---\n")
    with pytest.raises(FileExistsError, match="overwrite"):
        export(*common, "--out", str(tmp_path / "full"))
    with pytest.raises(ValueError, match="int4"):
        export(*common, "--out", str(tmp_path / "out"), "--save-dtype", "int4")
    with pytest.raises(FileNotFoundError, match="edit_config"):
        export("--model", str(tiny_folder), "--edit", str(edit_folder.parent), "--out", str(tmp_path / "out"))
    with pytest.raises(FileNotFoundError, match=r"summary\.json"):
        export(*common, "--out", str(tmp_path / "out"), "--attacks", str(edit_folder.parent))
    (edit_folder / "edit.safetensors").write_bytes((edit_folder / "edit.safetensors").read_bytes()[:-4])
    with pytest.raises(ValueError, match="altered"):
        export(*common, "--out", str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_name_that_the_hub_does_not_take_is_refused_before_any_work(edit_folder: Path, tmp_path: Path) -> None:
    result = invoke("export", "--edit", str(edit_folder), "--out", str(tmp_path / "out"), "--push-to", "bad name!")
    assert "'bad name!' cannot be the name of a repository" in str(result.exception)
    assert not (tmp_path / "out").exists()


def test_what_was_exported_stays_where_the_upload_fails(
    edit_folder: Path, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def push(folder: Path, repo_id: str, *, private: bool) -> str:
        raise PermissionError("no token")

    monkeypatch.setattr("mrp_lens.export.export.push_to_hub", push)
    line = ["--model", str(tiny_folder), "--edit", str(edit_folder), "--no-verify", "--push-to", "me/edited"]
    result = invoke("export", *line, "--out", str(tmp_path / "out"))
    assert "no token" in str(result.exception)
    assert (tmp_path / "out" / "config.json").is_file()
    said = " ".join(result.output.split())
    assert "To upload it later: python -c" in said


def test_it_uploads_when_asked_and_privately_unless_told(
    edit_folder: Path, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[tuple[Path, str, bool]] = []

    def push(folder: Path, repo_id: str, *, private: bool) -> str:
        sent.append((folder, repo_id, private))
        return "https://hub/commit/1"

    monkeypatch.setattr("mrp_lens.export.export.push_to_hub", push)
    common = ["--model", str(tiny_folder), "--edit", str(edit_folder), "--no-verify", "--push-to", "me/edited"]
    for name, more, private in (("a", [], True), ("b", ["--public"], False)):
        result = export(*common, "--out", str(tmp_path / name), *more)
        assert "https://hub/commit/1" in result.output
        assert sent.pop() == (tmp_path / name, "me/edited", private)
