"""Loading a model into either TransformerLens class, checked against Hugging Face."""

import json
import logging
import os
import tempfile
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from mrp_lens.model.base import LensModel, logits_of
from mrp_lens.model.source import Checkpoint, opened

logger = logging.getLogger(__name__)

Backend = Literal["auto", "hooked", "bridge"]
LOAD_TOLERANCE = 1e-3  # largest difference of log-probabilities from Hugging Face's, in float32


class ModelMismatchError(ValueError):
    """A loaded model does not reproduce Hugging Face's logits."""


def load_model(
    source: Any,
    *,
    backend: Backend | str = "auto",
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    tokenizer: Any = None,
) -> Any:
    """Load a model for editing, with its weights exactly as in the checkpoint: nothing folded, nothing centred.

    Args:
        source: "demo" (the embedded model that knows a small invented world), a local Hugging Face folder with
            weights and tokenizer (fine-tuned, or with an adapter merged in), a name on the Hub, or a loaded Hugging
            Face model, of which a copy is used.
        backend: "hooked" (HookedTransformer, TransformerLens 3 only), "bridge" (TransformerBridge), or "auto": the
            first where it exists and reproduces Hugging Face's logits, else the second.
        device: where to put it; None: a GPU if there is one, else the CPU.
        dtype: None: float32.
        tokenizer: None: the one that lies beside the weights.

    Returns:
        A HookedTransformer or TransformerBridge in evaluation mode, checked against Hugging Face on a few tokens.

    Raises:
        TypeError: a source that is none of these.
        ValueError: no such folder or name, an unknown backend, no tokenizer, missing or quantised weights, too little
            memory, or (ModelMismatchError) logits that differ from Hugging Face's.

    Example:
        >>> model = load_model("demo")
        >>> model.cfg.n_layers
        8
    """
    if backend not in ("auto", "hooked", "bridge"):
        raise ValueError(f"unknown backend {backend!r}; choose 'auto', 'hooked' or 'bridge'")
    where = torch.device(device) if device is not None else torch.device("cuda" if torch.cuda.is_available() else "cpu")
    precision = dtype or torch.float32
    copies = 2 if backend == "hooked" else 1  # HookedTransformer is filled from the Hugging Face model
    with opened(source, tokenizer, where, precision, copies) as checkpoint:
        probe, expected = _probe(checkpoint.hf_model)
        for kind in [backend] if backend != "auto" else ["hooked", "bridge"]:
            try:
                model = (_boot_hooked if kind == "hooked" else _boot_bridge)(checkpoint, where, precision)
                model.cfg.model_name = checkpoint.name
                model.eval()
                _compare(model, probe, expected, kind, precision)
                return model
            except Exception as error:  # TransformerLens raises all kinds for what it does not know
                if kind == "hooked" and backend == "auto":
                    logger.info("HookedTransformer cannot serve %s (%s); using the Bridge", checkpoint.name, error)
                elif isinstance(error, (ImportError, ModelMismatchError)):
                    raise
                else:
                    remedy = (
                        "use backend='bridge'" if kind == "hooked" else "see TransformerLens's list of supported models"
                    )
                    raise ValueError(
                        f"TransformerLens cannot load {checkpoint.name} as {kind}: {error}; {remedy}"
                    ) from error
    raise AssertionError("unreachable: the last backend returns or raises")


def _probe(hf_model: Any) -> tuple[Tensor, Tensor]:
    """A few tokens, and Hugging Face's log-probabilities for them."""
    length = min(12, int(getattr(hf_model.config, "max_position_embeddings", 12) or 12))
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(hf_model.config.vocab_size, (2, length), generator=generator).to(hf_model.device)
    with torch.no_grad():
        output = hf_model(input_ids=tokens, attention_mask=torch.ones_like(tokens), use_cache=False)
    return tokens, output.logits.float().log_softmax(-1)


def _boot_bridge(checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> Any:
    from transformer_lens.model_bridge import TransformerBridge

    return TransformerBridge.boot_transformers(
        str(checkpoint.folder),
        hf_model=checkpoint.hf_model,
        tokenizer=checkpoint.tokenizer,
        device=device,
        dtype=dtype,
    )


def _boot_hooked(checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> Any:
    """HookedTransformer's own loader refuses local folders; its parts do not, under a neutral path."""
    try:
        from transformer_lens import HookedTransformer, loading_from_pretrained
    except ImportError as error:
        raise ImportError(
            "HookedTransformer exists in TransformerLens 3 only; use backend='bridge' or install transformer-lens<4"
        ) from error
    with tempfile.TemporaryDirectory(prefix="checkpoint-") as temporary:
        neutral = Path(temporary)  # the architecture is guessed from the path: "llama" or "gemma" in it would misroute
        for file in checkpoint.folder.iterdir():
            if file.name != "config.json":
                os.symlink(file.resolve(), neutral / file.name)
        config = json.loads((checkpoint.folder / "config.json").read_text())
        config.setdefault("n_ctx", config.get("n_positions") or config.get("max_position_embeddings"))
        (neutral / "config.json").write_text(json.dumps(config))
        cfg = loading_from_pretrained.get_pretrained_model_config(
            str(neutral), fold_ln=False, device=str(device), dtype=dtype
        )
        state = loading_from_pretrained.get_pretrained_state_dict(str(neutral), cfg, checkpoint.hf_model, dtype=dtype)
    model = HookedTransformer(cfg, checkpoint.tokenizer)
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
