"""One template of a fit: what every method does alike is written here once; a method resolves its settings, and learns."""

import logging
import random
import warnings
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, fields, is_dataclass, replace
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from typing_extensions import override

from mrp_lens.data import Corpus, Document, Questions
from mrp_lens.data.kinds import check_corpus
from mrp_lens.data.tokenization import Encoded, Encoder, TokenBatch, in_order
from mrp_lens.edits import Edit, edit_on, projection_in
from mrp_lens.edits.provenance import fingerprint
from mrp_lens.methods.budget import Budget, Damage, damage_of
from mrp_lens.methods.control import ControlQuestions
from mrp_lens.methods.coverage import Coverage, cover, question_forms
from mrp_lens.methods.fit import Fit
from mrp_lens.methods.registry import Method
from mrp_lens.models import (
    LensModel,
    architecture_of,
    check_lens_model,
    describe,
    encoder_for,
    identity_of,
    why_not_exportable,
)
from mrp_lens.models.architectures import LAYOUTS
from mrp_lens.models.attachments import entries_on
from mrp_lens.models.generation import drawn_seed
from mrp_lens.models.hooks import frozen, read_states
from mrp_lens.training.callbacks import Callback
from mrp_lens.training.checkpoints import EVERY, Checkpoint, Resumable
from mrp_lens.training.loop import Losses, TrainingRun, train
from mrp_lens.utils.frames import versions
from mrp_lens.utils.processes import computed_once, together
from mrp_lens.utils.torch_state import ordinary_torch, refuse_inference_tensors
from mrp_lens.utils.validation import as_python, check_positive, generator_for, or_default

logger = logging.getLogger(__name__)

LONGEST = 512  # tokens of a document, as in the released RMU recipe
HELD_OUT = 64  # retain documents at most that no update sees, where the damage is measured
ASKED = 4  # questions made from a short one of them
STATES = 4096  # token states a side that a method looks at before it trains
STATES_BATCH = 64

Settings = TypeVar("Settings")


@dataclass(frozen=True)
class Data:
    """Encoded forget corpora and retain corpus; `corpora` and `retain_corpus` hold the documents of the rows, in their order."""

    encoder: Encoder
    names: tuple[str, ...]
    forget: tuple[list[Encoded], ...]
    retain: list[Encoded]
    record: Mapping[str, Any]
    corpora: tuple[Corpus, ...]
    retain_corpus: Corpus

    @property
    def all_forget(self) -> list[Encoded]:
        """The documents of all forget corpora."""
        return [row for rows in self.forget for row in rows]

    def with_documents(self, forget: Sequence[Sequence[Document]], retain: Sequence[Document] | None = None) -> "Data":
        """The same with other documents, for each forget corpus and for the retain corpus (None: as they are). Documents without
        a token to predict are left out."""
        sides = [*zip(forget, self.corpora, strict=True)]
        if retain is not None:
            sides.append((retain, self.retain_corpus))
        read = [_counted(self.encoder, documents, corpus.name, warn=False) for documents, corpus in sides]
        retain_corpus, kept = (self.retain_corpus, self.retain) if retain is None else read.pop()
        corpora, rows = zip(*read, strict=True)
        return replace(self, forget=rows, retain=kept, corpora=corpora, retain_corpus=retain_corpus)

    def held_out(self, generator: torch.Generator) -> tuple[list[Encoded], list[Encoded], "Data"]:
        """A tenth of the retain documents, at most 64; of those that are short, the answers to questions made from them; and the
        data without them and their copies. A single document is held out and stays."""
        count = min(HELD_OUT, max(1, len(self.retain) // 10))
        order = torch.randperm(len(self.retain), generator=generator).tolist()
        copies = {tuple(self.retain[i].ids) for i in order[:count]}
        kept = sorted(i for i in order[count:] if tuple(self.retain[i].ids) not in copies) or order
        documents = self.retain_corpus.documents
        left = replace(
            self,
            retain=[self.retain[i] for i in kept],
            retain_corpus=Corpus(tuple(documents[i] for i in kept), self.retain_corpus.name),
        )
        asked = question_forms(
            [documents[i] for i in order[:count]], random.Random(drawn_seed(generator)), copies=ASKED
        )
        _, answers = _counted(self.encoder, asked, "answers", warn=False)
        return [self.retain[i] for i in order[:count]], answers, left


def _counted(encoder: Encoder, documents: Sequence[Document], name: str, *, warn: bool) -> tuple[Corpus, list[Encoded]]:
    """Those of the documents with a token to predict, and their rows."""
    pairs = zip(documents, encoder.encode(documents, warn=warn), strict=True)
    counted = [(document, row) for document, row in pairs if any(row.in_loss[1:])]
    return Corpus(tuple(document for document, _ in counted), name), [row for _, row in counted]


def prepare(
    model: LensModel, forget: Corpus | Sequence[Corpus], retain: Corpus, *, max_length: int | None = None
) -> Data:
    """Encode the corpora; warn of documents in both.

    Args:
        model: HookedTransformer or TransformerBridge.
        forget: one corpus or several.
        retain: the retain set.
        max_length: tokens at which documents are cut. None: 512, or the model's context length if that is less.

    Raises:
        TypeError: not a Corpus.
        ValueError: a corpus is empty, two forget corpora share a name, or `max_length` is not from 2 to the context
            length.
    """
    refuse_inference_tensors(model.parameters())
    several: Any = forget
    corpora: list[Any] = [several] if isinstance(several, (Corpus, Questions)) else list(several)
    for corpus in corpora:
        check_corpus(forget=corpus)
    check_corpus(retain=retain)
    names = tuple(corpus.name for corpus in corpora)
    if not corpora or len(set(names)) < len(names):
        raise ValueError(f"give at least one forget corpus, each with its own name; got {list(names)}")
    encoder = encoder_for(model, max_length=or_default(max_length, min(LONGEST, int(model.cfg.n_ctx))))
    reason = why_not_exportable(model)
    if reason is not None:
        known = architecture_of(model) in LAYOUTS  # else the reason says what to do, and loading it again would not
        remedy = "; for that, load the checkpoint with mrp_lens.load_model(...)" if known else ""
        warnings.warn(
            f"{reason}: the edit works on this model, and cannot be exported to Hugging Face{remedy}",
            stacklevel=4,
        )
    shared = {document for corpus in corpora for document in corpus.documents} & set(retain.documents)
    if shared:
        warnings.warn(
            f"{len(shared)} documents are in the forget and in the retain corpus: the fit is to lose and to keep them; "
            "take them out of one",
            stacklevel=4,
        )
    read = []
    for role, corpus in [*(("forget", corpus) for corpus in corpora), ("retain", retain)]:
        counted, rows = _counted(encoder, corpus.documents, corpus.name, warn=True)
        with_tokens = set(counted.documents)
        unread = sum(
            bool(document.prompt and document.completion.strip()) and document not in with_tokens
            for document in corpus.documents
        )
        left_out = (
            f"the prompts of {unread} of {len(corpus)} documents of {corpus.name!r} fill the {encoder.max_length} tokens that are read, so "
            "that nothing of what follows is: raise max_length, or shorten the prompts"
        )
        if not rows:
            reason = left_out if unread else "it holds no document with a token to predict"
            raise ValueError(f"the {role} corpus {corpus.name!r} is empty: {reason}")
        if unread:
            warnings.warn(f"{left_out}; they are left out", stacklevel=4)
        read.append((counted, rows))
    record = {
        role: [{"name": corpus.name, "documents": len(corpus), "sha256": corpus.fingerprint} for corpus in chosen]
        for role, chosen in (("forget", corpora), ("retain", [retain]))
    }
    retain_corpus, kept = read.pop()
    counted_corpora, forget_rows = zip(*read, strict=True)
    return Data(encoder, names, forget_rows, kept, record, counted_corpora, retain_corpus)


@dataclass(frozen=True)
class FitContext:
    """What a fit has at hand, besides the method and its resolved settings.

    Attributes:
        name: of the method, or of a later phase of its fit.
        model: without the earlier edit, as it was given; see `fitting`.
        data: the encoded corpora.
        after: the earlier edit.
        request: name of this request.
        generator: the only source of random numbers.
        record: provenance of what is fitted, but for the number of steps.
        progress, checkpoint, callbacks: of training.
        coverage: what is read besides the corpora.
        budget: of damage; None: the fit has none.
    """

    name: str
    model: LensModel
    data: Data
    after: Edit | None
    request: str
    generator: torch.Generator
    record: Mapping[str, Any]
    progress: bool
    checkpoint: Checkpoint | None
    callbacks: Sequence[Callback]
    coverage: Coverage | None = None
    budget: Budget | None = None

    @property
    def multiplier(self) -> float:
        """Factor on the weight of the retain loss, as it is now."""
        return 1.0 if self.budget is None else self.budget.multiplier

    def covered(self) -> Data:
        """The data to learn from: the corpora, and what `coverage` says besides. The model is the one that writes."""
        if self.coverage is None:
            return self.data
        found = cover(
            self.model,
            self.data.corpora,
            self.data.retain_corpus,
            self.coverage,
            generator=self.generator,
            progress=self.progress,
        )
        logger.info("%s reads %s", self.name, dict(found.counts))
        return self.data.with_documents(found.forget, found.retain)

    def train(
        self,
        losses: Losses,
        optimizer: torch.optim.Optimizer,
        *,
        steps: int,
        schedule: Callable[[float], float] | None = None,
        resumable: Mapping[str, Resumable],
        shown: Callable[[], AbstractContextManager[object]] = nullcontext,
    ) -> TrainingRun:
        """The training loop (see `training.train`), with what the caller of `fit` asked for."""
        return train(
            losses,
            optimizer,
            steps=steps,
            description=self.name,
            schedule=schedule,
            progress=self.progress,
            generator=self.generator,
            resumable=resumable if self.budget is None else {**resumable, "budget": self.budget},
            checkpoint=self.checkpoint,
            callbacks=self.callbacks,
            governor=self.budget,
            settings=self.record,
            shown=shown,
        )

    def phase(self, name: str, settings: Mapping[str, Any]) -> "FitContext":
        """The context of a later phase of the same fit, with settings and a checkpoint of its own."""
        kept = None if self.checkpoint is None else self.checkpoint.part(name)
        return replace(self, name=name, record={**self.record, "settings": settings}, checkpoint=kept, budget=None)

    def provenance(self, *, steps: int) -> dict[str, Any]:
        """Of an edit that so many updates gave."""
        return {**self.record, "steps_done": steps}

    def request_provenance(self, *, steps: int) -> dict[str, Any]:
        """Of a ProjectionEdit with this request: the model is that of all requests, the rest is this one's."""
        own = {key: value for key, value in self.provenance(steps=steps).items() if key != "model"}
        return {"model": self.record["model"], "requests": {self.request: own}}

    def result(
        self,
        edit: Edit,
        run: TrainingRun,
        directions: Mapping[str, Float[Tensor, " d_model"]] | None = None,
        *,
        further: Edit | None = None,
    ) -> Fit:
        """The fit: the earlier edit and the new one, with how it ended, which the new one's provenance says too.

        Args:
            edit: the new one.
            run: the training that gave it.
            directions: by the name of their corpus.
            further: what a later phase puts on besides; how the fit ended is told of all together.
        """

        def whole() -> Edit:
            both = edit if self.after is None else self.after + edit
            return both if further is None else both + further

        outcome = None
        if self.budget is not None:
            with fitting(self.model, whole()):
                outcome = self.budget.outcome(run, earlier=damage_of(self.after))
            own = {"outcome": outcome.to_json()}
            requests = edit.provenance.get("requests")
            if requests is None:
                edit.provenance = {**edit.provenance, **own}
            else:
                named = {name: {**entry, **own} for name, entry in requests.items()}
                edit.provenance = {**edit.provenance, "requests": named}
        return Fit(whole(), run.log, self.record["settings"], run.interrupted, directions or {}, outcome)


class FitTemplate(Method, Generic[Settings]):
    """A method whose fit goes the usual way: check, encode, resolve the settings, record, learn.

    `Settings` is a frozen dataclass of what `resolve` derives: its fields have the names of the method's own, and no None.
    In the record they take the place of what the user gave.

    Attributes:
        max_length: tokens at which documents are cut. None: 512, or the context if that is shorter.
        by_request: the edit is kept by the name of its request, which has to be new, and a checkpoint is for that alone.
        budget: the damage that is allowed for: KL(unedited || edited) in nats a token, on retain text that no update sees, or
            a quarter of that on the answers it knows to questions made from it, whichever is more. The weight of the retain
            loss then rises while there is more, and falls while there is less, until the fit is where it aims and ends: at
            chance, or at a `target` that was given. None: the weight stays as it is, all steps are done, and all of the retain
            corpus is learned from.
        first_share: of the budget, to which a fit keeps until it is too slow with that.
        target: accuracy to forget down to, on control questions made from the forget set; `control_accuracy` of a model that
            never saw it is one. None: what cannot be told from chance.
        coverage: what is learned from besides the corpora. None: nothing.
    """

    max_length: int | None = None
    budget: float | None = None
    target: float | None = None
    coverage: Coverage | None = None
    by_request = False
    first_share = 1.0

    def check(self, model: LensModel) -> None:
        """Refuse settings that cannot be meant, before anything is read.

        Raises:
            TypeError, ValueError: name the setting, its value and what is allowed.
        """

    @property
    def holds(self) -> bool:
        """Whether there is a retain loss whose weight a budget can raise; without one a fit ends where the budget does."""
        return True

    @abstractmethod
    def resolve(self, model: LensModel, data: Data) -> Settings:
        """What the fit runs with where the user gave nothing; the earlier edit is on."""

    @abstractmethod
    def learn(self, settings: Settings, context: FitContext) -> Fit:
        """Train, or only look, and make the edit: `context.result(edit, run)`."""

    @override
    @together()
    @ordinary_torch(gradients=True)
    def fit(
        self,
        model: LensModel,
        forget: Corpus | Sequence[Corpus],
        retain: Corpus,
        *,
        seed: int = 0,
        after: Edit | None = None,
        request: str | None = None,
        progress: bool = True,
        checkpoint: str | Path | None = None,
        every: int = EVERY,
        callbacks: Sequence[Callback] = (),
    ) -> Fit:
        settings, context = self.context(
            model,
            forget,
            retain,
            seed=seed,
            after=after,
            request=request,
            progress=progress,
            checkpoint=checkpoint,
            every=every,
            callbacks=callbacks,
        )
        return self.learn(settings, context)

    def context(
        self,
        model: LensModel,
        forget: Corpus | Sequence[Corpus],
        retain: Corpus,
        *,
        seed: int,
        after: Edit | None,
        request: str | None,
        progress: bool = True,
        checkpoint: str | Path | None = None,
        every: int = EVERY,
        callbacks: Sequence[Callback] = (),
    ) -> tuple[Settings, FitContext]:
        """What `learn` is given for the same arguments of `fit`."""
        generator = generator_for(seed)
        data, settings, label = self.prepared(model, forget, retain, after, request)
        record = {
            "method": self.name,
            "settings": recorded(self, settings),
            "seed": as_python(seed),
            "model": describe(model),
            "data": dict(data.record),
            "versions": versions(),
        }
        kept = None
        if checkpoint is not None:
            earlier = None if after is None else fingerprint(after)
            named = {"request": label} if self.by_request else {}
            # The settings as they were given: what is measured of the model has other digits on another processor.
            known = {"settings": asdict(self), "model": identity_of(model), "after": earlier}
            identity = {**record, **named, **known}
            claimed = partial(Checkpoint.claim, checkpoint, identity, every=every)
            kept = computed_once(claimed)
        budget, data = self.within_budget(model, data, after, generator)
        context = FitContext(
            self.name,
            model,
            data,
            after,
            label,
            generator,
            record,
            progress,
            kept,
            tuple(callbacks),
            self.coverage,
            budget,
        )
        return settings, context

    def within_budget(
        self, model: LensModel, data: Data, after: Edit | None, generator: torch.Generator
    ) -> tuple[Budget | None, Data]:
        """The budget of a fit, and the data without the documents that are held out for it."""
        if self.budget is None:
            return None, data
        documents, answers, left = data.held_out(generator)
        control = ControlQuestions(data.encoder, data.corpora, seed=drawn_seed(generator))
        with fitting(model, after):
            damage = Damage(model, data.encoder, documents, answers)
            budget = Budget(
                model,
                damage,
                control,
                nats=self.budget,
                target=self.target,
                holds=self.holds,
                first=self.first_share,
            )
        return budget, left

    def check_for(self, model: LensModel) -> None:
        """Refuse a model that cannot be fitted, and settings that make no sense on it, before anything is computed.

        Raises:
            TypeError, ValueError: names what is wrong.
        """
        check_lens_model(model)
        if on := entries_on(model):
            raise ValueError(
                f"an edit is on this model ({on[0].edit!r}), and a fit would read its states as the model's own; take it off with "
                "detach(), or fit the next request after it with after="
            )
        check_positive(budget=self.budget)
        if self.coverage is not None:
            if not isinstance(self.coverage, Coverage):
                raise TypeError(
                    f"coverage must be a Coverage, or None to read the corpora alone, got {self.coverage!r}"
                )
            self.coverage.check()
        if self.target is not None and self.budget is None:
            raise ValueError(
                f"target {self.target} needs a budget, such as 0.05: without one a fit makes all of its updates"
            )
        if self.target is not None and not 0.0 < self.target <= 1.0:
            raise ValueError(
                f"target must be a share above 0 and at most 1, got {self.target}; 0.001 is out of reach, so that a fit spends its whole budget"
            )
        self.check(model)

    def prepared(
        self,
        model: LensModel,
        forget: Corpus | Sequence[Corpus],
        retain: Corpus,
        after: Edit | None,
        request: str | None,
    ) -> tuple[Data, Settings, str]:
        """What a fit needs before it draws a random number, checked; with the name of the request."""
        self.check_for(model)
        data = prepare(model, forget, retain, max_length=self.max_length)
        label = self.request_label(data.names, after, request)
        with fitting(model, after):
            return data, self.resolve(model, data), label

    def request_label(self, names: Sequence[str], after: Edit | None, request: str | None) -> str:
        """The name of the request: `request`, or those of its forget corpora.

        Raises:
            ValueError: the earlier edit has a request of that name.
        """
        label = or_default(request, "+".join(names))
        earlier = projection_in(after)
        if self.by_request and earlier is not None and label in earlier.requests:
            raise ValueError(f"the earlier edit has a request {label!r} already; name this one with request=...")
        return label


@contextmanager
def fitting(model: LensModel, after: Edit | None) -> Iterator[None]:
    """The model with earlier edits on, in evaluation mode, nothing requiring grad; all as before on exit."""
    with edit_on(model, after), frozen(model):
        yield


def recorded(method: Any, resolved: Any) -> dict[str, Any]:
    """The settings of a fit for its record: as the user gave them, with what was derived in the place of None."""
    derived = {
        field.name: recorded(getattr(method, field.name), value) if is_dataclass(value) else value
        for field in fields(resolved)
        for value in [getattr(resolved, field.name)]
    }
    return asdict(method) | derived


def both_sides(
    encoder: Encoder, forget: Sequence[Encoded], retain: Sequence[Encoded]
) -> tuple[TokenBatch, Bool[Tensor, " batch"]]:
    """Both sides as one batch, so that one pass serves both, and which rows are to be forgotten."""
    batch = encoder.collate([*forget, *retain])
    return batch, (torch.arange(len(batch)) < len(forget)).to(encoder.device)


def states_at(
    model: LensModel,
    encoder: Encoder,
    rows: Sequence[Encoded],
    hooks: Sequence[str],
    generator: torch.Generator,
    *,
    count: int = STATES,
    places: Callable[[TokenBatch], Bool[Tensor, "batch seq"]] = attrgetter("content_mask"),
) -> dict[str, Float[Tensor, "states d_model"]]:
    """States of content tokens (no pads, no BOS), or other places, at each hook, of randomly chosen documents with about `count`
    content tokens."""
    order = torch.randperm(len(rows), generator=generator).tolist()
    lengths = torch.tensor([sum(rows[i].content) for i in order])
    chosen = [rows[i] for i in order[: int((lengths.cumsum(0) < count).sum()) + 1]]
    kept = [read_states(model, batch, hooks, places) for _, batch in in_order(encoder, chosen, STATES_BATCH)]
    return {hook: torch.cat([states.pop(hook).float() for states in kept]) for hook in hooks}  # none is held twice
