"""What `export_hf` refuses, and what is left then: the model as it was, and no half folder."""

import builtins
import errno
import io
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer

from mrp_lens.edits import Edit, ProjectionEdit, SteeringEdit
from mrp_lens.edits.subspace import Subspace
from mrp_lens.export import ExportMismatchError, export_hf
from mrp_lens.export.formats import folded_into
from mrp_lens.export.verification import Difference, Proof
from mrp_lens.models import available_backends, load_model
from mrp_lens.models.hooks import hook_name
from mrp_lens.utils.io import whole_folder
from tests.conftest import D_MODEL
from tests.support.checkpoints import set_config, set_tensors
from tests.support.edits import projection, weight_edit
from tests.support.export_edits import content_of, write
from tests.support.families import save_family
from tests.utils.test_io import files_end_at


@pytest.fixture(scope="module")
def model(bridge: Any) -> Any:
    """The Bridge alone: what is refused does not depend on the class."""
    return bridge


WRONG_LAYER = ProjectionEdit({hook_name(17, "mlp_out"): Subspace.random(2, D_MODEL)})
NOISY = SteeringEdit.towards(torch.ones(D_MODEL), layer=1, coefficient=1.0, noise=0.5)
REFUSED: dict[str, tuple[dict[str, Any], Edit | None, type[Exception], str]] = {
    "another layer": ({}, WRONG_LAYER, ValueError, "no hook"),
    "an unknown form": ({"form": "gguf"}, projection(1), ValueError, "unknown form"),
    "folded in mid-stack": ({"form": "folded"}, projection(1), ValueError, "form='module'"),
    "weights as a module": ({"form": "module"}, None, ValueError, "form='folded'"),
    "noise": ({"form": "auto"}, NOISY, ValueError, "noise"),
    "an unknown dtype": ({"dtype": torch.int8}, projection(1), ValueError, "unknown dtype"),
    "an unknown dtype by name": ({"dtype": "float8"}, projection(1), ValueError, "unknown dtype float8; choose one of"),
    "a dtype for an adapter": ({"form": "adapter", "dtype": torch.float32}, projection(1), ValueError, "dtype"),
    "no such base": ({"base": "/nowhere/at/all"}, projection(1), ValueError, "base=FOLDER"),
    "texts as a string": ({"texts": "one"}, projection(1), TypeError, "list"),
    "no texts": ({"texts": []}, projection(1), ValueError, "empty"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_bad_input_is_refused_and_leaves_nothing(model: Any, what: str, tmp_path: Path, untouched: None) -> None:
    options, edit, kind, match = REFUSED[what]
    with pytest.raises(kind, match=match):
        export_hf(model, edit or weight_edit(model, 1), tmp_path / "out", progress=False, **options)
    assert list(tmp_path.iterdir()) == []


def test_an_existing_folder_stays_unless_told_otherwise(model: Any, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="overwrite"):
        write(model, projection(1, site="mlp_out"), tmp_path)
    assert (tmp_path / "mine.txt").read_text() == "mine"
    write(model, projection(1, site="mlp_out"), tmp_path, overwrite=True)
    assert not (tmp_path / "mine.txt").exists()


def test_another_models_folder_is_refused(model: Any, tiny_folder: Path, tmp_path: Path) -> None:
    other = save_family("llama", tmp_path / "other", seed=1)
    with pytest.raises(ValueError, match=r"not the checkpoint of this model: .* differs"):
        export_hf(model, projection(1), tmp_path / "out", base=other, progress=False)
    subtle, name = Path(shutil.copytree(tiny_folder, tmp_path / "subtle")), "model.layers.0.self_attn.q_proj.weight"
    set_tensors(subtle, lambda tensors: {**tensors, name: tensors[name] * 1.01})  # one matrix, and that by little
    for loaded in (
        model,
        *(load_model(tiny_folder, backend=kind) for kind in available_backends() if kind == "hooked"),
    ):
        with pytest.raises(ValueError, match=r"not the checkpoint of this model: .* differs"):
            write(loaded, projection(1), tmp_path / "out", base=subtle)
    assert not (tmp_path / "out").exists()


def test_a_model_with_hooks_on_is_refused(model: Any, tmp_path: Path) -> None:
    """They would be on for both sides of the comparison, or raise what half precision allows."""
    earlier = projection(0, rank=1, site="mlp_out", request="earlier")
    with earlier.applied(model), pytest.raises(ValueError, match=r"hooks are on this model \(at blocks\.0\."):
        export_hf(model, projection(2), tmp_path / "out", progress=False)
    assert list(tmp_path.iterdir()) == []


def test_a_base_of_another_model_is_seen_in_the_proof_as_well(tiny_folder: Path, tmp_path: Path) -> None:
    proof = Proof(torch.bfloat16, 10, edited=Difference(1.0, 0.15), unedited=Difference(1.0, 0.11))
    assert proof.exact  # by the letter: twice as far as the unedited models
    assert not proof.same_base  # which are too far apart to be one


@pytest.mark.parametrize("above", [False, True])
def test_the_base_checkpoint_is_never_overwritten(model: Any, tiny_folder: Path, tmp_path: Path, above: bool) -> None:
    base = Path(shutil.copytree(tiny_folder, tmp_path / "models" / "base"))
    before = content_of(base)
    with pytest.raises(ValueError, match="would be deleted"):
        export_hf(model, projection(1), base.parent if above else base, base=base, overwrite=True, progress=False)
    assert content_of(base) == before


def test_a_model_from_memory_needs_its_folder(tiny_folder: Path, tmp_path: Path) -> None:
    hf_model = AutoModelForCausalLM.from_pretrained(tiny_folder)
    hf_model.config._name_or_path = ""
    own = load_model(hf_model, backend="bridge", tokenizer=AutoTokenizer.from_pretrained(tiny_folder))
    with pytest.raises(ValueError, match=r"from memory: .* give base=FOLDER"):
        export_hf(own, projection(1), tmp_path / "out", progress=False)
    write(own, projection(1), tmp_path / "out", base=tiny_folder)


def test_quantised_and_incomplete_folders_are_refused(model: Any, tiny_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_folder, tmp_path / "base"))

    def refused(match: str) -> None:
        with pytest.raises(ValueError, match=match):
            export_hf(model, projection(1), tmp_path / "out", base=folder, progress=False)

    set_config(folder, quantization_config={"quant_method": "gptq"})
    refused("quantised")
    set_config(folder, quantization_config=...)
    (folder / "model.safetensors").rename(folder / "weights.safetensors")
    refused("holds no weights")
    index = {"weight_map": {"model.norm.weight": "model-00001-of-00009.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    refused("names 'model-00001-of-00009.safetensors', which is no file in this folder")


def test_folded_and_centred_weights_are_refused(backend: str, tmp_path: Path, tiny_folder: Path) -> None:
    if backend != "hooked":
        pytest.skip("HookedTransformer folds")
    own: Any = load_model(tiny_folder, backend="hooked")
    own.process_weights_(fold_ln=True, center_writing_weights=False, center_unembed=False)
    with pytest.raises(ValueError, match="no Hugging Face checkpoint holds these weights"):
        export_hf(own, projection(1), tmp_path / "out", base=tiny_folder, progress=False)
    assert list(tmp_path.iterdir()) == []


def test_too_little_disk_space_is_seen_before_writing(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(ValueError, match=r"needs about .* GiB"):
        export_hf(model, projection(1), tmp_path / "out", progress=False)
    assert list(tmp_path.iterdir()) == []


def test_room_is_asked_for_what_is_added_too(backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = save_family("mistral", tmp_path / "base")
    tied = load_model(base, backend=backend)
    size, head = (base / "model.safetensors").stat().st_size, tied.W_E.numel() * 4
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=int(1.05 * size) + head // 2))
    with pytest.raises(ValueError, match=r"needs about .* GiB"):
        export_hf(tied, projection(0, site="resid_pre"), tmp_path / "out", "folded", progress=False)
    write(tied, projection(0, site="mlp_out"), tmp_path / "out", "folded")


def test_a_disk_that_fills_up_leaves_nothing(model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise SafetensorError("I/O error: No space left on device")

    monkeypatch.setattr("mrp_lens.export.checkpoint.save_file", full)
    with pytest.raises(OSError, match=r"could not be written .*No space left"):
        export_hf(model, projection(1), tmp_path / "out", progress=False)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_model_that_differs_is_removed_and_the_old_folder_stays(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, untouched: None
) -> None:
    real = folded_into

    def wrong(edit: Edit, base: Any, dtype: torch.dtype) -> Any:
        changes = real(edit, base, dtype)
        name = next(iter(changes.changed))
        changes.changed[name] = changes.changed[name] * 1.01
        return changes

    out = tmp_path / "out"
    write(model, projection(1, site="mlp_out"), out)
    before = content_of(out)
    monkeypatch.setattr("mrp_lens.export.formats.folded_into", wrong)
    with pytest.raises(ExportMismatchError, match="is not the edited one"):
        export_hf(model, projection(1, site="mlp_out"), out, overwrite=True, progress=False)
    assert content_of(out) == before
    assert list(tmp_path.iterdir()) == [out]


@pytest.mark.slow
def test_a_folder_that_does_not_load_is_removed(model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mrp_lens.export.remote_code.TAIL", "\nraise RuntimeError('planted')\n")
    with pytest.raises(ExportMismatchError, match=r"could not be loaded in a fresh process: .*planted"):
        export_hf(model, projection(1), tmp_path / "out", progress=False)
    assert list(tmp_path.iterdir()) == []


def test_a_killed_export_leaves_no_half_folder_and_the_next_one_clears_up(model: Any, tmp_path: Path) -> None:
    code = (
        "import pathlib, sys, time\n"
        "from mrp_lens.utils.io import whole_folder\n"
        "with whole_folder(pathlib.Path(sys.argv[1])) as folder:\n"
        "    (folder / 'model.safetensors').write_bytes(b'half')\n"
        "    print('writing', flush=True)\n"
        "    time.sleep(60)\n"
    )
    out = tmp_path / "out"
    process = subprocess.Popen([sys.executable, "-c", code, str(out)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "writing\n"
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert not out.exists()
    assert [path.name for path in tmp_path.iterdir()] == [f".out.partial-{process.pid}"]
    write(model, projection(1), out)
    assert list(tmp_path.iterdir()) == [out]


def test_a_folder_that_is_being_written_is_left_alone(tmp_path: Path) -> None:
    with whole_folder(tmp_path / "out") as first:
        other = tmp_path / f".out.partial-{os.getppid()}"
        other.mkdir()
        (first / "file").write_text("x")
    assert other.is_dir()


@pytest.mark.parametrize("form", ["folded", "module", "adapter"])
def test_a_disk_that_is_full_at_any_file_of_an_export_leaves_the_old_folder(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: Any
) -> None:
    out, edit = tmp_path / "out", projection(1, site="mlp_out")
    write(model, edit, out, form)
    written = sum(1 for _ in out.iterdir())
    before = content_of(out)
    opened, left = [], [0]
    original = {module.__name__: module.open for module in (io, os, builtins)}

    def limited(name: str) -> Any:
        def open_(file: Any, mode: Any = "r", *args: Any, **options: Any) -> Any:
            writes = mode & os.O_CREAT if isinstance(mode, int) else set(mode) & set("wxa")
            if writes and tmp_path in Path(str(file)).parents:
                opened.append(file)
                if len(opened) > left[0]:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return original[name](file, mode, *args, **options)

        return open_

    for module in (io, os, builtins):
        monkeypatch.setattr(module, "open", limited(module.__name__))
    errors: list[str] = []
    for number in range(100):
        opened.clear()
        left[0] = number
        try:
            write(model, edit, out, form, overwrite=True)
            break
        except OSError as error:
            errors.append(str(error))
        assert content_of(out) == before
        assert list(tmp_path.iterdir()) == [out]
    assert len(errors) >= written
    assert all("No space left" in error for error in errors)
    assert list(tmp_path.iterdir()) == [out]


@pytest.mark.parametrize("form", ["folded", "module", "adapter"])
def test_a_disk_that_is_full_in_the_middle_of_a_file_of_an_export_leaves_the_old_folder(
    model: Any, tmp_path: Path, form: Any
) -> None:
    out, edit = tmp_path / "out", projection(1, site="mlp_out")
    write(model, edit, out, form)
    before = content_of(out)
    for size in sorted({len(content) - 1 for content in before.values()}):
        with files_end_at(size), pytest.raises(OSError, match=r"could not be written|File too large"):
            write(model, edit, out, form, overwrite=True)
        assert content_of(out) == before
        assert list(tmp_path.iterdir()) == [out]
