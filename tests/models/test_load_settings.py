"""What a configuration says is computed, or the class is not taken: against plain transformers, on texts beyond every rule."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Phi3Config, Qwen2Config, Qwen3Config

import mrp_lens.models.load as load
from mrp_lens.models import ModelMismatchError, available_backends, is_bridge, load_model
from mrp_lens.models.backends import boot
from mrp_lens.models.fidelity import ignored_settings, reach, small_config
from tests.support.export_edits import rms_over_spread
from tests.support.families import save_family
from tests.support.reference import log_probabilities, plain, random_tokens

LENGTH = 60
YARN = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 16}
LONG = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 16, "factor": 4.0}
LONG |= {"short_factor": [1.0] * 4, "long_factor": [1.0, 2.0, 4.0, 8.0]}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "original_max_position_embeddings": 16}
LLAMA3 |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 8.0}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
WINDOW = {"use_sliding_window": True, "sliding_window": 30, "max_window_layers": 2}

# family, settings, and what HookedTransformer leaves out (None: it computes them)
SETTINGS: dict[str, tuple[str, dict[str, Any], str | None]] = {
    "qwen2 window": ("qwen2", WINDOW, "sliding_window = 30"),
    "qwen3 window": ("qwen3", WINDOW, "sliding_window = 30"),
    "mistral window": ("mistral", {"sliding_window": 30}, None),
    "phi3 window": ("phi3", {"sliding_window": 30}, None),
    "gemma2 window": ("gemma2", {"sliding_window": 30}, ""),
    "qwen3 yarn": ("qwen3", {"rope_parameters": YARN}, "rope_type = 'yarn'"),
    "llama yarn": ("llama", {"rope_parameters": YARN}, "rope_type = 'yarn'"),
    "llama linear": ("llama", {"rope_parameters": LINEAR}, "rope_type = 'linear'"),
    "llama dynamic": ("llama", {"rope_parameters": DYNAMIC}, "rope_type = 'dynamic'"),
    "llama llama3": ("llama", {"rope_parameters": LLAMA3}, None),
    "phi3 longrope": ("phi3", {"rope_parameters": LONG}, "rope_type = 'longrope'"),
    "phi3 partial": (
        "phi3",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
        "partial_rotary_factor = 0.5",
    ),
    "llama attention bias": ("llama", {"attention_bias": True}, "attention_bias = True"),
    "llama mlp bias": ("llama", {"mlp_bias": True}, "mlp_bias = True"),
    "gpt2 inner": ("gpt2", {"n_inner": 40}, "n_inner = 40"),
}
OFTEN = ("qwen2 window", "mistral window", "llama yarn")


def off(model: Any, folder: Path, length: int = LENGTH) -> tuple[float, float]:
    """Largest difference from plain transformers' log-probabilities, and its root mean square as a share of their spread."""
    tokens = random_tokens(800, length, seed=3)
    wanted, got = log_probabilities(plain(folder), tokens), log_probabilities(model, tokens)
    return float((got - wanted).abs().max()), rms_over_spread(wanted, got)


@pytest.mark.parametrize("name", [n if n in OFTEN else pytest.param(n, marks=pytest.mark.slow) for n in SETTINGS])
def test_a_model_is_hugging_faces_beyond_every_rule_in_every_precision(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    family, settings, left_out = SETTINGS[name]
    folder = save_family(family, tmp_path, **settings)
    with caplog.at_level(logging.INFO, logger=load.__name__):
        model = load_model(folder, device="cpu")
    assert off(model, folder)[0] < 1e-4
    hooked = "hooked" in available_backends()
    assert is_bridge(model) == (left_out is not None or not hooked)
    if hooked and left_out is not None:
        assert left_out in caplog.text
        with pytest.raises(ValueError, match=f"{left_out}.*use backend='bridge'"):
            load_model(folder, backend="hooked", device="cpu")
    for dtype, share in ((torch.bfloat16, 0.03), (torch.float16, 0.004)):
        half = load_model(folder, device="cpu", dtype=dtype)
        assert is_bridge(half) == is_bridge(model)
        assert off(half, folder)[1] < share


@pytest.mark.slow
@pytest.mark.skipif("hooked" not in available_backends(), reason="needs HookedTransformer (TransformerLens 3)")
def test_a_model_of_real_size_is_judged_on_a_small_one_with_the_same_rules() -> None:
    rope = {**YARN, "original_max_position_embeddings": 32768}
    configs = [
        (MistralConfig(sliding_window=4096, max_position_embeddings=32768), None),
        (Qwen2Config(use_sliding_window=True, sliding_window=4096, max_window_layers=16), "sliding_window = 4096"),
        (Qwen3Config(max_position_embeddings=131072, rope_parameters=rope), "rope_type = 'yarn'"),
        (Phi3Config(sliding_window=2047), None),
    ]
    for config, left_out in configs:
        small = small_config(config)
        assert small.num_hidden_layers == 4
        assert reach(small) <= load.LONG
        found = ignored_settings("hooked", config)
        assert (found is None) if left_out is None else left_out in str(found)


def test_windows_and_limits_that_stand_in_a_ratio_keep_it() -> None:
    config = Phi3Config(
        max_position_embeddings=131072,
        original_max_position_embeddings=4096,
        rope_parameters={
            **LONG,
            "original_max_position_embeddings": 4096,
            "short_factor": [1.0] * 48,
            "long_factor": [2.0] * 48,
        },
    )
    small = small_config(config)
    assert small.max_position_embeddings / small.original_max_position_embeddings == 32
    assert small.rope_parameters["original_max_position_embeddings"] == small.original_max_position_embeddings
    assert small.original_max_position_embeddings < reach(small) < small.max_position_embeddings
    assert reach(LlamaConfig()) < 30  # no rule at all
    assert reach(Qwen2Config(sliding_window=64)) < 30  # a window that is not used


def test_a_class_that_differs_in_half_precision_is_refused_by_the_rounding_of_the_model_itself(
    tmp_path: Path, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save_family("llama", tmp_path)
    monkeypatch.setattr(load, "ignored_settings", lambda *_: None)  # only the model itself is compared
    real = boot

    def another(kind: Any, hf_model: Any, *more: Any) -> Any:
        with torch.no_grad():
            hf_model.model.layers[1].mlp.down_proj.weight.mul_(1.5)
        return real(kind, hf_model, *more)

    monkeypatch.setattr(load, "boot", another)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        with pytest.raises(ModelMismatchError, match="differ from Hugging Face's by"):
            load_model(folder, backend=backend, dtype=dtype)


def test_every_family_has_a_context_of_its_own_length(tmp_path: Path, backend: str) -> None:
    for family in ("mistral", "qwen3"):  # HookedTransformer would say 2,048
        assert load_model(save_family(family, tmp_path / family), backend=backend).cfg.n_ctx == 64


def test_where_no_small_model_can_be_made_the_model_itself_is_compared_on_a_long_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def impossible(*_: Any) -> None:
        raise RuntimeError("odd sizes")

    monkeypatch.setattr(load, "ignored_settings", impossible)
    folder = save_family("qwen2", tmp_path, **WINDOW)
    with caplog.at_level(logging.INFO, logger=load.__name__):
        model = load_model(folder)
    assert "no small model like" in caplog.text
    assert off(model, folder)[0] < 1e-4


@pytest.mark.parametrize("switch", ["no_grad", "inference_mode", "default_dtype", "default_device", "autocast"])
def test_a_model_is_the_same_whatever_torch_is_set_to(switch: str, tiny_folder: Path, backend: str) -> None:
    expected = {name: tensor.clone() for name, tensor in load_model(tiny_folder, backend=backend).state_dict().items()}
    try:
        if switch == "default_dtype":
            torch.set_default_dtype(torch.bfloat16)
        if switch == "default_device":
            torch.set_default_device("meta")
        with (
            torch.set_grad_enabled(switch != "no_grad"),
            torch.inference_mode(switch == "inference_mode"),
            torch.autocast("cpu", enabled=switch == "autocast"),
        ):
            model = load_model(tiny_folder, backend=backend)
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)
    found = model.state_dict()
    assert found.keys() == expected.keys()
    assert all(
        torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype for name, tensor in expected.items()
    )
    assert all(p.requires_grad and not p.is_inference() for p in model.parameters())


def test_a_model_in_memory_keeps_float32_angles_in_half_precision(tmp_path: Path) -> None:
    folder = save_family("llama", tmp_path)
    in_memory = load_model(AutoModelForCausalLM.from_pretrained(folder), backend="bridge", dtype="bfloat16")
    from_folder = load_model(folder, backend="bridge", dtype="torch.bfloat16")
    tokens = torch.arange(3, 60)[None]
    with torch.no_grad():
        assert torch.equal(in_memory(tokens), from_folder(tokens))


@pytest.mark.parametrize("dtype", ["bfloat17", "int8", "float8_e4m3fn", 16, torch.int64, "nn", "torch.float31"])
def test_an_unknown_precision_or_device_is_named(dtype: Any, tiny_folder: Path) -> None:
    with pytest.raises(ValueError, match=r"unknown dtype .*give 'float32', 'bfloat16' or 'float16'"):
        load_model(tiny_folder, dtype=dtype)
    with pytest.raises(ValueError, match="unknown device 'gpu'"):
        load_model(tiny_folder, device="gpu")
