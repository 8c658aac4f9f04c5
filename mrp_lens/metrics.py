"""Looking at a model: what it answers and how well it predicts text. Each metric returns a tidy frame with its control."""

from collections.abc import Callable

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from tqdm.auto import tqdm

from mrp_lens.batching import Encoded, Encoder, in_order
from mrp_lens.corpus import Corpus, Document, Questions
from mrp_lens.model import LensModel
from mrp_lens.predictions import predictions, targets
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
    model: LensModel, questions: Questions, *, batch_size: int = 128, seed: int = 0, progress: bool = False
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
    model: LensModel, questions: Questions, *, batch_size: int = 128, progress: bool = False
) -> list[NDArray[np.float64]]:
    """For each question, the mean log-probability per token (nats) of every choice after the prompt.

    One pass over the text of a choice also scores all choices that share its tokens up to their own last one: where
    every choice is a single token, one pass a question.
    """
    encoder = Encoder.for_model(model)
    documents = [Document(q.prompt, choice) for q in questions.questions for choice in q.choices]
    encoded = encoder.encode(documents, keep="end")  # where a prompt is too long, the choice still has to be scored
    rows: list[Encoded] = []
    scored: list[list[int]] = []  # for each row, the choices (counted over all questions) whose score it gives
    start = 0
    for question in questions.questions:
        first_row = len(rows)
        for choice in sorted(range(start, start + len(question.choices)), key=lambda c: -len(encoded[c].ids)):
            context = encoded[choice].ids[:-1]
            known = (row for row in range(first_row, len(rows)) if rows[row].ids[: len(context)] == context)
            row = next(known, None)
            if row is None:
                rows.append(encoded[choice])
                scored.append([choice])
            else:
                scored[row].append(choice)
        start += len(question.choices)
    values = np.empty(len(encoded))
    with frozen(model), torch.no_grad(), tqdm(total=len(rows), desc="scoring choices", disable=not progress) as bar:
        for chosen, batch in in_order(encoder, rows, batch_size):
            predicted = predictions(model, batch).cpu()
            ends = batch.loss_mask.sum(dim=1).cumsum(0).tolist()
            for begin, row in zip([0, *ends], chosen, strict=False):
                for choice in scored[row]:
                    ids = [
                        token
                        for token, counts in zip(encoded[choice].ids, encoded[choice].in_loss, strict=True)
                        if counts
                    ]
                    places = torch.arange(begin, begin + len(ids))
                    values[choice] = float(predicted[places, torch.tensor(ids)].double().mean())
            bar.update(len(chosen))
    return np.split(values, np.cumsum([len(q.choices) for q in questions.questions])[:-1])


def perplexity(
    model: LensModel, corpus: Corpus, *, batch_size: int = 128, seed: int = 0, progress: bool = False
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
    model: LensModel, corpus: Corpus, *, batch_size: int = 128, seed: int = 0, progress: bool = False
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
            own = predictions(model, batch).gather(-1, targets(batch)[:, None])[:, 0].double().cpu()
            row = batch.loss_mask[:, 1:].nonzero()[:, 0].cpu()
            sums[chosen, 0] = torch.zeros(len(chosen), dtype=torch.float64).index_add(0, row, own).numpy()
            sums[chosen, 1] = batch.loss_mask.sum(dim=1).cpu().numpy()
            bar.update(len(chosen))
    kept = sums[sums[:, 1] > 0]
    if not len(kept):
        raise ValueError(f"{corpus.name!r} holds no token to predict: every document is empty or a single token")
    return kept
