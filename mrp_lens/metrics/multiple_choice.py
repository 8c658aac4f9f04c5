"""What a model answers: accuracy on multiple-choice questions."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from mrp_lens.data import Questions
from mrp_lens.metrics.bootstrap import bootstrap_interval
from mrp_lens.metrics.perplexity import encoded_choices, mean_log_probabilities
from mrp_lens.metrics.registry import Measured, register
from mrp_lens.models import LensModel, encoder_for
from mrp_lens.utils.torch_state import ordinary_torch

UNNAMED = "no group"


@ordinary_torch(gradients=False)
def accuracy(
    model: LensModel, questions: Questions, *, batch_size: int = 128, seed: int = 0, progress: bool = False
) -> pd.DataFrame:
    """Share of questions whose right choice has the largest length-normalised likelihood (log p per token).

    A question in which k choices share the largest counts 1/k if the right one is among them, as a guess would.

    Returns:
        One row for each group and, if there are several, one for "all" (first). Columns: `group`, `n`, `accuracy` in
        [0, 1] with its 95% bootstrap interval over questions `low`, `high` (NaN with a single question); `chance`, the
        control: what blind guessing gives; `answer_probability`, mean over questions of the right choice's probability per token (geometric mean).

    Raises:
        ValueError: there are no questions, a choice that cannot be scored, or a group named "all" beside others;
            NonFiniteError where the model's logits are NaN or infinite.
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


def side_row(frame: pd.DataFrame) -> dict[str, float]:
    """Of a frame with a row a `side` ("forget", "retain"): `forget_accuracy`, `forget_low`, ..."""
    return {
        f"{side}_{key}": value for side, found in frame.set_index("side").iterrows() for key, value in found.items()
    }


@register(
    "accuracy",
    summary="Share of questions answered right, on the forget quiz and on the retain quiz.",
    row=side_row,
    headings={"forget_accuracy": "accuracy on the forget quiz", "retain_accuracy": "accuracy on the retain quiz"},
    tables={"unlearn"},
)
def _of_quizzes(measured: Measured) -> pd.DataFrame | None:
    found = {
        side: accuracy(measured.model, quiz, seed=measured.seed, progress=measured.progress).iloc[0]
        for side, quiz in measured.task.quiz(limit=measured.limit).items()
    }
    rows = [{"side": side, **first[["accuracy", "low", "high", "chance"]]} for side, first in found.items()]
    return pd.DataFrame(rows) if rows else None


def by_group(table: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    """The rows of each `group`; and, if there are several groups, all rows as "all" (first).

    Rows without a name are "all" if no row has one, and else "no group".

    Raises:
        ValueError: one of several groups is named "all".
    """
    parts = [(str(name), part) for name, part in table.groupby("group", sort=False)]
    if len(parts) == 1:
        return [(parts[0][0] or "all", table)]
    if any(name == "all" for name, _ in parts):
        raise ValueError('a group cannot be named "all", which stands for all groups together; rename it')
    return [("all", table), *((name or UNNAMED, part) for name, part in parts)]


def answered_right(scores: Sequence[NDArray[np.float64]], questions: Questions) -> NDArray[np.float64]:
    """1 for each question whose right choice has the highest score, 0 for the others.

    Where several choices share it, a guess among them: 1 / (how many), so that the order of the choices never counts.

    Raises:
        ValueError: a score that is NaN.
    """
    shares = []
    for score, question in zip(scores, questions.questions, strict=True):
        if np.isnan(score).any():
            raise ValueError(f"a choice of {question.prompt!r} has the score NaN, which says nothing")
        best = score == score.max()
        shares.append(float(best[question.answer] / best.sum()))
    return np.array(shares)


@ordinary_torch(gradients=False)
def choice_scores(
    model: LensModel, questions: Questions, *, batch_size: int = 128, progress: bool = False
) -> list[NDArray[np.float64]]:
    """For each question, the mean log-probability per token (nats) of every choice after the prompt.

    A choice's score is its own, whatever the other choices are: that of the tokens which reach into it when prompt and
    choice are read as one text. -infinity where the model rules one of them out.

    Raises:
        ValueError: a choice without a token, or too long for the model; NonFiniteError where logits are NaN.
    """
    encoder = encoder_for(model)
    sizes = [len(question.choices) for question in questions.questions]
    rows = encoded_choices(encoder, questions)
    return mean_log_probabilities(model, encoder, rows, sizes, batch_size=batch_size, progress=progress)
