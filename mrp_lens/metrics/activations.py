"""States of the residual stream, batch by batch: what metrics read, without ever holding a corpus's states at once."""

from collections.abc import Iterator, Mapping, Sequence
from copy import copy
from dataclasses import KW_ONLY, dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from mrp_lens.data import Corpus
from mrp_lens.data.tokenization import PaddingSide, TokenBatch, in_order
from mrp_lens.edits import Edit, EditStack, SteeringEdit, edit_on
from mrp_lens.edits.subspace import Subspace, unit
from mrp_lens.models import LensModel, check_layers, check_lens_model, device_of, encoder_for
from mrp_lens.models.finite import check_states
from mrp_lens.models.hooks import captured, check_hook_names, frozen, hook_name, layer_of, run_segment
from mrp_lens.utils.validation import generator_for

When = Literal["before", "after"]

USABLE = 1e-12  # an eigenvalue below this share of their sum is rounding noise of float32 states, not a direction


Texts = Corpus | Mapping[str, Corpus]
"""What to look at: a corpus, or several by the name of their group, such as {"forget": ..., "retain": ...}."""
WINDOW = 4  # batches whose documents are tokenised, and sorted by length, together


@dataclass(frozen=True)
class StatePair:
    """States of the content tokens (no pads, no BOS) of a batch of whole documents, without and with an edit.

    Attributes:
        states: "before" and, with an edit, "after" -> hook name -> [tokens, d_model], in the model's dtype.
        rows: [tokens] which of the corpus's documents each token belongs to; a document's tokens are consecutive.
        tokens: [tokens] their ids.
    """

    states: Mapping[When, Mapping[str, Float[Tensor, "tokens d_model"]]]
    rows: Int[Tensor, " tokens"]
    tokens: Int[Tensor, " tokens"]

    @property
    def documents(self) -> int:
        """How many there are in the batch."""
        return len(torch.unique_consecutive(self.rows))


@dataclass(frozen=True)
class PairReader:
    """Reads corpora batch by batch, each batch without the edit and then with it, so that no states need be kept.

    Attributes:
        model: as it stands "before".
        edit: put on for "after"; None: there is no "after".
        documents: at most so many of each corpus, chosen at random by `seed`. None: all.
        seed: of the choice.
        batch_size, max_length, padding, progress: as in `read_batches`.

    Raises:
        TypeError: the edit is not an Edit.
        ValueError: the edit does not fit the model (it says why), or `documents` is below 1.
    """

    model: LensModel
    edit: Edit | None
    _: KW_ONLY
    documents: int | None
    seed: int
    batch_size: int
    max_length: int | None
    padding: PaddingSide
    progress: bool

    def __post_init__(self) -> None:
        if self.edit is not None and not isinstance(self.edit, Edit):
            raise TypeError(f"edit must be an Edit, such as fit.edit, or None; got {type(self.edit).__name__}")
        if self.documents is not None and self.documents < 1:
            raise ValueError(f"documents must be at least 1, or None for all, got {self.documents}")
        with edit_on(self.model, self.edit):
            pass  # refuse an edit that does not fit before anything is read

    def pairs(self, corpus: Corpus, hooks: Sequence[str]) -> Iterator[StatePair]:
        """The states at the hooks, of all documents or of those chosen.

        Raises:
            ValueError: no document holds a token besides BOS, or states that hold NaN or infinity.
        """
        places = self._chosen(corpus)
        batches = read_batches(
            self.model,
            Corpus(tuple(corpus.documents[place] for place in places), corpus.name),
            batch_size=self.batch_size,
            max_length=self.max_length,
            padding=self.padding,
            progress=self.progress,
        )
        for number, (chosen, batch) in enumerate(batches):
            states: dict[When, Mapping[str, Tensor]] = {"before": states_of(self.model, batch, hooks)}
            if self.edit is not None:
                with _with_own_noise(self.edit, number).applied(self.model, check=False):
                    states["after"] = states_of(self.model, batch, hooks)
            rows = torch.tensor([places[i] for i in chosen], device=batch.tokens.device)[:, None]
            mask = batch.content_mask
            yield StatePair(states, rows.expand_as(batch.tokens)[mask], batch.tokens[mask])

    def _chosen(self, corpus: Corpus) -> list[int]:
        if self.documents is None or self.documents >= len(corpus):
            return list(range(len(corpus)))
        order = torch.randperm(len(corpus), generator=generator_for(self.seed))
        return sorted(order[: self.documents].tolist())


class Moments:
    """Sums over states, in float64 on the CPU: their number, their first and second moments, how far an edit moved them."""

    def __init__(self, d_model: int) -> None:
        self.documents = 0
        self.tokens = 0
        self.moved = 0.0  # sum of squared distances to the unedited states
        self._length = 0.0
        self._total = torch.zeros(d_model, dtype=torch.float64)
        self._products = torch.zeros(d_model, d_model, dtype=torch.float64)

    def add(
        self,
        states: Float[Tensor, "tokens d_model"],
        documents: int,
        unedited: Float[Tensor, "tokens d_model"] | None = None,
    ) -> None:
        """States of so many documents; `unedited` are those of the same tokens without the edit."""
        wide = states.double()
        self.documents += documents
        self.tokens += len(wide)
        self._length += float(wide.norm(dim=-1).sum())
        self._total += wide.sum(dim=0).cpu()
        self._products += (wide.T @ wide).cpu()
        if unedited is not None:
            self.moved += float((wide - unedited.double()).square().sum())

    @property
    def norm(self) -> float:
        """Mean L2 norm."""
        return self._length / self.tokens

    @property
    def energy(self) -> float:
        """Sum of squared norms."""
        return float(self._products.trace())

    @property
    def effective_rank(self) -> float:
        """exp of the entropy of the covariance's normalised eigenvalues (Roy and Vetterli 2007); NaN without variance."""
        mean = self._total / self.tokens
        covariance = self._products / self.tokens - torch.outer(mean, mean)
        values = torch.linalg.eigvalsh(covariance).clamp(min=0.0)
        if float(values.sum()) <= USABLE * self.energy / self.tokens:
            return float("nan")
        return float(torch.special.entr(values / values.sum()).sum().exp())

    def energy_share(self, subspace: Subspace) -> float:
        """Share of the states' squared norm inside the subspace; NaN if all states are 0."""
        basis = subspace.basis.double().cpu()
        inside = max(float(((basis @ self._products) * basis).sum()), 0.0)
        return inside / self.energy if self.energy else float("nan")

    def top_directions(self, rank: int) -> Subspace:
        """The span of the `rank` first principal directions, uncentred as MRP's start (`methods.start`) takes them.

        Raises:
            ValueError: the states span fewer.
        """
        values, vectors = torch.linalg.eigh(self._products)
        usable = int((values > USABLE * self.energy).sum())
        if usable < rank:
            raise ValueError(f"rank {rank} is above the {usable} directions that {self.tokens} states span")
        return Subspace(vectors[:, -rank:].T.float())


def read_moments(reader: PairReader, corpus: Corpus, hooks: Mapping[int, str]) -> dict[When, dict[int, Moments]]:
    """ "before" and, with an edit, "after" -> layer -> moments of the states at the layer's hook."""
    d_model = int(reader.model.cfg.d_model)
    whens: tuple[When, ...] = ("before",) if reader.edit is None else ("before", "after")
    moments = {when: {layer: Moments(d_model) for layer in hooks} for when in whens}
    for pair in reader.pairs(corpus, list(hooks.values())):
        for when in whens:
            for layer, hook in hooks.items():
                unedited = pair.states["before"][hook] if when == "after" else None
                moments[when][layer].add(pair.states[when][hook], pair.documents, unedited)
    return moments


def _with_own_noise(edit: Edit, number: int) -> Edit:
    """The edit for a batch of this number: steering's noise starts anew where it is put on, and would repeat itself."""
    if isinstance(edit, EditStack):
        return EditStack([_with_own_noise(part, number) for part in edit.parts])
    if isinstance(edit, SteeringEdit) and edit.noise > 0.0:
        edit = copy(edit)
        edit.seed += number
    return edit


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
    encoder = encoder_for(model, max_length=max_length)
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
