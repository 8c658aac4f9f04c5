"""Fluency of answers: perplexity and repetition one answer at a time, and gibberish on a model that knows a language."""

import copy
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mrp_lens import metrics
from mrp_lens.data import Document
from mrp_lens.metrics.fluency import _repetition, _shuffles_as_likely
from mrp_lens.models import LensModel, load_model
from mrp_lens.models.generation import Continuation, continued, without_end
from tests.support.edits import projection
from tests.support.families import save_family
from tests.support.plain import ids_of, plain_logits

PROMPTS = ["The old man", "The colour of", "A house", "It is the"]
EDIT = projection(1, 2)


def test_perplexity_is_that_of_the_answers_under_the_unedited_model(model: LensModel, untouched: None) -> None:
    frame = metrics.fluency(model, EDIT, PROMPTS, max_new_tokens=6, orders=2, progress=False)
    assert frame["when"].tolist() == ["before"] * 4 + ["after"] * 4
    rows = frame.set_index(["when", "measure"])
    with EDIT.applied(model):
        edited = continued(model, PROMPTS, max_new_tokens=6)
    for when, answers in (("before", continued(model, PROMPTS, max_new_tokens=6)), ("after", edited)):
        own = [likelihoods(model, answer) for answer in answers if answer.text]
        flat = [value for answer in own for value in answer]
        assert rows.loc[(when, "perplexity"), "mean"] == pytest.approx(np.exp(-np.mean(flat)), rel=1e-4)
        assert rows.loc[(when, "perplexity"), "n"] == len(own)
        assert rows.loc[(when, "empty"), "mean"] == np.mean([not answer.text for answer in answers])
        repeated = []
        for ids in (without_end(model, answer.ids) for answer in answers if answer.text):
            grams = [tuple(ids[at : at + 4]) for at in range(len(ids) - 3)]
            repeated.append(1 - len(set(grams)) / len(grams) if grams else 0.0)
        assert rows.loc[(when, "repetition"), "mean"] == pytest.approx(np.mean(repeated))
    alone = metrics.fluency(model, None, PROMPTS, max_new_tokens=6, orders=2, progress=False)
    assert alone.equals(frame[frame["when"] == "before"].reset_index(drop=True))


def likelihoods(model: LensModel, answer: Continuation) -> list[float]:
    """Log-probabilities of what was written, one token at a time."""
    ids, found = list(answer.prompt), []
    for token in without_end(model, answer.ids):
        found.append(float(torch.tensor(plain_logits(model, ids)).log_softmax(-1)[token]))
        ids.append(token)
    return found


def test_an_answer_that_begins_without_a_blank_is_scored_as_it_was_written(demo_model: Any) -> None:
    prompts = ["The colour of Laxanine is gold", "The old man"]
    answers = continued(demo_model, prompts, max_new_tokens=6)
    assert answers[0].text.startswith(".")
    expected = np.exp(-np.mean([value for answer in answers for value in likelihoods(demo_model, answer)]))
    rows = metrics.fluency(demo_model, None, prompts, max_new_tokens=6, progress=False).set_index("measure")
    assert rows.loc["perplexity", "mean"] == pytest.approx(expected, rel=1e-3)


def test_another_judge_says_how_likely_answers_are(model: LensModel, other: LensModel, untouched: None) -> None:
    own, judged = (
        metrics.fluency(model, None, PROMPTS, judge=judge, max_new_tokens=6, orders=2, progress=False).set_index(
            "measure"
        )
        for judge in (None, other)
    )
    flat = [value for answer in continued(model, PROMPTS, max_new_tokens=6) for value in likelihoods(other, answer)]
    assert judged.loc["perplexity", "mean"] == pytest.approx(np.exp(-np.mean(flat)), rel=1e-4)
    assert judged.loc["perplexity", "mean"] != pytest.approx(own.loc["perplexity", "mean"], rel=1e-2)
    assert judged["mean"]["repetition"] == pytest.approx(own["mean"]["repetition"])


def test_a_judge_that_reads_other_tokens_is_refused(
    model: LensModel, backend: str, tmp_path: Path, untouched: None
) -> None:
    tokenizer = copy.deepcopy(model.tokenizer)
    tokenizer.bos_token = None
    judge = load_model(save_family("llama", tmp_path, tokenizer=tokenizer), backend=backend)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="reads the prompts as other tokens"):
        metrics.fluency(model, None, PROMPTS, judge=judge, max_new_tokens=2, progress=False)


@pytest.mark.filterwarnings("ignore:1 of 1 documents are longer")
def test_an_answer_to_a_prompt_as_long_as_the_context_is_scored_whole(model: LensModel, untouched: None) -> None:
    long = " ".join(["The old man walked near the house"] * 60)
    assert len(ids_of(model, long)) > model.cfg.n_ctx
    rows = metrics.fluency(model, None, [long], max_new_tokens=8, orders=2, progress=False).set_index("measure")
    (answer,) = continued(model, [long], max_new_tokens=8)
    assert rows["n"][["perplexity", "repetition"]].tolist() == [int(bool(answer.text))] * 2
    ids, written = list(answer.prompt), without_end(model, answer.ids)
    tokens = torch.tensor([ids + written])
    with torch.no_grad():
        logs = model(tokens, attention_mask=torch.ones_like(tokens))[0].double().log_softmax(-1)
    own = [float(logs[len(ids) + at - 1, token]) for at, token in enumerate(written)]
    assert rows.loc["perplexity", "mean"] == pytest.approx(np.exp(-np.mean(own)), rel=1e-4)


def test_repetition_by_hand() -> None:
    assert _repetition([1, 2, 1, 2, 1, 2], 2) == 1 - 2 / 5
    assert _repetition([1, 2, 3, 4], 2) == 0.0
    assert _repetition([1], 2) == 0.0


@pytest.mark.parametrize("words", [True, False], ids=["sentences", "word salad"])
def test_sentences_pass_and_word_salad_does_not(demo_model: Any, world: Any, words: bool) -> None:
    """On the demo, whose model writes the world's sentences: the same words in its order, and in none."""
    draw = np.random.default_rng(0)
    texts = [document.completion for document in world.text().spread(12).documents]
    parts = [text.split()[:12] for text in texts if len(text.split()) >= 8]
    salad = [" ".join(part if words else draw.permutation(part)) for part in parts]
    documents = [Document("", text) for text in salad]
    found = np.mean(_shuffles_as_likely(demo_model, documents, 19, 64, 0, False))
    assert found < 0.2 if words else found > 0.7


def test_too_few_words_are_not_tested_and_nothing_written_is_empty(
    model: LensModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = {"The old man": "house", "A": ""}
    module = import_module("mrp_lens.metrics.fluency")

    def written(model: LensModel, prompts: list[str], **_: Any) -> list[Continuation]:
        return [
            Continuation(
                tuple(ids_of(model, p)), tuple(ids_of(model, f" {answers[p]}")[1:]) if answers[p] else (), answers[p]
            )
            for p in prompts
        ]

    monkeypatch.setattr(module, "continued", written)
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

    def as_told(model: Any, rows: Any, *_: Any) -> list[Any]:
        told = [model.tokenizer.decode(row.ids, skip_special_tokens=True).strip() for row in rows]
        return [np.array([0.0 if text == right else -1.0]) for text in told]

    monkeypatch.setattr(module, "_log_probabilities", as_told)
    answers = [*[Document("", right)] * 40, Document("", "one one one one")]
    assert _shuffles_as_likely(model, answers, 19, 8, 0, False) == [0.0] * 40
