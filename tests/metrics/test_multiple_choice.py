from typing import Any

import numpy as np
import pytest
import torch

from mrp_lens import metrics
from mrp_lens.data import Corpus, Questions
from mrp_lens.models import LensModel


def log_probability(model: LensModel, prompt: str, completion: str) -> list[float]:
    """Independent and slow: no batch, no padding, one token at a time."""
    tokenizer = model.tokenizer
    ids = [tokenizer.bos_token_id, *tokenizer(prompt + completion, add_special_tokens=False)["input_ids"]]
    start = len([tokenizer.bos_token_id, *tokenizer(prompt, add_special_tokens=False)["input_ids"]])
    values = []
    with torch.no_grad():
        for position in range(start, len(ids)):
            logits: Any = model(
                torch.tensor([ids[:position]]), attention_mask=torch.ones(1, position, dtype=torch.long)
            )
            values.append(float(logits[0, -1].log_softmax(-1)[ids[position]]))
    return values


QUIZ: list[dict[str, Any]] = [
    {
        "question": "Question: What is the colour of Xim Oline? Answer:",
        "choices": ["red", "blue", "green"],
        "answer": 0,
    },  # single tokens
    {
        "question": "The craft is",
        "choices": ["fishing boat", "carving", "the old man walked"],
        "answer": 2,
    },  # several tokens
    {"question": "A longer prompt, so that padding matters, says", "choices": ["white", "brown bread"], "answer": 1},
]


def test_choice_scores_equal_the_plain_calculation(model: LensModel, untouched: None) -> None:
    quiz = Questions.from_rows(QUIZ)
    for question, scores in zip(quiz.questions, metrics.choice_scores(model, quiz, batch_size=2), strict=True):
        expected = [np.mean(log_probability(model, question.prompt, choice)) for choice in question.choices]
        np.testing.assert_allclose(scores, expected, atol=1e-5)


def test_accuracy_counts_what_the_scores_say(model: LensModel, untouched: None) -> None:
    best = [int(np.argmax(scores)) for scores in metrics.choice_scores(model, Questions.from_rows(QUIZ))]
    right = [{**row, "answer": choice, "kind": "a"} for row, choice in zip(QUIZ, best, strict=True)]
    wrong = [
        {**row, "answer": (choice + 1) % len(row["choices"]), "kind": "b"}
        for row, choice in zip(QUIZ, best, strict=True)
    ]  # type: ignore[arg-type]
    table = metrics.accuracy(model, Questions.from_rows(right + wrong, group="kind")).set_index("group")
    assert list(table.index) == ["all", "a", "b"]
    assert table["accuracy"].to_dict() == {"all": 0.5, "a": 1.0, "b": 0.0}
    assert list(table["chance"])[1] == pytest.approx((1 / 3 + 1 / 3 + 1 / 2) / 3)
    assert float(table["low"].iloc[0]) < 0.5 < float(table["high"].iloc[0])
    assert (table["n"] == [6, 3, 3]).all()
    with pytest.raises(ValueError, match="no questions in 'none'"):
        metrics.accuracy(model, Questions((), "none"))


def test_perplexity_and_answer_probability_equal_the_plain_calculation(model: LensModel, untouched: None) -> None:
    corpus = Corpus.from_rows(
        [{"p": "The old", "c": " man walked slowly."}, {"p": "", "c": "The sage."}],
        prompt="{p}",
        completion="{c}",
        name="two",
    )
    values = [log_probability(model, d.prompt, d.completion) for d in corpus.documents]
    flat = [value for document in values for value in document]
    row = metrics.perplexity(model, corpus).iloc[0]
    assert row["perplexity"] == pytest.approx(np.exp(-np.mean(flat)), rel=1e-4)
    assert row["tokens"] == len(flat)
    assert row["uniform"] == model.cfg.d_vocab
    probability = metrics.answer_probability(model, corpus).iloc[0]["probability"]
    assert probability == pytest.approx(np.mean([np.exp(np.mean(document)) for document in values]), rel=1e-4)
    with pytest.raises(ValueError, match="no documents"):
        metrics.perplexity(model, Corpus((), "none"))


def test_the_bootstrap_interval_covers_as_often_as_it_says() -> None:
    generator = np.random.default_rng(0)
    hits = 0
    for seed in range(200):
        low, high = metrics.bootstrap_interval(generator.binomial(1, 0.3, size=300).astype(float), seed=seed)
        hits += low <= 0.3 <= high
    assert 0.90 <= hits / 200 <= 0.99
    values = generator.normal(size=50)
    assert metrics.bootstrap_interval(values, seed=1) == metrics.bootstrap_interval(values, seed=1)
