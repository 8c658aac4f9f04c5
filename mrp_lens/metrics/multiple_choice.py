"""What a model answers: likelihoods of the choices of questions, and the share of questions that it answers right."""

import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from mrp_lens.data import Document, Questions
from mrp_lens.data.kinds import check_questions
from mrp_lens.data.tokenization import Encoded, Encoder
from mrp_lens.metrics.bootstrap import share_interval
from mrp_lens.metrics.likelihood import mean_log_probabilities
from mrp_lens.metrics.registry import Measured, register
from mrp_lens.models import LensModel, encoder_for
from mrp_lens.utils.torch_state import ordinary_torch

UNNAMED = "no group"
SHOWN = 40  # characters of a choice in a message


@ordinary_torch(gradients=False)
def accuracy(
    model: LensModel, questions: Questions, *, batch_size: int = 128, seed: int = 0, progress: bool = True
) -> pd.DataFrame:
    """Share of questions whose right choice has the largest length-normalised likelihood (log p per token).

    A question in which k choices share the largest counts 1/k if the right one is among them, as a guess would.

    Args:
        model: HookedTransformer or TransformerBridge, with the edit on if there is one.
        questions: reported by group.
        batch_size: choices at a time.
        seed: of the bootstrap.
        progress: show a progress bar.

    Returns:
        One row for each group and, if there are several, one for "all" (first). Columns: `group`, `n`, `accuracy` in
        [0, 1] with its 95% interval `low`, `high` over questions or, where several are about
        one, entities (NaN with a single question); `chance`, the control: what blind guessing gives; `answer_probability`, mean
        over questions of the right choice's probability per token (geometric mean).

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
            "entity": questions.entities,
            "right": answered_right(scores, questions),
            "chance": [1 / len(question.choices) for question in questions.questions],
            "probability": [
                float(np.exp(score[q.answer])) for score, q in zip(scores, questions.questions, strict=True)
            ],
        }
    )
    return pd.DataFrame(
        [
            accuracy_row(name, part, seed=seed) | {"answer_probability": part["probability"].mean()}
            for name, part in by_group(table)
        ]
    )


def accuracy_row(group: str, answers: pd.DataFrame, *, seed: int) -> dict[str, Any]:
    """`group`, `n`, `accuracy`, `low`, `high` and `chance` of questions: `right`, from 0 to 1, `entity` and `chance`."""
    right = answers["right"].to_numpy(float)
    low, high = share_interval(right, answers["entity"].tolist(), seed=seed)
    row = {"group": group, "n": len(answers), "accuracy": right.mean(), "low": low, "high": high}
    return row | {"chance": answers["chance"].mean()}


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
    tables={"unlearn", "benchmark"},
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
    model: LensModel, questions: Questions, *, batch_size: int = 128, progress: bool = True
) -> list[NDArray[np.float64]]:
    """For each question, the mean log-probability per token (nats) of every choice after the prompt.

    A choice's score is its own, whatever the other choices are: that of the tokens which reach into it when prompt and
    choice are read as one text. -infinity where the model rules one of them out. Arguments as for `accuracy`.

    Raises:
        TypeError: no Questions.
        ValueError: a choice without a token, or too long for the model; NonFiniteError where logits are NaN.
    """
    encoder = encoder_for(model)
    rows = encoded_choices(encoder, questions)
    sizes = [len(question.choices) for question in questions.questions]
    return mean_log_probabilities(model, encoder, rows, sizes, batch_size=batch_size, progress=progress)


def encoded_choices(encoder: Encoder, questions: Questions, *, right_only: bool = False) -> list[Encoded]:
    """Prompt + choice as tokens, one after the other, of which those that reach into the choice count in the loss.

    A token that holds the end of the prompt and the beginning of the choice counts. Where both together are too long for
    the model, the end is kept; the choice has to be in it as a whole, with a token before it.

    Args:
        encoder: the model's.
        questions: whose choices.
        right_only: the right choice of each question alone.

    Raises:
        TypeError: no Questions.
        ValueError: a choice that cannot be scored as a whole; says which, and why.
    """
    check_questions(questions=questions)
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


def _short(text: str) -> str:
    return repr(text if len(text) <= SHOWN else text[:SHOWN] + "...")
