"""What `load_model` takes, and what it says about what it cannot take."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import mrp_lens.models.load as load
import mrp_lens.models.source as source
from mrp_lens.data import Corpus
from mrp_lens.edits import ProjectionEdit
from mrp_lens.edits.subspace import Subspace
from mrp_lens.methods import MRP, RMU
from mrp_lens.models import ModelMismatchError, available_backends, is_bridge, load_model, why_not_exportable
from mrp_lens.models.hooks import hook_name
from mrp_lens.models.source import count_parameters
from tests.conftest import D_MODEL
from tests.support.families import save_family
from tests.support.reference import difference, log_probabilities

Texts = tuple[Corpus, Corpus]
TOKENS = torch.arange(3, 15)[None]


@pytest.fixture
def hf_model(tiny_folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(tiny_folder)


def test_a_loaded_and_changed_hugging_face_model_is_taken_as_it_is_and_left_alone(
    hf_model: Any, tiny_folder: Path, backend: str
) -> None:
    with torch.no_grad():  # fine-tuned, or an adapter merged in
        hf_model.model.layers[1].mlp.down_proj.weight.mul_(1.5)
    before = {name: tensor.clone() for name, tensor in hf_model.state_dict().items()}
    model = load_model(hf_model, backend=backend)
    assert difference(model, hf_model, TOKENS) < 1e-4
    assert difference(load_model(tiny_folder, backend=backend), hf_model, TOKENS) > 1e-3
    with ProjectionEdit({hook_name(1): Subspace.random(4, D_MODEL, seed=0)}).applied(model):
        pass
    assert list(hf_model.state_dict()) == list(before)
    assert all(torch.equal(tensor, before[name]) for name, tensor in hf_model.state_dict().items())


def test_a_loaded_model_without_a_folder_needs_its_tokenizer(hf_model: Any, tiny_folder: Path) -> None:
    hf_model.config._name_or_path = ""
    with pytest.raises(ValueError, match=r"brings no tokenizer; pass load_model\(model, tokenizer="):
        load_model(hf_model)
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    assert load_model(hf_model, tokenizer=tokenizer).tokenizer is not None


def test_other_things_are_refused_by_their_type(model: Any, hf_model: Any) -> None:
    for thing in (3, torch.nn.Linear(2, 2)):
        with pytest.raises(TypeError, match=f"cannot load a {type(thing).__name__}"):
            load_model(thing)
    hf_model.merge_and_unload = lambda: None
    with pytest.raises(ValueError, match="carries an adapter; merge it first"):
        load_model(hf_model)


def test_bad_folders_and_names_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no folder at '/nowhere'"):
        load_model("/nowhere")
    with pytest.raises(ValueError, match=r"holds no config.json"):
        load_model(tmp_path)
    with pytest.raises(ValueError, match="unknown backend 'jax'"):
        load_model("demo", backend="jax")
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"holds an adapter and no model; merge it first"):
        load_model(tmp_path)


def test_a_name_that_the_hub_does_not_give_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def unreachable(name: str, **_: Any) -> str:
        raise OSError(f"cannot reach the Hub for {name}")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    with pytest.raises(ValueError, match=r"'org/name' is neither a local folder nor .*: cannot reach the Hub"):
        load_model("org/name")


def test_a_hub_name_is_downloaded_and_loaded(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **_: str(tiny_folder))
    assert load_model("org/name").cfg.model_name == "org/name"


def test_the_weights_in_the_format_of_the_models_makers_are_not_downloaded(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub
    from huggingface_hub.utils import filter_repo_objects

    asked: dict[str, Any] = {}

    def download(name: str, **settings: Any) -> str:
        asked.update(settings)
        return str(tiny_folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    source.find_folder("org/name")
    wanted = ["config.json", "model.safetensors", "model-00001-of-00002.safetensors", "model.safetensors.index.json"]
    others = ["consolidated.safetensors", "consolidated-00001-of-00002.safetensors", "consolidated.00.pth"]
    assert list(filter_repo_objects([*wanted, *others], **asked)) == wanted


def test_a_checkpoint_without_tokenizer_weights_or_all_of_them_is_refused(tiny_folder: Path, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    shutil.copy(tiny_folder / "config.json", tmp_path)
    with pytest.raises(ValueError, match="holds no weights"):
        load_model(tmp_path)
    shutil.copy(tiny_folder / "model.safetensors", tmp_path)
    with pytest.raises(ValueError, match="no usable tokenizer"):
        load_model(tmp_path)
    tensors = load_file(tiny_folder / "model.safetensors")
    del tensors["model.layers.2.mlp.down_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    AutoTokenizer.from_pretrained(tiny_folder).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"1 tensors are missing \(model.layers.2.mlp.down_proj.weight"):
        load_model(tmp_path)


def test_a_quantised_checkpoint_is_refused(tiny_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "quantised"
    shutil.copytree(tiny_folder, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "gptq"}}))
    with pytest.raises(ValueError, match=r"is quantised \(gptq\).*Load the checkpoint in float32, bfloat16 or float16"):
        load_model(folder)


def test_what_cannot_fit_is_refused_before_it_is_loaded(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parameters = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(tiny_folder).parameters())
    assert count_parameters(tiny_folder) == parameters
    monkeypatch.setattr(source, "free_memory", lambda device: 4 * parameters - 1)
    with pytest.raises(ValueError, match=r"needs about .* GiB on cpu to load in float32 .*dtype=torch.bfloat16"):
        load_model(tiny_folder, backend="bridge")
    assert is_bridge(load_model(tiny_folder, backend="bridge", dtype=torch.bfloat16))


def test_weights_that_lie_there_twice_are_counted_once(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parameters = count_parameters(tiny_folder)
    monkeypatch.setattr(source, "free_memory", lambda device: 4 * parameters)
    folder = Path(shutil.copytree(tiny_folder, tmp_path / "model"))
    whole = folder / "model.safetensors"
    shutil.copy(whole, folder / "consolidated.safetensors")  # as in Mistral's repositories
    shutil.copy(whole, folder / "model-00001-of-00001.safetensors")  # without an index nobody reads it
    torch.save(load_file(whole), folder / "pytorch_model.bin")
    assert count_parameters(folder) == parameters
    assert is_bridge(load_model(folder, backend="bridge"))
    whole.unlink()
    assert count_parameters(folder) == (folder / "pytorch_model.bin").stat().st_size // 2
    shards = dict.fromkeys(load_file(folder / "consolidated.safetensors"), "model-00001-of-00001.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": shards}))
    assert count_parameters(folder) == parameters
    assert is_bridge(load_model(folder, backend="bridge"))


def test_weights_of_which_the_configuration_gives_the_name_load(tiny_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_folder, tmp_path / "model"))
    (folder / "model.safetensors").rename(folder / "other.safetensors")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "transformers_weights": "other.safetensors"}))
    assert is_bridge(load_model(folder, backend="bridge"))


def test_hooked_transformer_says_what_it_cannot_load_and_auto_takes_the_bridge(tmp_path: Path) -> None:
    folder = save_family("gemma2", tmp_path / "gemma2")
    assert is_bridge(load_model(folder))
    if "hooked" in available_backends():
        with pytest.raises(ValueError, match=r"cannot load .* as hooked: .*; use backend='bridge'"):
            load_model(folder, backend="hooked")


@pytest.mark.skipif("hooked" not in available_backends(), reason="needs HookedTransformer (TransformerLens 3)")
def test_a_users_own_folded_hooked_transformer_takes_edits_and_fits_but_no_export(
    tmp_path: Path, texts: Texts, hf_model: Any
) -> None:
    folder = save_family("gpt2", tmp_path / "gpt2")
    model: Any = load_model(folder, backend="hooked")
    assert why_not_exportable(model) is None
    before = log_probabilities(model, TOKENS)
    model.process_weights_()
    torch.testing.assert_close(log_probabilities(model, TOKENS), before, atol=1e-4, rtol=0)  # folded: the same function
    assert why_not_exportable(model) == "LayerNorm is folded into its weights"
    for method in (MRP(steps=2), RMU(steps=2)):
        with pytest.warns(UserWarning, match=r"LayerNorm is folded.*cannot be exported"):
            fit = method.fit(model, *texts, seed=0, progress=False)
        with fit.edit.applied(model):
            assert float((log_probabilities(model, TOKENS) - before).abs().max()) > 1e-4


@pytest.mark.skipif("hooked" not in available_backends(), reason="needs HookedTransformer (TransformerLens 3)")
def test_centred_weights_are_known(tmp_path: Path) -> None:
    model: Any = load_model(save_family("gpt2", tmp_path / "gpt2"), backend="hooked")
    model.process_weights_(fold_ln=False, center_unembed=False)
    assert why_not_exportable(model) == "its writing weights are centred"


def test_the_bridges_compatibility_mode_is_known(tiny_folder: Path) -> None:
    model: Any = load_model(tiny_folder, backend="bridge")
    assert why_not_exportable(model) is None
    model.enable_compatibility_mode()
    assert why_not_exportable(model) == "its compatibility mode rewrote the weights"


def test_a_path_that_names_another_family_loads(tiny_folder: Path, tmp_path: Path, backend: str) -> None:
    folder = tmp_path / "my-gemma-of-gpt2"
    shutil.copytree(tiny_folder, folder)
    assert is_bridge(load_model(folder, backend=backend)) == (backend == "bridge")  # type: ignore[arg-type]


def test_a_model_that_differs_from_hugging_face_is_refused(
    tiny_folder: Path, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = load._expected

    def other(hf_model: Any, *settings: Any) -> Any:
        """What Hugging Face would say if it had lost the last norm's weights."""
        with torch.no_grad():
            kept = hf_model.model.norm.weight.clone()
            hf_model.model.norm.weight.fill_(1.0)
            probe = real(hf_model, *settings)
            hf_model.model.norm.weight.copy_(kept)
        return probe

    monkeypatch.setattr(load, "_expected", other)
    with pytest.raises(ModelMismatchError, match="differ from Hugging Face's by"):
        load_model(tiny_folder, backend=backend)  # type: ignore[arg-type]


@pytest.mark.skipif("hooked" in available_backends(), reason="TransformerLens 3 has HookedTransformer")
def test_without_hooked_transformer_the_remedy_is_named(tiny_folder: Path) -> None:
    with pytest.raises(ImportError, match="use backend='bridge' or install transformer-lens<4"):
        load_model(tiny_folder, backend="hooked")
    assert is_bridge(load_model(tiny_folder))
