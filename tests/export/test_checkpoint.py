"""Checkpoints as other people's tools leave them: the export is the model that transformers loads, with the edit on.

The oracle is plain transformers with hooks that were placed by hand; mrp_lens's own hooks are not asked.
"""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from mrp_lens.edits import Edit, WeightEdit
from mrp_lens.export import export_hf
from mrp_lens.export.checkpoint import HFCheckpoint
from mrp_lens.export.formats import folded_into
from mrp_lens.models import load_model, tensor_digests
from tests.support.checkpoints import VARIANTS, ends, own_head_under_a_tied_config, set_config, set_tensors, tensors_in
from tests.support.edits import projection
from tests.support.export_edits import EDITS, every_write, exported, log_probabilities, put_on_by_hand, write
from tests.support.families import FAMILIES, save_family

ROUNDED = {"old dtype", "no dtype"}  # stored in bfloat16: a folded projection is rounded to that
OFTEN = {
    "no dtype",
    "pickled before 2020",
    "own head under a tied config",
    "head alone under a tied config",
    "own head under the name of transformers",
}


CASES = [
    pytest.param(family, variant, marks=[] if family == "gpt2" and variant in OFTEN else [pytest.mark.slow])
    for family in FAMILIES
    for variant in VARIANTS
]


def by_hand(base: Path, family: str, edit: Edit) -> Tensor:
    hf_model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    put_on_by_hand(hf_model, family, edit)
    return log_probabilities(hf_model)


@pytest.mark.parametrize(("family", "variant"), CASES)
def test_an_export_is_what_transformers_loads_with_the_edit_on(family: str, variant: str, tmp_path: Path) -> None:
    base = save_family(family, tmp_path / "base")
    VARIANTS[variant](base)
    model = load_model(base, backend="bridge", device="cpu")
    folding = projection(0, site="resid_pre") if family == "gemma2" else every_write()
    edits = {"folded": folding, "module": EDITS["new matrices + projection, resid_post"](model)}
    for form, edit in edits.items():
        out = write(model, edit, tmp_path / form, form)
        allowed = 0.05 if form == "folded" and variant in ROUNDED else 1e-5
        got = log_probabilities(exported(out, dtype=torch.float32))
        torch.testing.assert_close(got, by_hand(base, family, edit), atol=allowed, rtol=0)
        # Nobody said a precision: it is that in which the base loads.
        assert exported(out).dtype == AutoModelForCausalLM.from_pretrained(base).dtype
        one, other = (AutoTokenizer.from_pretrained(f, trust_remote_code=True) for f in (base, out))
        assert one.special_tokens_map == other.special_tokens_map


@pytest.mark.slow
@pytest.mark.parametrize("variant", [*sorted(OFTEN), "float64", "padded vocabulary"])
@pytest.mark.parametrize("form", ["folded", "module"])
def test_such_exports_pass_the_proof(form: str, variant: str, backend: str, tmp_path: Path) -> None:
    base = save_family("neox", tmp_path / "base")
    VARIANTS[variant](base)
    model = load_model(base, backend=backend, device="cpu")
    edit = every_write() if form == "folded" else projection(1, 2)
    report = export_hf(model, edit, tmp_path / "out", form, progress=False)  # type: ignore[arg-type]
    assert report.proof is not None
    assert report.proof.exact


def test_two_heads_that_differ_leave_untied_in_every_version_of_transformers(tmp_path: Path) -> None:
    base = save_family("llama", tmp_path / "base")
    own_head_under_a_tied_config(base)
    model = load_model(base, backend="bridge", device="cpu")
    for form in ("folded", "module"):
        edit = projection(1, site="mlp_out" if form == "folded" else "resid_post")
        write(model, edit, tmp_path / form, form)
        config = json.loads((tmp_path / form / "config.json").read_text())
        assert config.get("base_config", config)["tie_word_embeddings"] is False


@pytest.mark.parametrize("files", ["embedding", "both", "head"])
def test_a_new_embedding_of_a_tied_model_is_its_new_head_too(files: str, tmp_path: Path) -> None:
    base = save_family("gpt2", tmp_path / "base")
    embedding, head = ends(base)
    if files == "both":
        set_tensors(base, lambda t: {**t, head: t[embedding]})
    elif files == "head":
        set_tensors(base, lambda t: {head: t[embedding], **{k: v for k, v in t.items() if k != embedding}})
    model = load_model(base, backend="bridge", device="cpu")
    old = AutoModelForCausalLM.from_pretrained(base).get_input_embeddings().weight.detach().clone()
    new = WeightEdit({embedding: old * 1.5 + 0.01}, {embedding: tensor_digests(old)})
    alone = exported(write(model, new, tmp_path / "alone"))
    torch.testing.assert_close(log_probabilities(alone), by_hand(base, "gpt2", new), atol=1e-5, rtol=0)
    both = new + projection(0, site="resid_pre")  # projected at the entrance alone: the new head stays whole
    projected = exported(write(model, both, tmp_path / "both", "folded"))
    torch.testing.assert_close(log_probabilities(projected), by_hand(base, "gpt2", both), atol=1e-5, rtol=0)
    assert {tensor.dtype for tensor in tensors_in(tmp_path / "both").values()} == {torch.float32}


def test_a_head_that_is_nowhere_is_refused(tmp_path: Path) -> None:
    base = save_family("llama", tmp_path / "base")
    model = load_model(base, backend="bridge", device="cpu")
    _, head = ends(base)
    set_tensors(base, lambda t: {name: tensor for name, tensor in t.items() if name != head})
    with pytest.raises(ValueError, match=r"holds no lm_head.weight, and its config.json does not say"):
        write(model, projection(1), tmp_path / "out")


@pytest.mark.parametrize("stored", ["float8_e4m3fn", "int8"])
def test_packed_weights_without_a_word_in_the_configuration_are_refused(stored: str, tmp_path: Path) -> None:
    base = save_family("llama", tmp_path / "base")
    whole = tensors_in(base)

    def pack(name: str) -> HFCheckpoint:
        set_tensors(base, lambda _: {**whole, name: (10 * whole[name]).to(getattr(torch, stored))})
        return HFCheckpoint.open(base)

    with pytest.raises(ValueError, match=rf"embedding in .* is stored as {stored}"):
        _ = pack("model.embed_tokens.weight").dtype
    packed = pack("model.layers.1.mlp.down_proj.weight")
    changed = folded_into(projection(1, site="mlp_out"), packed, torch.float32).changed
    with pytest.raises(ValueError, match=rf"down_proj.weight is stored as {stored}, which cannot hold the edit"):
        packed.write_weights(tmp_path, changed=changed, added={})


def test_a_head_that_is_added_has_the_precision_of_the_files(tmp_path: Path) -> None:
    base = save_family("mistral", tmp_path / "base")
    set_tensors(base, lambda t: {name: tensor.half() for name, tensor in t.items()})
    set_config(base, dtype="float16")
    model = load_model(base, backend="bridge", device="cpu")
    edit = projection(0, site="resid_pre")
    for dtype, expected in ((None, torch.float16), (torch.bfloat16, torch.bfloat16)):
        out = tmp_path / str(expected)
        write(model, edit, out, "folded", dtype=dtype)
        assert {tensor.dtype for tensor in tensors_in(out).values()} == {expected}
