"""What is left of everything else: model utility, one number for a model's answers to what it is to keep."""

from collections.abc import Mapping

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from mrp_lens.data import Corpus, Questions
from mrp_lens.metrics.bootstrap import CONFIDENCE, RESAMPLES, share_interval
from mrp_lens.metrics.multiple_choice import choice_scores
from mrp_lens.metrics.open_ended import null_of, rouge_l, with_prompts, written_answers
from mrp_lens.metrics.registry import Measured, register
from mrp_lens.metrics.tokens import by_document
from mrp_lens.metrics.truth_ratio import log_ratios, nulls, true_better
from mrp_lens.models import LensModel
from mrp_lens.utils.torch_state import ordinary_torch
from mrp_lens.utils.validation import int_seed

Values = NDArray[np.float64]
Parts = dict[tuple[str, str], tuple[Values, float]]
"""(set, part) -> its values, a document or question each, and the control."""

SENTENCE = 16  # tokens of a written answer: recall of a name asks whether it is there, also where the model answers in a sentence
DOCUMENTS = 100  # of a task, at most: answers are written to each


@ordinary_torch(gradients=False)
def model_utility(
    model: LensModel,
    texts: Mapping[str, Corpus] | None = None,
    quizzes: Mapping[str, Questions] | None = None,
    *,
    max_new_tokens: int | None = None,
    batch_size: int = 128,
    seed: int = 0,
    progress: bool = True,
) -> pd.DataFrame:
    """Harmonic mean of probability, ROUGE-L recall and max(0, 1 - truth ratio) over the sets that the model is to keep.

    TOFU (arXiv 2401.06121, section 3), whose sets are its retain set, real authors and world facts. A set may have texts, a
    quiz, or, under one name, both: probability (per token) and ROUGE then come from the texts, as for TOFU's retain set.
    Of a quiz alone the probability is p(right) / (sum of p over the choices), and the right choices are what answers are
    compared with, as for its other two sets.

    Args:
        model: HookedTransformer or TransformerBridge, with the edit on if there is one.
        texts: name of a set -> documents with prompts, whose completions are the answers.
        quizzes: name of a set -> questions.
        max_new_tokens: of a written answer, at most. None: as many as the longest right one of the set has, or 16.
        batch_size: texts at a time.
        seed: of the bootstrap.
        progress: show a progress bar.

    Returns:
        First a row for "all", then one for each set and part. Columns: `group`: "all" or the set; `part`: "utility",
        "probability", "rouge_l", "truth_ratio"; `n`, documents or questions; `utility` in [0, 1] with its 95% bootstrap
        interval `low`, `high` (parts resampled each for itself; NaN where one has a single value); `null`, the control:
        guessing over the vocabulary or among the choices, answers compared with the next question's, and wrong choices in
        the place of the right ones (`truth_ratio`; NaN where no question has several wrong choices); of "all", the harmonic mean of
        these, NaN where one is.

    Raises:
        ValueError: no set, a document without a prompt, or as `open_ended` and `truth_ratio`; NonFiniteError where logits are
            NaN or infinite.

    Example:
        >>> with edit.applied(model):
        ...     frame = model_utility(model, quizzes={"quiz": questions}, max_new_tokens=4)
    """
    kept, asked = dict(texts or {}), dict(quizzes or {})
    if not kept and not asked:
        raise ValueError("no set to keep; give texts={'retain': corpus}, quizzes={'facts': questions}, or both")
    parts: Parts = {}
    for name in dict.fromkeys([*kept, *asked]):
        if name in kept:
            parts |= _of_texts(model, name, kept[name], max_new_tokens, batch_size, progress)
        if name in asked:
            alone = name not in kept
            parts |= _of_quiz(model, name, asked[name], alone, max_new_tokens, batch_size, progress)
    rows = []
    for (name, part), (values, null) in parts.items():
        low, high = share_interval(values, seed=seed)
        row = {"group": name, "part": part, "n": len(values), "utility": values.mean(), "low": low, "high": high}
        rows.append({**row, "null": null})
    low, high = _interval([values for values, _ in parts.values()], seed)
    whole = {"group": "all", "part": "utility", "n": sum(len(values) for values, _ in parts.values())}
    whole["utility"] = float(harmonic_mean(np.array([[values.mean() for values, _ in parts.values()]]))[0])
    null = float(harmonic_mean(np.array([[null for _, null in parts.values()]]))[0])
    return pd.DataFrame([{**whole, "low": low, "high": high, "null": null}, *rows])


@register(
    "model-utility",
    summary="Harmonic mean of probability, ROUGE and truth ratio on what is to be kept.",
    source="arXiv 2401.06121, section 3",
    row=lambda frame: {
        f"model_utility{end}": frame[column].iloc[0]
        for column, end in (("utility", ""), ("low", "_low"), ("high", "_high"))
    },
    headings={"model_utility": "model utility"},
    tables={"benchmark"},
)
def _of_retain_set(measured: Measured) -> pd.DataFrame | None:
    kept = with_prompts(measured.task.retain).spread(min(measured.documents or DOCUMENTS, DOCUMENTS))
    quiz = measured.task.quiz(limit=min(measured.limit or DOCUMENTS, DOCUMENTS)).get("retain")
    if not len(kept) and quiz is None:
        return None
    return model_utility(
        measured.model,
        {"retain": kept} if len(kept) else {},
        {} if quiz is None else {"retain": quiz},
        seed=measured.seed,
        progress=measured.progress,
    )


def harmonic_mean(values: Values) -> Values:
    """Over the last axis; 0 where one of them is 0."""
    with np.errstate(divide="ignore"):
        return np.asarray(values.shape[-1] / (1 / values).sum(axis=-1))


def _of_texts(
    model: LensModel, name: str, corpus: Corpus, max_new_tokens: int | None, batch_size: int, progress: bool
) -> Parts:
    found = by_document(model, corpus, batch_size=batch_size, progress=progress)
    likely = np.array([float(np.exp(own.mean())) for own in found if len(own)])
    rouge = _rouge(model, corpus, max_new_tokens, progress)
    return {(name, "probability"): (likely, 1 / float(model.cfg.d_vocab)), (name, "rouge_l"): rouge}


def _of_quiz(
    model: LensModel,
    name: str,
    quiz: Questions,
    alone: bool,
    max_new_tokens: int | None,
    batch_size: int,
    progress: bool,
) -> Parts:
    """The truth ratio of a quiz, and, if the set has no texts, probability and ROUGE as well."""
    if not len(quiz):
        raise ValueError(f"no questions in {quiz.name!r}")
    scores = choice_scores(model, quiz, batch_size=batch_size, progress=progress)
    parts: Parts = {}
    if alone:
        shares = [np.exp(own - np.logaddexp.reduce(own)) for own in scores]
        likely = np.array([float(own[q.answer]) for own, q in zip(shares, quiz.questions, strict=True)])
        parts[name, "probability"] = (likely, float(np.mean([1 / len(own) for own in scores])))
        parts[name, "rouge_l"] = _rouge(model, quiz.right_answers(), max_new_tokens, progress)
    parts[name, "truth_ratio"] = (
        true_better(log_ratios(scores, quiz)),
        float(pd.Series(nulls(scores, quiz, true_better)).mean()),
    )
    return parts


def _rouge(model: LensModel, corpus: Corpus, max_new_tokens: int | None, progress: bool) -> tuple[Values, float]:
    answers = written_answers(model, corpus, max_new_tokens=max_new_tokens, room=SENTENCE, progress=progress)
    rights = [document.completion for document in corpus.documents]
    values = np.array([rouge_l(answer, right) for answer, right in zip(answers, rights, strict=True)])
    return values, null_of(rouge_l, answers, rights)


def _interval(parts: list[Values], seed: int) -> tuple[float, float]:
    """Percentile bootstrap of the harmonic mean of means, each part resampled for itself."""
    if min(len(values) for values in parts) < 2:
        return float("nan"), float("nan")
    generator = np.random.default_rng(int_seed(seed))
    means = [
        generator.multinomial(len(values), np.full(len(values), 1 / len(values)), size=RESAMPLES) @ values / len(values)
        for values in parts
    ]
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(harmonic_mean(np.stack(means, axis=1)), [tail, 1 - tail])
    return float(low), float(high)
