"""Exact memorisation and extraction strength, against one token at a time."""

from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from mrp_lens import metrics
from mrp_lens.data import Corpus, Document
from mrp_lens.data.task import UnlearningTask
from mrp_lens.metrics.memorization import _strength
from mrp_lens.models import LensModel
from tests.support.plain import ids_of, plain_logits


def guesses(model: LensModel, document: Document) -> list[tuple[int, int]]:
    """Each token of the completion, and what the model says there."""
    ids, start = ids_of(model, document.prompt + document.completion), len(ids_of(model, document.prompt))
    return [(ids[at], int(np.argmax(plain_logits(model, ids[:at])))) for at in range(start, len(ids))]


def liked_by(model: LensModel, prompt: str, tokens: int, rest: str) -> Document:
    """A completion that begins with what the model says by itself."""
    ids = ids_of(model, prompt)
    for _ in range(tokens):
        ids = [*ids, int(np.argmax(plain_logits(model, ids)))]
    return Document(prompt, str(model.tokenizer.decode(ids[1:])).removeprefix(prompt) + rest)


@pytest.fixture
def corpus(model: LensModel) -> Corpus:
    half = [liked_by(model, "The old man", tokens, rest) for tokens, rest in ((6, ""), (4, " house"), (2, " and red"))]
    return Corpus((*half, Document("The colour of", " the house is red."), Document("", "A house.")), "five")


def strength(right: list[bool]) -> float:
    """By trying every k."""
    return next(1 - k / len(right) for k in range(len(right) + 1) if all(right[k:]))


def test_both_equal_the_calculation_token_by_token(model: LensModel, corpus: Corpus, untouched: None) -> None:
    of_documents = [guesses(model, document) for document in corpus.documents]
    right = [[token == said for token, said in document] for document in of_documents]
    assert 0 < sum(map(sum, right)) < sum(map(len, right))
    frequent, _ = Counter(token for document in of_documents for token, _ in document).most_common(1)[0]
    constant = [[token == frequent for token, _ in document] for document in of_documents]
    expected: dict[str, Any] = {"exact_memorization": np.mean, "extraction_strength": strength}
    for name, statistic in expected.items():
        frame = getattr(metrics, name)(model, corpus, batch_size=2, progress=False)
        row = frame.iloc[0]
        assert row[name] == pytest.approx(np.mean([statistic(document) for document in right]), abs=1e-12)
        assert row["constant"] == pytest.approx(np.mean([statistic(document) for document in constant]), abs=1e-12)
        assert (row["corpus"], row["documents"]) == ("five", 5)
        assert row["low"] <= metrics.value(frame) <= row["high"]


@pytest.mark.parametrize(
    ("right", "expected"),
    [([1, 1, 1, 1], 1.0), ([0, 1, 1, 1], 0.75), ([1, 1, 0, 1], 0.25), ([1, 1, 1, 0], 0.0), ([0], 0.0), ([1], 1.0)],
)
def test_extraction_strength_by_hand(right: list[int], expected: float) -> None:
    assert _strength(np.array(right, dtype=bool)) == expected == strength([bool(value) for value in right])


def test_what_is_written_by_the_model_is_memorised_whole(model: LensModel) -> None:
    document = liked_by(model, "The old man", 5, "")
    if all(
        token == said for token, said in guesses(model, document)
    ):  # decoding and reading again gives the same tokens
        alone = Corpus((document,), "own")
        for metric in (metrics.exact_memorization, metrics.extraction_strength):
            row = metric(model, alone).iloc[0]
            assert (metrics.value(metric(model, alone)), np.isnan(row["low"])) == (1.0, True)


def test_documents_without_a_token_to_predict_do_not_count(model: LensModel, corpus: Corpus) -> None:
    with_blank = replace(corpus, documents=(*corpus.documents, Document("", "")))
    for metric in (metrics.exact_memorization, metrics.extraction_strength):
        assert metric(model, with_blank, progress=False).equals(metric(model, corpus, progress=False))
        with pytest.raises(ValueError, match="'blank' holds no token to predict"):
            metric(model, Corpus.from_texts([""], name="blank"))
        with pytest.raises(ValueError, match="no documents in 'none'"):
            metric(model, Corpus((), "none"))


def test_a_benchmark_has_both_from_one_pass(model: LensModel, corpus: Corpus) -> None:
    task = UnlearningTask((corpus,), corpus, corpus)
    measured = metrics.Measured(model=model, task=task, progress=False)
    row = metrics.METRICS["memorization"].row(metrics.METRICS["memorization"].measure(measured))  # type: ignore[misc]
    for name in ("exact_memorization", "extraction_strength"):
        own = getattr(metrics, name)(model, corpus).iloc[0]
        ends = (f"forget_{name}", f"forget_{name}_low", f"forget_{name}_high")
        assert [row[key] for key in ends] == [own[name], own["low"], own["high"]]
