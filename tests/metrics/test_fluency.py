"""Fluency of answers: perplexity and repetition one answer at a time, and gibberish on a model that knows a language."""

from importlib import import_module
from typing import Any

import numpy as np
import pytest
import torch

from mrp_lens import metrics
from mrp_lens.data import Document
from mrp_lens.metrics.fluency import _log_probabilities, _repetitions, _shuffles_as_likely
from mrp_lens.models import LensModel
from mrp_lens.models.generation import continuations
from tests.support.edits import projection
from tests.support.plain import ids_of, log_probability

PROMPTS = ["The old man", "The colour of", "A house", "It is the"]
EDIT = projection(1, 2)


def test_perplexity_is_that_of_the_answers_under_the_unedited_model(model: LensModel, untouched: None) -> None:
    frame = metrics.fluency(model, EDIT, PROMPTS, max_new_tokens=6, orders=2, progress=False)
    assert frame["when"].tolist() == ["before"] * 4 + ["after"] * 4
    rows = frame.set_index(["when", "measure"])
    with EDIT.applied(model):
        edited = continuations(model, PROMPTS, max_new_tokens=6)
    for when, answers in (("before", continuations(model, PROMPTS, max_new_tokens=6)), ("after", edited)):
        own = [log_probability(model, p, f" {a}") for p, a in zip(PROMPTS, answers, strict=True) if a]
        flat = [value for answer in own for value in answer]
        assert rows.loc[(when, "perplexity"), "mean"] == pytest.approx(np.exp(-np.mean(flat)), rel=1e-4)
        assert rows.loc[(when, "perplexity"), "n"] == len(own)
        assert rows.loc[(when, "empty"), "mean"] == np.mean([not answer for answer in answers])
        repeated = []
        for prompt, answer in zip(PROMPTS, answers, strict=True):
            ids = ids_of(model, f"{prompt} {answer}")[len(ids_of(model, prompt)) :]
            grams = [tuple(ids[at : at + 4]) for at in range(len(ids) - 3)]
            repeated.append(1 - len(set(grams)) / len(grams) if grams else 0.0)
        assert rows.loc[(when, "repetition"), "mean"] == pytest.approx(np.mean(repeated))
    alone = metrics.fluency(model, None, PROMPTS, max_new_tokens=6, orders=2, progress=False)
    assert alone.equals(frame[frame["when"] == "before"].reset_index(drop=True))


@pytest.mark.filterwarnings("ignore:1 of 1 documents are longer")
def test_an_answer_to_a_prompt_as_long_as_the_context_is_scored_whole(model: LensModel, untouched: None) -> None:
    long = " ".join(["The old man walked near the house"] * 60)
    assert len(ids_of(model, long)) > model.cfg.n_ctx
    rows = metrics.fluency(model, None, [long], max_new_tokens=8, orders=2, progress=False).set_index("measure")
    (answer,) = continuations(model, [long], max_new_tokens=8)
    assert rows["n"][["perplexity", "repetition"]].tolist() == [int(bool(answer))] * 2
    whole = ids_of(model, f"{long} {answer}")
    kept = [whole[0], *whole[1:][-(model.cfg.n_ctx - 1) :]]
    count = len(whole) - len(ids_of(model, long))
    tokens = torch.tensor([kept])
    with torch.no_grad():
        logs = model(tokens, attention_mask=torch.ones_like(tokens))[0].double().log_softmax(-1)
    own = [float(logs[at - 1, kept[at]]) for at in range(len(kept) - count, len(kept))]
    assert rows.loc["perplexity", "mean"] == pytest.approx(np.exp(-np.mean(own)), rel=1e-4)


def test_repetition_by_hand(model: LensModel) -> None:
    texts = ["the house" + " the house" * 7, "The old man walked slowly", "A"]
    tokens = len(ids_of(model, texts[0])) - 1
    often, never, short = _repetitions(model, [Document("", text) for text in texts], 2)
    assert often > 1 - 6 / (tokens - 1)
    assert (never, short) == (0.0, 0.0)


@pytest.mark.parametrize("words", [True, False], ids=["sentences", "word salad"])
def test_sentences_pass_and_word_salad_does_not(demo_model: Any, world: Any, words: bool) -> None:
    """On the demo, whose model writes the world's sentences: the same words in its order, and in none."""
    draw = np.random.default_rng(0)
    texts = [document.completion for document in world.text().spread(12).documents]
    parts = [text.split()[:12] for text in texts if len(text.split()) >= 8]
    salad = [" ".join(part if words else draw.permutation(part)) for part in parts]
    documents = [Document("", text) for text in salad]
    likely = _log_probabilities(demo_model, documents, 64, False)
    found = np.mean(_shuffles_as_likely(demo_model, documents, likely, 19, 64, 0, False))
    assert found < 0.2 if words else found > 0.7


def test_too_few_words_are_not_tested_and_nothing_written_is_empty(
    model: LensModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = {"The old man": "house", "A": ""}
    module = import_module("mrp_lens.metrics.fluency")
    monkeypatch.setattr(module, "continuations", lambda model, prompts, **_: [answers[p] for p in prompts])
    frame = metrics.fluency(model, None, list(answers), progress=False).set_index("measure")
    assert (frame.loc["empty", "mean"], frame.loc["gibberish", "n"], frame.loc["perplexity", "n"]) == (0.5, 0, 1)
    assert np.isnan(frame.loc["gibberish", "mean"])
    answers["The old man"] = ""
    frame = metrics.fluency(model, None, list(answers), progress=False).set_index("measure")
    assert (frame.loc["empty", "mean"], frame.loc["perplexity", "n"]) == (1.0, 0)
    assert np.isnan(frame.loc["perplexity", "mean"])


def test_shuffles_are_drawn_by_the_seed_alone(model: LensModel, untouched: None) -> None:
    first, again = (
        metrics.fluency(model, EDIT, PROMPTS, max_new_tokens=8, orders=2, seed=3, progress=False) for _ in range(2)
    )
    assert first.equals(again)


def test_what_cannot_be_asked_is_named(model: Any, untouched: None) -> None:
    with pytest.raises(ValueError, match="no prompts to answer"):
        metrics.fluency(model, EDIT, [])
    with pytest.raises(TypeError, match="prompts is one string, 'The old man'; write"):
        metrics.fluency(model, EDIT, "The old man")
    with pytest.raises(ValueError, match="orders must be at least 1, got 0"):
        metrics.fluency(model, EDIT, PROMPTS, orders=0)


def test_an_answer_is_compared_with_other_orders_alone(model: LensModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """An order that is likelier than every other passes, in answers of four words, whose own order every 24th draw is, as in others."""
    right = "one two three four"
    module = import_module("mrp_lens.metrics.fluency")

    def likelihoods(model: Any, documents: Any, *_: Any) -> list[Any]:
        return [np.array([0.0 if document.completion.strip() == right else -1.0]) for document in documents]

    monkeypatch.setattr(module, "_log_probabilities", likelihoods)
    answers, alike = [Document("", right)] * 40, [Document("", "one one one one")]
    likely = likelihoods(model, answers + alike)
    assert _shuffles_as_likely(model, answers + alike, likely, 19, 8, 0, False) == [0.0] * 40
