"""How deep unlearning went: layer by layer, where the answer comes back when states are exchanged with a model that knows."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Float64
from numpy.typing import NDArray
from torch import Tensor

from mrp_lens.data import Corpus
from mrp_lens.data.tokenization import TokenBatch, in_order
from mrp_lens.edits import Edit, edit_on
from mrp_lens.metrics.activations import hooks_at
from mrp_lens.metrics.bootstrap import bootstrap_interval, share_interval
from mrp_lens.metrics.registry import Measured, register
from mrp_lens.metrics.tokens import reads_alike
from mrp_lens.models import LensModel, check_lens_model, encoder_for
from mrp_lens.models.hooks import captured, frozen, hooked
from mrp_lens.models.memory import in_halves
from mrp_lens.training.losses import before_counted, cross_entropy, predictions
from mrp_lens.utils.progress import progress_bar
from mrp_lens.utils.torch_state import ordinary_torch
from mrp_lens.utils.validation import check_one_of, generator_for

Into = Literal["edited", "unedited"]
Positions = Literal["all", "answer"]

GAP = 0.05  # nats a token: UDS's tau
DOCUMENTS = 100  # of a task, at most
SCORES = "scores"  # beside the states, by the names of their hooks

Values = NDArray[np.float64]
States = Mapping[str, Float[Tensor, "batch seq d_model"]]


@ordinary_torch(gradients=False)
def depth(
    model: LensModel,
    edited: Edit | LensModel,
    corpus: Corpus,
    *,
    reference: LensModel | None,
    into: Into = "edited",
    positions: Positions = "all",
    layers: Sequence[int] | None = None,
    threshold: float = GAP,
    batch_size: int = 32,
    seed: int = 0,
    progress: bool = True,
) -> pd.DataFrame:
    """At each layer, how likely the answers are after patching, and one number: 0 as in the unedited model, 1 as never seen.

    `into="edited"`: the edited model runs with the unedited one's states put in at one layer. Where the answer comes back,
    the layers above still know: the edit is no deeper than the layers below, and mending these is enough to undo it.
    `into="unedited"`: the unedited model runs with the edited one's states put in. Where the answer comes back, the states
    still hold it in the form in which the unedited layers read it; scrambled states (RMU) count as erased, whether or not
    they can be unscrambled. With `positions="answer"` that is the Unlearning Depth Score (arXiv 2605.24614).

    With d(l) the loss in log-probability per token against the unedited model, patched at layer l, a document's depth is

        sum over l of min(max(d(l), 0), d_ref(l))  /  sum over l of d_ref(l),   over the layers with d_ref(l) > threshold,

    d_ref of the model that never saw the answers in the place of the edited one; depth is the mean over documents.

    Args:
        model: the one that knows, without any edit.
        edited: an edit of it, or a model of the same shape and tokenizer, such as a checkpoint that was edited elsewhere.
        corpus: what was to be forgotten: the tokens that count are the answers.
        reference: a model of the same shape that never saw them. It should have started from the same weights as `model`: the
            basis of the stream is otherwise its own, and its states mean nothing to the model.
        into: which model runs with the other one's states.
        positions: "all": of the whole text; "answer": those from which the answer's tokens are predicted.
        layers: at whose resid_post to patch. None: all.
        threshold: nats a token, below which the reference knows a layer's part as well, so that it does not count.
        batch_size: documents at a time, whose states at all layers are held.
        seed: of the random tokens and of the bootstrap.
        progress: show a progress bar.

    Returns:
        One row a layer. Columns: `into`, `layer`; `n`, documents with an answer; `log_probability` of the answers after
        patching (nats a token, mean over documents) with its 95% bootstrap interval `low`, `high` (NaN with a single
        document); the controls: `unedited` and `edited`, without patching, by these two models; `never_saw`, the same patching with
        the reference in the place of the edited model; `random`, with states of the unedited model at random other tokens
        of the batch instead, put in where the patched ones are; and, the same in every row, `depth` in [0, 1] with
        `depth_low`, `depth_high`, and `counted`, the documents in it: those where the reference lacks anything.

    Raises:
        TypeError: `edited` is neither an edit nor a model of TransformerLens.
        ValueError: no reference; models of other shapes, or that read other tokens; a layer that does not exist; no document
            with a token to predict; NonFiniteError where logits are NaN or infinite.

    Example:
        >>> never_saw = model  # stands for a model that was trained on the retain set alone
        >>> frame = depth(model, edit, forget, reference=never_saw)
    """
    if reference is None:
        raise ValueError(
            "depth is measured against a model that never saw the answers; give reference=load_model(...), one that was trained "
            "on the retain set alone"
        )
    check_one_of(Into, into=into)
    check_one_of(Positions, positions=positions)
    hooks = hooks_at(model, layers, "resid_post")
    knowing, subject, never_saw = _Side(model), _side_of(model, edited), _Side(reference)
    for other in (subject.model, reference):
        _check_alike(model, other, corpus)
    scores = _Scores(hooks, into, positions, seed)
    encoder = encoder_for(model)
    rows = [row for row in encoder.encode(corpus.documents) if any(row.in_loss[1:])]
    if not rows:
        raise ValueError(f"{corpus.name!r} holds no token to predict: every document is empty or a single token")
    bar = progress_bar(total=len(rows) * len(hooks), desc="patching layers", progress=progress)
    with frozen(model), frozen(subject.model), frozen(reference), torch.no_grad(), bar:
        for _, batch in in_order(encoder, rows, batch_size, logits=True):
            for _layer in scores.add(batch, knowing, subject, never_saw):
                bar.update(len(batch))
    return scores.frame(threshold)


@register(
    "depth",
    summary="Where the forgotten answers come back when states are patched: 0 as before the edit, 1 as never seen.",
    source="arXiv 2605.24614",
    row=lambda frame: {
        f"{key}{end}": own[f"depth{end}"].iloc[0]
        for key, into in (("depth", "edited"), ("depth_of_states", "unedited"))
        for own in (frame[frame["into"] == into],)
        for end in ("", "_low", "_high")
    },
    headings={"depth": "depth: layers above still know", "depth_of_states": "depth: states hold it (UDS)"},
    figures=["depth"],
    tables={"benchmark"},
    compares=True,
)
def _of_forget_set(measured: Measured) -> pd.DataFrame | None:
    if measured.reference is None or measured.edit is None:
        return None
    texts = measured.task.forget_texts.spread(min(measured.documents or DOCUMENTS, DOCUMENTS))
    chosen: tuple[tuple[Into, Positions], ...] = (("edited", "all"), ("unedited", "answer"))
    frames = [
        depth(
            measured.model,
            measured.edit,
            texts,
            reference=measured.reference,
            into=into,
            positions=positions,
            seed=measured.seed,
            progress=measured.progress,
        )
        for into, positions in chosen
    ]
    return pd.concat(frames, ignore_index=True)


@dataclass(frozen=True)
class _Patch:
    """A batch, the states to put in, and where; rows can be taken of it."""

    batch: TokenBatch
    states: Float[Tensor, "batch seq d_model"]
    where: Bool[Tensor, "batch seq"]

    def __len__(self) -> int:
        return len(self.batch)

    def __getitem__(self, rows: slice) -> "_Patch":
        return _Patch(self.batch[rows], self.states[rows], self.where[rows])


@dataclass(frozen=True)
class _Side:
    """A model, as it stands or with an edit on."""

    model: LensModel
    edit: Edit | None = None

    def read(self, batch: TokenBatch, hooks: Sequence[str]) -> tuple[States, Values]:
        """The states at each hook, and the mean log-probability of the tokens that count in each row."""

        def whole(part: TokenBatch) -> dict[str, Tensor]:
            with edit_on(self.model, self.edit), captured(self.model, hooks) as store:
                scores = self._scores(part)
            return {**store, SCORES: scores}

        found = in_halves(batch, whole)
        return found, found.pop(SCORES).numpy()

    def patched(
        self, batch: TokenBatch, hook: str, states: Float[Tensor, "batch seq d_model"], where: Bool[Tensor, "batch seq"]
    ) -> Values:
        """The same log-probability with the states put in at a hook, behind what the edit does there."""

        def whole(part: _Patch) -> Tensor:
            def put(activation: Tensor, hook: Any) -> Tensor:
                return torch.where(part.where[..., None], part.states.to(activation), activation)

            with edit_on(self.model, self.edit), hooked(self.model, [(hook, put)]):
                return self._scores(part.batch)

        return in_halves(_Patch(batch, states, where), whole).numpy()

    def _scores(self, batch: TokenBatch) -> Float64[Tensor, " batch"]:
        own = -cross_entropy(predictions(self.model, batch, whole=True), batch).double().cpu()
        counts = batch.loss_mask[:, 1:].sum(dim=1).tolist()
        return torch.stack([part.mean() for part in own.split(counts)])


class _Scores:
    """The log-probabilities of documents, batch by batch."""

    def __init__(self, hooks: Mapping[int, str], into: Into, positions: Positions, seed: int) -> None:
        self.hooks, self.into, self.positions, self.seed = hooks, into, positions, seed
        self.generator = generator_for(seed)
        self.whole: dict[str, list[Values]] = {"unedited": [], "edited": []}  # without patching
        self.patched: dict[tuple[str, int], list[Values]] = {}

    def add(self, batch: TokenBatch, knowing: _Side, subject: _Side, never_saw: _Side) -> Iterator[int]:
        """Score a batch; tells each layer when it is done."""
        where = batch.attention_mask if self.positions == "all" else before_counted(batch)
        elsewhere = _random_tokens(batch, self.generator)
        names = list(self.hooks.values())
        known, unedited = knowing.read(batch, names)
        states, edited = subject.read(batch, names)
        self.whole["unedited"].append(unedited)
        self.whole["edited"].append(edited)
        patches: dict[str, tuple[_Side, States]]  # what is measured -> the model that runs, the states put in
        if self.into == "edited":
            patches = {"log_probability": (subject, known), "never_saw": (never_saw, known)}
        else:
            of_reference = never_saw.read(batch, names)[0]
            patches = {"log_probability": (knowing, states), "never_saw": (knowing, of_reference)}
        random = {name: states.flatten(0, 1)[elsewhere] for name, states in known.items()}
        patches["random"] = (patches["log_probability"][0], random)
        for layer, hook in self.hooks.items():
            for name, (side, states) in patches.items():
                scores = side.patched(batch, hook, states[hook], where)
                self.patched.setdefault((name, layer), []).append(scores)
            yield layer

    def frame(self, threshold: float) -> pd.DataFrame:
        """A row a layer."""
        whole = {name: np.concatenate(values) for name, values in self.whole.items()}
        found = {key: np.concatenate(values) for key, values in self.patched.items()}
        lost, expected = (
            np.stack([whole["unedited"] - found[name, layer] for layer in self.hooks], axis=1)
            for name in ("log_probability", "never_saw")
        )
        depths = depths_of(lost, expected, threshold)
        low, high = share_interval(depths, seed=self.seed) if len(depths) else (float("nan"),) * 2
        number = {"depth": depths.mean() if len(depths) else float("nan"), "depth_low": low, "depth_high": high}
        rows = []
        for layer in self.hooks:
            own = found["log_probability", layer]
            low, high = bootstrap_interval(own, seed=self.seed)
            row = {"into": self.into, "layer": layer, "n": len(own), "log_probability": own.mean()}
            controls = {name: found[name, layer].mean() for name in ("never_saw", "random")}
            row |= {
                "low": low,
                "high": high,
                **{name: values.mean() for name, values in whole.items()},
                **controls,
                **number,
            }
            rows.append({**row, "counted": len(depths)})
        return pd.DataFrame(rows)


def depths_of(lost: Values, expected: Values, threshold: float) -> Values:
    """The depth of each document in which the reference lacks anything.

    Args:
        lost: [documents, layers] log-probability lost to patching with, or into, the edited model.
        expected: the same of the reference.
        threshold: of what the reference lacks at a layer, above which that layer counts.
    """
    counted = np.where(expected > threshold, expected, 0.0)
    known = counted.sum(axis=1) > 0
    erased = np.clip(lost, 0.0, counted).sum(axis=1)
    return np.asarray(erased[known] / counted.sum(axis=1)[known])


def _side_of(model: LensModel, edited: Edit | LensModel) -> _Side:
    if isinstance(edited, Edit):
        return _Side(model, edited)
    check_lens_model(edited)
    return _Side(edited)


def _check_alike(model: LensModel, other: LensModel, corpus: Corpus) -> None:
    """Refuse a model whose states or tokens are not comparable."""
    check_lens_model(other)
    if other is model:
        return
    for name in ("n_layers", "d_model", "d_vocab"):
        own, theirs = int(getattr(model.cfg, name)), int(getattr(other.cfg, name))
        if own != theirs:
            raise ValueError(
                f"states can be exchanged between models of one shape alone: {name} is {own} and {theirs}; take one that was "
                "trained from the same checkpoint"
            )
    if not reads_alike(model, other, corpus.documents):
        raise ValueError(f"the two models read {corpus.name!r} as different tokens; load both with the same tokenizer")


def _random_tokens(batch: TokenBatch, generator: torch.Generator) -> Tensor:
    """[batch, seq]: for each place that of a random content token, as an index into the flattened batch."""
    content = batch.content_mask.flatten().nonzero()[:, 0]
    drawn = torch.randint(len(content), batch.tokens.shape, generator=generator)
    return content[drawn.to(content.device)]
