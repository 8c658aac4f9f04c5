"""What a model answers: accuracy on multiple-choice questions."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from tqdm.auto import tqdm

from mrp_lens.batching import Encoded, Encoder, in_order
from mrp_lens.corpus import Document, Questions
from mrp_lens.metrics.intervals import bootstrap_interval
from mrp_lens.model import LensModel
from mrp_lens.predictions import predictions
from mrp_lens.stream import frozen


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
            "right": answered_right(scores, questions),
            "chance": [1 / len(question.choices) for question in questions.questions],
            "probability": [
                float(np.exp(score[q.answer])) for score, q in zip(scores, questions.questions, strict=True)
            ],
        }
    )
    rows = []
    for name, part in by_group(table):
        right = part["right"].to_numpy(float)
        low, high = bootstrap_interval(right, seed=seed)
        rows.append(
            {
                "group": name,
                "n": len(part),
                "accuracy": right.mean(),
                "low": low,
                "high": high,
                "chance": part["chance"].mean(),
                "answer_probability": part["probability"].mean(),
            }
        )
    return pd.DataFrame(rows)


def by_group(table: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    """The rows of each `group`, unnamed ones as "all"; and, if there are several groups, all rows as "all" (first)."""
    parts = [(str(name) or "all", part) for name, part in table.groupby("group", sort=False)]
    return [("all", table), *parts] if len(parts) > 1 else parts


def answered_right(scores: Sequence[NDArray[np.float64]], questions: Questions) -> NDArray[np.float64]:
    """1 for each question whose right choice has the highest score, 0 for the others."""
    return np.array([float(np.argmax(score) == q.answer) for score, q in zip(scores, questions.questions, strict=True)])


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
