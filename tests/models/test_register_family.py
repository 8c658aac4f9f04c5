"""A family of one's own: one call says where its matrices are, and edits, exports and attachments know it."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, OlmoConfig

from mrp_lens.data import Corpus
from mrp_lens.edits import WeightEdit
from mrp_lens.export import export_hf
from mrp_lens.hf import attach
from mrp_lens.methods import MRP
from mrp_lens.models import load_model, why_not_exportable
from mrp_lens.models.architectures import LAYOUTS, Layout, layout_of, register_family
from tests.support.edits import projection
from tests.support.export_edits import reversed_matrix
from tests.support.families import FAMILIES, save_family
from tests.support.reference import difference

OLMO = "OlmoForCausalLM"  # pre-norm, with norms that have no weights: in transformers and TransformerLens, not here


@pytest.fixture(autouse=True)
def own_table(monkeypatch: pytest.MonkeyPatch) -> None:
    len(LAYOUTS)  # plugins are there
    monkeypatch.setattr(LAYOUTS, "_entries", dict(LAYOUTS._entries))


@pytest.fixture(scope="module")
def olmo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sizes = dict(FAMILIES["llama"][2])
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(FAMILIES, "olmo", (OlmoConfig.__name__, OLMO, sizes))
        return save_family("olmo", tmp_path_factory.mktemp("olmo"))


def register() -> Layout:
    return register_family(
        Layout(
            blocks="model.layers",
            modules={"stream": "input_layernorm", "attn_out": "self_attn", "mlp_out": "mlp"},
            matrices={"attn_out": "self_attn.o_proj", "mlp_out": "mlp.down_proj"},
            embeddings=("model.embed_tokens",),
        ),
        OLMO,
    )


def test_a_family_that_is_not_registered_is_named(olmo: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=f"where {OLMO} keeps its residual stream is not known here; known are .*Llama"
    ):
        layout_of(OLMO)
    with pytest.raises(ValueError, match=rf"{OLMO} keeps .* is not known here; known are .*edit.save_pretrained\("):
        export_hf(load_model(olmo), projection(1, site="mlp_out"), tmp_path / "out", "folded", progress=False)


def test_a_fit_says_beforehand_that_where_its_edit_belongs_is_not_known(
    olmo: Path, texts: tuple[Corpus, Corpus]
) -> None:
    model = load_model(olmo, backend="bridge")
    with pytest.warns(UserWarning, match=rf"where {OLMO} keeps .*register_family\(.* edit.save_pretrained\(") as said:
        MRP(steps=2).fit(model, *texts, seed=0, progress=False)
    assert "load_model" not in str(said[0].message)
    register()
    assert why_not_exportable(model) is None


def test_a_mixture_of_experts_can_be_registered(tmp_path: Path, backend: str) -> None:
    model = load_model(save_family("mixtral", tmp_path), backend=backend)  # type: ignore[arg-type]
    assert str(why_not_exportable(model)).startswith("where MixtralForCausalLM keeps its residual stream is not known")
    layout = LAYOUTS["LlamaForCausalLM"]
    matrices = {"attn_out": layout.matrices["attn_out"]}  # the experts have several
    register_family(replace(layout, matrices=matrices), "MixtralForCausalLM")
    assert why_not_exportable(model) is None


@pytest.mark.slow
@pytest.mark.parametrize(("form", "site"), [("folded", "mlp_out"), ("module", "attn_out")])
def test_edits_of_a_registered_family_export(olmo: Path, form: str, site: str, tmp_path: Path) -> None:
    """`export_hf` proves it in a process of its own, which does not know of the registration."""
    register()
    report = export_hf(load_model(olmo), projection(1, site=site), tmp_path / "out", form, progress=False)
    assert report.form == form
    assert report.max_logit_diff is not None
    assert report.max_logit_diff <= 1e-4


@pytest.mark.parametrize("kind", ["projection", "weights"])
def test_edits_of_a_registered_family_are_the_same_on_both_libraries(olmo: Path, kind: str) -> None:
    register()
    model = load_model(olmo)
    edit = reversed_matrix(model, 2) if kind == "weights" else projection(1, 2, site="attn_out")
    if isinstance(edit, WeightEdit):
        assert list(edit.tensors) == ["model.layers.2.mlp.down_proj.weight"]
    tokens = torch.arange(3, 20)[None]
    hf_model = AutoModelForCausalLM.from_pretrained(olmo).eval()
    with edit.applied(model):
        assert difference(model, hf_model, tokens) > 1e-2
        attach(hf_model, edit)
        assert difference(model, hf_model, tokens) < 1e-4


def test_a_family_has_one_layout() -> None:
    layout = register()
    assert register_family(layout, OLMO) is layout  # the same again is no harm
    with pytest.raises(ValueError, match="a family named 'LlamaForCausalLM' is registered already"):
        register_family(Layout("x", {}, {}, ()), "LlamaForCausalLM")
    with pytest.raises(ValueError, match="'my family' is no name for a family"):
        register_family(layout, "my family")
