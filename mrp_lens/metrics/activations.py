"""States of the residual stream, batch by batch: what metrics read, without ever holding a corpus's states at once."""

from collections.abc import Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mrp_lens.data import Corpus
from mrp_lens.data.tokenization import PaddingSide, TokenBatch, in_order
from mrp_lens.edits import Edit, EditStack, SteeringEdit, edit_on
from mrp_lens.edits.subspace import unit
from mrp_lens.metrics.shared_states import StatesByHook, shared_or_read
from mrp_lens.models import LensModel, check_layers, check_lens_model, device_of, encoder_for
from mrp_lens.models.finite import check_states
from mrp_lens.models.hooks import check_hook_names, hook_name
from mrp_lens.utils.progress import progress_bar
from mrp_lens.utils.validation import check_whole, generator_for

WINDOW = 4  # batches whose documents are tokenised, and sorted by length, together

When = Literal["before", "after"]
Texts = Corpus | Mapping[str, Corpus]
"""What to look at: a corpus, or several by the name of their group, such as {"forget": ..., "retain": ...}."""


@dataclass(frozen=True)
class StateBatch:
    """States of the content tokens (no pads, no BOS) of a batch of whole documents, without and with an edit.

    Attributes:
        states: hook name -> [tokens, d_model], in the model's dtype, of the model as it stands.
        edited: likewise, with the edit; None where there is none.
        rows: [tokens] which of the corpus's documents each token belongs to; a document's tokens are consecutive.
        batch: the tokens and masks they come from.
    """

    states: StatesByHook
    edited: StatesByHook | None
    rows: Int[Tensor, " tokens"]
    batch: TokenBatch

    @property
    def by_when(self) -> dict[When, Mapping[str, Float[Tensor, "tokens d_model"]]]:
        """ "before" and, where there is an edit, "after" -> the states."""
        return {"before": self.states} if self.edited is None else {"before": self.states, "after": self.edited}

    @property
    def tokens(self) -> Int[Tensor, " tokens"]:
        """Their ids."""
        return self.batch.tokens[self.batch.content_mask]

    @property
    def sizes(self) -> list[int]:
        """Tokens of each document, in their order."""
        counts: list[int] = torch.unique_consecutive(self.rows, return_counts=True)[1].tolist()
        return counts

    @property
    def documents(self) -> int:
        """How many there are in the batch."""
        return len(self.sizes)


@dataclass(frozen=True)
class StateReader:
    """Reads corpora batch by batch, each batch without the edit and then with it, so that no states need be kept.

    Attributes:
        model: HookedTransformer or TransformerBridge.
        edit: put on and taken off batch by batch; None: states are those of the model as it stands.
        documents: at most so many of each corpus, chosen at random by `seed`. None: all.
        seed: of the choice.
        batch_size: documents at a time.
        max_length: tokens at which documents are cut. None: the model's context length.
        padding: "right" or "left"; of no effect on the states beyond rounding.
        progress: show a progress bar.

    Raises:
        TypeError: the edit is not an Edit.
        ValueError: the edit does not fit the model (it says why), or `documents` is below 1.
    """

    model: LensModel
    edit: Edit | None = None
    documents: int | None = None
    seed: int = 0
    batch_size: int = 32
    max_length: int | None = None
    padding: PaddingSide = "right"
    progress: bool = True

    def __post_init__(self) -> None:
        if self.edit is not None and not isinstance(self.edit, Edit):
            raise TypeError(f"edit must be an Edit, such as fit.edit, or None; got {type(self.edit).__name__}")
        if self.documents is not None and self.documents < 1:
            raise ValueError(f"documents must be at least 1, or None for all, got {self.documents}")
        check_whole(batch_size=self.batch_size)
        with edit_on(self.model, self.edit):
            pass  # refuse an edit that does not fit before anything is read

    def read(self, corpus: Corpus, hooks: Sequence[str]) -> Iterator[StateBatch]:
        """The states at the hooks, prompts and completions alike. A forward pass ends at the last of the hooks' layers.

        Raises:
            ValueError: a hook that the model does not have, or no document with a token besides BOS; NonFiniteError where
                states hold NaN or infinity.
        """
        for number, (places, batch) in enumerate(self.batches(corpus)):
            edited, states = None, states_of(self.model, batch, hooks)
            if self.edit is not None:
                with _with_own_noise(self.edit, number).applied(self.model, check=False):
                    edited = states_of(self.model, batch, hooks)
            rows = torch.tensor(places, device=batch.tokens.device)[:, None].expand_as(batch.tokens)
            yield StateBatch(states, edited, rows[batch.content_mask], batch)

    def batches(self, corpus: Corpus) -> Iterator[tuple[list[int], TokenBatch]]:
        """Batches of the documents that hold a content token, each with the places of its documents in the corpus.

        Raises:
            ValueError: none does.
        """
        chosen = self._chosen(corpus)
        encoder = encoder_for(self.model, max_length=self.max_length)
        documents, found, start = [corpus.documents[place] for place in chosen], False, 0
        with progress_bar(total=len(chosen), desc=f"reading {corpus.name}", progress=self.progress) as bar:
            for window in encoder.windows(documents, WINDOW * self.batch_size):
                filled = [place for place, row in enumerate(window) if any(row.content)]
                rows = [window[place] for place in filled]
                for places, batch in in_order(encoder, rows, self.batch_size, side=self.padding):
                    found = True
                    yield [chosen[start + filled[place]] for place in places], batch
                    bar.update(len(places))
                start += len(window)
        if not found:
            raise ValueError(f"no document in {corpus.name!r} holds a token besides BOS and padding")

    def _chosen(self, corpus: Corpus) -> list[int]:
        if self.documents is None or self.documents >= len(corpus):
            return list(range(len(corpus)))
        order = torch.randperm(len(corpus), generator=generator_for(self.seed))
        return sorted(order[: self.documents].tolist())


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


def states_of(model: LensModel, batch: TokenBatch, hooks: Sequence[str]) -> StatesByHook:
    """States of a batch's content tokens at each hook, without gradient; the pass ends at the last of the hooks' layers.

    A batch for which memory runs out is read in halves.

    Raises:
        NonFiniteError: states that hold NaN or infinity.
    """
    states = shared_or_read(model, batch, hooks)
    check_states(model, batch, states)
    return states


def _with_own_noise(edit: Edit, number: int) -> Edit:
    """The edit for a batch of this number: steering's noise starts anew where it is put on, and would repeat itself."""
    if isinstance(edit, EditStack):
        return EditStack([_with_own_noise(part, number) for part in edit.parts])
    if isinstance(edit, SteeringEdit) and edit.noise > 0.0:
        edit = copy(edit)
        edit.seed += number
    return edit
