"""The folders that `export_hf` writes, and what it refuses."""

import copy
import json
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Model, LlamaForCausalLM

from mrp_lens.export import export_hf
from mrp_lens.export.remote_code import CODE_FILE
from mrp_lens.export.verification import SPLIT
from mrp_lens.hf import attach
from mrp_lens.models import describe, load_model
from tests.conftest import assert_same_state, state_of
from tests.export.conftest import EXPORTED
from tests.support.checkpoints import set_config, tensors_in
from tests.support.edits import logits, projection, weight_edit
from tests.support.export_edits import (
    TOKENS,
    assert_exact,
    content_of,
    every_write,
    exported,
    hooked,
    log_probabilities,
    write,
)
from tests.support.families import save_family


@pytest.mark.slow
@pytest.mark.parametrize(
    ("site", "form"),
    [
        ("mlp_out", "folded"),
        ("resid_post", "module"),
        ("resid_post", "adapter"),
    ],
)
def test_an_export_is_proved_in_a_fresh_process(
    model: Any, site: str, form: str, tmp_path: Path, untouched: None
) -> None:
    edit = projection(0, 2, site=site)
    report = export_hf(model, edit, tmp_path / "out", form if form == "adapter" else "auto", progress=False)
    assert report.form == form
    assert report.max_logit_diff is not None
    assert 0 < report.max_logit_diff <= 1e-4
    assert report.proof is not None
    assert report.proof.tokens > 50
    assert "float32" in str(report)
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"{report.max_logit_diff:.1e}" in card


@pytest.mark.parametrize("form", EXPORTED)
def test_both_classes_write_the_same_files(
    model: Any, form: str, exports: dict[str, Path], tmp_path: Path, untouched: None
) -> None:
    """So what is read below is what either has written."""
    out = write(model, EXPORTED[form], tmp_path / "out", form)
    assert content_of(out) == content_of(exports[form])
    if form != "adapter":
        assert_exact(model, EXPORTED[form], out)


def test_untouched_tensors_and_companions_are_byte_identical(model: Any, tiny_folder: Path, tmp_path: Path) -> None:
    base = Path(shutil.copytree(tiny_folder, tmp_path / "base"))
    (base / "chat_template.jinja").write_text("{{ messages }}")
    (base / "optimizer.pt").write_text("not part of a model")
    out = write(model, projection(1, site="mlp_out"), tmp_path / "out", base=base)
    before, after = tensors_in(base), tensors_in(out)
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"model.layers.1.mlp.down_proj.weight"}
    assert all(before[name].dtype == after[name].dtype for name in before)
    assert json.loads((out / "config.json").read_text()) == json.loads((base / "config.json").read_text())
    for name in ("generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (out / name).read_bytes() == (base / name).read_bytes()
    assert not (out / "optimizer.pt").exists()
    assert len({file.stat().st_mode for file in out.iterdir()}) == 1  # weights are no more private than the rest


def test_a_module_leaves_the_base_file_as_it_is_and_keeps_rows_in_float32(
    exports: dict[str, Path], tiny_folder: Path
) -> None:
    first = exports["module"] / "model-00001-of-00002.safetensors"
    assert first.read_bytes() == (tiny_folder / "model.safetensors").read_bytes()
    load = partial(exported, exports["module"])
    for loaded in (load(dtype=torch.bfloat16), load().half(), load().to(torch.float16)):
        assert loaded.model.layers[1].mlp.down_proj.weight.dtype != torch.float32
        rows = loaded.model.layers[1].edit["resid_post"][0].rows
        assert rows.dtype == torch.float32
        torch.testing.assert_close(rows @ rows.T, torch.eye(3), atol=1e-5, rtol=0)


def test_a_module_never_loads_as_the_unedited_model(bridge: Any, exports: dict[str, Path], tmp_path: Path) -> None:
    loaded, again = exported(exports["module"]), tmp_path / "again"
    loaded.save_pretrained(again)
    assert (again / CODE_FILE).is_file()
    assert_exact(bridge, EXPORTED["module"], again)
    for folder in (exports["module"], again):
        with pytest.raises(ValueError, match="trust_remote_code"):
            AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False)
        with pytest.raises(Exception, match="trust_remote_code=True"):  # says what to do, in the place of a setting
            LlamaForCausalLM.from_pretrained(folder)
    for source in (exports["module"], loaded):
        with pytest.raises(ValueError, match="load the base model that its"):
            load_model(source, backend="bridge")


def test_a_module_without_its_rows_is_refused(copied: dict[str, Path]) -> None:
    out = copied["module"]
    (out / "model.safetensors.index.json").unlink()
    (out / "model-00002-of-00002.safetensors").unlink()
    (out / "model-00001-of-00002.safetensors").rename(out / "model.safetensors")
    with pytest.raises(ValueError, match="edit's tensors are missing"):
        exported(out)


def test_tokenizer_and_generation_settings_come_along(exports: dict[str, Path], tiny_folder: Path) -> None:
    ours, base = (AutoTokenizer.from_pretrained(f, trust_remote_code=True) for f in (exports["module"], tiny_folder))
    text = "The colour of Zaxim is red."
    assert ours(text)["input_ids"] == base(text)["input_ids"]
    loaded, plain = exported(exports["module"]), AutoModelForCausalLM.from_pretrained(tiny_folder)
    assert loaded.generation_config.to_dict() == plain.generation_config.to_dict()
    assert loaded.config.vocab_size == plain.config.vocab_size


@pytest.mark.slow
@pytest.mark.parametrize("form", ["folded", "module"])
@pytest.mark.parametrize("layout", ["shards", "one shard", "bin", "bare"])
def test_other_ways_of_storing_a_checkpoint(
    layout: str, form: str, backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = save_family("gpt2", tmp_path / "base")
    whole = AutoModelForCausalLM.from_pretrained(base)
    if layout == "shards":
        (base / "model.safetensors").unlink()
        whole.save_pretrained(base, max_shard_size="60KB")
        assert len(list(base.glob("*.safetensors"))) > 2
    elif layout == "one shard":  # as big models are saved that happen to fit into one
        names = dict.fromkeys(tensors_in(base), "model-00001-of-00001.safetensors")
        (base / "model.safetensors").rename(base / "model-00001-of-00001.safetensors")
        (base / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    elif layout == "bin":
        (base / "model.safetensors").unlink()
        state = {name: tensor for name, tensor in whole.state_dict().items() if name != "lm_head.weight"}
        torch.save(state, base / "pytorch_model.bin")
    else:  # as GPT-2 lies on the Hub: "h.0.mlp..." for "transformer.h.0.mlp..."
        config = (base / "config.json").read_text()
        GPT2Model.from_pretrained(base).save_pretrained(base)
        (base / "config.json").write_text(config)
    model = load_model(base, backend=backend)
    folding = projection(1, site="mlp_out") if layout == "shards" else every_write()
    edit = folding if form == "folded" else projection(1, 2)
    out = write(model, edit, tmp_path / "out", form)
    assert_exact(model, edit, out)
    if layout == "shards":
        same = [f.name for f in base.glob("*.safetensors") if f.read_bytes() == (out / f.name).read_bytes()]
        assert same if form == "folded" else len(same) == len(list(base.glob("*.safetensors")))


@pytest.mark.parametrize("family", ["mistral", "gpt2"])
def test_tied_models_leave_untied_when_their_embeddings_are_projected(
    family: str, backend: str, tmp_path: Path
) -> None:
    base = save_family(family, tmp_path / "base")
    model = load_model(base, backend=backend)
    edit = projection(0, site="resid_pre")
    loaded = AutoModelForCausalLM.from_pretrained(write(model, edit, tmp_path / "out", "folded"))
    assert loaded.config.tie_word_embeddings is False
    original = AutoModelForCausalLM.from_pretrained(base).get_input_embeddings().weight
    assert torch.equal(loaded.get_output_embeddings().weight, original)
    assert_exact(model, edit, loaded)


@pytest.mark.slow
def test_a_half_precision_checkpoint_keeps_its_precision_or_takes_another(
    model: Any, backend: str, tiny_folder: Path, tmp_path: Path
) -> None:
    base = Path(shutil.copytree(tiny_folder, tmp_path / "base"))
    AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float16).save_pretrained(base)
    wide = load_model(base, backend=backend)
    edit = weight_edit(wide, 2)
    report = export_hf(wide, edit, tmp_path / "half", progress=False)
    assert report.dtype == torch.float16
    assert report.proof is not None
    assert report.proof.dtype == torch.float16
    assert report.proof.edited.rms <= 2 * report.proof.unedited.rms
    assert {t.dtype for t in tensors_in(tmp_path / "half").values()} == {torch.float16}
    write(wide, edit, tmp_path / "wide", dtype="float32")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "wide").dtype == torch.float32
    assert_exact(wide, edit, tmp_path / "wide")


@pytest.mark.filterwarnings("ignore:.*brings code of its own")  # said while the base is loaded
def test_what_points_at_code_that_does_not_come_along_stays_behind(
    model: Any, tiny_folder: Path, tmp_path: Path
) -> None:
    base = Path(shutil.copytree(tiny_folder, tmp_path / "base"))
    set_config(base, auto_map={"AutoConfig": "configuration_x.XConfig"})
    edit = projection(1, site="mlp_out")
    out = write(model, edit, tmp_path / "out", base=base)
    assert "auto_map" not in json.loads((out / "config.json").read_text())
    assert_exact(model, edit, out)


def test_an_adapter_tells_no_path_of_the_machine_it_was_made_on(model: Any, tiny_folder: Path, tmp_path: Path) -> None:
    edit = projection(1) + weight_edit(model, 2)
    for part in edit.parts:
        part.provenance = {"model": describe(model), "data": {"forget": [{"name": str(tmp_path / "secret.jsonl")}]}}
    edit.save_pretrained(tmp_path / "saved")
    out = write(model, tmp_path / "saved", tmp_path / "out", "adapter")
    text = "".join((out / name).read_text() for name in ("edit_config.json", "README.md"))
    assert str(tmp_path) not in text
    assert str(tiny_folder.parent) not in text
    assert "secret.jsonl" in text
    loaded = AutoModelForCausalLM.from_pretrained(tiny_folder)
    with attach(loaded, out):
        assert_exact(model, edit, loaded)


def test_a_folder_from_one_class_loads_in_the_other(model: Any, exports: dict[str, Path]) -> None:
    other = load_model(exports["folded"], backend="bridge" if "Hooked" in type(model).__name__ else "auto")
    wanted = hooked(model, EXPORTED["folded"])
    torch.testing.assert_close(logits(other, TOKENS).log_softmax(-1), wanted, atol=1e-4, rtol=0)


@pytest.mark.slow
def test_exporting_leaves_the_model_as_it_was(model: Any, tmp_path: Path) -> None:
    before, started = state_of(model), time.perf_counter()
    report = export_hf(model, weight_edit(model, 1) + projection(2), tmp_path / "out", progress=False)
    assert_same_state(before, state_of(model))
    assert 0 < report.seconds <= time.perf_counter() - started


@pytest.mark.parametrize("form", ["folded", pytest.param("module", marks=pytest.mark.slow)])
def test_a_tokenizer_that_was_changed_in_memory_is_the_one_that_is_exported(
    form: str, tiny_folder: Path, tmp_path: Path
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    tokenizer.add_tokens(["<extra>"])
    tokenizer.chat_template = "{{ messages[0].content }}!"
    wide = AutoModelForCausalLM.from_pretrained(tiny_folder)
    wide.resize_token_embeddings(len(tokenizer) + 7)
    wide.save_pretrained(tmp_path / "base")
    AutoTokenizer.from_pretrained(tiny_folder).save_pretrained(tmp_path / "base")
    model = load_model(tmp_path / "base", tokenizer=tokenizer, backend="bridge")
    # Assigned, it would be replaced by the one on the disk.
    model.__dict__["_tokenizer" if hasattr(type(model), "tokenizer") else "tokenizer"] = tokenizer
    edit = projection(1, site="mlp_out" if form == "folded" else "resid_post")
    texts = ["The colour of <extra> is red."]
    proved = form == "module"
    export_hf(model, edit, tmp_path / "out", form, texts=texts, verify=proved, progress=False)  # type: ignore[arg-type]
    found = AutoTokenizer.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert found(texts)["input_ids"] == tokenizer(texts)["input_ids"]
    assert len(tokenizer) - 1 in found(texts)["input_ids"][0]
    assert found.apply_chat_template([{"role": "user", "content": "Hello"}], tokenize=False) == "Hello!"


def test_nothing_of_the_bases_tokenizer_is_left_beside_another(tiny_folder: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny_folder, base)
    stored = AutoTokenizer.from_pretrained(base)
    (base / "special_tokens_map.json").write_text(json.dumps({"eos_token": stored.eos_token}))
    (base / "additional_chat_templates").mkdir()
    (base / "additional_chat_templates" / "rag.jinja").write_text("{{ documents }}")
    changed = AutoTokenizer.from_pretrained(tiny_folder)
    changed.eos_token = next(token for token in changed.all_special_tokens if token != stored.eos_token)
    model = load_model(base, tokenizer=changed, backend="bridge")
    model.__dict__["_tokenizer" if hasattr(type(model), "tokenizer") else "tokenizer"] = changed
    export_hf(model, projection(1, site="mlp_out"), tmp_path / "out", "folded", verify=False, progress=False)
    found = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert found.eos_token == changed.eos_token != stored.eos_token
    assert not isinstance(found.chat_template, dict)


def test_a_tokenizer_with_other_rules_is_the_one_that_is_exported(tiny_folder: Path, tmp_path: Path) -> None:
    text, stored = "The BIG Dog", AutoTokenizer.from_pretrained(tiny_folder)
    stored.save_pretrained(tmp_path / "lower")
    file = tmp_path / "lower" / "tokenizer.json"
    settings = json.loads(file.read_text())
    rules = [{"type": "Lowercase"}, *filter(None, [settings["normalizer"]])]
    file.write_text(json.dumps(settings | {"normalizer": {"type": "Sequence", "normalizers": rules}}))
    lower = AutoTokenizer.from_pretrained(tmp_path / "lower")
    assert lower.get_vocab() == stored.get_vocab()
    assert lower(text)["input_ids"] != stored(text)["input_ids"]
    for tokenizer in (lower, stored):
        model = load_model(tiny_folder, tokenizer=tokenizer, backend="bridge")
        out = tmp_path / str(tokenizer is lower)
        export_hf(model, projection(1, site="mlp_out"), out, "folded", verify=False, progress=False)
        assert AutoTokenizer.from_pretrained(out)(text)["input_ids"] == tokenizer(text)["input_ids"]
        same = (out / "tokenizer.json").read_bytes() == (tiny_folder / "tokenizer.json").read_bytes()
        assert same == (tokenizer is stored)


@pytest.mark.parametrize("site", ["resid_mid", "resid_post"])
def test_threads_that_use_one_loaded_module_get_what_they_get_alone(bridge: Any, site: str, tmp_path: Path) -> None:
    loaded = exported(write(bridge, projection(1, 2, site=site), tmp_path / "out"))
    texts = [(TOKENS + 7 * number).repeat(1, 3) for number in range(6)]
    alone = [log_probabilities(loaded, tokens) for tokens in texts]
    with ThreadPoolExecutor(6) as threads:
        for _ in range(5):
            together = list(threads.map(lambda tokens: log_probabilities(loaded, tokens), texts))
            torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)


def test_a_module_on_several_devices_recomputing_its_activations_or_copied_keeps_its_edit(
    bridge: Any, tmp_path: Path
) -> None:
    edit = projection(1, site="resid_mid") + projection(2, request="two")
    out = write(bridge, edit, tmp_path / "out")
    whole = ("model.embed_tokens", "model.rotary_emb", "model.norm", "lm_head", "model.layers.0", "model.layers.3")
    on_disk = {**dict.fromkeys(whole, "cpu"), "model.layers.1": "disk", "model.layers.2": "disk"}
    offloaded = exported(out, device_map=on_disk, offload_folder=str(tmp_path / "disk"))
    loaded = exported(out)
    for placed in (offloaded, loaded, copy.deepcopy(loaded)):
        assert_exact(bridge, edit, placed)
    gradients = []
    for recompute in (False, True):
        if recompute:
            loaded.activation_checkpointing_enable()
        loaded.train().zero_grad()
        loaded(input_ids=TOKENS, labels=TOKENS, use_cache=False).loss.backward()
        gradients.append({name: parameter.grad.clone() for name, parameter in loaded.named_parameters()})
    torch.testing.assert_close(gradients[0], gradients[1], atol=1e-6, rtol=0)


def test_a_modules_tokenizer_is_of_the_class_that_its_base_loads(tmp_path: Path) -> None:
    base = save_family("qwen2", tmp_path / "base")  # whose type makes transformers choose Qwen2Tokenizer
    out = write(load_model(base, backend="bridge"), projection(1), tmp_path / "out", "module")
    ours, theirs = (AutoTokenizer.from_pretrained(f, trust_remote_code=True) for f in (out, base))
    for text in SPLIT:
        assert ours(text)["input_ids"] == theirs(text)["input_ids"]
    assert ours.special_tokens_map == theirs.special_tokens_map
