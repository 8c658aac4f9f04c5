"""Texts that begin alike, over one pass of what they have in common: the keys and values of a beginning are computed once.

The choices of a question follow the same prompt, which is often several times as long as all of them.
"""

import logging
from collections.abc import Iterator, Sequence
from copy import copy
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
PASS = 64  # tokens that a pass is worth: what it takes whatever it reads


@dataclass(frozen=True)
class Continued:
    """Texts that go on from beginnings that several have in common.

    Attributes:
        prefixes: what the texts begin with, right padded.
        owner: of each text, the row of its beginning.
        rest: of each text what follows, right padded.
        wanted: the tokens of `rest` that are to be predicted.
    """

    prefixes: TokenBatch
    owner: Int[Tensor, " rows"]
    rest: TokenBatch
    wanted: Bool[Tensor, "rows seq"]


def logits_behind(model: LensModel, texts: Continued, *, worth: int = PASS) -> Float[Tensor, "wanted d_vocab"]:
    """The logits that predict what is wanted, row by row, without gradient; each beginning is read once, and of what follows the
    tokens before the last wanted one.

    Right for models and edits for which `reads_prefixes` is.

    Args:
        model: HookedTransformer or TransformerBridge, with the edit on if there is one.
        texts: to read.
        worth: what all of the beginnings begin with is read once for them where that saves more tokens than this.
    """
    before, wanted = texts.prefixes.attention_mask, texts.wanted
    places = torch.arange(wanted.shape[1], device=wanted.device)
    lengths: list[int] = (wanted * places).amax(dim=1).tolist()
    line = wanted.flatten().cumsum(0).view_as(wanted) - 1  # of the result, for each wanted token
    with torch.no_grad():
        cache, behind = _read(model, texts.prefixes, worth)
        found = behind.new_empty(int(wanted.sum()), behind.shape[-1])
        first = wanted[:, 0]
        found[line[first, 0]] = behind[texts.owner[first]]
        for rows in _alike_in_length(lengths):
            owner, width = texts.owner[rows], lengths[rows[-1]]
            rest, mask = texts.rest.tokens[rows, :width], texts.rest.attention_mask[rows, :width]
            asked = wanted[rows, 1 : width + 1]
            read = logits_at(model, rest, _mask(model, before[owner], mask), asked, cache=_chosen(cache, owner))
            found[line[rows, 1 : width + 1][asked]] = read
        return found


def _read(model: LensModel, prefixes: TokenBatch, worth: int) -> tuple[Any, Float[Tensor, "rows d_vocab"]]:
    """The cache of beginnings, and the logits behind each."""
    tokens, mask = prefixes.tokens, prefixes.attention_mask
    ends = mask & ~torch.nn.functional.pad(mask[:, 1:], (0, 1))
    stem = _in_common(prefixes, worth)
    cache = _cache(model, 1 if stem else len(prefixes), mask.device)
    if not stem:
        return cache, logits_at(model, tokens, mask, ends, cache=cache)
    before = mask[:, :stem]
    logits_at(model, tokens[:1, :stem], before[:1], torch.zeros_like(before[:1]), cache=cache)
    cache = _chosen(cache, torch.zeros(len(prefixes), dtype=torch.long, device=mask.device))
    return cache, logits_at(model, tokens[:, stem:], _mask(model, before, mask[:, stem:]), ends[:, stem:], cache=cache)


def _in_common(prefixes: TokenBatch, worth: int) -> int:
    """Tokens that all of several beginnings begin with, less the last one of the shortest; 0 where that does not save enough."""
    tokens, mask = prefixes.tokens, prefixes.attention_mask
    shortest = int(mask.sum(dim=1).min())
    alike = (tokens[:, : shortest - 1] == tokens[:1, : shortest - 1]).all(dim=0)
    stem = int(alike.long().cumprod(dim=0).sum())
    return stem if stem * (len(prefixes) - 1) > worth else 0


def _mask(model: LensModel, before: Bool[Tensor, "rows seq"], mask: Bool[Tensor, "rows rest"]) -> Tensor:
    """What a pass behind a cache is told: HookedTransformer's cache remembers the mask of what it holds, Hugging Face's does not."""
    return torch.cat([before, mask], dim=1) if is_bridge(model) else mask


def reads_prefixes(model: LensModel, texts: Continued) -> bool:
    """Whether `logits_behind` gives what whole passes do. It does not where an edit counts positions in a pass or is random, or
    where TransformerLens does not know an architecture's cache. Arguments as there."""
    if reads_by_length(model):
        return False
    try:
        found = logits_behind(model, texts, worth=0)
    except Exception as error:  # what an architecture's own code says to a cache
        logger.info("beginnings are read with each text: the model cannot go on behind them (%s)", one_line(error))
        return False
    expected = _of_whole_passes(model, texts)
    largest = expected.abs().max()
    right = bool((found - expected).abs().max() <= TOLERANCE.get(dtype_of(model), HALF) * largest)
    if not right:
        logger.info("beginnings are read with each text: behind them the model, or its edit, gives something else")
    return right


def _of_whole_passes(model: LensModel, texts: Continued) -> Float[Tensor, "wanted d_vocab"]:
    """The same logits, each beginning read with every text."""
    before = texts.prefixes.attention_mask[texts.owner]
    tokens = torch.cat([texts.prefixes.tokens[texts.owner], texts.rest.tokens], dim=1)
    masks = torch.cat([before, texts.rest.attention_mask], dim=1)
    wanted = torch.cat([torch.zeros_like(before), texts.wanted], dim=1)
    order = masks.long().argsort(dim=1, descending=True, stable=True)  # the padding between them goes to the end
    tokens, masks, wanted = (each.gather(1, order) for each in (tokens, masks, wanted))
    with torch.no_grad():
        return logits_at(model, tokens, masks, torch.nn.functional.pad(wanted[:, 1:], (0, 1)))


def _alike_in_length(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Rows in parts, each from the shortest to the longest of it, the longest part first; without those of length 0.

    What is padded in a part is less than what another pass over the model is worth.
    """
    order = sorted((row for row in range(len(lengths)) if lengths[row]), key=lengths.__getitem__)
    while order:
        longest = lengths[order[-1]]
        shorter = (end for end in range(len(order), 0, -1) if end * (longest - lengths[order[end - 1]]) > PASS)
        end = next(shorter, 0)
        yield order[end:]
        order = order[:end]


def _cache(model: LensModel, rows: int, device: torch.device) -> Any:
    """An empty cache of keys and values, of the kind that the model's class takes."""
    if is_bridge(model):
        from transformers import DynamicCache

        return DynamicCache()
    from transformer_lens.cache.key_value_cache import TransformerLensKeyValueCache

    return TransformerLensKeyValueCache.init_cache(model.cfg, device, rows)


def _chosen(cache: Any, owner: Int[Tensor, " rows"]) -> Any:
    """A cache whose rows are those of their owners; the one that is given stays as it is."""
    chosen = copy(cache)
    if hasattr(cache, "layers"):
        chosen.layers = [copy(layer) for layer in cache.layers]
        chosen.batch_select_indices(owner)
        return chosen
    chosen.previous_attention_mask = cache.previous_attention_mask[owner]
    chosen.entries = [copy(entry) for entry in cache.entries]
    for entry in chosen.entries:
        entry.past_keys, entry.past_values = entry.past_keys[owner], entry.past_values[owner]
    return chosen
