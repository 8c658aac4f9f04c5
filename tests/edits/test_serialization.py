import errno
import hashlib
import json
import multiprocessing
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from mrp_lens.edits import EditStack, ProjectionEdit, load_edit
from mrp_lens.edits.provenance import fingerprint, without_paths
from mrp_lens.models import LensModel, describe
from mrp_lens.models.hooks import hook_name
from tests.conftest import D_MODEL, LAYERS
from tests.support.edit_folders import read, write
from tests.support.edits import all_kinds, logits, projection, weight_edit


@pytest.mark.parametrize("kind", range(4))
def test_save_and_load_are_bit_identical(
    model: LensModel, tokens: torch.Tensor, tmp_path: Path, kind: int, untouched: None
) -> None:
    edit = all_kinds(model, 1)[kind]
    edit.provenance = {} if isinstance(edit, EditStack) else {"method": "by hand", "model": describe(model)}
    edit.save_pretrained(tmp_path / "edit")
    again = load_edit(tmp_path / "edit")
    assert type(again) is type(edit)
    assert again.provenance == edit.provenance
    (settings_a, tensors_a), (settings_b, tensors_b) = edit.to_parts(), again.to_parts()
    assert settings_a == settings_b
    assert tensors_a.keys() == tensors_b.keys()
    assert all(torch.equal(tensors_a[name], tensors_b[name]) for name in tensors_a)
    with edit.applied(model):
        expected = logits(model, tokens)
    with again.applied(model):
        assert torch.equal(logits(model, tokens), expected)


def test_a_stack_that_was_saved_and_loaded_is_the_same_one(model: LensModel, tmp_path: Path, untouched: None) -> None:
    edit = projection(1) + weight_edit(model, 1)
    for part in edit.parts:
        part.provenance = {"method": "mrp", "settings": {"layers": (1, 2), "data": str(tmp_path / "forget.jsonl")}}
    edit.save_pretrained(tmp_path / "edit")
    again = load_edit(tmp_path / "edit")
    assert again.parts[0].provenance != edit.parts[0].provenance  # tuples come back as lists
    assert again == edit
    assert hash(again) == hash(edit)
    assert fingerprint(again) == fingerprint(edit) == fingerprint(without_paths(edit))
    edit.attach(model)
    again.detach(model)
    other = projection(1) + weight_edit(model, 1, scale=0.5)
    assert other != edit
    assert fingerprint(other) != fingerprint(edit)
    assert EditStack(edit.parts[::-1]) != edit


def test_a_stack_built_by_hand_has_the_fingerprint_that_version_0_1_gave_it() -> None:
    edit = EditStack([projection(1), projection(2)])
    settings, tensors = edit.to_parts()
    said = json.dumps(settings, sort_keys=True).encode() + safetensors.torch.save(tensors)
    assert fingerprint(edit) == hashlib.sha256(said).hexdigest()


def test_a_full_disk_is_told_with_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(number: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"edit.safetensors could not be written \(No space left.*nothing is left of it"):
        projection(1).save_pretrained(tmp_path / "edit")
    assert not list(tmp_path.iterdir())


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    projection(1).save_pretrained(tmp_path / "edit")
    return tmp_path / "edit"


def test_a_truncated_folder_is_refused(saved: Path) -> None:
    for name in ("edit.safetensors", "edit_config.json"):
        content = (saved / name).read_bytes()
        (saved / name).write_bytes(content[: len(content) // 2])
        with pytest.raises(ValueError, match=f"{name} is (truncated|damaged)"):
            load_edit(saved)
        (saved / name).unlink()
        with pytest.raises(FileNotFoundError, match=name):
            load_edit(saved)
        (saved / name).write_bytes(content)
    load_edit(saved)


def test_an_altered_folder_is_refused(saved: Path) -> None:
    config = (saved / "edit_config.json").read_text()
    (saved / "edit_config.json").write_text(config.replace("hook_resid_post", "hook_mlp_out"))
    with pytest.raises(ValueError, match=r"edit_config.json is truncated or was altered"):
        load_edit(saved)
    (saved / "edit_config.json").write_text(config)
    tensors = safetensors.torch.load_file(saved / "edit.safetensors")
    safetensors.torch.save_file({name: tensor * 1.001 for name, tensor in tensors.items()}, saved / "edit.safetensors")
    with pytest.raises(ValueError, match=r"edit.safetensors is truncated or was altered"):
        load_edit(saved)


def test_tensors_that_no_edit_may_have_are_refused(saved: Path) -> None:
    config, content = read(saved)
    (name, basis), *_ = safetensors.torch.load(content).items()
    nan = basis.clone()
    nan[0, 0] = float("nan")
    for bad, message in (
        (basis * 1.1, "not orthonormal"),
        (nan, "NaN"),
        (basis[:2], "configuration says rank 3"),
        (torch.eye(D_MODEL), "rank"),
    ):
        write(saved, config, safetensors.torch.save({name: bad}))
        with pytest.raises(ValueError, match=message):
            load_edit(saved)
    write(saved, config, safetensors.torch.save({"other": basis}))
    with pytest.raises(ValueError, match="does not hold what its configuration says"):
        load_edit(saved)
    write(saved, {**config, "kind": "spell"}, content)
    with pytest.raises(ValueError, match="unknown kind of edit 'spell'"):
        load_edit(saved)


def test_saving_over_a_folder_needs_leave(saved: Path) -> None:
    with pytest.raises(FileExistsError, match="not empty"):
        projection(2).save_pretrained(saved)
    assert load_edit(saved).hook_names == (hook_name(1),)  # type: ignore[attr-defined]
    projection(2).save_pretrained(saved, overwrite=True)
    assert load_edit(saved).hook_names == (hook_name(2),)  # type: ignore[attr-defined]
    assert sorted(os.listdir(saved.parent)) == ["edit"]


def _save_for_ever(path: str) -> None:
    for number in range(10_000):
        projection(number % LAYERS, rank=8).save_pretrained(path, overwrite=True)


def test_a_killed_save_leaves_the_old_folder_or_the_new_one(tmp_path: Path) -> None:
    target = tmp_path / "edit"
    projection(0, rank=8).save_pretrained(target)
    context = multiprocessing.get_context("fork")
    for attempt in range(15):
        process = context.Process(target=_save_for_ever, args=(str(target),))
        process.start()
        time.sleep(0.05 + 0.011 * attempt)
        os.kill(process.pid or 0, signal.SIGKILL)
        process.join()
        edit = load_edit(target)
        assert isinstance(edit, ProjectionEdit)
        assert edit.subspaces()[edit.hook_names[0]].rank == 8


@pytest.mark.parametrize(
    "moment", ["before the old folder moves", "between the renames", "before the old folder is deleted"]
)
def test_a_save_killed_at_the_worst_moments_is_recovered(
    tmp_path: Path, moment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "edit"
    projection(0).save_pretrained(target)
    renames: list[str] = []
    real_rename = Path.rename

    class Killed(BaseException):
        pass

    def rename(self: Path, to: Path) -> Any:
        if len(renames) == {"before the old folder moves": 0, "between the renames": 1}.get(moment, 9):
            raise Killed
        renames.append(str(to))
        return real_rename(self, to)

    def rmtree(path: Path, **_: Any) -> None:
        if moment == "before the old folder is deleted" and str(path).endswith("replaced"):
            raise Killed

    monkeypatch.setattr(Path, "rename", rename)
    monkeypatch.setattr("mrp_lens.utils.io.shutil.rmtree", rmtree)
    with pytest.raises(Killed):
        projection(1).save_pretrained(target, overwrite=True)
    monkeypatch.undo()
    expected = 1 if moment == "before the old folder is deleted" else 0
    assert load_edit(target).hook_names == (hook_name(expected),)  # type: ignore[attr-defined]
    projection(2).save_pretrained(target, overwrite=True)
    assert load_edit(target).hook_names == (hook_name(2),)  # type: ignore[attr-defined]
