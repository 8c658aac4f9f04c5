"""Sizes by the configuration alone are those of the model that is built of it."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from mrp_lens.models.sizes import sizes_of
from tests.support.families import DEMO_FOLDER, FAMILIES

MIXTURE = {
    **{"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 50},
    **{"num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2, "max_position_embeddings": 64},
}


def config_of(family: str, **settings: Any) -> Any:
    name, _, sizes = FAMILIES[family]
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    return getattr(transformers, name)(**{"vocab_size": 50, **ids, **sizes, **settings})


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_counted_as_it_is_built(family: str) -> None:
    config = config_of(family)
    sizes, model = sizes_of(config), transformers.AutoModelForCausalLM.from_config(config)
    assert sizes.n_parameters == sizes.active_parameters == sum(p.numel() for p in model.parameters())
    assert (sizes.n_layers, sizes.d_model, sizes.n_heads, sizes.d_vocab, sizes.n_ctx) == (4, 32, 4, 50, 64)
    assert sizes.d_mlp == (128 if family == "gpt2" else config.intermediate_size)
    assert sizes.maps == {"gpt2": 4, "neox": 1}.get(family, 3)
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert sizes.is_tied == tied
    assert sizes.is_layer_norm == (family in ("gpt2", "neox"))
    assert not sizes.is_mixture


def test_of_a_mixture_a_token_meets_some_of_the_experts() -> None:
    config = transformers.MixtralConfig(**MIXTURE)
    sizes, model = sizes_of(config), transformers.AutoModelForCausalLM.from_config(config)
    assert sizes.n_parameters == sum(p.numel() for p in model.parameters())
    assert (sizes.n_experts, sizes.n_experts_a_token, sizes.is_mixture) == (4, 2, True)
    idle = 3 * 2 * (3 * 32 * 48)  # layers, experts that a token does not meet, their three matrices
    assert sizes.active_parameters == sizes.n_parameters - idle


def test_a_folder_needs_no_weights_and_gets_no_values(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((DEMO_FOLDER / "config.json").read_text())
    before = torch.get_rng_state()
    assert sizes_of(tmp_path).n_parameters == sizes_of("demo").n_parameters == 1_809_024
    assert torch.equal(before, torch.get_rng_state())


def test_of_a_name_on_the_hub_the_configuration_alone_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def fetched(source: str, **_: Any) -> Any:
        asked.append(source)
        return config_of("llama")

    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: pytest.fail("weights were asked for"))
    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", fetched)
    assert sizes_of("somebody/something").d_model == 32
    assert asked == ["somebody/something"]


def test_a_name_that_the_hub_does_not_have_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(source: str, **_: Any) -> Any:
        raise OSError("no such\nrepository")

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", failing)
    with pytest.raises(
        ValueError, match=r"^'some/body' is neither a local folder nor a model whose .* no such repository$"
    ):
        sizes_of("some/body")


@pytest.mark.parametrize(
    ("source", "error", "pattern"),
    [
        (3, TypeError, "cannot plan for a int; give 'demo', a Hugging Face model folder"),
        ("./nothing-here", ValueError, "no folder at './nothing-here'"),
        (config_of("llama", num_hidden_layers=0), ValueError, "num_hidden_layers = 0; it must be from 1 to 1000"),
        (config_of("llama", num_hidden_layers=10**9), ValueError, "num_hidden_layers = 1000000000"),
        (transformers.ViTConfig(), ValueError, "no model can be built of the configuration of vit"),
        (
            transformers.MambaConfig(hidden_size=16, num_hidden_layers=2),
            ValueError,
            "mamba.* num_attention_heads = None",
        ),
    ],
)
def test_what_is_no_model_is_refused(source: Any, error: type[Exception], pattern: str) -> None:
    with pytest.raises(error, match=pattern):
        sizes_of(source)


def test_a_quantised_folder_is_refused(tmp_path: Path) -> None:
    config_of("llama", quantization_config={"quant_method": "gptq", "bits": 4}).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"is quantised \(gptq\)"):
        sizes_of(tmp_path)
