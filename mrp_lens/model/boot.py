"""A Hugging Face model inside one of TransformerLens's two classes, its weights and its tokenizer as they are."""

import json
import tempfile
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch

Kind = Literal["hooked", "bridge"]


def boot(kind: Kind, hf_model: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """A HookedTransformer filled from the model, or a TransformerBridge around its modules; without tokenizer.

    Raises:
        ImportError: there is no HookedTransformer in this TransformerLens.
        Exception: TransformerLens raises all kinds for what it does not know.
    """
    return (_boot_hooked if kind == "hooked" else _boot_bridge)(hf_model, device, dtype).eval()


def _boot_bridge(hf_model: Any, device: torch.device, dtype: torch.dtype) -> Any:
    from transformer_lens.model_bridge import TransformerBridge

    model = TransformerBridge.boot_transformers(
        "local", hf_model=hf_model, tokenizer=_stand_in(), device=device, dtype=dtype
    )
    set_tokenizer(model, None)
    return model


def _boot_hooked(hf_model: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """HookedTransformer's own loader refuses local folders; its parts do not."""
    try:
        from transformer_lens import HookedTransformer, loading_from_pretrained
    except ImportError as error:
        raise ImportError(
            "HookedTransformer exists in TransformerLens 3 only; use backend='bridge' or install transformer-lens<4"
        ) from error
    # The architecture is guessed from the path: "llama" or "gemma" in it would misroute.
    with tempfile.TemporaryDirectory(prefix="checkpoint-") as neutral:
        settings = json.loads(hf_model.config.to_json_string(use_diff=False))
        settings["architectures"] = [type(hf_model).__name__]
        settings.setdefault("n_ctx", settings.get("n_positions") or settings.get("max_position_embeddings"))
        (Path(neutral) / "config.json").write_text(json.dumps(settings), encoding="utf-8")
        cfg = loading_from_pretrained.get_pretrained_model_config(
            neutral, fold_ln=False, device=str(device), dtype=dtype
        )
        state = loading_from_pretrained.get_pretrained_state_dict(neutral, cfg, hf_model, dtype=dtype)
    cfg.tokenizer_name = None  # it would be read from the folder's path
    cfg.n_ctx = int(settings["n_ctx"])  # some families are capped at 2,048 tokens, or raised to them
    model = HookedTransformer(cfg)
    unchanged = {"fold_ln": False, "center_writing_weights": False, "center_unembed": False, "fold_value_biases": False}
    model.load_and_process_state_dict(state, **unchanged)
    return model.to(device)


def set_tokenizer(model: Any, tokenizer: Any) -> None:
    """Give a model a tokenizer as it is: both classes would read another from disk and set special tokens on it."""
    model.__dict__["_tokenizer" if hasattr(type(model), "tokenizer") else "tokenizer"] = tokenizer


@cache
def _stand_in() -> Any:
    """A tokenizer that TransformerLens finds nothing to change about."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    special = dict.fromkeys(("bos_token", "eos_token", "pad_token"), "a")
    words = Tokenizer(WordLevel({"a": 0}, unk_token="a"))
    return PreTrainedTokenizerFast(tokenizer_object=words, name_or_path="", add_bos_token=True, **special)
