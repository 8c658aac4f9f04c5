"""Model folders from strangers: refused with one line before anything is read or run that should not be, or loaded exactly."""

import json
import os
import pickle
import random
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import mrp_lens.models.source as source
from mrp_lens.models import load_model
from tests.support.families import save_family
from tests.support.mutations import VALUES, mutated
from tests.support.reference import difference, plain, random_tokens

Change = Callable[[Path], object]


@pytest.fixture
def folder(tiny_folder: Path, tmp_path: Path) -> Path:
    copied = tmp_path / "model"
    shutil.copytree(tiny_folder, copied)
    return copied


def edit_json(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def refused(folder: Path, pattern: str) -> None:
    with pytest.raises(ValueError, match=pattern) as caught:
        load_model(folder)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 900


@pytest.mark.parametrize(
    ("text", "pattern"),
    [
        ("[1, 2]", "config.json is damaged: it holds a list, not one JSON object"),
        ("{", "config.json is damaged: it is not JSON"),
        ("", "config.json is damaged: it is not JSON"),
        ('{"a": ' + "[" * 100_000 + "]" * 100_000 + "}", "config.json is damaged: it is nested too deeply"),
        (
            '{"a": "' + "x" * 17 * 2**20 + '"}',
            "config.json has 17 MiB, .*; a configuration is one object of some kilobytes",
        ),
        ("{}", "says model_type None, which transformers .* does not know"),
        ('{"model_type": ["llama"]}', r"says model_type \['llama'\], which transformers"),
    ],
    ids=["list", "cut", "empty", "nested", "huge", "no type", "list as type"],
)
def test_a_broken_configuration_is_named(text: str, pattern: str, folder: Path) -> None:
    (folder / "config.json").write_text(text)
    refused(folder, pattern)
    (folder / "config.json").write_bytes(b"\xff\xfe{}")
    refused(folder, "config.json is damaged: it is not JSON")


@pytest.mark.parametrize("name", ["hidden_size", "vocab_size", "num_hidden_layers", "intermediate_size", "head_dim"])
def test_sizes_that_the_weights_cannot_have_are_refused_before_anything_is_built(
    name: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def built(*_: Any, **__: Any) -> None:
        raise AssertionError("a model was built")

    monkeypatch.setattr(source, "read_weights", built)
    edit_json(folder / "config.json", **{name: 10**12})
    refused(folder, f"says {name} = 1000000000000, and its weight files hold [0-9]+ numbers")


MISFITS: list[dict[str, Any]] = [
    {"hidden_size": 48},
    {"hidden_size": -32},
    {"hidden_size": "x"},
    {"num_attention_heads": 0},
    {"num_attention_heads": 5},
    {"num_hidden_layers": -1},
    {"max_position_embeddings": {}},
    {"sliding_window": {}},
    {"rope_parameters": 3},
    {"hidden_act": "none"},
    {"vocab_size": 900},
    {"rms_norm_eps": "tiny"},
]


@pytest.mark.parametrize("changes", MISFITS, ids=str)
def test_settings_that_do_not_fit_the_weights_are_refused(changes: dict[str, Any], folder: Path) -> None:
    edit_json(folder / "config.json", **changes)
    refused(
        folder,
        r"cannot be loaded into the model|transformers cannot use|do not fill|must be a |TransformerLens cannot",
    )


MARKER = "mrp_lens_code_ran"
CODE = f"import os\nos.environ[{MARKER!r}] = 'yes'\nfrom transformers import LlamaConfig as C, LlamaForCausalLM as M\n"


def test_no_code_of_a_folder_runs(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(MARKER, raising=False)
    monkeypatch.setattr("builtins.input", lambda *_: "y")  # transformers would ask
    (folder / "code.py").write_text(CODE)
    code = {"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M", "AutoTokenizer": ["code.T", None]}
    edit_json(folder / "config.json", auto_map=code)
    edit_json(folder / "tokenizer_config.json", auto_map=code)
    with pytest.warns(
        UserWarning, match="brings code of its own .* is never run here: it is loaded as the llama model"
    ):
        model = load_model(folder)
    assert difference(model, folder, torch.arange(3, 20)[None]) < 1e-4
    edit_json(folder / "tokenizer_config.json", tokenizer_class="T")
    with pytest.warns(UserWarning, match="is never run"):
        refused(folder, "no usable tokenizer in .* contains custom code")
    edit_json(folder / "config.json", model_type="own")
    refused(folder, "says model_type 'own', which .* does not know; it brings code of its own, which is never run here")
    assert MARKER not in os.environ


class Setter:
    """Runs code when it is unpickled."""

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return exec, (f"import os; os.environ[{MARKER!r}] = 'yes'",)


def test_pickled_code_does_not_run_and_plain_tensors_load(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(MARKER, raising=False)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(tensors, folder / "pytorch_model.bin")
    assert load_model(folder).cfg.n_layers == 4
    torch.save({**tensors, "model.norm.weight": Setter()}, folder / "pytorch_model.bin")
    refused(folder, "cannot be loaded into the model of its config.json: Weights only load failed")
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps([Setter(), "x" * 10**6]))
    refused(folder, "cannot be loaded into the model of its config.json")
    assert MARKER not in os.environ


@pytest.mark.parametrize(
    "name", ["../outside.safetensors", "/outside.safetensors", "..\\outside.safetensors", "absent"]
)
def test_an_index_that_names_other_files_is_refused(name: str, folder: Path) -> None:
    shutil.move(folder / "model.safetensors", folder.parent / "outside.safetensors")
    shutil.copy(folder.parent / "outside.safetensors", folder / "model-1.safetensors")
    keys = load_file(folder / "model-1.safetensors")
    name = str(folder.parent / "outside.safetensors") if name.startswith("/") else name
    for shard in ("model-1.safetensors", name):
        index = {"metadata": {}, "weight_map": {**dict.fromkeys(keys, "model-1.safetensors"), "lm_head.weight": shard}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        if shard == name:
            refused(folder, "index.json names .*, which is no file in this folder")
        else:
            assert load_model(folder).cfg.n_layers == 4
    for text in ("{}", '{"weight_map": [1]}', '{"weight_map": {"a": 3}}'):
        (folder / "model.safetensors.index.json").write_text(text)
        refused(folder, "index.json has no weight_map")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"])
def test_links_out_of_a_folder_are_not_followed(name: str, folder: Path) -> None:
    shutil.move(folder / name, folder.parent / name)
    (folder / name).symlink_to(folder.parent / name)
    refused(folder, f"{name} is a symbolic link out of its folder")
    (folder / name).unlink()
    shutil.move(folder.parent / name, folder / "elsewhere")
    (folder / name).symlink_to("elsewhere")  # inside
    (folder.parent / "link").symlink_to(folder)  # the folder itself is the caller's word
    assert load_model(folder.parent / "link").cfg.n_layers == 4


def test_a_snapshot_of_the_hubs_cache_is_links_into_its_blobs(folder: Path, tmp_path: Path) -> None:
    home = tmp_path / "models--org--name"
    snapshot, blobs = home / "snapshots" / "abc", home / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, file in enumerate(folder.iterdir()):
        shutil.move(file, blobs / str(number))
        (snapshot / file.name).symlink_to(Path("../../blobs") / str(number))
    assert load_model(snapshot).cfg.n_layers == 4
    (snapshot / "extra.safetensors").symlink_to("/etc/hostname")
    refused(snapshot, "extra.safetensors is a symbolic link out of its folder")


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"model": {"type": "BPE", "vocab": {"a": -1}, "merges": ["x"]}}'])
def test_a_broken_tokenizer_is_named(text: str, folder: Path) -> None:
    (folder / "tokenizer.json").write_text(text)
    refused(folder, "no usable tokenizer in .*Save one there with tokenizer.save_pretrained")


def test_broken_weights_are_named(folder: Path) -> None:
    weights = folder / "model.safetensors"
    content = weights.read_bytes()
    for broken in (content[: len(content) // 2], b"", b"\xff" * 64, (2**60).to_bytes(8, "little") + content[8:]):
        weights.write_bytes(broken)
        refused(folder, "model.safetensors is not a safetensors file: .*; download it again")


SETTINGS = (
    *VALUES,
    *(16, 64, 128, 10**12, 2**63, -(2**63), -1.0, "gelu", "eager", {"rope_type": "yarn"}),
    *(["full_attention"] * 4, ["sliding_attention"] * 4, {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}),
)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
def test_mutated_configurations_are_refused_or_loaded_as_transformers_loads_them(family: str, tmp_path: Path) -> None:
    folder = save_family(family, tmp_path / family, **{"sliding_window": 8} if family == "qwen2" else {})
    original = json.loads((folder / "config.json").read_text())
    absent = ("sliding_window", "layer_types", "head_dim", "auto_map", "pretraining_tp", "quantization_config", "n_ctx")
    refusals: list[str] = []
    loaded = 0
    for seed in range(150):
        draw = random.Random(seed)
        added = {draw.choice(absent): draw.choice(SETTINGS)} if draw.random() < 0.3 else {}
        (folder / "config.json").write_text(changed := mutated(json.dumps(original | added), seed, SETTINGS))
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                model = load_model(folder, device="cpu")
        except ValueError as error:
            refusals.append(str(error))
            continue
        except BaseException as error:
            raise AssertionError(f"seed {seed}, {changed}: {type(error).__name__}: {error}") from error
        reference = plain(folder)
        length = min(60, int(getattr(reference.config, "max_position_embeddings", 60)))
        off = difference(model, reference, random_tokens(reference.config.vocab_size, length, first=0))
        assert off < 1e-3, f"seed {seed}, {changed}: {type(model).__name__} is {off} off"
        loaded += 1
    assert not [text for text in refusals if "\n" in text]
    assert loaded > 10
    assert len(refusals) > 10
