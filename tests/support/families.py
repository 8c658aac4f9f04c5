"""Tiny checkpoints of the architectures that are supported, with every parameter perturbed.

At its default initialisation a model hides mistakes: biases are 0, norm weights 1.
"""

from pathlib import Path
from typing import Any

import pytest
import torch

DEMO_FOLDER = Path(__file__).parents[2] / "mrp_lens" / "data" / "world" / "model"
WIDTH = 32
DEPTH = 4
OFTEN = (
    "gpt2",
    "llama",
    "gemma2",
)  # one without rotary positions, the most common kind, one with norms behind matrices
NO_HOOKED = {"gemma2"}  # HookedTransformer's parts refuse it under a local path; the Bridge loads it

_ROTARY = {
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": DEPTH,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "gpt2": (
        "GPT2Config",
        "GPT2LMHeadModel",
        {"n_embd": WIDTH, "n_layer": DEPTH, "n_head": 4, "n_positions": 64},
    ),
    "neox": (
        "GPTNeoXConfig",
        "GPTNeoXForCausalLM",
        {k: v for k, v in _ROTARY.items() if k != "num_key_value_heads"} | {"rotary_pct": 0.25},
    ),
    "llama": ("LlamaConfig", "LlamaForCausalLM", _ROTARY | {"tie_word_embeddings": False}),
    "mistral": ("MistralConfig", "MistralForCausalLM", _ROTARY | {"tie_word_embeddings": True}),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", _ROTARY),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", _ROTARY | {"head_dim": 8}),
    "gemma2": ("Gemma2Config", "Gemma2ForCausalLM", _ROTARY | {"head_dim": 8, "query_pre_attn_scalar": 8}),
    "phi3": ("Phi3Config", "Phi3ForCausalLM", _ROTARY),
}
MIXTURES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "mixtral": ("MixtralConfig", "MixtralForCausalLM", _ROTARY | {"num_local_experts": 3, "num_experts_per_tok": 2}),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        "Qwen3MoeForCausalLM",
        _ROTARY | {"head_dim": 8, "num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    ),
}
"""Of experts; the Bridge alone loads them."""


def save_family(family: str, folder: Path, *, seed: int = 0, tokenizer: Any = None, **settings: Any) -> Path:
    """A 4-layer model of the family with a tokenizer (the demo's) and further settings; returns `folder`."""
    import transformers

    tokenizer = tokenizer or transformers.AutoTokenizer.from_pretrained(DEMO_FOLDER)
    config_name, model_name, sizes = (FAMILIES | MIXTURES)[family]
    ids = {f"{kind}_token_id": getattr(tokenizer, f"{kind}_token_id") for kind in ("bos", "eos", "pad")}
    config = getattr(transformers, config_name)(**({"vocab_size": len(tokenizer)} | ids | sizes | settings))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = getattr(transformers, model_name)(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def families_mostly_slow(*often: str) -> list[Any]:
    """All families for `params`: these (a few, if none is named) in every run of the suite, the others with the slow tests."""
    return [
        family if family in (often or OFTEN) else pytest.param(family, marks=pytest.mark.slow) for family in FAMILIES
    ]
