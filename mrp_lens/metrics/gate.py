"""Which tokens a conditional projection acts on: how much of the forget set its gates find, and how often they are mistaken."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mrp_lens.data import Corpus, Questions
from mrp_lens.data.tokenization import TokenBatch
from mrp_lens.edits import ConditionalProjectionEdit, Edit, Gate
from mrp_lens.edits.wrapped import WrappedEdit
from mrp_lens.metrics.activations import StateReader, groups_of
from mrp_lens.metrics.registry import Measured, register
from mrp_lens.models import LensModel, device_of
from mrp_lens.models.finite import check_states
from mrp_lens.models.hooks import HookFunction, frozen, layer_of, place_in_block, run_segment
from mrp_lens.utils.torch_state import ordinary_torch
from mrp_lens.utils.validation import check_one_of

FIRES = 0.5  # a gate that is open wider than this counts as firing
SHOWN = 12  # documents of each side on the report page

Asked = Corpus | Questions
Part = Literal["all", "prompt"]


class Place(NamedTuple):
    """One gate of an edit."""

    request: str
    hook: str


@dataclass
class Firing:
    """What one gate does to the tokens of one side that count."""

    tokens: int = 0
    documents: int = 0
    share: float = 0.0  # summed over tokens
    fired: int = 0  # tokens
    documents_firing: int = 0  # with a token at which it fires

    def add(self, share: Float[Tensor, "batch seq"], counted: Bool[Tensor, "batch seq"]) -> None:
        """Those of a batch."""
        fires = (share > FIRES) & counted
        self.tokens += int(counted.sum())
        self.documents += int(counted.any(dim=1).sum())
        self.share += float(share[counted].double().sum())
        self.fired += int(fires.sum())
        self.documents_firing += int(fires.any(dim=1).sum())


@ordinary_torch(gradients=False)
def gate(
    model: LensModel,
    edit: Edit,
    forget: Asked,
    retain: Asked,
    *,
    part: Part = "all",
    documents: int | None = 1000,
    seed: int = 0,
    batch_size: int = 32,
    max_length: int | None = None,
    progress: bool = True,
) -> pd.DataFrame:
    """How many of the forget set's tokens each gate of an edit fires at, and of the retain set's.

    A gate fires at a token whose state loses more than half of its part in the subspace. It is read where it acts: on the
    state that comes in, the edit's other hooks on. Pads and BOS do not count.

    Args:
        model: HookedTransformer or TransformerBridge, without the edit.
        edit: one that holds a projection behind gates, alone or among others.
        forget: where the gates should fire; of questions each prompt is read together with its right choice, so that texts
            in a form that no fit saw tell how far the gates reach.
        retain: where they should not; likewise.
        part: "all": every token; "prompt": those of prompts alone, in front of which no answer has been seen.
        documents: read at most so many of each side, chosen at random by `seed`. None: all.
        seed: of that choice.
        batch_size, max_length, progress: as in `alignment`.

    Returns:
        One row a gate: `request`, `hook`, `layer`; `precision`, share of the tokens at which it fires that are the forget
        set's (NaN where it never fires), with its control `precision_null`, that of a gate that fires at random; `recall`,
        share of the forget set's tokens at which it fires, beside `retain_firing`, share of the retain set's; and for each
        side `forget_share`, `retain_share`, mean of g(h); `forget_documents_firing`, `retain_documents_firing`, share of
        documents with a token at which it fires; the counts `forget_tokens`, `retain_tokens`, `forget_documents`,
        `retain_documents`.

    Raises:
        TypeError, ValueError: an edit without a gate or of another model, no texts, no token, no prompt, an unknown part.

    Example:
        >>> gates = {hook: ml.Gate(torch.ones(model.cfg.d_model), threshold=0.1) for hook in fit.edit.subspaces()}
        >>> frame = gate(model, ml.ConditionalProjectionEdit(fit.edit.subspaces(), gates), forget, retain)
    """
    check_one_of(Part, part=part)
    gates = gates_of(edit)
    reader = StateReader(model, edit, documents, seed, batch_size, max_length, progress=progress)
    found: dict[Place, dict[str, Firing]] = {place: {} for place in gates}
    for side, asked in (("forget", forget), ("retain", retain)):
        corpus = corpus_of(asked) if part == "all" else _with_prompts(corpus_of(asked))
        for _, batch, shares in _read(reader, edit, corpus):
            counted = batch.content_mask if part == "all" else batch.content_mask & ~batch.loss_mask
            for place, share in shares.items():
                found[place].setdefault(side, Firing()).add(share, counted)
    return pd.DataFrame([_row(place, sides) for place, sides in found.items()])


@ordinary_torch(gradients=False)
def gate_tokens(
    model: LensModel,
    edit: Edit,
    corpus: Asked | Mapping[str, Corpus],
    *,
    limit: int | None = 20,
    seed: int = 0,
    batch_size: int = 32,
    max_length: int | None = None,
    progress: bool = True,
) -> pd.DataFrame:
    """Token by token, how far each gate of an edit is open.

    Args:
        model, edit: as in `gate`.
        corpus: texts, or questions, read as in `gate`; or several corpora by name: {"forget": ..., "retain": ...}.
        limit: documents of each corpus at most, chosen at random by `seed`. None: all.
        seed: of that choice.
        batch_size, max_length, progress: as in `alignment`.

    Returns:
        One row a gate and content token: `group` (the corpus's name), `document` (its place in the corpus), `position` (of
        the token among the document's, BOS not counted, from 0), `token` (its string), `request`, `hook`, `layer`, and
        `share`, g(h) of the state that comes in.

    Raises:
        TypeError, ValueError: as in `gate`.

    Example:
        >>> gates = {hook: ml.Gate(torch.ones(model.cfg.d_model), threshold=0.1) for hook in fit.edit.subspaces()}
        >>> frame = gate_tokens(model, ml.ConditionalProjectionEdit(fit.edit.subspaces(), gates), forget)
    """
    gates = gates_of(edit)
    reader = StateReader(model, edit, limit, seed, batch_size, max_length, progress=progress)
    texts = corpus_of(corpus) if isinstance(corpus, Questions) else corpus
    rows: list[tuple[Any, ...]] = []
    for number, (group, documents) in enumerate(groups_of(texts).items()):
        for places, batch, shares in _read(reader, edit, documents):
            for row, document in enumerate(places):
                content = batch.content_mask[row]
                tokens = [str(model.tokenizer.decode([token])) for token in batch.tokens[row][content].tolist()]
                for order, place in enumerate(gates):
                    told = enumerate(zip(tokens, shares[place][row][content].tolist(), strict=True))
                    rows += [(number, order, document, n, group, *place, token, share) for n, (token, share) in told]
    names = ["number", "order", "document", "position", "group", "request", "hook", "token", "share"]
    frame = pd.DataFrame(sorted(rows), columns=names)
    frame["layer"] = frame["hook"].map(layer_of)
    return frame[["group", "document", "position", "token", "request", "hook", "layer", "share"]]


@register(
    "gate",
    summary="At how many tokens of the forget set the gates of a conditional projection fire, and of the retain set.",
    figures=["gate"],
    compares=True,
)
def _of_task(measured: Measured) -> pd.DataFrame | None:
    if measured.edit is None or not _gated_parts(measured.edit):
        return None
    texts = measured.task.texts(limit=measured.documents)
    return gate(
        measured.model,
        measured.edit,
        texts["forget"],
        texts["retain"],
        seed=measured.seed,
        progress=measured.progress,
    )


@register(
    "gate-tokens",
    summary="Token by token, how far the gates of a conditional projection are open.",
    figures=["gate_tokens"],
    compares=True,
)
def _of_few(measured: Measured) -> pd.DataFrame | None:
    if measured.edit is None or not _gated_parts(measured.edit):
        return None
    texts = measured.task.texts(limit=SHOWN)
    return gate_tokens(measured.model, measured.edit, texts, seed=measured.seed, progress=measured.progress)


def gates_of(edit: Edit) -> list[Place]:
    """The gates of an edit, by layer.

    Raises:
        TypeError: it is no edit.
        ValueError: it has none.
    """
    if not isinstance(edit, Edit):
        raise TypeError(f"edit must be an Edit, such as fit.edit, got {type(edit).__name__}")
    found = [Place(name, hook) for part in _gated_parts(edit) for name in part.requests for hook in part.gates(name)]
    if not found:
        raise ValueError(
            f"the edit has no gate that could fire, got {edit!r}; ConditionalProjectionEdit(subspaces, gates) has one at each hook"
        )
    return sorted(found, key=lambda place: place_in_block(place.hook))


def corpus_of(asked: Asked) -> Corpus:
    """The corpus itself; of questions, each prompt with its right choice.

    Raises:
        TypeError: it is neither.
        ValueError: it is empty.
    """
    if not isinstance(asked, Corpus | Questions):
        raise TypeError(f"expected a Corpus or Questions, got {type(asked).__name__}")
    if not len(asked):
        raise ValueError(f"nothing to read in {asked.name!r}, which is empty")
    return asked if isinstance(asked, Corpus) else asked.right_answers()


def _gated_parts(edit: Edit) -> list[ConditionalProjectionEdit]:
    return [part for part in edit.parts if isinstance(part, ConditionalProjectionEdit)]


def _with_prompts(corpus: Corpus) -> Corpus:
    asked = tuple(document for document in corpus.documents if document.prompt)
    if not asked:
        raise ValueError(
            f"no document in {corpus.name!r} has a prompt; leave part at 'all', or read it with prompt=... and completion=..."
        )
    return replace(corpus, documents=asked)


def _read(
    reader: StateReader, edit: Edit, corpus: Corpus
) -> Iterator[tuple[list[int], TokenBatch, dict[Place, Float[Tensor, "batch seq"]]]]:
    """Batch by batch the places of its documents in the corpus, its tokens, and g(h) at each gate."""
    last = max(layer_of(place.hook) for place in gates_of(edit))
    with frozen(reader.model), torch.no_grad(), _watched(reader.model, edit) as shares:
        for places, batch in reader.batches(corpus):
            run_segment(reader.model, batch.tokens, batch.attention_mask, first=last, last=last)
            found = {hook: share[batch.content_mask][:, None] for (_, hook), share in shares.items()}
            check_states(reader.model, batch, found)
            yield places, batch, dict(shares)


@contextmanager
def _watched(model: LensModel, edit: Edit) -> Iterator[dict[Place, Float[Tensor, "batch seq"]]]:
    """The edit on, and a dict that every pass fills with g(h) of the states that come to each gate."""
    store: dict[Place, Tensor] = {}
    home = device_of(model)

    def watching(part: Edit, name: str, change: HookFunction) -> HookFunction:
        gates = gates_at(part, name)

        def watch(activation: Tensor, hook: Any) -> Tensor | None:
            for request, gate in gates.items():
                store[Place(request, name)] = gate(activation).to(home)
            return change(activation, hook)

        return watch

    with WrappedEdit(edit, watching).applied(model):
        yield store


def gates_at(edit: Edit, hook: str) -> dict[str, Gate]:
    """By request the gates that an edit has at a hook; none where it is no conditional projection."""
    if not isinstance(edit, ConditionalProjectionEdit):
        return {}
    return {request: gates[hook] for request in edit.requests if hook in (gates := edit.gates(request))}


def _row(place: Place, sides: Mapping[str, Firing]) -> dict[str, Any]:
    forget, retain = sides["forget"], sides["retain"]
    fired = forget.fired + retain.fired
    return {
        "request": place.request,
        "hook": place.hook,
        "layer": layer_of(place.hook),
        "precision": forget.fired / fired if fired else float("nan"),
        "precision_null": forget.tokens / (forget.tokens + retain.tokens),
        "recall": forget.fired / forget.tokens,
        "retain_firing": retain.fired / retain.tokens,
        **{f"{side}_share": found.share / found.tokens for side, found in sides.items()},
        **{f"{side}_documents_firing": found.documents_firing / found.documents for side, found in sides.items()},
        **{f"{side}_tokens": found.tokens for side, found in sides.items()},
        **{f"{side}_documents": found.documents for side, found in sides.items()},
    }
