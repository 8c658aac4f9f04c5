"""What a model answers in its own words, beside what it chooses: ROUGE, exact match and token F1 of what it writes."""

import re
import string
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np
import pandas as pd

from mrp_lens.data import Corpus, Questions
from mrp_lens.metrics.bootstrap import share_interval
from mrp_lens.metrics.multiple_choice import accuracy, by_group
from mrp_lens.metrics.registry import Measured, register
from mrp_lens.models import LensModel
from mrp_lens.models.generation import continuations
from mrp_lens.utils.torch_state import ordinary_torch
from mrp_lens.utils.validation import check_whole

ARTICLES = re.compile(r"\b(a|an|the)\b")
WITHOUT_PUNCTUATION = str.maketrans("", "", string.punctuation)


def rouge_l(answer: str, right: str) -> float:
    """ROUGE-L recall with stemming: the share of the right answer's words that the answer has in their order (Lin, 2004)."""
    return float(_rouge().score(right, answer)["rougeL"].recall)


def exact_match(answer: str, right: str) -> float:
    """1 where both are the same but for case, punctuation and articles (SQuAD, arXiv 1606.05250)."""
    return float(_normalised(answer) == _normalised(right))


def token_f1(answer: str, right: str) -> float:
    """Harmonic mean of precision and recall of the words that both share, normalised as in `exact_match` (SQuAD)."""
    words, wanted = Counter(_normalised(answer)), Counter(_normalised(right))
    if not words or not wanted:
        return float(words == wanted)
    shared = (words & wanted).total()
    return 2 * shared / (words.total() + wanted.total())


MEASURES: Mapping[str, Callable[[str, str], float]] = {
    "rouge_l": rouge_l,
    "exact_match": exact_match,
    "token_f1": token_f1,
}
"""Name -> how well an answer fits the right one, from 0 to 1."""


@ordinary_torch(gradients=False)
def open_ended(
    model: LensModel,
    asked: Corpus | Questions,
    *,
    max_new_tokens: int | None = None,
    batch_size: int = 128,
    seed: int = 0,
    progress: bool = True,
) -> pd.DataFrame:
    """How well the answers that a model writes (greedily) fit the right ones; of a quiz also how often it chooses right.

    Multiple choice can overstate forgetting, and understate it (arXiv 2510.07626): read both.

    Args:
        model: HookedTransformer or TransformerBridge, with the edit on if there is one.
        asked: documents with prompts, whose completions are the right answers; or a quiz, reported by group, whose right
            choices are.
        max_new_tokens: of an answer, at most. None: as many as the longest right answer has.
        batch_size: texts (prompt and choice) at a time, for multiple choice.
        seed: of the bootstrap.
        progress: show a progress bar.

    Returns:
        For each group (as in `metrics.accuracy`) a row a measure. Columns: `group`; `measure`: "rouge_l", "exact_match",
        "token_f1", and of a quiz "multiple_choice"; `n`; `mean` in [0, 1] with its 95% bootstrap interval over questions
        `low`, `high` (NaN with a single one); `null`, the control: the same answers scored against the right one of the
        next question of the group (NaN with a single one); of multiple choice, blind guessing.

    Raises:
        TypeError: neither a corpus nor a quiz.
        ValueError: nothing is asked, a document has no prompt, or a choice cannot be scored; NonFiniteError where logits
            become NaN or infinite.

    Example:
        >>> with edit.applied(model):
        ...     frame = open_ended(model, questions, max_new_tokens=8)
    """
    if not isinstance(asked, Corpus | Questions):
        raise TypeError(f"asked must be a Corpus or Questions, got {type(asked).__name__}")
    corpus = asked.right_answers() if isinstance(asked, Questions) else asked
    answers = written_answers(model, corpus, max_new_tokens=max_new_tokens, progress=progress)
    names = [question.group for question in asked.questions] if isinstance(asked, Questions) else [""] * len(corpus)
    rights = [document.completion for document in corpus.documents]
    table = pd.DataFrame({"group": names, "answer": answers, "right": rights})
    chosen: dict[str, dict[Any, Any]] = {}
    if isinstance(asked, Questions):
        frame = accuracy(model, asked, batch_size=batch_size, seed=seed, progress=progress)
        chosen = {str(row["group"]): row for row in frame.to_dict("records")}
    rows = []
    for name, part in by_group(table):
        written, wanted = part["answer"].tolist(), part["right"].tolist()
        for measure, score in MEASURES.items():
            values = np.array([score(answer, right) for answer, right in zip(written, wanted, strict=True)])
            low, high = share_interval(values, seed=seed)
            row = {"group": name, "measure": measure, "n": len(part), "mean": values.mean(), "low": low, "high": high}
            rows.append({**row, "null": null_of(score, written, wanted)})
        if name in chosen:
            row = {key: chosen[name][key] for key in ("group", "n", "low", "high")}
            own = {"measure": "multiple_choice", "mean": chosen[name]["accuracy"], "null": chosen[name]["chance"]}
            rows.append(row | own)
    return pd.DataFrame(rows)[["group", "measure", "n", "mean", "low", "high", "null"]]


@register(
    "open-ended",
    summary="How well the answers that the model writes to the forget set's questions fit the right ones.",
    source="arXiv 2510.07626",
    row=lambda frame: {
        f"forget_{row['measure']}{end}": row[column]
        for row in frame[frame["measure"] != "multiple_choice"].to_dict("records")
        for column, end in (("mean", ""), ("low", "_low"), ("high", "_high"))
    },
    headings={
        "forget_rouge_l": "ROUGE-L recall of answers on the forget set",
        "forget_exact_match": "exact match of answers on the forget set",
        "forget_token_f1": "token F1 of answers on the forget set",
    },
    tables={"benchmark"},
)
def _of_forget_set(measured: Measured) -> pd.DataFrame | None:
    texts = with_prompts(measured.task.forget_texts).spread(measured.documents)
    if not len(texts):
        return None
    return open_ended(measured.model, texts, seed=measured.seed, progress=measured.progress)


def with_prompts(corpus: Corpus) -> Corpus:
    """The documents that have a prompt."""
    return Corpus(tuple(document for document in corpus.documents if document.prompt), corpus.name)


def written_answers(
    model: LensModel, corpus: Corpus, *, max_new_tokens: int | None = None, progress: bool = True
) -> list[str]:
    """What the model writes, greedily, after each prompt; arguments and errors as in `open_ended`."""
    check_whole(max_new_tokens=max_new_tokens)
    if not len(corpus):
        raise ValueError(f"nothing is asked in {corpus.name!r}, which is empty")
    bare = next((number for number, document in enumerate(corpus.documents) if not document.prompt), None)
    if bare is not None:
        raise ValueError(
            f"{corpus.name!r}, document {bare} has no prompt to answer; read it with templates, such as "
            "prompt='Question: {question}\\nAnswer:', completion=' {answer}'"
        )
    if max_new_tokens is None:
        rights = [document.completion for document in corpus.documents]
        tokens = model.tokenizer(rights, add_special_tokens=False)["input_ids"]
        max_new_tokens = max(1, *(len(ids) for ids in tokens))
    prompts = [document.prompt for document in corpus.documents]
    return continuations(model, prompts, max_new_tokens=max_new_tokens, progress=progress)


def null_of(score: Callable[[str, str], float], answers: Sequence[str], rights: Sequence[str]) -> float:
    """The mean score of answers against the right answer of the next question; NaN with a single one."""
    others = [*rights[1:], *rights[:1]]
    found = [score(answer, other) for answer, other in zip(answers, others, strict=True)]
    return float(np.mean(found)) if len(found) > 1 else float("nan")


def _normalised(text: str) -> tuple[str, ...]:
    return tuple(ARTICLES.sub(" ", text.lower().translate(WITHOUT_PUNCTUATION)).split())


@cache
def _rouge() -> Any:
    from rouge_score.rouge_scorer import RougeScorer  # seconds to import

    return RougeScorer(["rougeL"], use_stemmer=True)
