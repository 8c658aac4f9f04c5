"""What all methods share: their result, their data, and the record of how an edit came about."""

import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from mrp_lens.data import Corpus
from mrp_lens.data.tokenization import Encoded, Encoder, TokenBatch
from mrp_lens.edits import Edit, edit_on, load_edit
from mrp_lens.edits.provenance import fingerprint
from mrp_lens.models import LensModel, describe, encoder_for, identity_of, why_not_exportable
from mrp_lens.models.hooks import frozen
from mrp_lens.training.checkpoints import Checkpoint
from mrp_lens.utils.frames import frame_of, rows_of, versions
from mrp_lens.utils.io import make_folder, read_json, write_json, write_text
from mrp_lens.utils.torch_state import refuse_inference_tensors
from mrp_lens.utils.validation import given, plain

Forget = Corpus | Sequence[Corpus]

EDIT, LOG, FIT = "edit", "log.csv", "fit.json"  # what a saved fit consists of
CHECKPOINT = "checkpoint"

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

    def save(self, folder: str | Path) -> None:
        """Write `edit/`, `log.csv` and, last of all, `fit.json` into a folder: once that is there, the fit is whole. (The log
        is in both: in CSV for people, in JSON to the last bit.)"""
        target = make_folder(folder)
        self.edit.save_pretrained(target / EDIT, overwrite=True)
        write_text(target / LOG, self.log.to_csv(index=False))
        write_json(
            target / FIT,
            {
                "settings": dict(self.settings),
                "interrupted": self.interrupted,
                "directions": {name: direction.tolist() for name, direction in self.directions.items()},
                "log": rows_of(self.log),
            },
        )

    @classmethod
    def load(cls, folder: str | Path) -> "Fit":
        """What `save` wrote; tensors come back bit-identical.

        Raises:
            FileNotFoundError: the folder holds no fit, or a part of it is missing.
            ValueError: a file is damaged.
        """
        target = Path(folder)
        if not (target / FIT).is_file():
            raise FileNotFoundError(f"{target} holds no {FIT}; give a folder that a fit was saved into")
        try:
            content = read_json(target / FIT, "fit again")
            directions = {
                name: torch.tensor(values, dtype=torch.float32) for name, values in content["directions"].items()
            }
            log = frame_of(content["log"])
            settings, interrupted = dict(content["settings"]), bool(content["interrupted"])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"the fit in {target} is damaged ({error!r}); fit again") from error
        return cls(load_edit(target / EDIT), log, settings, interrupted, directions)

    @classmethod
    def once(cls, folder: str | Path, make: Callable[[Path], "Fit"]) -> "Fit":
        """The fit that a folder holds, or a new one, saved there before anything else is done with it.

        Args:
            folder: of this fit.
            make: called with a folder for the checkpoint, which is removed once the fit is saved.

        Raises:
            KeyboardInterrupt: Ctrl-C ended the fit; the checkpoint stays, and the next call goes on with it.
        """
        target = Path(folder)
        if not (target / FIT).is_file():
            fit = make(target / CHECKPOINT)
            if fit.interrupted:
                raise KeyboardInterrupt
            fit.save(target)
        shutil.rmtree(target / CHECKPOINT, ignore_errors=True)
        return cls.load(target)

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
    refuse_inference_tensors(model.parameters())
    corpora = [forget] if isinstance(forget, Corpus) else list(forget)
    for corpus in (*corpora, retain):
        if not isinstance(corpus, Corpus):
            raise TypeError(
                f"expected a Corpus, got {type(corpus).__name__}; make one with Corpus.from_texts, from_rows or from_file"
            )
    names = tuple(corpus.name for corpus in corpora)
    if not corpora or len(set(names)) < len(names):
        raise ValueError(f"give at least one forget corpus, each with its own name; got {list(names)}")
    encoder = encoder_for(model, max_length=given(max_length, min(LONGEST, int(model.cfg.n_ctx))))
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


def provenance(model: LensModel, method: str, settings: Mapping[str, Any], data: Data, *, seed: int) -> dict[str, Any]:
    """How an edit came about, but for the number of steps: method, settings, model, hashes of the data (never their text),
    versions."""
    return {
        "method": method,
        "settings": dict(settings),
        "seed": plain(seed),
        "model": describe(model),
        "data": dict(data.record),
        "versions": versions(),
    }


def claimed(
    checkpoint: str | Path | None, every: int, model: LensModel, record: Mapping[str, Any], after: Edit | None
) -> Checkpoint | None:
    """The folder in which a fit is kept while it runs; None where nobody asked for one.

    Args:
        checkpoint: the folder.
        every: updates after which the state is written.
        model: without the edit.
        record: the fit's provenance.
        after: the earlier edit.

    Raises:
        ValueError: the folder holds another fit.
        OSError: it cannot be made or written into.
    """
    if checkpoint is None:
        return None
    earlier = None if after is None else fingerprint(after)
    return Checkpoint.claim(checkpoint, {**record, "model": identity_of(model), "after": earlier}, every=every)
