"""What a model answers in its own words, beside what it chooses: ROUGE, exact match and token F1 of what it writes."""

import re
import string
import unicodedata
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
UNSPACED = re.compile(
    "[\u3005-\u3007\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]"
)
"""The characters of Chinese and Japanese, which have no blanks between words: each counts as a word."""


def rouge_l(answer: str, right: str) -> float:
    """ROUGE-L recall: the share of the right answer's words that the answer has in their order (Lin, 2004).

    Words are runs of letters and digits of any script, case and compatibility forms (NFKC) folded, English endings stemmed.
    """
    return float(_rouge().score(right, answer)["rougeL"].recall)


def exact_match(answer: str, right: str) -> float:
    """1 where both are the same but for case, punctuation and articles (SQuAD, arXiv 1606.05250).

    Of a right answer that is nothing else, such as "A" or "-", articles count, and then punctuation.
    """
    words, wanted = _compared(answer, right)
    return float(words == wanted)


def token_f1(answer: str, right: str) -> float:
    """Harmonic mean of precision and recall of the words that both share, normalised as in `exact_match` (SQuAD)."""
    words, wanted = map(Counter, _compared(answer, right))
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

    Multiple choice can overstate forgetting, and understate it (arXiv 2510.07626): read both. An answer ends at its first line break,
    unless the right one has some.

    Args:
        model: HookedTransformer or TransformerBridge, with the edit on if there is one.
        asked: documents with prompts, whose completions are the right answers; or a quiz, reported by group, whose right
            choices are.
        max_new_tokens: of an answer, at most; prompts that leave no room for them are cut at their start. None: as many as the
            longest right answer has; where that does not fit behind the longest prompt, what that leaves of the context, or
            half of it.
        batch_size: texts (prompt and choice) at a time, for multiple choice.
        seed: of the bootstrap.
        progress: show a progress bar.

    Returns:
        For each group (as in `metrics.accuracy`) a row a measure. Columns: `group`; `measure`: "rouge_l", "exact_match",
        "token_f1", and of a quiz "multiple_choice"; `n`; `mean` in [0, 1] with its 95% interval `low`, `high`, as
        of `metrics.accuracy` (NaN with a single question); `null`, the control: the same answers scored against the right one of the
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
    entities = asked.entities if isinstance(asked, Questions) else range(len(corpus))
    table = pd.DataFrame({"group": names, "entity": entities, "answer": answers, "right": rights})
    chosen: dict[str, dict[Any, Any]] = {}
    if isinstance(asked, Questions):
        frame = accuracy(model, asked, batch_size=batch_size, seed=seed, progress=progress)
        chosen = {str(row["group"]): row for row in frame.to_dict("records")}
    rows = []
    for name, part in by_group(table):
        written, wanted = part["answer"].tolist(), part["right"].tolist()
        for measure, score in MEASURES.items():
            values = np.array([score(answer, right) for answer, right in zip(written, wanted, strict=True)])
            low, high = share_interval(values, part["entity"].tolist(), seed=seed)
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
    model: LensModel, corpus: Corpus, *, max_new_tokens: int | None = None, room: int = 1, progress: bool = True
) -> list[str]:
    """What the model writes, greedily, after each prompt: up to a line break where the right answer has none, since a model that does
    not stop goes on with questions of its own; arguments and errors as in `open_ended`. `room`: tokens of an answer, at least, where
    the longest right one says how many it may have."""
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
        max_new_tokens = _longest_answer(model, corpus, room)
    prompts = [document.prompt for document in corpus.documents]
    written = continuations(model, prompts, max_new_tokens=max_new_tokens, progress=progress)
    rights = [document.completion.strip() for document in corpus.documents]
    return [
        answer if "\n" in right else answer.split("\n", 1)[0].rstrip()
        for answer, right in zip(written, rights, strict=True)
    ]


def null_of(score: Callable[[str, str], float], answers: Sequence[str], rights: Sequence[str]) -> float:
    """The mean score of answers against the right answer of the next question; NaN with a single one."""
    others = [*rights[1:], *rights[:1]]
    found = [score(answer, other) for answer, other in zip(answers, others, strict=True)]
    return float(np.mean(found)) if len(found) > 1 else float("nan")


def _longest_answer(model: LensModel, corpus: Corpus, least: int) -> int:
    """The tokens of the longest right answer, or `least`, as far as the context has room for them behind the longest prompt, or in half
    of it."""
    sides = [document.prompt for document in corpus.documents], [document.completion for document in corpus.documents]
    tokens = (model.tokenizer(side, add_special_tokens=False)["input_ids"] for side in sides)
    prompt, answer = (max(len(ids) for ids in side) for side in tokens)
    context = int(model.cfg.n_ctx)
    return max(1, min(max(answer, least), max(context - 1 - prompt, context // 2)))  # a BOS comes before


def _compared(answer: str, right: str) -> tuple[list[str], list[str]]:
    """The words of both, without punctuation and articles, as far as that leaves something of the right answer."""
    for words_of in (_normalised, _without_punctuation):
        if wanted := words_of(right).split():
            return words_of(answer).split(), wanted
    return _folded(answer).split(), _folded(right).split()


def _normalised(text: str) -> str:
    return ARTICLES.sub(" ", _without_punctuation(text))


def _without_punctuation(text: str) -> str:
    return "".join(
        char for char in _folded(text) if char not in string.punctuation and unicodedata.category(char)[0] != "P"
    )


def _folded(text: str) -> str:
    """Without case and compatibility forms, and with blanks around the characters of scripts that have none."""
    return UNSPACED.sub(r" \g<0> ", unicodedata.normalize("NFKC", text).casefold())


class _Words:
    """ROUGE's words in any script: those of ASCII letters as `rouge_score` has them, which knows no others."""

    def __init__(self) -> None:
        from rouge_score.tokenizers import DefaultTokenizer  # seconds to import

        self.ascii = DefaultTokenizer(use_stemmer=True)

    def tokenize(self, text: str) -> list[str]:
        """The words of a text: letters, their marks, and digits."""
        kept = (char if unicodedata.category(char)[0] in "LMN" else " " for char in _folded(text))
        words = "".join(kept).split()
        return [part for word in words for part in (self.ascii.tokenize(word) if word.isascii() else [word])]


@cache
def _rouge() -> Any:
    from rouge_score.rouge_scorer import RougeScorer  # seconds to import

    return RougeScorer(["rougeL"], tokenizer=_Words())
