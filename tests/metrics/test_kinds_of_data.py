"""Data of another kind than a metric or an attack measures are refused by name."""

from collections.abc import Callable
from typing import Any

import pytest

from mrp_lens import attacks, metrics
from mrp_lens.data import Corpus, Question, Questions
from mrp_lens.metrics.multiple_choice import choice_scores
from tests.support.edits import projection
from tests.support.quizzes import quiz

ASKED = quiz(0, 24)
TEXTS = Corpus.from_texts(["The old man walked near the house.", "The colour is red."], name="texts")
EDIT = projection(1)
NO_CORPUS = r"corpus must be a Corpus, got Questions; corpus\.right_answers\(\) is one"
NO_QUESTIONS = "questions must be Questions, got Corpus; make them with"
CASES: dict[str, tuple[Callable[[Any], object], str]] = {
    "accuracy": (lambda model: metrics.accuracy(model, TEXTS), NO_QUESTIONS),  # type: ignore[arg-type]
    "truth ratio": (lambda model: metrics.truth_ratio(model, TEXTS), NO_QUESTIONS),  # type: ignore[arg-type]
    "logit lens": (lambda model: metrics.logit_lens(model, TEXTS), NO_QUESTIONS),  # type: ignore[arg-type]
    "perplexity": (lambda model: metrics.perplexity(model, ASKED), NO_CORPUS),  # type: ignore[arg-type]
    "memorisation": (lambda model: metrics.exact_memorization(model, ASKED), NO_CORPUS),  # type: ignore[arg-type]
    "a list": (lambda model: metrics.perplexity(model, ["a text"]), "got list; make one with"),  # type: ignore[arg-type]
    "damage of questions": (lambda model: metrics.damage(model, EDIT, ASKED), NO_CORPUS),  # type: ignore[arg-type]
    "damage of nothing": (lambda model: metrics.damage(model, None, TEXTS), "edit must be an Edit, got NoneType"),  # type: ignore[arg-type]
    "untaught": (
        lambda model: attacks.relearn(model, None, train=ASKED, held_out=quiz(50, 24), untaught=TEXTS),  # type: ignore[arg-type]
        "untaught must be Questions, got Corpus",
    ),
    "marks": (
        lambda model: attacks.relearn(model, None, train=ASKED, held_out=quiz(50, 24), marks=5),  # type: ignore[arg-type]
        r"marks are several numbers of updates, got 5; write \[5\]",
    ),
    "kinds": (
        lambda model: attacks.bypass(model, EDIT, held_out=ASKED, kinds="noise"),  # type: ignore[arg-type]
        r"kinds is one string, 'noise'; write \['noise'\]",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_another_kind_of_data_is_named(model: Any, untouched: None, name: str) -> None:
    ask, message = CASES[name]
    with pytest.raises(TypeError, match=message):
        ask(model)


def test_questions_without_a_wrong_choice_and_no_questions_at_all(model: Any) -> None:
    single = Questions((Question("The colour is", (" red",), 0),), "single")
    with pytest.raises(ValueError, match="'The colour is' has no wrong choice to compare the right one with"):
        metrics.truth_ratio(model, single)
    assert choice_scores(model, Questions((), "none")) == []
