from typing import Any

import numpy as np
import pytest

from mrp_lens import metrics
from mrp_lens.data import Corpus
from mrp_lens.models import LensModel
from tests.support.plain import log_probability


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


def test_texts_longer_than_the_context_of_one_token_and_of_split_characters(model: Any, plain: Any) -> None:
    texts = ["The old man walked slowly near the house. " * 12, "🙂🙂 é ü 中文", "The sage.", ""]
    with pytest.warns(UserWarning, match="1 of 4 documents are longer"):
        row = metrics.perplexity(model, Corpus.from_texts(texts)).iloc[0]
    tokenizer = model.tokenizer
    total = tokens = 0.0
    for text in texts[:3]:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"][: model.cfg.n_ctx - 1]
        score, count = plain("", tokenizer.decode(ids))
        assert count == len(ids)
        total, tokens = total + score * count, tokens + count
    assert (row["documents"], row["tokens"]) == (3, tokens)
    assert row["perplexity"] == pytest.approx(np.exp(-total / tokens), rel=1e-5)
