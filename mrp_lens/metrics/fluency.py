"""Whether what an edited model answers is still language: perplexity under the unedited model, repetition, gibberish."""

import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from mrp_lens.data import Document
from mrp_lens.data.tokenization import Encoded
from mrp_lens.edits import Edit, edit_on
from mrp_lens.metrics.bootstrap import share_interval
from mrp_lens.metrics.perplexity import perplexity_of
from mrp_lens.metrics.registry import Measured, register
from mrp_lens.metrics.tokens import by_row, reads_alike
from mrp_lens.models import LensModel, encoder_for
from mrp_lens.models.generation import Continuation, continued, without_end
from mrp_lens.utils.torch_state import ordinary_torch
from mrp_lens.utils.validation import check_whole, int_seed

PROMPTS = 100  # of a task, at most
ORDERS = 19  # with which a text that is no language passes in 1 case of 20
LEAST_WORDS = 4  # of a text that is tested: 3 words have 6 orders

Values = NDArray[np.float64]


@ordinary_torch(gradients=False)
def fluency(
    model: LensModel,
    edit: Edit | None,
    prompts: Sequence[str],
    *,
    judge: LensModel | None = None,
    max_new_tokens: int = 40,
    ngram: int = 4,
    orders: int = ORDERS,
    batch_size: int = 128,
    seed: int = 0,
    progress: bool = True,
) -> pd.DataFrame:
    """How fluent the answers are that a model writes (greedily) with an edit, beside those without it.

    `perplexity`: exp of the mean cross-entropy a token of the answers, as they were written, after their prompts, under the judge.
    `repetition`: share of the n-grams of an answer's tokens that it has had before, mean over answers (seq-rep-n of
    Welleck et al., arXiv 1908.04319). `gibberish`: share of answers whose words are no likelier to the judge in
    their order than in random orders: an answer passes if it is likelier than every one of `orders` shuffles, a
    permutation test at 1 / (orders + 1). It needs no classifier and no threshold on perplexity, which facts that the
    unedited model would not state raise as well as word salad does.

    Args:
        model: HookedTransformer or TransformerBridge, without the edit; left as it is.
        edit: the one to look at. None: only the row of the unedited model.
        prompts: such as the questions of the forget set.
        judge: the model that says how likely an answer is, without any edit. None: `model` without the edit. To compare answers of
            several models, give all of them the same one.
        max_new_tokens: of an answer, at most.
        ngram: n of `repetition`, in tokens.
        orders: shuffles of each answer.
        batch_size: texts at a time.
        seed: of the shuffles and of the bootstrap.
        progress: show a progress bar.

    Returns:
        One row a measure before and, with an edit, after. Columns: `when`: "before", the control, or "after"; `measure`:
        "perplexity", "repetition", "gibberish" or "empty" (share of prompts without an answer); `n`, answers that
        count: all for "empty", those with a token for "perplexity" and "repetition", and for "gibberish" those of at least
        4 words that are not all alike; `mean`, with its 95% bootstrap interval over answers `low`, `high`: NaN where none counts, the interval
        also where only one does.

    Raises:
        TypeError: a string instead of several.
        ValueError: no prompts, or a judge that reads them as other tokens; NonFiniteError where logits become NaN or infinite.

    Example:
        >>> frame = fluency(model, edit, ["The colour of", "The sage said that"], max_new_tokens=6)
    """
    check_whole(max_new_tokens=max_new_tokens, ngram=ngram, orders=orders)
    if isinstance(prompts, str):
        raise TypeError(f"prompts is one string, {prompts[:40]!r}; write [prompt] for a single prompt")
    asked = list(prompts)
    if not asked:
        raise ValueError("no prompts to answer; give the questions of the forget set, for example")
    judging = model if judge is None else judge
    if judging is not model and not reads_alike(model, judging, [Document("", prompt) for prompt in asked]):
        raise ValueError(
            "the judge reads the prompts as other tokens than the model; load both with the same tokenizer"
        )
    rows = []
    for when, on in [("before", None), *([] if edit is None else [("after", edit)])]:
        with edit_on(model, on):
            answers = continued(model, asked, max_new_tokens=max_new_tokens, progress=progress)
        given = [(prompt, answer) for prompt, answer in zip(asked, answers, strict=True) if answer.text]
        tokens = [without_end(model, answer.ids) for _, answer in given]
        encoded = [_row(answer.prompt, ids) for (_, answer), ids in zip(given, tokens, strict=True)]
        likely = _log_probabilities(judging, encoded, batch_size, progress)
        texts = [Document(prompt, _lead(model, answer) + answer.text) for prompt, answer in given]
        shares = {
            "repetition": [_repetition(ids, ngram) for ids in tokens],
            "gibberish": _shuffles_as_likely(judging, texts, orders, batch_size, seed, progress),
            "empty": [float(not answer.text) for answer in answers],
        }
        rows.append({"when": when, "measure": "perplexity", **_perplexity(likely, seed)})
        rows += [{"when": when, "measure": name, **_mean(np.array(own), seed)} for name, own in shares.items()]
    return pd.DataFrame(rows)


@register(
    "fluency",
    summary="Whether the answers to the forget set's questions are still language.",
    source="arXiv 1908.04319",
    row=lambda frame: {
        f"answers_{row['measure']}{end}": row[column]
        for row in frame[frame["when"] == frame["when"].iloc[-1]].to_dict("records")
        for column, end in (("mean", ""), ("low", "_low"), ("high", "_high"))
    },
    headings={
        "answers_perplexity": "perplexity of answers, unedited model",
        "answers_repetition": "repetition in answers",
        "answers_gibberish": "answers no likelier than their words in random order",
        "answers_empty": "questions without an answer",
    },
    tables={"benchmark"},
    compares=True,
)
def _of_forget_prompts(measured: Measured) -> pd.DataFrame:
    prompts = measured.task.forget_prompts(limit=min(measured.limit or PROMPTS, PROMPTS))
    return fluency(
        measured.model, measured.edit, prompts, judge=measured.judge, seed=measured.seed, progress=measured.progress
    )


def _row(prompt: Sequence[int], answer: Sequence[int]) -> Encoded:
    """Both as the model read and wrote them; the answer counts."""
    counts = (False,) * len(prompt) + (True,) * len(answer)
    return Encoded((*prompt, *answer), counts, counts)


def _lead(model: LensModel, answer: Continuation) -> str:
    """The white space between prompt and answer: what the model writes is stripped of it."""
    prompt, whole = (
        model.tokenizer.decode(ids, skip_special_tokens=True) for ids in (answer.prompt, (*answer.prompt, *answer.ids))
    )
    behind = str(whole)[len(prompt) :]
    return behind[: len(behind) - len(behind.lstrip())]


def _log_probabilities(model: LensModel, rows: Sequence[Encoded], batch_size: int, progress: bool) -> list[Values]:
    found = by_row(model, rows, batch_size=batch_size, desc="scoring answers", progress=progress) if rows else []
    return [own[:, 0] for own in found]


def _perplexity(likely: Sequence[Values], seed: int) -> dict[str, Any]:
    sums = np.array([[own.sum(), len(own)] for own in likely if len(own)])
    if not len(sums):
        return {"n": 0} | dict.fromkeys(("mean", "low", "high"), float("nan"))
    return {"n": len(sums)} | dict(zip(("mean", "low", "high"), perplexity_of(sums, seed=seed), strict=True))


def _mean(values: Values, seed: int) -> dict[str, Any]:
    if not len(values):
        return {"n": 0} | dict.fromkeys(("mean", "low", "high"), float("nan"))
    low, high = share_interval(values, seed=seed)
    return {"n": len(values), "mean": float(values.mean()), "low": low, "high": high}


def _repetition(ids: Sequence[int], ngram: int) -> float:
    """1 - distinct / all n-grams of tokens; 0 where there is none."""
    grams = [tuple(ids[start : start + ngram]) for start in range(len(ids) - ngram + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def _shuffles_as_likely(
    model: LensModel, texts: Sequence[Document], orders: int, batch_size: int, seed: int, progress: bool
) -> list[float]:
    """1 for each answer of enough words that is no likelier than one of its shuffles, else 0; all of them with a blank between words, and
    what stands before the first one as it was."""
    draw = random.Random(int_seed(seed))
    ordered = []
    for text in texts:
        words = text.completion.split()
        if len(words) >= LEAST_WORDS and len(set(words)) > 1:
            lead = text.completion[: len(text.completion) - len(text.completion.lstrip())]
            shuffles = (_shuffled(words, draw) for _ in range(orders))
            ordered += [Document(text.prompt, lead + " ".join(each)) for each in (words, *shuffles)]
    rows = encoder_for(model).encode(ordered, keep="end", warn=False)
    scores = [own.mean() for own in _log_probabilities(model, rows, batch_size, progress)]
    groups = [scores[start : start + orders + 1] for start in range(0, len(scores), orders + 1)]
    return [float(own <= max(shuffled)) for own, *shuffled in groups]


def _shuffled(words: Sequence[str], draw: random.Random) -> list[str]:
    """Words that are not all alike, in another order: of four, every 24th draw is the order that they have."""
    while True:
        order = draw.sample(words, len(words))
        if order != list(words):
            return order
