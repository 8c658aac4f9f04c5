"""Model utility: the harmonic mean of its parts, each by hand."""

from importlib import import_module
from typing import Any

import numpy as np
import pytest
from scipy.stats import hmean

from mrp_lens import metrics
from mrp_lens.data import Corpus, Document, Question, Questions
from mrp_lens.metrics.open_ended import rouge_l
from mrp_lens.metrics.utility import SENTENCE, harmonic_mean
from mrp_lens.models import LensModel
from mrp_lens.models.generation import continuations
from tests.support.plain import log_probability

PROMPTS = ["The old man", "The colour of", "A house"]
TEXTS = Corpus(tuple(map(Document, PROMPTS, (" walked slowly", " the house is red", " and a garden"))), "texts")
QUIZ = Questions(
    tuple(Question(prompt, (" a red house", " the old man", " blue"), number) for number, prompt in enumerate(PROMPTS)),
    "quiz",
)


def written(model: LensModel, rights: list[str]) -> float:
    answers = continuations(model, PROMPTS, max_new_tokens=4)
    return float(np.mean([rouge_l(answer, right) for answer, right in zip(answers, rights, strict=True)]))


def per_token(model: LensModel, question: Question) -> list[float]:
    return [float(np.exp(np.mean(log_probability(model, question.prompt, choice)))) for choice in question.choices]


def test_every_part_is_calculated_by_hand(model: LensModel, untouched: None) -> None:
    settings: Any = {"max_new_tokens": 4, "progress": False}
    frame = metrics.model_utility(model, {"retain": TEXTS}, {"retain": QUIZ, "facts": QUIZ}, **settings)
    parts = frame.set_index(["group", "part"])["utility"]
    likely = [np.exp(np.mean(log_probability(model, d.prompt, d.completion))) for d in TEXTS.documents]
    assert parts["retain", "probability"] == pytest.approx(np.mean(likely), rel=1e-4)
    assert parts["retain", "rouge_l"] == pytest.approx(written(model, [d.completion for d in TEXTS.documents]))
    scores = [(per_token(model, question), question.answer) for question in QUIZ.questions]
    shares = [own[right] / sum(own) for own, right in scores]
    assert parts["facts", "probability"] == pytest.approx(np.mean(shares), rel=1e-4)
    assert parts["facts", "rouge_l"] == pytest.approx(written(model, [q.choices[q.answer] for q in QUIZ.questions]))
    better = [max(0.0, 1 - np.exp(np.mean(np.log(np.delete(own, right)))) / own[right]) for own, right in scores]
    assert parts["facts", "truth_ratio"] == parts["retain", "truth_ratio"] == pytest.approx(np.mean(better), abs=1e-5)
    values = parts.drop(("all", "utility")).to_numpy(float)
    expected = hmean(values) if (values > 0).all() else 0.0
    assert metrics.value(frame) == pytest.approx(expected)
    assert frame["group"].tolist() == ["all", *["retain"] * 3, *["facts"] * 3]
    nulls = frame.set_index(["group", "part"])["null"]
    assert nulls["facts", "probability"] == pytest.approx(1 / 3)
    assert nulls["retain", "probability"] == pytest.approx(1 / model.cfg.d_vocab)


def test_the_harmonic_mean_is_scipys_and_0_where_a_part_is() -> None:
    draw = np.random.default_rng(0).uniform(0.01, 1, (5, 9))
    assert harmonic_mean(draw) == pytest.approx(hmean(draw, axis=1), abs=1e-12)
    assert harmonic_mean(np.array([[0.0, 0.9]])).tolist() == [0.0]


def test_a_name_counts_where_it_is_said_in_a_sentence(model: LensModel, monkeypatch: pytest.MonkeyPatch) -> None:
    said, rooms = {"France": "The capital of France is Paris.", "Peru": "It is a large country."}, []

    def say(model: Any, prompts: list[str], *, max_new_tokens: int, progress: bool) -> list[str]:
        rooms.append(max_new_tokens)
        return [said[prompt] for prompt in prompts]

    monkeypatch.setattr(import_module("mrp_lens.metrics.open_ended"), "continuations", say)
    quiz = Questions((Question("France", ("Paris", "Rome"), 0), Question("Peru", ("Lima", "Oslo"), 0)), "capitals")
    frame = metrics.model_utility(model, quizzes={"capitals": quiz}, progress=False)
    assert rooms == [SENTENCE]
    assert frame.set_index("part").loc["rouge_l", "utility"] == 0.5


def test_a_set_may_have_texts_or_a_quiz_alone(model: LensModel, untouched: None) -> None:
    of_texts = metrics.model_utility(model, {"retain": TEXTS}, max_new_tokens=2, progress=False)
    assert of_texts["part"].tolist() == ["utility", "probability", "rouge_l"]
    of_quiz = metrics.model_utility(model, quizzes={"facts": QUIZ}, max_new_tokens=2, progress=False)
    assert of_quiz["part"].tolist() == ["utility", "probability", "rouge_l", "truth_ratio"]
    assert (of_quiz["low"].dropna() <= of_quiz["high"].dropna()).all()
    with pytest.raises(ValueError, match="no set to keep; give texts="):
        metrics.model_utility(model)
    with pytest.raises(ValueError, match="no questions in 'none'"):
        metrics.model_utility(model, quizzes={"none": Questions((), "none")})
