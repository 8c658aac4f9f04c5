"""Plain transformers, which a loaded model is checked against."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from mrp_lens.models import logits_of


def plain(folder: Path) -> Any:
    """The Hugging Face model of a folder, in float32, attention computed as the Bridge does."""
    return AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="eager", dtype=torch.float32, trust_remote_code=False
    ).eval()


def random_tokens(vocabulary: int, length: int, *, rows: int = 1, first: int = 3, seed: int = 0) -> Tensor:
    return torch.randint(first, vocabulary, (rows, length), generator=torch.Generator().manual_seed(seed))


def log_probabilities(model: Any, tokens: Tensor) -> Tensor:
    """Of a model of either library."""
    everything = torch.ones_like(tokens, dtype=torch.bool)
    with torch.no_grad():
        if hasattr(model, "hook_dict"):
            return logits_of(model, tokens, everything).float().log_softmax(-1)
        return model(input_ids=tokens, attention_mask=everything.long()).logits.float().log_softmax(-1)


def difference(model: Any, reference: Any, tokens: Tensor) -> float:
    """Largest difference of log-probabilities; the reference may be a folder."""
    other = plain(reference) if isinstance(reference, Path) else reference
    return float((log_probabilities(model, tokens) - log_probabilities(other, tokens)).abs().max())
