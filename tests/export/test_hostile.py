"""Base checkpoints, edits and exported folders from strangers: refused with a line, and nothing of theirs is run or copied."""

import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from huggingface_hub import ModelCard

from mrp_lens.edits import ProjectionEdit, exported_hooks
from mrp_lens.edits.subspace import Subspace
from mrp_lens.export import Measurements, push_to_hub
from mrp_lens.export.checkpoint import HFCheckpoint
from mrp_lens.export.model_card import model_card
from mrp_lens.export.remote_code import CODE_FILE
from mrp_lens.models.hooks import hook_name
from tests.conftest import D_MODEL
from tests.support.checkpoints import set_config, tensors_in
from tests.support.edits import projection
from tests.support.export_edits import assert_exact, exported, write


@pytest.fixture
def base(tiny_folder: Path, tmp_path: Path) -> Path:
    """A copy to do harm in, beside a secret."""
    (tmp_path / "secret").write_text('{"secret": 1}')
    return Path(shutil.copytree(tiny_folder, tmp_path / "base"))


class Payload:
    """Pickled, a command."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.mark}",)


def indexed(base: Path, name: Any) -> None:
    names = dict.fromkeys(tensors_in(base), name)
    (base / "model.safetensors").rename(base / "shard.safetensors")
    shutil.copy(base / "shard.safetensors", base.parent)
    (base / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))


def pickled(base: Path) -> None:
    (base / "model.safetensors").unlink()
    torch.save({"x": torch.ones(2), "y": Payload(base.parent / "harm")}, base / "pytorch_model.bin")


def huge(base: Path) -> None:
    header = json.dumps({"x": {"dtype": "F32", "shape": [2**40, 2**10], "data_offsets": [0, 2**52]}}).encode()
    (base / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)


def linked(base: Path, name: str, place: Path) -> None:
    (base / name).unlink(missing_ok=True)
    (base / name).symlink_to(place)


def weights_elsewhere(base: Path) -> None:
    shutil.move(base / "model.safetensors", base.parent / "elsewhere.safetensors")
    linked(base, "model.safetensors", base.parent / "elsewhere.safetensors")


BASES: dict[str, tuple[Callable[[Path], object], str]] = {
    "an index that leads out": (
        lambda b: indexed(b, "../shard.safetensors"),
        r"names '../shard.safetensors', which is no file in this folder",
    ),
    "an index that names a root": (
        lambda b: indexed(b, "/etc/passwd"),
        r"names '/etc/passwd', which is no file in this folder",
    ),
    "an index of numbers": (lambda b: indexed(b, 3), r"has no weight_map from tensors to file names"),
    "a pickle that runs a command": (pickled, r"pytorch_model.bin is damaged, or holds more than tensors"),
    "a header of 4 PiB": (huge, r"model.safetensors is damaged"),
    "a tokenizer that is a link": (
        lambda b: linked(b, "tokenizer.json", b.parent / "secret"),
        r"tokenizer.json is a link to .*secret, outside of its folder",
    ),
    "a folder of templates that is a link": (
        lambda b: linked(b, "additional_chat_templates", b.parent),
        r"is a link to .*, outside of its folder",
    ),
    "weights that are a link": (weights_elsewhere, r"model.safetensors is a link to .*elsewhere"),
    "a configuration of brackets": (
        lambda b: (b / "config.json").write_text("[" * 100_000),
        r"config.json is damaged: it is nested too deeply",
    ),
    "a configuration that is a list": (
        lambda b: (b / "config.json").write_text("[]"),
        r"not one JSON object",
    ),
    "code for a type": (
        lambda b: set_config(b, model_type='llama"\nimport os\nos.abort()#', architectures=["LlamaForCausalLM"]),
        r"where a model of the type .* keeps its residual stream is not known",
    ),
    "a type that is a list": (lambda b: set_config(b, model_type=["llama"]), r"a model of the type \['llama'\]"),
    "quantised weights": (lambda b: set_config(b, quantization_config={"quant_method": "x"}), "is quantised"),
    "compressed weights": (lambda b: set_config(b, compression_config={"quant_method": "x"}), "is quantised"),
}


@pytest.mark.parametrize("harm", BASES)
def test_a_base_checkpoint_that_does_harm_is_refused(bridge: Any, base: Path, harm: str) -> None:
    change, message = BASES[harm]
    change(base)
    before = sorted(base.parent.rglob("*"))
    with pytest.raises(ValueError, match=message):
        write(bridge, projection(1), base.parent / "out", base=base)
    assert sorted(base.parent.rglob("*")) == before


def test_settings_that_name_code_or_kernels_of_others_stay_behind(bridge: Any, base: Path) -> None:
    set_config(
        base,
        auto_map={"AutoConfig": "evil/repo--x.X"},
        architectures=["os.system('x')"],
        _attn_implementation="evil/kernels",
        _name_or_path="/home/somebody/models/secret",
    )
    settings = json.loads((base / "tokenizer_config.json").read_text())
    settings["auto_map"] = {"AutoTokenizer": ["evil/repo--tokenization.Tok", None]}
    (base / "tokenizer_config.json").write_text(json.dumps(settings))
    (base / "tokenizer_evil.py").write_text("raise SystemExit")
    for form, edit in (("folded", projection(1, site="mlp_out")), ("module", projection(1))):
        out = base.parent / form
        write(bridge, edit, out, form, base=base)
        text = "".join(file.read_text() for file in out.iterdir() if file.suffix in (".json", ".py"))
        assert not any(word in text for word in ("evil", "os.system", "somebody"))
        assert sorted(out.glob("*.py")) == ([out / CODE_FILE] if form == "module" else [])
        assert_exact(bridge, edit, out)


def test_the_links_of_the_hubs_cache_are_followed(bridge: Any, tiny_folder: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "models--org--name" / "snapshots" / "0123abcd"
    blobs = snapshot.parent.parent / "blobs"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, file in enumerate(sorted(tiny_folder.iterdir())):
        shutil.copy(file, blobs / str(number))
        (snapshot / file.name).symlink_to(Path("..") / ".." / "blobs" / str(number))
    (tmp_path / "mine").symlink_to(snapshot)
    for place in (snapshot, tmp_path / "mine"):
        out = tmp_path / f"out-{place.name}"
        write(bridge, projection(1), out, base=place)
        assert (out / "tokenizer.json").read_bytes() == (tiny_folder / "tokenizer.json").read_bytes()
        assert not any(file.is_symlink() for file in out.iterdir())
    (snapshot / "tokenizer.json").unlink()
    (snapshot / "tokenizer.json").symlink_to(tmp_path)
    (tmp_path / "models--org--other").mkdir()
    (snapshot / "vocab.txt").symlink_to(tiny_folder / "config.json")
    with pytest.raises(ValueError, match="outside of its folder"):
        write(bridge, projection(1), tmp_path / "no", base=snapshot)


def test_an_upload_follows_no_link_out_of_the_folder(copied: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("secret")
    (copied["adapter"] / "notes.txt").symlink_to(tmp_path / "secret")
    with pytest.raises(ValueError, match=r"notes.txt is a link to .*secret"):
        push_to_hub(copied["adapter"], "me/model", endpoint="http://127.0.0.1:9")


HOSTILE = "x](http://evil) <img src=http://evil> `code` | --- \n---\nlicense: mit\n# heading {{ 7 * 7 }}"


def test_a_card_shows_strangers_names_as_they_are() -> None:
    edit = ProjectionEdit({hook_name(1): Subspace.random(2, D_MODEL)}, request=HOSTILE)
    corpus = {"name": HOSTILE, "documents": HOSTILE, "sha256": HOSTILE}
    made = dict.fromkeys(["method", "seed", "steps_done"], HOSTILE) | {
        "settings": {HOSTILE: HOSTILE, "steps": HOSTILE},
        "data": {HOSTILE: [corpus]},
        "versions": {"torch": HOSTILE},
        "outcome": {"ended": HOSTILE, "left": HOSTILE, "damage": [HOSTILE]},
    }
    edit.provenance = {
        "model": {"name": HOSTILE, "n_layers": HOSTILE, "d_model": 1, "d_vocab": 1},
        "requests": {HOSTILE: made},
    }
    record = Measurements(notes=[HOSTILE], sources=[HOSTILE])
    language, datasets = {"a": [HOSTILE]}, ["org/data", HOSTILE]
    front = {"license": HOSTILE, "language": language, "datasets": datasets, "license_name": "mine"}
    plain = ModelCard(model_card(projection(1), base="org/base", form="module")).content.count("\n---")
    for form in ("folded", "module", "adapter"):
        card = ModelCard(
            model_card(edit, base=HOSTILE, form=form, checks=[HOSTILE], record=record, base_front_matter=front)
        )
        data = card.data.to_dict()
        assert data.get("license") is None  # not a name, hence not carried
        assert data["license_name"] == "mine"
        assert not data.keys() & {"language", "datasets"}
        outside = card.text.replace("\\`", "")
        assert "](http" not in outside
        assert "<img" not in outside
        assert "{{ 7 * 7 }}" in outside
        assert "`code" not in outside
        lines = card.text.splitlines()
        assert not [line for line in lines if line.startswith(("license: mit", "# heading", "---"))]
        assert card.content.count("\n---") == plain
    with pytest.raises(ValueError, match="Repo id must"):
        model_card(projection(1), base="org/base", form="module", repo_id='x"); import os #')


def changed(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config["mrp_lens"])
    (folder / "config.json").write_text(json.dumps(config))


def resealed(settings: dict[str, Any], change: Callable[[list[dict[str, Any]]], object]) -> None:
    """Changed by somebody who also knows how to compute the hash."""
    change(settings["changes"])
    settings["sha256"] = exported_hooks.hash_of({key: value for key, value in settings.items() if key != "sha256"})


def step(change: Callable[[dict[str, Any]], object]) -> Callable[[dict[str, Any]], object]:
    return lambda settings: resealed(settings, lambda changes: change(changes[0]["steps"][0]))


SETTINGS: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "no change": (lambda s: s["changes"].clear(), "hash does not match"),
    "one change fewer": (lambda s: s["changes"].pop(), "hash does not match"),
    "another layer": (lambda s: s["changes"][0].update(layer=3), "hash does not match"),
    "another site": (lambda s: s["changes"][0].update(site="mlp_out"), "hash does not match"),
    "other modules": (lambda s: s["modules"].update(mlp_out="self_attn"), "hash does not match"),
    "no hash": (lambda s: s.pop("sha256"), "hash does not match"),
    "no settings": (lambda s: s.clear(), "hash does not match"),
    "sealed: no change": (lambda s: resealed(s, lambda c: c.clear()), "are none of an edit"),
    "sealed: a layer that is no number": (lambda s: resealed(s, lambda c: c[0].update(layer=True)), "are none of"),
    "sealed: a layer that is not there": (lambda s: resealed(s, lambda c: c[0].update(layer=4)), "are none of an edit"),
    "sealed: a place twice": (lambda s: resealed(s, lambda c: c.append(c[0])), "are none of an edit"),
    "sealed: no step": (lambda s: resealed(s, lambda c: c[0].update(steps=[])), "are none of an edit"),
    "sealed: a shape of a terabyte": (step(lambda p: p.update(shape=[2**30, D_MODEL])), "are none of an edit"),
    "sealed: another kind": (step(lambda p: p.update(kind="steering")), "are none of an edit"),
    "sealed: text": (lambda s: resealed(s, lambda c: c.__setitem__(0, "x")), "are none of an edit"),  # type: ignore[call-overload]
}


@pytest.mark.parametrize("what", SETTINGS)
def test_changed_settings_of_a_module_never_load(copied: dict[str, Path], what: str) -> None:
    change, message = SETTINGS[what]
    changed(copied["module"], change)
    with pytest.raises(ValueError, match=message):
        exported(copied["module"])


@pytest.mark.parametrize("value", [0.0, float("nan"), 1.0])
def test_changed_tensors_of_a_modules_edit_never_load(copied: dict[str, Path], value: float) -> None:
    folder = copied["module"]
    (name,) = [
        file for file in folder.glob("*.safetensors") if any(".edit." in k for k in safetensors.torch.load_file(file))
    ]
    tensors = safetensors.torch.load_file(name)
    key = next(key for key in tensors if ".edit." in key)
    tensors[key][0, 0] = value
    safetensors.torch.save_file(tensors, name, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"the edit's tensor rows at layer \d \(resid_post\) was changed"):
        exported(folder)


def test_an_open_checkpoint_reads_no_architecture_from_its_configuration(base: Path) -> None:
    set_config(base, architectures=["GPT2LMHeadModel"])
    assert HFCheckpoint.open(base).layout.blocks == "model.layers"
