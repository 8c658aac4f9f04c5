"""How sure is the model? The largest logit, and what else tells sure from unsure, token by token."""

import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor
from tqdm.auto import tqdm

from mrp_lens.data import Corpus, Document, Questions
from mrp_lens.data.tokenization import Encoded, PaddingSide, TokenBatch, in_order
from mrp_lens.metrics.bootstrap import bootstrap_interval
from mrp_lens.metrics.multiple_choice import UNNAMED, accuracy, side_row
from mrp_lens.metrics.registry import Measured, register
from mrp_lens.models import LensModel, check_lens_model, encoder_for, logits_at
from mrp_lens.models.finite import check_log_probabilities
from mrp_lens.models.generation import end_tokens
from mrp_lens.models.hooks import frozen
from mrp_lens.training.losses import before_counted, targets
from mrp_lens.utils.progress import progress_bar
from mrp_lens.utils.torch_state import ordinary_torch
from mrp_lens.utils.validation import check_one_of, check_whole

Mode = Literal["generated", "forced"]
MEASURES = ("max_logit", "max_probability", "entropy", "margin", "probability")

QuestionSet = Questions | Corpus
QuestionSets = QuestionSet | Mapping[str, QuestionSet]
"""What to ask: questions, a corpus (prompt and completion), or several of them by name: {"forget": ..., ...}."""

Found = tuple[list[int], Int[Tensor, " tokens"], Float[Tensor, "tokens measures"]]
"""Which item each token belongs to, the tokens, and MEASURES at each."""


@dataclass(frozen=True)
class _Item:
    """A question as a document, with its group and its place there."""

    group: str
    question: int
    document: Document


@ordinary_torch(gradients=False)
def confidence(
    model: LensModel,
    questions: QuestionSets,
    *,
    mode: Mode | str = "generated",
    tokens: int = 30,
    batch_size: int = 64,
    padding: PaddingSide = "right",
    seed: int = 0,
    progress: bool = True,
) -> pd.DataFrame:
    """How sure the model is, per group: `token_confidence` in figures, MaxLogit of arXiv 2408.06223 among them.

    RMU is said to move the largest logit of forget questions down and to narrow its spread (`std`). A logit has no
    natural zero, since adding a number to all of them changes no probability: compare `max_logit` between versions of
    one model, such as before and after an edit, and never between models. What is generated differs between versions,
    in length as well (`tokens`); "forced" compares them at the same tokens.

    Args:
        model, questions, mode, tokens, batch_size, padding, progress: as `token_confidence`.
        seed: of the bootstrap.

    Returns:
        One row a group and measure, in the order of appearance: `group`, `mode`; `measure`, one of max_logit (logits),
        max_probability, entropy (nats), margin (nats), probability; `questions` and `tokens`, how many were measured;
        `mean` over tokens, with its 95% bootstrap interval over questions `low`, `high` (NaN with a single question);
        `std` over tokens; `uniform`, the control: what guessing uniformly over the vocabulary gives (NaN for
        max_logit, for want of a zero).

    Raises:
        TypeError, ValueError: as `token_confidence`.

    Example:
        >>> before = confidence(model, {"forget": questions})
        >>> with fit.edit.applied(model):
        ...     after = confidence(model, {"forget": questions})
    """
    frame = token_confidence(
        model, questions, mode=mode, tokens=tokens, batch_size=batch_size, padding=padding, progress=progress
    )
    vocabulary = int(model.cfg.d_vocab)
    uniform = {
        "max_logit": float("nan"),
        "max_probability": 1 / vocabulary,
        "entropy": float(np.log(vocabulary)),
        "margin": 0.0,
        "probability": 1 / vocabulary,
    }
    rows = []
    for group, part in frame.groupby("group", sort=False):
        by_question = part.groupby("question", sort=False)
        counts = by_question.size().to_numpy().astype(float)
        for measure in MEASURES:
            totals = by_question[measure].sum().to_numpy(float)
            low, high = _interval(totals, counts, seed)
            rows.append(
                {"group": group, "mode": mode, "measure": measure, "questions": len(counts), "tokens": len(part)}
                | {"mean": totals.sum() / counts.sum(), "low": low, "high": high}
                | {"std": float(part[measure].std(ddof=0)), "uniform": uniform[measure]}
            )
    return pd.DataFrame(rows)


@ordinary_torch(gradients=False)
def token_confidence(
    model: LensModel,
    questions: QuestionSets,
    *,
    mode: Mode | str = "generated",
    tokens: int = 30,
    batch_size: int = 64,
    padding: PaddingSide = "right",
    progress: bool = True,
) -> pd.DataFrame:
    """How sure the model is at every token that it writes, or at every token of the right answer.

    Args:
        model: HookedTransformer or TransformerBridge, with the edit on if there is one.
        questions: questions, whose right choices are the answers; a corpus, whose completions are; or several by
            name: {"forget": ..., "retain": ...}.
        mode: "generated": greedy decoding after the prompt, up to and including the first of the tokens that end a text, of
            the tokenizer's or the checkpoint's generation config. Every token is a new forward pass over the whole text, so
            that an edit sees what it saw in training.
            "forced": prompt and right answer are read, and the model is measured where it predicts the answer.
        tokens: at most so many of a question (the paper: 30). Prompts are cut at their start where they would not
            leave room for them in the model's context; a UserWarning tells how many were.
        batch_size: questions at a time. The logits of one batch, [batch_size, length, d_vocab], are what takes memory.
        padding: "right" or "left"; of no effect beyond rounding.
        progress: show a progress bar.

    Returns:
        One row a token: `group` (the name, where names are given; else that of the corpus, or the question's own
        group: "all" if none has one, "no group" if others have), `mode`, `question` (place in its questions or corpus,
        from 0), `position` (from 0, in the generated text or the answer), `token` (as text); `max_logit`, the largest logit, as it leaves the
        model (comparable between versions of one model only: a logit has no natural zero); `max_probability`;
        `entropy` of the next-token distribution, in nats; `margin`, log-probability of the likeliest token less that
        of the second, in nats; `probability` of the token that stands there. Questions without a token to measure,
        such as an empty completion, have no row.

    Raises:
        TypeError: neither questions nor a corpus.
        ValueError: nothing to ask, an unknown mode, an empty prompt to generate from, a group without any answer, or
            more tokens than the model's context has room for; NonFiniteError where logits are NaN or infinite (at
            -infinity a token is ruled out, which is no fault).
    """
    check_one_of(Mode, mode=mode)
    check_lens_model(model)
    most = int(model.cfg.n_ctx) - 2  # a BOS and the end of the prompt come before
    if not 1 <= tokens <= most:
        raise ValueError(f"tokens must be from 1 to {most} (the model's context length less 2), got {tokens}")
    check_whole(batch_size=batch_size)
    items = _items(questions)
    measure = _generated if mode == "generated" else _forced
    rows = []
    bar = progress_bar(total=len(items), desc=f"{mode} tokens", progress=progress)
    with frozen(model), torch.no_grad(), bar:
        written = [0] * len(items)
        for places, ids, values in measure(model, items, tokens, batch_size, padding, bar):
            for place, token, of_token in zip(places, ids.tolist(), values.tolist(), strict=True):
                rows.append((place, written[place], token, *of_token))
                written[place] += 1
    for group in {item.group: None for item in items}.keys() - {items[row[0]].group for row in rows}:
        raise ValueError(f"no answer in {group!r} holds a token to predict; give completions, or use mode='generated'")
    rows.sort(key=lambda row: row[:2])
    return pd.DataFrame(
        {
            "group": [items[row[0]].group for row in rows],
            "mode": mode,
            "question": [items[row[0]].question for row in rows],
            "position": [row[1] for row in rows],
            "token": [str(model.tokenizer.decode([row[2]])) for row in rows],
            **{name: [row[3 + column] for row in rows] for column, name in enumerate(MEASURES)},
        }
    )


@register(
    "confidence",
    summary="How sure the model is of each token of the right answers, or of the texts where there is no quiz.",
    source="arXiv 2408.06223, MaxLogit",
    figures=["confidence_by_method"],
)
def _of_answers(measured: Measured) -> pd.DataFrame:
    asked = measured.task.asked(limit=measured.limit)
    return confidence(measured.model, asked, mode="forced", seed=measured.seed, progress=measured.progress)


@register(
    "quiz",
    summary="Accuracy, largest probability and largest logit of the right answers, on each quiz.",
    source="arXiv 2408.06223, MaxLogit",
    row=side_row,
    tables={"sweep"},
)
def _of_quizzes(measured: Measured) -> pd.DataFrame | None:
    rows = []
    for side, quiz in measured.task.quiz(limit=measured.limit).items():
        right = accuracy(measured.model, quiz, seed=measured.seed, progress=measured.progress).iloc[0]
        sure = confidence(measured.model, {side: quiz}, mode="forced", seed=measured.seed, progress=measured.progress)
        means = sure.set_index("measure")["mean"]
        rows.append({"side": side, **right[["accuracy", "low", "high"]], **means[["max_probability", "max_logit"]]})
    return pd.DataFrame(rows) if rows else None


def _items(questions: QuestionSets) -> list[_Item]:
    """Every question of every group, in their order."""
    if not isinstance(questions, Mapping):
        return _items_of(questions)
    if not questions:
        raise ValueError("no questions given; name at least one set: {'forget': ..., 'retain': ...}")
    return [replace(item, group=group) for group, chosen in questions.items() for item in _items_of(chosen)]


def _items_of(chosen: QuestionSet) -> list[_Item]:
    if not isinstance(chosen, Questions | Corpus):
        raise TypeError(f"expected Questions or a Corpus, or several by name, got {type(chosen).__name__}")
    if not len(chosen):
        raise ValueError(f"no questions in {chosen.name!r}")
    if isinstance(chosen, Corpus):
        return [_Item(chosen.name, place, document) for place, document in enumerate(chosen.documents)]
    pairs = zip(chosen.questions, chosen.right_answers().documents, strict=True)
    unnamed = UNNAMED if any(chosen.groups) else "all"  # as `accuracy` calls them
    return [_Item(question.group or unnamed, place, document) for place, (question, document) in enumerate(pairs)]


def _generated(
    model: LensModel, items: Sequence[_Item], tokens: int, batch_size: int, padding: PaddingSide, bar: tqdm
) -> Iterator[Found]:
    """Greedy decoding without a key/value cache, which the two classes and their hooks treat differently."""
    encoder = encoder_for(model, max_length=int(model.cfg.n_ctx) - tokens)
    rows = encoder.encode([Document("", item.document.prompt) for item in items], keep="end")
    for row, item in zip(rows, items, strict=True):
        if not any(row.content):
            raise ValueError(
                f"question {item.question} of {item.group!r} has an empty prompt, after which there is nothing to generate; "
                "use mode='forced', or read the corpus with templates, such as prompt='{question}', completion=' {answer}'"
            )
    ends = end_tokens(model)
    for places, _ in in_order(encoder, rows, batch_size):
        going = places
        for _ in range(tokens):
            batch = encoder.collate([rows[place] for place in going], side=padding)
            logits = _last_logits(model, batch)
            ids = logits.argmax(dim=-1)
            yield going, ids, _measures(model, batch, logits, ids)
            for place, token in zip(going, ids.tolist(), strict=True):
                row = rows[place]
                rows[place] = Encoded((*row.ids, token), (*row.content, True), (*row.in_loss, True))
            going = [place for place in going if rows[place].ids[-1] not in ends]
            if not going:
                break
        bar.update(len(places))


def _forced(
    model: LensModel, items: Sequence[_Item], tokens: int, batch_size: int, padding: PaddingSide, bar: tqdm
) -> Iterator[Found]:
    """One pass over prompt and answer; what follows the last measured token is not read."""
    encoder = encoder_for(model)
    uncut = replace(encoder, max_length=sys.maxsize).encode([item.document for item in items])
    rows = [_fitted(row, tokens, encoder.max_length) for row in uncut]
    cut = sum(row.in_loss.count(False) < full.in_loss.count(False) for row, full in zip(rows, uncut, strict=True))
    if cut:
        warnings.warn(
            f"{cut} of {len(rows)} prompts leave no room for their answers in the model's context of "
            f"{encoder.max_length} tokens; only the end of them is read",
            stacklevel=4,
        )
    asked = [place for place, row in enumerate(rows) if any(row.in_loss[1:])]
    for chosen, batch in in_order(encoder, [rows[place] for place in asked], batch_size, side=padding):
        counted = batch.loss_mask[:, 1:]
        logits = logits_at(model, batch.tokens, batch.attention_mask, before_counted(batch))
        ids = targets(batch)
        yield (
            [asked[chosen[row]] for row in counted.nonzero()[:, 0].tolist()],
            ids,
            _measures(model, batch, logits, ids),
        )
        bar.update(len(chosen))


def _fitted(row: Encoded, tokens: int, length: int) -> Encoded:
    """The row up to its last token to be measured; over `length`, the end of that, and BOS."""
    answer = [place for place, counts in enumerate(row.in_loss) if counts and place > 0][:tokens]
    end = answer[-1] + 1 if answer else len(row.ids)
    head = int(row.content[:1] == (False,))
    return row.at([*range(head), *range(max(head, end - (length - head)), end)])


def _last_logits(model: LensModel, batch: TokenBatch) -> Float[Tensor, "batch d_vocab"]:
    """At the last token of each row."""
    places = torch.arange(batch.tokens.shape[1], device=batch.tokens.device)
    last = (places * batch.attention_mask).amax(dim=1, keepdim=True)
    return logits_at(model, batch.tokens, batch.attention_mask, places == last)


def _measures(
    model: LensModel, batch: TokenBatch, logits: Float[Tensor, "tokens d_vocab"], ids: Int[Tensor, " tokens"]
) -> Float[Tensor, "tokens measures"]:
    """MEASURES, of float32 logits, which are some of the batch's."""
    wide = logits.float()
    log_probabilities = wide.log_softmax(dim=-1)
    check_log_probabilities(model, batch, log_probabilities)
    probabilities = log_probabilities.exp()
    largest, second = wide.topk(2, dim=-1).values.unbind(dim=-1)
    return torch.stack(
        [
            largest,
            probabilities.amax(dim=-1),
            torch.special.entr(probabilities).sum(dim=-1),
            largest - second,
            probabilities.gather(-1, ids[:, None])[:, 0],
        ],
        dim=-1,
    )


def _interval(totals: NDArray[np.float64], counts: NDArray[np.float64], seed: int) -> tuple[float, float]:
    """Of the mean over tokens, resampling questions: tokens of a question go together."""
    return bootstrap_interval(
        np.stack([totals, counts], axis=1), lambda r: r[:, :, 0].sum(axis=1) / r[:, :, 1].sum(axis=1), seed=seed
    )
