"""Everything with an interval over a quiz knows that questions about one entity go together."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pandas as pd
import pytest

from mrp_lens import attacks, metrics
from mrp_lens.attacks.evaluation import Evaluator
from mrp_lens.data import Corpus, Questions
from mrp_lens.models import LensModel
from tests.support.edits import projection
from tests.support.quizzes import colours, liked, quiz

Frame = Callable[[LensModel, Questions], pd.DataFrame]
TEXTS = Corpus.from_texts([f"The old man walked slowly {word}." for word in ("today", "again", "late", "early")])


def _drops(model: LensModel, asked: Questions) -> pd.DataFrame:
    data: dict[str, Any] = {"held_out": quiz(100, 20), "retain_questions": asked, "forget": TEXTS, "retain": TEXTS}
    kinds = ["forget token in a retain question"]
    return attacks.bypass(model, projection(1), **data, kinds=kinds, progress=False)


def _triggers(model: LensModel, asked: Questions) -> pd.DataFrame:
    return attacks.jailbreak(
        model, None, train=quiz(100, 8), held_out=asked, steps=1, candidates=2, length=1, progress=False
    )


def _probes(model: LensModel, asked: Questions) -> pd.DataFrame:
    frame = attacks.probe(model, None, train=asked, held_out=asked_again(asked), layers=[1], progress=False)
    return frame[frame["group"] == "held-out"]


def asked_again(asked: Questions) -> Questions:
    return replace(asked, questions=tuple(replace(q, prompt=f"So {q.prompt}") for q in asked.questions))


MEASURES: dict[str, tuple[Frame, str]] = {
    "accuracy": (lambda model, asked: metrics.accuracy(model, asked), ""),
    "logit lens": (lambda model, asked: metrics.logit_lens(model, asked, layers=[1]), ""),
    "truth ratio": (lambda model, asked: metrics.truth_ratio(model, asked), ""),
    "open-ended": (lambda model, asked: metrics.open_ended(model, asked, max_new_tokens=2), ""),
    "probe": (_probes, ""),
    "bypass, on retain questions": (_drops, "drop_"),
    "jailbreak": (_triggers, "recovery_"),
}


@pytest.mark.parametrize("name", MEASURES)
def test_what_is_asked_four_times_over_is_no_surer(model: LensModel, name: str) -> None:
    measure, prefix = MEASURES[name]
    once = replace(liked(model, quiz(0, 12)), name="once")
    # Of a third of the entities another answer is said to be right, so that figures are not all or nothing; recovery is of what is known.
    wrong = {n for n in range(12) if n % 3 == 0 and name != "jailbreak"}
    once = replace(
        once,
        questions=tuple(
            replace(q, entity=f"Zaxim{n}", group="", answer=1 - q.answer if n in wrong else q.answer)
            for n, q in enumerate(once.questions)
        ),
    )
    named = replace(once, questions=once.questions * 4)
    unnamed = replace(named, questions=tuple(replace(q, entity="") for q in named.questions))
    known, blind = (measure(model, asked).iloc[-1] for asked in (named, unnamed))
    width = {which: row[f"{prefix}high"] - row[f"{prefix}low"] for which, row in (("known", known), ("blind", blind))}
    assert width["blind"] > 0
    assert width["known"] > 1.3 * width["blind"]


def test_retraining_counts_the_questions_of_each_of_its_three_scores(model: LensModel, untouched: None) -> None:
    def about(asked: Questions, each: int) -> Questions:
        return replace(
            asked, questions=tuple(replace(q, entity=f"E{n // each}") for n, q in enumerate(asked.questions))
        )

    held_out, untaught = about(colours(200), 5), about(colours(300, 40), 2)
    evaluator = Evaluator.of(model, None, colours(100), held_out, untaught, seed=0)
    figures = evaluator.figures(model)
    floor = evaluator.floor
    assert floor is not None
    expected = {"": held_out, "_floor": floor, "_ceiling": held_out}
    for end, asked in expected.items():
        right = metrics.multiple_choice.answered_right(metrics.choice_scores(model, asked, progress=False), asked)
        wanted = metrics.bootstrap.effective_number(right, asked.entities)
        assert figures[f"effective_n{end}"] == pytest.approx(wanted)
        assert wanted < len(asked)
