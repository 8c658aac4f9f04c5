"""Texts that begin alike, over one pass of what they have in common: the keys and values of a beginning are computed once.

The choices of a question follow the same prompt, which is often several times as long as all of them.
"""

import logging
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mrp_lens.data.tokenization import TokenBatch
from mrp_lens.models.base import dtype_of, is_bridge, logits_at, reads_by_length
from mrp_lens.models.protocol import LensModel
from mrp_lens.utils.io import one_line

logger = logging.getLogger(__name__)

TOLERANCE = {
    torch.float32: 1e-4,
    torch.float64: 1e-6,
}  # of the largest logit, by which passes may differ from whole ones
HALF = 0.03  # the same in half precision


@dataclass(frozen=True)
class Continued:
    """Texts that go on from beginnings that several have in common.

    Attributes:
        prefixes: what the texts begin with, right padded.
        owner: of each text, the row of its beginning.
        rest: of each text what follows, right padded.
        positions: those in `rest` at which logits are wanted.
    """

    prefixes: TokenBatch
    owner: Int[Tensor, " rows"]
    rest: TokenBatch
    positions: Bool[Tensor, "rows seq"]


def logits_behind(model: LensModel, texts: Continued) -> Float[Tensor, "chosen d_vocab"]:
    """The logits that are wanted, row by row, without gradient; each beginning is read once.

    Right for models and edits for which `reads_prefixes` is.

    Args:
        model: HookedTransformer or TransformerBridge, with the edit on if there is one.
        texts: to read.
    """
    before, rest = texts.prefixes.attention_mask, texts.rest
    with torch.no_grad():
        cache = _cache(model, len(texts.prefixes), before.device)
        logits_at(model, texts.prefixes.tokens, before, torch.zeros_like(before), cache=cache)
        _repeat(cache, texts.owner)
        # HookedTransformer's cache remembers the mask of what it holds; Hugging Face's is told all of it.
        masks = [before[texts.owner], rest.attention_mask] if is_bridge(model) else [rest.attention_mask]
        return logits_at(model, rest.tokens, torch.cat(masks, dim=1), texts.positions, cache=cache)


def reads_prefixes(model: LensModel, texts: Continued) -> bool:
    """Whether `logits_behind` gives what whole passes do. It does not where an edit counts positions in a pass or is random, or
    where TransformerLens does not know an architecture's cache. Arguments as there."""
    if reads_by_length(model):
        return False
    try:
        found = logits_behind(model, texts)
    except Exception as error:  # what an architecture's own code says to a cache
        logger.info("beginnings are read with each text: the model cannot go on behind them (%s)", one_line(error))
        return False
    expected = _of_whole_passes(model, texts)
    largest = expected.abs().max()
    right = bool((found - expected).abs().max() <= TOLERANCE.get(dtype_of(model), HALF) * largest)
    if not right:
        logger.info("beginnings are read with each text: behind them the model, or its edit, gives something else")
    return right


def _of_whole_passes(model: LensModel, texts: Continued) -> Float[Tensor, "chosen d_vocab"]:
    """The same logits, each beginning read with every text."""
    before = texts.prefixes.attention_mask[texts.owner]
    tokens = torch.cat([texts.prefixes.tokens[texts.owner], texts.rest.tokens], dim=1)
    masks = torch.cat([before, texts.rest.attention_mask], dim=1)
    wanted = torch.cat([torch.zeros_like(before), texts.positions], dim=1)
    order = masks.long().argsort(dim=1, descending=True, stable=True)  # the padding between them goes to the end
    with torch.no_grad():
        return logits_at(model, *(each.gather(1, order) for each in (tokens, masks, wanted)))


def _cache(model: LensModel, rows: int, device: torch.device) -> Any:
    """An empty cache of keys and values, of the kind that the model's class takes."""
    if is_bridge(model):
        from transformers import DynamicCache

        return DynamicCache()
    from transformer_lens.cache.key_value_cache import TransformerLensKeyValueCache

    return TransformerLensKeyValueCache.init_cache(model.cfg, device, rows)


def _repeat(cache: Any, owner: Int[Tensor, " rows"]) -> None:
    """Make each row of the cache that of its owner."""
    if hasattr(cache, "batch_select_indices"):
        cache.batch_select_indices(owner)
        return
    cache.previous_attention_mask = cache.previous_attention_mask[owner]
    for entry in cache.entries:
        entry.past_keys, entry.past_values = entry.past_keys[owner], entry.past_values[owner]
