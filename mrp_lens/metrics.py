"""Looking at a model: what it answers and how well it predicts text. Each metric returns a tidy frame with its control."""

from collections.abc import Callable

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor
from tqdm.auto import tqdm

from mrp_lens.batching import Encoder, TokenBatch, in_order
from mrp_lens.corpus import Corpus, Document, Questions
from mrp_lens.model import LensModel, logits_of
from mrp_lens.stream import frozen

RESAMPLES = 2000
CONFIDENCE = 0.95


def bootstrap_interval(
    values: NDArray[np.float64],
    statistic: Callable[[NDArray[np.float64]], NDArray[np.float64]] = lambda resampled: resampled.mean(axis=1),
    *,
    seed: int = 0,
) -> tuple[float, float]:
    """Percentile bootstrap over the first axis: 95% interval from 2,000 resamples.

    Args:
        values: [n, ...], one row a question or document.
        statistic: maps resamples [r, n, ...] to [r].
        seed: of the resampling.
    """
    generator = np.random.default_rng(seed)
    estimates = np.concatenate(
        [statistic(values[generator.integers(len(values), size=(100, len(values)))]) for _ in range(RESAMPLES // 100)]
    )
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(estimates, [tail, 1 - tail])
    return float(low), float(high)


def accuracy(
    model: LensModel, questions: Questions, *, batch_size: int = 64, seed: int = 0, progress: bool = False
) -> pd.DataFrame:
    """Share of questions whose right choice has the largest length-normalised likelihood (log p per token).

    Returns:
        One row for each group and, if there are several, one for "all" (first). Columns: `group`, `n`, `accuracy` in
        [0, 1] with its 95% bootstrap interval over questions `low`, `high`; `chance`, the control: what blind guessing
        gives; `answer_probability`, mean over questions of the right choice's probability per token (geometric mean).

    Raises:
        ValueError: there are no questions.
    """
    if not len(questions):
        raise ValueError(f"no questions in {questions.name!r}")
    scores = choice_scores(model, questions, batch_size=batch_size, progress=progress)
    table = pd.DataFrame(
        {
            "group": [question.group for question in questions.questions],
            "right": [
                float(np.argmax(score) == q.answer) for score, q in zip(scores, questions.questions, strict=True)
            ],
            "chance": [1 / len(question.choices) for question in questions.questions],
            "probability": [
                float(np.exp(score[q.answer])) for score, q in zip(scores, questions.questions, strict=True)
            ],
        }
    )
    parts = [(str(name), part) for name, part in table.groupby("group", sort=False)]
    rows = []
    for name, part in ([("all", table)] if len(parts) > 1 else []) + parts:
        right = part["right"].to_numpy(float)
        low, high = bootstrap_interval(right, seed=seed)
        rows.append(
            {
                "group": name or "all",
                "n": len(part),
                "accuracy": right.mean(),
                "low": low,
                "high": high,
                "chance": part["chance"].mean(),
                "answer_probability": part["probability"].mean(),
            }
        )
    return pd.DataFrame(rows)


def choice_scores(
    model: LensModel, questions: Questions, *, batch_size: int = 64, progress: bool = False
) -> list[NDArray[np.float64]]:
    """For each question, the mean log-probability per token (nats) of every choice after the prompt.

    Where all choices of a question are single tokens, one pass over its prompt scores them all.
    """
    encoder = Encoder.for_model(model)
    documents = [Document(q.prompt, choice) for q in questions.questions for choice in q.choices]
    encoded = encoder.encode(documents)
    scores = [np.full(len(q.choices), np.nan) for q in questions.questions]
    # A pass over the text of one choice also scores every other choice that differs from it in the last token only.
    jobs: list[tuple[int, list[int], list[int]]] = []  # row to run, the choices it scores, their last tokens
    start = 0
    for q in questions.questions:
        rows = range(start, start + len(q.choices))
        single = all(
            sum(encoded[row].in_loss) == 1 and encoded[row].ids[:-1] == encoded[start].ids[:-1] for row in rows
        )
        for group in [list(rows)] if single else [[row] for row in rows]:
            jobs.append((group[0], group, [encoded[row].ids[-1] for row in group]))
        start += len(q.choices)
    owner = [(number, choice) for number, q in enumerate(questions.questions) for choice in range(len(q.choices))]
    with frozen(model), torch.no_grad(), tqdm(total=len(jobs), desc="scoring choices", disable=not progress) as bar:
        for chosen, batch in in_order(encoder, [encoded[job[0]] for job in jobs], batch_size):
            log_probabilities, target = _next_token_log_probabilities(model, batch)
            for row, job in enumerate(jobs[i] for i in chosen):
                counted = target[row].nonzero()[:, 0]
                if len(job[1]) > 1:
                    values = log_probabilities[row, counted[-1], torch.tensor(job[2])].double().cpu().numpy()
                    for document, value in zip(job[1], values, strict=True):
                        number, choice = owner[document]
                        scores[number][choice] = value
                else:
                    ids = batch.tokens[row, counted + 1]
                    number, choice = owner[job[0]]
                    scores[number][choice] = float(log_probabilities[row, counted, ids].double().mean())
            bar.update(len(chosen))
    return scores


def perplexity(
    model: LensModel, corpus: Corpus, *, batch_size: int = 64, seed: int = 0, progress: bool = False
) -> pd.DataFrame:
    """exp of the mean cross-entropy (nats) per predicted token, with a bootstrap interval over documents.

    Returns:
        One row: `corpus`, `documents`, `tokens`, `perplexity`, `low`, `high`; `uniform`, the control: the
        perplexity of guessing uniformly over the vocabulary.
    """
    sums = _document_log_probabilities(model, corpus, batch_size=batch_size, progress=progress)
    low, high = bootstrap_interval(sums, lambda r: np.exp(-r[:, :, 0].sum(axis=1) / r[:, :, 1].sum(axis=1)), seed=seed)
    total, count = sums.sum(axis=0)
    return pd.DataFrame(
        [
            {
                "corpus": corpus.name,
                "documents": len(corpus),
                "tokens": int(count),
                "perplexity": float(np.exp(-total / count)),
                "low": low,
                "high": high,
                "uniform": float(model.cfg.d_vocab),
            }
        ]
    )


def answer_probability(
    model: LensModel, corpus: Corpus, *, batch_size: int = 64, seed: int = 0, progress: bool = False
) -> pd.DataFrame:
    """Mean over documents of the completion's probability per token (geometric mean over its tokens).

    Returns:
        One row: `corpus`, `documents`, `probability`, `low`, `high`; `uniform`, the control: 1 / d_vocab.
    """
    sums = _document_log_probabilities(model, corpus, batch_size=batch_size, progress=progress)
    values = np.exp(sums[:, 0] / sums[:, 1])
    low, high = bootstrap_interval(values, seed=seed)
    row = {
        "corpus": corpus.name,
        "documents": len(corpus),
        "probability": float(values.mean()),
        "low": low,
        "high": high,
    }
    return pd.DataFrame([{**row, "uniform": 1 / float(model.cfg.d_vocab)}])


def _document_log_probabilities(
    model: LensModel, corpus: Corpus, *, batch_size: int, progress: bool
) -> NDArray[np.float64]:
    """[documents, 2]: sum of log-probabilities of the tokens that count, and their number."""
    if not len(corpus):
        raise ValueError(f"no documents in {corpus.name!r}")
    encoder = Encoder.for_model(model)
    encoded = encoder.encode(corpus.documents)
    sums = np.zeros((len(encoded), 2))
    with frozen(model), torch.no_grad(), tqdm(total=len(encoded), desc="scoring text", disable=not progress) as bar:
        for chosen, batch in in_order(encoder, encoded, batch_size):
            log_probabilities, target = _next_token_log_probabilities(model, batch)
            picked = log_probabilities.gather(-1, batch.tokens[:, 1:, None])[..., 0].double() * target
            sums[chosen, 0] = picked.sum(dim=1).cpu().numpy()
            sums[chosen, 1] = target.sum(dim=1).cpu().numpy()
            bar.update(len(chosen))
    kept = sums[sums[:, 1] > 0]
    if not len(kept):
        raise ValueError(f"{corpus.name!r} holds no token to predict: every document is empty or a single token")
    return kept


def _next_token_log_probabilities(
    model: LensModel, batch: TokenBatch
) -> tuple[Float[Tensor, "batch shifted d_vocab"], Tensor]:
    """Log-probabilities for tokens 1.., in float32, and which of these tokens count."""
    logits = logits_of(model, batch.tokens, batch.attention_mask)
    return logits[:, :-1].float().log_softmax(-1), batch.loss_mask[:, 1:]
