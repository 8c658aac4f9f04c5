from typing import Any

import pytest

from mrp_lens.runs.report.answers import NOTHING, UNCLEAR, UNTESTED, UNTOLD, Answer, answers_of

BEFORE: dict[str, Any] = {
    "method": "unedited",
    "forget_accuracy": 0.9,
    "forget_low": 0.85,
    "forget_high": 0.95,
    "retain_accuracy": 0.8,
    "text_perplexity_ratio": 1.0,
}
AFTER: dict[str, Any] = {
    "method": "mrp",
    "forget_accuracy": 0.3,
    "forget_low": 0.26,
    "forget_high": 0.34,
    "retain_accuracy": 0.76,
    "text_perplexity_ratio": 1.02,
    "forget_chance": 0.25,
}


def answers(**changed: Any) -> Any:
    (found,) = answers_of([BEFORE, {**AFTER, **changed}])
    return found


def test_what_is_left_is_a_share_of_what_was_above_the_level() -> None:
    guessed = answers()
    figures = "30.0% [26.0, 34.0] of the forget quiz right; 90.0% before; 25.0% by guessing"
    assert guessed.forgot == Answer("Forgotten", figures, pytest.approx(0.05 / 0.65))
    known = answers(forget_accuracy=0.35, forget_low=0.24, forget_high=0.46).forgot
    assert (known.words, known.share) == ("Cannot be told from guessing", pytest.approx(0.1 / 0.65))
    taught = answers(untaught_accuracy=0.28)
    assert taught.forgot.words == "Forgotten"
    assert taught.forgot.share == pytest.approx(0.02 / 0.62)
    assert "28.0% on facts never taught" in taught.forgot.figures
    assert answers(forget_accuracy=0.2, forget_low=0.15).forgot.share == 0.0


def test_a_model_that_never_saw_the_set_is_the_level_before_all_others() -> None:
    never = {**BEFORE, "method": "never-taught", "forget_accuracy": 0.3}
    (found,) = answers_of([BEFORE, never, {**AFTER, "untaught_accuracy": 0.1}])
    assert found.forgot is not None
    assert found.forgot.words == "Forgotten"
    assert "30.0% by a model that never saw the forget set" in found.forgot.figures


@pytest.mark.parametrize(
    ("verdict", "words"),
    {"absent": "Forgotten", "suppressed": "Suppressed: below facts never taught", "known": "Not all forgotten"}.items(),
)
def test_a_verdict_of_the_run_is_what_the_page_says(verdict: str, words: str) -> None:
    assert answers(verdict=verdict).forgot.words == words


UNSURE = float("nan")


@pytest.mark.parametrize(
    ("accuracy", "interval", "words"),
    [
        (0.02, (0.0, 0.05), "Suppressed: below guessing"),
        (0.15, (0.1, 0.2), "Suppressed: below guessing"),
        (0.15, (0.05, 0.25), "Cannot be told from guessing"),
        (0.24, (0.2, 0.28), "Forgotten"),
        (0.3, (0.1, 0.6), "Forgotten"),
        (0.4, (0.3, 0.5), "Not all forgotten"),
        (0.4, (0.1, 0.7), "Cannot be told from guessing"),
        (0.9, (0.2, 1.0), UNTOLD),
        (0.25, (0.0, 1.0), UNTOLD),
        (0.0, (UNSURE, UNSURE), UNTOLD),
        (1.0, (None, None), UNTOLD),
    ],
)
def test_a_row_without_a_verdict_is_judged_as_the_demo_judges(
    accuracy: float, interval: tuple[Any, Any], words: str
) -> None:
    found = answers(forget_accuracy=accuracy, forget_low=interval[0], forget_high=interval[1]).forgot
    assert found.words == words
    assert (found.share is None) == (words == UNTOLD)


def test_below_never_taught_facts_it_is_suppressed_even_where_guessing_is_lower() -> None:
    found = answers(untaught_accuracy=0.4, forget_accuracy=0.26, forget_low=0.2).forgot
    assert found.words == "Suppressed: below facts never taught"


@pytest.mark.parametrize("verdict", [None, "absent"])
def test_a_model_that_guessed_before_the_edit_had_nothing_to_forget(verdict: str | None) -> None:
    before = {**BEFORE, "forget_accuracy": 0.26, "forget_low": 0.2, "forget_high": 0.32}
    (found,) = answers_of([before, {**AFTER, "verdict": verdict}])
    assert found.forgot is not None
    assert (found.forgot.words, found.forgot.share) == (NOTHING, None)


def test_without_a_level_nothing_is_called_forgotten() -> None:
    found = answers(forget_chance=None, forget_accuracy=0.0, forget_low=0.0).forgot
    assert (found.words, found.share) == ("90.0% → 0.0% [0.0, 34.0]", None)
    assert answers(forget_chance=None, verdict="known").forgot.words == "Not all forgotten"


def test_the_cost_is_on_the_retain_quiz_or_else_on_text() -> None:
    cost = answers(worst_topic_accuracy=0.5, worst_topic="towns").cost
    assert cost.words == "-4.0 points on the retain quiz"
    assert cost.share == pytest.approx(0.95)
    assert cost.figures == "76.0% right; 80.0% before; worst topic (towns) 50.0%; text perplexity x1.020"
    assert answers(retain_accuracy=None).cost == Answer("Text perplexity x1.020")


def test_the_attack_that_brings_most_back_counts() -> None:
    assert answers().survives == Answer(UNTESTED)
    back = {"recovery_5": 0.4, "recovery_20": 0.6, "recovery_20_low": 0.5, "recovery_20_high": 0.7}
    assert answers(**back).survives == Answer(
        "60% [50, 70] comes back", "after 20 updates on others of the facts", pytest.approx(0.6)
    )
    assert answers(recovery_kept_20=1.2).survives.share == 1.0
    assert answers(recovery_20=float("nan")).survives == Answer(UNCLEAR)


@pytest.mark.parametrize("key", ["recovery_stripped_5", "recovery_5_stripped"])  # of the leaderboard, of relearning
def test_an_attack_is_told_with_the_form_of_the_edit(key: str) -> None:
    survives = answers(recovery_20=0.1, **{key: 1.0}).survives
    assert survives.figures == "hooks stripped, after 5 updates on others of the facts"


def test_without_a_quiz_the_forget_texts_speak() -> None:
    rows = [{"method": name, "forget_probability": value} for name, value in (("unedited", 0.9), ("rmu", 0.05))]
    (found,) = answers_of(rows)
    assert found.forgot is not None
    assert found.forgot.words == "90.0% → 5.0%"
    assert found.forgot.share is None


@pytest.mark.parametrize(
    "rows",
    [
        [],
        [AFTER],
        [BEFORE, AFTER, AFTER],
        [{"method": "unedited"}, {"method": "mrp"}],
        [{"layer": 1}, {"layer": 2}],
    ],
    ids=["none", "no unedited model", "a sweep", "nothing measured", "a study"],
)
def test_other_tables_have_no_answers(rows: list[dict[str, Any]]) -> None:
    assert answers_of(rows) == []


def test_controls_are_no_edits() -> None:
    names = ("unedited", "random-projection", "mrp")
    assert [each.method for each in answers_of([{**BEFORE, "method": name} for name in names])] == ["mrp"]
