"""Loading a model into either TransformerLens class, checked against Hugging Face."""

import json
import logging
import os
import tempfile
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from mrp_lens.model.base import LensModel, logits_of

logger = logging.getLogger(__name__)

Backend = Literal["auto", "hooked", "bridge"]
LOAD_TOLERANCE = 1e-3  # largest difference of log-probabilities from Hugging Face's, in float32


class ModelMismatchError(ValueError):
    """A loaded model does not reproduce Hugging Face's logits."""


def load_model(
    source: str | Path,
    *,
    backend: Backend | str = "auto",
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
) -> Any:
    """Load a model for editing, with its weights exactly as in the checkpoint: nothing folded, nothing centred.

    Args:
        source: "demo" (the embedded model that knows a small invented world), a local Hugging Face folder with
            weights and tokenizer, or a name on the Hub.
        backend: "hooked" (HookedTransformer, TransformerLens 3 only), "bridge" (TransformerBridge), or "auto": the
            first where it exists and reproduces Hugging Face's logits, else the second.
        device: where to put it; None: a GPU if there is one, else the CPU.
        dtype: None: float32.

    Returns:
        A HookedTransformer or TransformerBridge in evaluation mode, checked against Hugging Face on a few tokens.

    Raises:
        ValueError: no such folder or name, an unknown backend, no tokenizer, or (ModelMismatchError) logits that
            differ from Hugging Face's.

    Example:
        >>> model = load_model("demo")
        >>> model.cfg.n_layers
        8
    """
    if backend not in ("auto", "hooked", "bridge"):
        raise ValueError(f"unknown backend {backend!r}; choose 'auto', 'hooked' or 'bridge'")
    folder = _folder(source)
    where = torch.device(device) if device is not None else torch.device("cuda" if torch.cuda.is_available() else "cpu")
    precision = dtype or torch.float32
    hf_model, tokenizer = _load_hf(folder, where, precision)
    vocabulary = hf_model.config.vocab_size
    probe = torch.randint(vocabulary, (2, 12), generator=torch.Generator().manual_seed(0)).to(where)
    with torch.no_grad():
        expected = (
            hf_model(input_ids=probe, attention_mask=torch.ones_like(probe), use_cache=False)
            .logits.float()
            .log_softmax(-1)
        )
    name = "demo" if source == "demo" else str(source)
    for kind in [backend] if backend != "auto" else ["hooked", "bridge"]:
        try:
            model = (
                _boot_hooked(folder, hf_model, tokenizer, where, precision)
                if kind == "hooked"
                else _boot_bridge(folder, hf_model, tokenizer, where, precision)
            )
            model.cfg.model_name = name
            model.eval()
            _compare(model, probe, expected, kind, precision)
            return model
        except (ImportError, RuntimeError, KeyError, ValueError, AttributeError) as error:
            if kind == "bridge" or backend == "hooked":
                raise
            logger.info("HookedTransformer cannot serve %s (%s); using TransformerBridge", name, error)
    raise AssertionError("unreachable: the last backend returns or raises")


def _folder(source: str | Path) -> Path:
    if source == "demo":
        return Path(str(files("mrp_lens.world") / "data"))
    path = Path(source)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ValueError(
                f"{path} holds no config.json; give a Hugging Face model folder (one written by save_pretrained)"
            )
        return path
    if path.is_absolute() or str(source).startswith((".", "~")) or str(source).count("/") != 1:
        raise ValueError(
            f"no folder at {source!r}; give 'demo', a Hugging Face model folder, or a Hub name such as 'org/name'"
        )
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(source), ignore_patterns=["*.bin", "*.pth", "*.gguf", "*.onnx"]))
    except Exception as error:
        raise ValueError(
            f"{source!r} is neither a local folder nor to be had from the Hugging Face Hub: {error}"
        ) from error


def _load_hf(folder: Path, device: torch.device, dtype: torch.dtype) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except Exception as error:
        raise ValueError(
            f"no usable tokenizer in {folder}: {error}. Save one there with tokenizer.save_pretrained(...)"
        ) from error
    # The Bridge computes attention eagerly; the same choice here keeps the comparison free of kernel differences.
    hf_model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager")
    return hf_model.to(device).eval(), tokenizer


def _boot_bridge(folder: Path, hf_model: Any, tokenizer: Any, device: torch.device, dtype: torch.dtype) -> Any:
    from transformer_lens.model_bridge import TransformerBridge

    return TransformerBridge.boot_transformers(
        str(folder), hf_model=hf_model, tokenizer=tokenizer, device=device, dtype=dtype
    )


def _boot_hooked(folder: Path, hf_model: Any, tokenizer: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """HookedTransformer's own loader refuses local folders; its parts do not, under a neutral path."""
    try:
        from transformer_lens import HookedTransformer, loading_from_pretrained
    except ImportError as error:
        raise ImportError(
            "HookedTransformer exists in TransformerLens 3 only; use backend='bridge' or install transformer-lens<4"
        ) from error
    with tempfile.TemporaryDirectory(prefix="checkpoint-") as temporary:
        neutral = Path(temporary)  # the architecture is guessed from the path: "llama" or "gemma" in it would misroute
        for file in folder.iterdir():
            if file.name != "config.json":
                os.symlink(file.resolve(), neutral / file.name)
        config = json.loads((folder / "config.json").read_text())
        config.setdefault("n_ctx", config.get("n_positions") or config.get("max_position_embeddings"))
        (neutral / "config.json").write_text(json.dumps(config))
        cfg = loading_from_pretrained.get_pretrained_model_config(
            str(neutral), fold_ln=False, device=str(device), dtype=dtype
        )
        state = loading_from_pretrained.get_pretrained_state_dict(str(neutral), cfg, hf_model, dtype=dtype)
    model = HookedTransformer(cfg, tokenizer)
    unchanged = {"fold_ln": False, "center_writing_weights": False, "center_unembed": False, "fold_value_biases": False}
    model.load_and_process_state_dict(state, **unchanged)
    return model.to(device)


def _compare(model: LensModel, probe: Tensor, expected: Tensor, kind: str, dtype: torch.dtype) -> None:
    with torch.no_grad():
        got = logits_of(model, probe, torch.ones_like(probe, dtype=torch.bool)).float().log_softmax(-1)
    difference = float((got - expected).abs().max())
    # In half precision the two classes differ by rounding alone; a wrong load is off by whole units.
    allowed = LOAD_TOLERANCE if dtype == torch.float32 else 0.5
    if not difference <= allowed:
        remedy = "use backend='bridge'" if kind == "hooked" else "TransformerLens does not reproduce this architecture"
        raise ModelMismatchError(
            f"the {kind} model's log-probabilities differ from Hugging Face's by {difference:.3g} (allowed: {allowed:g}); {remedy}"
        )
