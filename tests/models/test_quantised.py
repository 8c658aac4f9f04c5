"""Models whose matrices bitsandbytes keeps in 8 bits: what works on them, and what is refused."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from mrp_lens import metrics
from mrp_lens.attacks import relearned
from mrp_lens.attacks.finetuning import unlocked
from mrp_lens.attacks.quantization import quantized
from mrp_lens.data import Corpus
from mrp_lens.edits import load_edit
from mrp_lens.export import export_hf
from mrp_lens.methods import MRP, NPO, RMU
from mrp_lens.models import available_backends, is_bridge, load_model, why_not_exportable
from mrp_lens.models.hooks import hook_name
from tests.conftest import D_MODEL
from tests.support.reference import difference, log_probabilities

pytest.importorskip("bitsandbytes")
Texts = tuple[Corpus, Corpus]
TOKENS = torch.arange(3, 15)[None]
PACKED = r"is quantised \(int8\): packed integers can be neither edited nor trained"


def quantised(folder: Path, **bits: bool) -> Any:
    return AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=BitsAndBytesConfig(**bits), dtype=torch.float32, attn_implementation="eager"
    ).eval()


@pytest.fixture
def hf_model(tiny_folder: Path) -> Any:
    return quantised(tiny_folder, load_in_8bit=True)


@pytest.fixture
def model(hf_model: Any) -> Any:
    return load_model(hf_model)


@pytest.mark.slow
def test_a_model_in_memory_and_its_folder_go_into_the_bridge(
    hf_model: Any, model: Any, tiny_folder: Path, tmp_path: Path
) -> None:
    hf_model.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(tiny_folder).save_pretrained(tmp_path)
    exact = log_probabilities(load_model(tiny_folder, backend="bridge"), TOKENS)
    for loaded in (model, load_model(tmp_path), load_model(tmp_path, backend="bridge", dtype="bfloat16")):
        assert is_bridge(loaded)
        assert loaded.blocks[1].mlp.out.original_component.weight.dtype == torch.int8
        assert difference(loaded, hf_model, TOKENS) < 1e-4
        assert 1e-5 < (log_probabilities(loaded, TOKENS) - exact).abs().max() < 0.5
    if "hooked" in available_backends():
        with pytest.raises(ValueError, match="is quantised, and HookedTransformer has matrices of its own"):
            load_model(tmp_path, backend="hooked")


def test_four_bits_are_refused(tiny_folder: Path) -> None:
    with pytest.raises(ValueError, match=r"is quantised \(bitsandbytes in 4 bits\).*in 8 bits can be hooked"):
        load_model(quantised(tiny_folder, load_in_4bit=True))


def test_projections_are_fitted_measured_and_saved(model: Any, texts: Texts, tmp_path: Path) -> None:
    forget, retain = texts
    before = metrics.perplexity(model, forget)
    with pytest.warns(UserWarning, match="its matrices are quantised: the edit works on this model"):
        fit = MRP(layers=[1, 2], rank=2, steps=3, budget=None, coverage=None).fit(model, forget, retain, progress=False)
    assert fit.edit.layers == (1, 2)
    fit.edit.save_pretrained(tmp_path / "edit")
    with load_edit(tmp_path / "edit").applied(model):
        after = metrics.perplexity(model, forget)
        assert model.run_with_cache(TOKENS)[1][hook_name(1)].shape == (1, TOKENS.shape[1], D_MODEL)
    assert abs(before.iloc[0]["perplexity"] - after.iloc[0]["perplexity"]) > 1e-3
    assert metrics.perplexity(model, forget).equals(before)


@pytest.mark.parametrize(
    "use",
    [
        lambda model, texts: RMU(steps=2, budget=None, coverage=None).fit(model, *texts, progress=False),
        lambda model, texts: NPO(steps=2).fit(model, *texts, progress=False),
        lambda model, texts: quantized(model, 8).__enter__(),
        lambda model, texts: relearned(model, None, train=texts[0], steps=1, progress=False).__enter__(),
        lambda model, texts: unlocked(model, None, "lora", lora_rank=2, seed=0).__enter__(),
    ],
    ids=["RMU", "NPO", "rounding", "retraining", "LoRA"],
)
def test_what_would_change_matrices_is_refused_and_changes_nothing(
    model: Any, texts: Texts, use: Callable[[Any, Texts], Any]
) -> None:
    warnings.simplefilter("ignore", UserWarning)  # that what is fitted here cannot be exported
    before = {name: tensor.clone() for name, tensor in model.state_dict().items() if isinstance(tensor, torch.Tensor)}
    with pytest.raises(ValueError, match=PACKED):
        use(model, texts)
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in before.items())


def test_export_is_refused_with_the_reason(model: Any, tiny_folder: Path, texts: Texts, tmp_path: Path) -> None:
    assert why_not_exportable(model) == "its matrices are quantised"
    with pytest.warns(UserWarning, match="quantised"):
        edit = MRP(layers=[1], rank=2, steps=1, budget=None, coverage=None).fit(model, *texts, progress=False).edit
    with pytest.raises(ValueError, match="quantised"):
        export_hf(model, edit, tmp_path / "out")
    assert not (tmp_path / "out").exists()
