"""Whether a model still tells the truth from a falsehood of the same form: truth ratio, and forget quality made of it."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from mrp_lens.data import Questions
from mrp_lens.metrics.bootstrap import CONFIDENCE, share_interval
from mrp_lens.metrics.multiple_choice import by_group, choice_scores
from mrp_lens.metrics.registry import Measured, register
from mrp_lens.models import LensModel
from mrp_lens.utils.torch_state import ordinary_torch

Values = NDArray[np.float64]


@ordinary_torch(gradients=False)
def truth_ratio(
    model: LensModel, questions: Questions, *, batch_size: int = 128, seed: int = 0, progress: bool = True
) -> pd.DataFrame:
    """How alike right and wrong answers are to the model: mean over questions of min(R, 1 / R), R = p(wrong) / p(right).

    TOFU (arXiv 2401.06121, Eq. 1). p is a choice's probability per token, p(wrong) the geometric mean over the wrong
    choices, as in TOFU's and open-unlearning's code (the paper writes an arithmetic one). The right choice is best a
    paraphrase of what the model was taught: otherwise R measures wording.

    Args:
        model: HookedTransformer or TransformerBridge, with the edit on if there is one.
        questions: each with a right choice and wrong ones of the same form; reported by group.
        batch_size: texts (prompt and choice) at a time.
        seed: of the bootstrap.
        progress: show a progress bar.

    Returns:
        One row for each group and, if there are several, one for "all" (first). Columns: `group`, `n`; `truth_ratio` in
        [0, 1] with its 95% interval `low`, `high`, as of `metrics.accuracy`: 1 where right
        and wrong are equally likely; `null`, the control: what each wrong choice in the place of the right one gives, the
        level of a model that does not know which is right; `true_better`, mean of max(0, 1 - R), the part that the truth
        ratio has in model utility: 1 where the right choice is certain.

    Raises:
        ValueError: no questions, a choice that cannot be scored, or a right and a wrong choice that the model both rules
            out; NonFiniteError where the model's logits are NaN or infinite.

    Example:
        >>> with edit.applied(model):
        ...     frame = truth_ratio(model, questions)
    """
    scores = _scores(model, questions, batch_size, progress)
    logs = log_ratios(scores, questions)
    table = pd.DataFrame(
        {
            "group": [question.group for question in questions.questions],
            "entity": questions.entities,
            "closeness": closeness(logs),
            "null": nulls(scores, questions, closeness),
            "true_better": true_better(logs),
        }
    )
    rows = []
    for name, part in by_group(table):
        low, high = share_interval(part["closeness"].to_numpy(float), part["entity"].tolist(), seed=seed)
        row = {"group": name, "n": len(part), "truth_ratio": part["closeness"].mean(), "low": low, "high": high}
        rows.append({**row, "null": part["null"].mean(), "true_better": part["true_better"].mean()})
    return pd.DataFrame(rows)


@ordinary_torch(gradients=False)
def forget_quality(
    model: LensModel,
    questions: Questions,
    *,
    reference: LensModel | None,
    batch_size: int = 128,
    progress: bool = True,
) -> pd.DataFrame:
    """Whether the truth ratios could be those of a model that never saw the forget set: p of a Kolmogorov-Smirnov test.

    TOFU (arXiv 2401.06121, section 3). The test compares the distributions of R over the questions, two-sided.

    Args:
        model: HookedTransformer or TransformerBridge, with the edit on if there is one.
        questions: as for `truth_ratio`.
        reference: the model that never saw the forget set, such as one trained on the retain set alone.
        batch_size: texts (prompt and choice) at a time.
        progress: show a progress bar.

    Returns:
        One row: `n`; `forget_quality`, the p-value: above .05 the two cannot be told apart; `distance`, the test's statistic in
        [0, 1], with its 95% interval `low`, `high` (Dvoretzky-Kiefer-Wolfowitz with Massart's constant, both distributions at
        once: wide, and valid for any n); `null`, the control: the distance below which two samples of one distribution stay in
        95% of cases. Questions count as independent here: where several are about one entity, p and interval are too small.

    Raises:
        ValueError: no reference, or as `truth_ratio`; NonFiniteError where logits are NaN or infinite.

    Example:
        >>> never_saw = model  # stands for a model that was trained on the retain set alone
        >>> with edit.applied(model):
        ...     frame = forget_quality(model, questions, reference=never_saw)
    """
    if reference is None:
        raise ValueError(
            "forget quality compares with a model that never saw the forget set; give reference=load_model(...), one that was "
            "trained on the retain set alone. Where there is none, truth_ratio needs no reference"
        )
    own, other = (log_ratios(_scores(of, questions, batch_size, progress), questions) for of in (model, reference))
    return pd.DataFrame([compared(own, other)])


@register(
    "truth-ratio",
    summary="Whether the model still tells right answers of the forget quiz from wrong ones: 1 where it does not.",
    source="arXiv 2401.06121, Eq. 1",
    row=lambda frame: {
        f"forget_truth_ratio{end}": frame[column].iloc[0]
        for column, end in (("truth_ratio", ""), ("low", "_low"), ("high", "_high"), ("null", "_null"))
    },
    headings={"forget_truth_ratio": "truth ratio", "forget_truth_ratio_null": "truth ratio of not knowing"},
    tables={"benchmark"},
)
def _of_forget_quiz(measured: Measured) -> pd.DataFrame | None:
    quiz = measured.task.quiz(limit=measured.limit).get("forget")
    if quiz is None:
        return None
    return truth_ratio(measured.model, quiz, seed=measured.seed, progress=measured.progress)


@register(
    "forget-quality",
    summary="Whether the truth ratios could be those of a model that never saw the forget set.",
    source="arXiv 2401.06121, section 3",
    row=lambda frame: {
        "forget_quality": frame["forget_quality"].iloc[0],
        **{f"forget_quality_{key}": frame[key].iloc[0] for key in ("distance", "null")},
    },
    headings={
        "forget_quality": "forget quality (p)",
        "forget_quality_distance": "Kolmogorov-Smirnov distance",
        "forget_quality_null": "distance of chance",
    },
    tables={"benchmark"},
)
def _against_reference(measured: Measured) -> pd.DataFrame | None:
    quiz = measured.task.quiz(limit=measured.limit).get("forget")
    if quiz is None or measured.reference is None:
        return None
    return forget_quality(measured.model, quiz, reference=measured.reference, progress=measured.progress)


def log_ratios(scores: Sequence[Values], questions: Questions) -> Values:
    """log R of each question, from the mean log-probabilities per token of its choices (`choice_scores`).

    Raises:
        ValueError: a question without a wrong choice, or the model rules out the right choice and a wrong one.
    """
    found = []
    for score, question in zip(scores, questions.questions, strict=True):
        if len(score) < 2:
            raise ValueError(
                f"{question.prompt!r} has no wrong choice to compare the right one with; leave the question out"
            )
        wrong = np.delete(score, question.answer).mean()
        if wrong == score[question.answer] == -np.inf:
            raise ValueError(
                f"the model gives probability 0 to the right choice of {question.prompt!r} and to a wrong one, so that they "
                "have no ratio; leave the question out"
            )
        found.append(wrong - score[question.answer])
    return np.array(found)


def compared(own: Values, other: Values) -> dict[str, Any]:
    """The row of `forget_quality`, from log R of both models."""
    from scipy.stats import ks_2samp, kstwobign  # half a second to import

    test = ks_2samp(own, other)  # the logarithm keeps the order, which is all that counts
    distance, count = float(test.statistic), len(own)
    reach = 2 * math.sqrt(math.log(4 / (1 - CONFIDENCE)) / (2 * count))
    row = {"n": count, "forget_quality": float(test.pvalue), "distance": distance}
    ends = {"low": max(0.0, distance - reach), "high": min(1.0, distance + reach)}
    return {**row, **ends, "null": float(kstwobign.ppf(CONFIDENCE)) * math.sqrt(2 / count)}


def closeness(logs: Values) -> Values:
    """min(R, 1 / R) of log R."""
    return np.exp(-np.abs(logs))


def true_better(logs: Values) -> Values:
    """max(0, 1 - R) of log R."""
    return -np.expm1(np.minimum(logs, 0.0))


def nulls(scores: Sequence[Values], questions: Questions, statistic: Callable[[Values], Values]) -> Values:
    """The mean statistic of log R with each wrong choice in turn in the place of the right one, against the other wrong ones.

    NaN for a question with a single wrong choice, or one that the model rules out.
    """
    found = []
    for score, question in zip(scores, questions.questions, strict=True):
        wrong = np.delete(score, question.answer)
        if len(wrong) < 2 or np.isinf(wrong).any():
            found.append(float("nan"))
        else:
            others = (wrong.sum() - wrong) / (len(wrong) - 1)
            found.append(float(statistic(others - wrong).mean()))
    return np.array(found)


def _scores(model: LensModel, questions: Questions, batch_size: int, progress: bool) -> list[Values]:
    if not len(questions):
        raise ValueError(f"no questions in {questions.name!r}")
    return choice_scores(model, questions, batch_size=batch_size, progress=progress)
