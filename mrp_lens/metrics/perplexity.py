"""How well a model predicts text."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from tqdm.auto import tqdm

from mrp_lens.data import Corpus, Document, Questions
from mrp_lens.data.tokenization import Encoded, Encoder, in_order
from mrp_lens.metrics.bootstrap import bootstrap_interval
from mrp_lens.metrics.registry import Measured, register
from mrp_lens.models import LensModel, encoder_for
from mrp_lens.models.base import same_positions
from mrp_lens.models.hooks import frozen
from mrp_lens.training.losses import predictions, targets
from mrp_lens.utils.torch_state import ordinary_torch


def encoded_choices(encoder: Encoder, questions: Questions, *, right_only: bool = False) -> list[Encoded]:
    """Prompt + choice as tokens, one after the other, of which those that reach into the choice count in the loss.

    A token that holds the end of the prompt and the beginning of the choice counts. Where both together are too long for
    the model, the end is kept; the choice has to be in it as a whole, with a token before it.

    Args:
        encoder: the model's.
        questions: whose choices.
        right_only: the right choice of each question alone.

    Raises:
        ValueError: a choice that cannot be scored as a whole; says which, and why.
    """
    asked = [
        (number, choice)
        for number, question in enumerate(questions.questions)
        for choice in ([question.answer] if right_only else range(len(question.choices)))
    ]
    documents = [Document(questions.questions[n].prompt, questions.questions[n].choices[c]) for n, c in asked]
    whole = replace(encoder, max_length=sys.maxsize).encode(documents)
    rows = encoder.fitted(whole, keep="end")
    for (number, choice), full, row in zip(asked, whole, rows, strict=True):
        if reason := _why_not(full, row, encoder.max_length):
            text = questions.questions[number].choices[choice]
            raise ValueError(f"{questions.name!r}, question {number}: choice {choice} ({_short(text)}) {reason}")
    return rows


def mean_log_probabilities(
    model: LensModel,
    encoder: Encoder,
    rows: Sequence[Encoded],
    sizes: Sequence[int],
    *,
    batch_size: int,
    progress: bool = False,
) -> list[NDArray[np.float64]]:
    """The mean log-probability (nats) of the tokens that count in each row, grouped as the rows are.

    Within a group one pass over a row also scores those that share its tokens up to their own last one: where every
    choice of a question is a single token, one pass a question. -infinity where the model rules a token out.

    Args:
        model: with the edit on, if there is one.
        encoder: the model's.
        rows: in which a token counts, and never the first one.
        sizes: of the groups of rows that may share passes, such as the choices of a question.
        batch_size: passes at a time.
        progress: show a progress bar.

    Raises:
        NonFiniteError: logits that are NaN or infinite.
    """
    places = [_counted(row) for row in rows]
    passes: list[_Pass] = []
    start = 0
    for size in sizes:
        own: list[_Pass] = []
        for number in sorted(range(start, start + size), key=lambda n: -len(rows[n].ids)):
            context = rows[number].ids[:-1]
            length = len(rows[number].ids)
            known = next(
                (
                    it
                    for it in own
                    if it.row.ids[: len(context)] == context and same_positions(model, len(it.row.ids), length)
                ),
                None,
            )
            if known is None:
                known = _Pass(rows[number], [])
                own.append(known)
            known.scored.append(number)
        passes += own
        start += size
    read = [it.marked(places) for it in passes]
    values = np.full(len(rows), np.nan)
    with frozen(model), torch.no_grad(), tqdm(total=len(read), desc="scoring choices", disable=not progress) as bar:
        for chosen, batch in in_order(encoder, read, batch_size):
            predicted = predictions(model, batch)
            scored: list[int] = []
            lines: list[int] = []
            begin = 0
            for number in chosen:
                line = {place: begin + i for i, place in enumerate(_counted(read[number]))}
                begin += len(line)
                scored += passes[number].scored
                lines += [line[place] for row in passes[number].scored for place in places[row]]
            ids = [rows[row].ids[place] for row in scored for place in places[row]]
            found = predicted[lines, ids].double().cpu().numpy()
            ends = np.cumsum([len(places[row]) for row in scored])
            values[scored] = [part.mean() for part in np.split(found, ends[:-1])]
            bar.update(len(chosen))
    return np.split(values, np.cumsum(sizes)[:-1])


@dataclass(frozen=True)
class _Pass:
    """A row that is read, and the numbers of the rows that it scores: their tokens but the last are its first ones."""

    row: Encoded
    scored: list[int]

    def marked(self, places: Sequence[Sequence[int]]) -> Encoded:
        """The row, with every place in the loss at which one of the scored rows has a token that counts.

        These are not the row's own: where a token holds the end of the prompt and the beginning of one choice, and two
        tokens do for another, the same place belongs to the prompt of one and to the other choice itself.
        """
        wanted = {place for number in self.scored for place in places[number]}
        return replace(self.row, in_loss=tuple(place in wanted for place in range(len(self.row.ids))))


def _counted(row: Encoded) -> list[int]:
    return [place for place, counts in enumerate(row.in_loss) if counts]


def _why_not(whole: Encoded, row: Encoded, max_length: int) -> str | None:
    """Why a row that was cut from the whole cannot be scored; None if it can."""
    if not any(whole.in_loss):
        return "holds no token of its own, so it has no likelihood; leave it out, or give it a text"
    if sum(row.in_loss) < sum(whole.in_loss):
        return (
            f"has {sum(whole.in_loss)} tokens and does not fit into the {max_length} tokens that are read; shorten it"
        )
    if row.in_loss[0]:
        return "has no token before it, after which it could be predicted; give the question a prompt, or shorten the choice"
    return None


def _short(text: str, most: int = 40) -> str:
    return repr(text if len(text) <= most else text[:most] + "...")


@ordinary_torch(gradients=False)
def perplexity(
    model: LensModel, corpus: Corpus, *, batch_size: int = 128, seed: int = 0, progress: bool = False
) -> pd.DataFrame:
    """exp of the mean cross-entropy (nats) per predicted token, with a bootstrap interval over documents.

    Returns:
        One row: `corpus`; `documents` and `tokens`, how many were predicted (a document of one token has none to predict);
        `perplexity`, infinite where the model rules a token of the text out; `low`, `high` (NaN with a single document);
        `uniform`, the control: the perplexity of guessing uniformly over the vocabulary.

    Raises:
        ValueError: no document, or none with a token to predict; NonFiniteError where logits are NaN or infinite.
    """
    sums = _document_log_probabilities(model, corpus, batch_size=batch_size, progress=progress)
    total, count = sums.sum(axis=0)
    with np.errstate(over="ignore"):  # above e^709 it is infinite
        low, high = bootstrap_interval(
            sums, lambda r: np.exp(-r[:, :, 0].sum(axis=1) / r[:, :, 1].sum(axis=1)), seed=seed
        )
        value = float(np.exp(-total / count))
    return pd.DataFrame(
        [
            {
                "corpus": corpus.name,
                "documents": len(sums),
                "tokens": int(count),
                "perplexity": value,
                "low": low,
                "high": high,
                "uniform": float(model.cfg.d_vocab),
            }
        ]
    )


@ordinary_torch(gradients=False)
def answer_probability(
    model: LensModel, corpus: Corpus, *, batch_size: int = 128, seed: int = 0, progress: bool = False
) -> pd.DataFrame:
    """Mean over documents of the completion's probability per token (geometric mean over its tokens).

    Returns:
        One row: `corpus`; `documents`, how many have a token to predict; `probability`, `low`, `high` (NaN with a single
        document); `uniform`, the control: 1 / d_vocab.

    Raises:
        ValueError: as `perplexity`.
    """
    sums = _document_log_probabilities(model, corpus, batch_size=batch_size, progress=progress)
    values = np.exp(sums[:, 0] / sums[:, 1])
    low, high = bootstrap_interval(values, seed=seed)
    row = {
        "corpus": corpus.name,
        "documents": len(values),
        "probability": float(values.mean()),
        "low": low,
        "high": high,
    }
    return pd.DataFrame([{**row, "uniform": 1 / float(model.cfg.d_vocab)}])


@register(
    "answer-probability",
    summary="Probability per token of the forget set's completions.",
    row=lambda frame: {
        f"forget_probability{end}": frame[column].iloc[0]
        for column, end in (("probability", ""), ("low", "_low"), ("high", "_high"))
    },
    headings={"forget_probability": "probability of the forget set's tokens"},
    tables={"unlearn"},
)
def _of_forget_set(measured: Measured) -> pd.DataFrame:
    texts = measured.task.forget_texts.spread(measured.documents)
    return answer_probability(measured.model, texts, seed=measured.seed, progress=measured.progress)


@register(
    "perplexity",
    summary="Perplexity of retain text that no fit saw.",
    row=lambda frame: {"text_perplexity": frame["perplexity"].iloc[0]},
    headings={"text_perplexity_ratio": "perplexity of text, after / before"},
    tables={"unlearn"},
)
def _of_held_out_text(measured: Measured) -> pd.DataFrame:
    texts = measured.task.held_out.spread(measured.documents)
    return perplexity(measured.model, texts, seed=measured.seed, progress=measured.progress)


def _document_log_probabilities(
    model: LensModel, corpus: Corpus, *, batch_size: int, progress: bool
) -> NDArray[np.float64]:
    """[documents, 2]: sum of log-probabilities of the tokens that count, and their number."""
    if not len(corpus):
        raise ValueError(f"no documents in {corpus.name!r}")
    encoder = encoder_for(model)
    encoded = encoder.encode(corpus.documents)
    sums = np.zeros((len(encoded), 2))
    with frozen(model), torch.no_grad(), tqdm(total=len(encoded), desc="scoring text", disable=not progress) as bar:
        for chosen, batch in in_order(encoder, encoded, batch_size):
            own = predictions(model, batch).gather(-1, targets(batch)[:, None])[:, 0].double().cpu()
            row = batch.loss_mask[:, 1:].nonzero()[:, 0].cpu()
            sums[chosen, 0] = torch.zeros(len(chosen), dtype=torch.float64).index_add(0, row, own).numpy()
            sums[chosen, 1] = batch.loss_mask.sum(dim=1).cpu().numpy()
            bar.update(len(chosen))
    kept = sums[sums[:, 1] > 0]
    if not len(kept):
        raise ValueError(f"{corpus.name!r} holds no token to predict: every document is empty or a single token")
    return kept
