from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import transformers

from mrp_lens import metrics
from mrp_lens.data import Corpus, Document
from mrp_lens.models import LensModel, available_backends, load_model
from tests.support.edits import projection
from tests.support.families import DEMO_FOLDER, save_family
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


@pytest.mark.parametrize("backend", available_backends())
def test_an_empty_text_counts_nothing_where_nothing_begins_a_text(backend: Any, tmp_path: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(DEMO_FOLDER)
    tokenizer.bos_token = None
    model = load_model(str(save_family("qwen2", tmp_path, tokenizer=tokenizer)), backend=backend)
    told = Corpus.from_texts(["The old man walked.", "The sage."])
    with_empty = replace(told, documents=(Document("", ""), *told.documents, Document("", "")))
    edit = projection(1)
    for batch_size in (1, 128):
        for measured in (metrics.perplexity, metrics.answer_probability, metrics.exact_memorization):
            pd.testing.assert_frame_equal(measured(model, with_empty, batch_size=batch_size), measured(model, told))
        damages = [metrics.damage(model, edit, corpus, batch_size=batch_size) for corpus in (with_empty, told)]
        pd.testing.assert_frame_equal(*damages)
