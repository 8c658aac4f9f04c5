"""Questions for a tiny model that has learned nothing: the right answer is what it prefers."""

from dataclasses import replace

import numpy as np

from mrp_lens.data import Question, Questions
from mrp_lens.metrics import choice_scores
from mrp_lens.models import LensModel
from tests.support.plain import log_probability

WORDS = " man, woman, child, farmer, teacher, house, garden, bridge, market, old".split(",")


def quiz(first: int, n: int, *, wording: str = "Zaxim{} is", name: str = "quiz") -> Questions:
    """Two words to choose from, other ones in each question."""
    return Questions(
        tuple(
            Question(
                wording.format(number),
                (WORDS[number % 10], WORDS[(number * 3 + 1) % 10]),
                number // 2 % 2,
                group=("even", "odd")[number % 2],
            )
            for number in range(first, first + n)
        ),
        name,
    )


def liked(model: LensModel, questions: Questions) -> Questions:
    """The same prompts, with what the model prefers as the right answers: so it knows all, and loses some when edited."""
    scores = choice_scores(model, questions)
    return replace(
        questions,
        questions=tuple(replace(q, answer=int(np.argmax(s))) for q, s in zip(questions.questions, scores, strict=True)),
    )


def slow_right(model: LensModel, questions: Questions) -> list[float]:
    """One question, one choice, one token at a time."""
    right = []
    for q in questions.questions:
        scores = [float(np.mean(log_probability(model, q.prompt, choice))) for choice in q.choices]
        right.append(float(scores.index(max(scores)) == q.answer))
    return right


def colours(first: int, n: int = 20, *, name: str = "colours") -> Questions:
    """Four choices of one word each; the right ones are nothing that the model prefers."""
    choices = ["red", "blue", "green", "white"]
    rows = [
        {"question": f"The colour of Zaxim{number} is", "choices": choices, "answer": choices[number % 4]}
        for number in range(first, first + n)
    ]
    return Questions.from_rows(rows, name=name)
