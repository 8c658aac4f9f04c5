"""What all methods share: their result, their data, and the record of how an edit came about."""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pandas as pd
from jaxtyping import Float
from torch import Tensor

from mrp_lens.batching import Encoded, Encoder, TokenBatch
from mrp_lens.checks import given
from mrp_lens.corpus import Corpus
from mrp_lens.edit import Edit, edit_on
from mrp_lens.model import LensModel, describe, why_not_exportable
from mrp_lens.runs import versions
from mrp_lens.stream import frozen

Forget = Corpus | Sequence[Corpus]

LONGEST = 512  # tokens of a document, as in the released RMU recipe


@dataclass(frozen=True)
class Fit:
    """The result of fitting a method.

    Attributes:
        edit: apply it, save it, stack it.
        log: one row a step: `step`, `loss` and its parts, `seconds`.
        settings: every hyperparameter as it was used, derived defaults included.
        interrupted: Ctrl-C ended the fit early; the edit holds what was learned until then.
        directions: RMU and Adaptive RMU: forget corpus -> its unit direction u, [d_model].
    """

    edit: Edit
    log: pd.DataFrame
    settings: Mapping[str, Any]
    interrupted: bool = False
    directions: Mapping[str, Float[Tensor, " d_model"]] = field(default_factory=dict)

    @property
    def direction(self) -> Float[Tensor, " d_model"]:
        """The direction u of a fit with one forget corpus.

        Raises:
            ValueError: the method has no direction, or several.
        """
        if len(self.directions) != 1:
            raise ValueError(
                f"this fit has {len(self.directions)} directions {list(self.directions)}; use fit.directions[name]"
            )
        return next(iter(self.directions.values()))


@dataclass(frozen=True)
class Data:
    """Encoded forget corpora and retain corpus."""

    encoder: Encoder
    names: tuple[str, ...]
    forget: tuple[list[Encoded], ...]
    retain: list[Encoded]
    record: Mapping[str, Any]

    @property
    def all_forget(self) -> list[Encoded]:
        """The documents of all forget corpora."""
        return [row for rows in self.forget for row in rows]


def prepare(model: LensModel, forget: Forget, retain: Corpus, *, max_length: int | None = None) -> Data:
    """Encode the corpora; warn if what must go is also to stay.

    Args:
        model: HookedTransformer or TransformerBridge.
        forget: one corpus or several.
        retain: what must stay.
        max_length: tokens at which documents are cut. None: 512, or the model's context length if that is less.

    Raises:
        TypeError: not a Corpus.
        ValueError: a corpus is empty, two forget corpora share a name, or `max_length` is not from 2 to the context
            length.
    """
    corpora = [forget] if isinstance(forget, Corpus) else list(forget)
    for corpus in (*corpora, retain):
        if not isinstance(corpus, Corpus):
            raise TypeError(
                f"expected a Corpus, got {type(corpus).__name__}; make one with Corpus.from_texts, from_rows or from_file"
            )
    names = tuple(corpus.name for corpus in corpora)
    if not corpora or len(set(names)) < len(names):
        raise ValueError(f"give at least one forget corpus, each with its own name; got {list(names)}")
    encoder = Encoder.for_model(model, max_length=given(max_length, min(LONGEST, int(model.cfg.n_ctx))))
    reason = why_not_exportable(model)
    if reason is not None:
        warnings.warn(
            f"{reason}: the edit works on this model, and cannot be exported to Hugging Face; for that, load the "
            "checkpoint with mrp_lens.load_model(...)",
            stacklevel=3,
        )
    shared = {document for corpus in corpora for document in corpus.documents} & set(retain.documents)
    if shared:
        warnings.warn(
            f"{len(shared)} documents are in the forget and in the retain corpus: the fit is to lose and to keep them; "
            "take them out of one",
            stacklevel=3,
        )
    encoded = {}
    for role, corpus in [*(("forget", corpus) for corpus in corpora), ("retain", retain)]:
        rows = [row for row in encoder.encode(corpus.documents) if any(row.in_loss[1:])]
        if not rows:
            raise ValueError(
                f"the {role} corpus {corpus.name!r} is empty: it holds no document with a token to predict"
            )
        encoded[role, corpus.name] = rows
    record = {
        role: [{"name": corpus.name, "documents": len(corpus), "sha256": corpus.fingerprint} for corpus in chosen]
        for role, chosen in (("forget", corpora), ("retain", [retain]))
    }
    return Data(
        encoder, names, tuple(encoded["forget", name] for name in names), encoded["retain", retain.name], record
    )


@contextmanager
def fitting(model: LensModel, after: Edit | None) -> Iterator[None]:
    """The model with earlier edits on, in evaluation mode, nothing requiring grad; all as before on exit."""
    with edit_on(model, after), frozen(model):
        yield


def parts_of(batch: TokenBatch, micro_batch: int | None) -> Iterator[TokenBatch]:
    """The batch in pieces of at most `micro_batch` rows (None: whole), padding as in the whole."""
    size = micro_batch or len(batch)
    for start in range(0, len(batch), size):
        rows = slice(start, start + size)
        yield TokenBatch(
            batch.tokens[rows], batch.attention_mask[rows], batch.content_mask[rows], batch.loss_mask[rows]
        )


def request_provenance(request: str, record: Mapping[str, Any]) -> dict[str, Any]:
    """The provenance of a ProjectionEdit with one request, from its `provenance`: the model is that of all requests."""
    return {
        "model": record["model"],
        "requests": {request: {key: value for key, value in record.items() if key != "model"}},
    }


def provenance(
    model: LensModel, method: str, settings: Mapping[str, Any], data: Data, *, seed: int, steps_done: int
) -> dict[str, Any]:
    """How an edit came about: method, settings, model, hashes of the data (never their text), versions."""
    return {
        "method": method,
        "settings": dict(settings),
        "seed": seed,
        "steps_done": steps_done,
        "model": describe(model),
        "data": dict(data.record),
        "versions": versions(),
    }
