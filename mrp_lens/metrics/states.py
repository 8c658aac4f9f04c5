"""States of the residual stream, batch by batch: what metrics read, without ever holding a corpus's states at once."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from mrp_lens.batching import Encoder, PaddingSide, TokenBatch, in_order
from mrp_lens.corpus import Corpus
from mrp_lens.finite import check_states
from mrp_lens.model import LensModel, check_layers, check_lens_model, device_of
from mrp_lens.stream import captured, check_hook_names, frozen, hook_name, layer_of, run_segment
from mrp_lens.subspace import unit

Texts = Corpus | Mapping[str, Corpus]
"""What to look at: a corpus, or several by the name of their group, such as {"forget": ..., "retain": ...}."""

WINDOW = 4  # batches whose documents are tokenised, and sorted by length, together


@dataclass(frozen=True)
class StateBatch:
    """States of the content tokens (no pads, no BOS) of a batch of whole documents.

    Attributes:
        states: hook name -> [tokens, d_model], in the model's dtype.
        rows: [tokens] which of the corpus's documents each token belongs to.
        batch: the tokens and masks they come from.
    """

    states: Mapping[str, Float[Tensor, "tokens d_model"]]
    rows: Int[Tensor, " tokens"]
    batch: TokenBatch


def groups_of(texts: Texts) -> dict[str, Corpus]:
    """The corpora by group; a single corpus is a group under its own name.

    Raises:
        TypeError: not a Corpus.
        ValueError: no corpus, or an empty one.
    """
    groups = {texts.name: texts} if isinstance(texts, Corpus) else dict(texts)
    if not groups:
        raise ValueError("no texts given; give a Corpus, or several by name: {'forget': ..., 'retain': ...}")
    for name, corpus in groups.items():
        if not isinstance(corpus, Corpus):
            raise TypeError(f"expected a Corpus for {name!r}, got {type(corpus).__name__}")
        if not len(corpus):
            raise ValueError(f"no documents in {corpus.name!r}")
    return groups


def hooks_at(model: LensModel, layers: Sequence[int] | None, site: str) -> dict[int, str]:
    """Layer -> hook name (None: all layers).

    Raises:
        ValueError: a layer, or a site, that the model does not have.
    """
    check_lens_model(model)
    chosen = range(model.cfg.n_layers) if layers is None else check_layers(model, layers)
    hooks = {layer: hook_name(layer, site) for layer in chosen}
    check_hook_names(model, hooks.values())
    return hooks


def direction_for(model: LensModel, direction: Float[Tensor, " _width"]) -> Float[Tensor, " d_model"]:
    """The direction at length 1 on the model's device.

    Raises:
        TypeError, ValueError: not a finite non-zero vector as wide as the model's stream.
    """
    vector = unit(direction)
    check_lens_model(model)
    if len(vector) != model.cfg.d_model:
        raise ValueError(f"the direction has {len(vector)} entries, the model's stream {model.cfg.d_model}")
    return vector.to(device_of(model))


def read_batches(
    model: LensModel,
    corpus: Corpus,
    *,
    batch_size: int,
    max_length: int | None = None,
    padding: PaddingSide = "right",
    progress: bool = False,
) -> Iterator[tuple[list[int], TokenBatch]]:
    """Batches of documents that hold a content token, each with the places of its documents in the corpus.

    Raises:
        ValueError: no document holds a token besides BOS.
    """
    encoder = Encoder.for_model(model, max_length=max_length)
    found, start = False, 0
    with tqdm(total=len(corpus), desc=f"reading {corpus.name}", disable=not progress) as bar:
        for window in encoder.windows(corpus.documents, WINDOW * batch_size):
            places = [place for place, row in enumerate(window) if any(row.content)]
            for chosen, batch in in_order(encoder, [window[place] for place in places], batch_size, side=padding):
                found = True
                yield [start + places[i] for i in chosen], batch
                bar.update(len(chosen))
            start += len(window)
    if not found:
        raise ValueError(f"no document in {corpus.name!r} holds a token besides BOS and padding")


def read_states(
    model: LensModel,
    corpus: Corpus,
    hooks: Sequence[str],
    *,
    batch_size: int = 32,
    max_length: int | None = None,
    padding: PaddingSide = "right",
    progress: bool = False,
) -> Iterator[StateBatch]:
    """States at the hooks, of all documents, without gradient. The forward pass ends at the last of the hooks' layers.

    Args:
        model: with the edit on, if there is one.
        corpus: prompts and completions are read alike.
        hooks: names of hook points.
        batch_size: documents at a time.
        max_length: tokens at which documents are cut. None: the model's context length.
        padding: "right" or "left"; of no effect on the states beyond rounding.
        progress: show a progress bar.

    Raises:
        ValueError: a hook that the model does not have, or a corpus without tokens.
    """
    batches = read_batches(
        model, corpus, batch_size=batch_size, max_length=max_length, padding=padding, progress=progress
    )
    for places, batch in batches:
        states = states_of(model, batch, hooks)
        where = torch.tensor(places, device=batch.tokens.device)[:, None].expand_as(batch.tokens)
        yield StateBatch(states, where[batch.content_mask], batch)


def states_of(model: LensModel, batch: TokenBatch, hooks: Sequence[str]) -> dict[str, Float[Tensor, "tokens d_model"]]:
    """States of a batch's content tokens at each hook, without gradient; the pass ends at the last of the hooks' layers.

    Raises:
        NonFiniteError: states that hold NaN or infinity.
    """
    last = max(layer_of(name) for name in hooks)
    with frozen(model), torch.no_grad(), captured(model, hooks) as store:
        run_segment(model, batch.tokens, batch.attention_mask, first=last, last=last)
    states = {name: store[name][batch.content_mask] for name in hooks}
    check_states(model, batch, states)
    return states
