from dataclasses import replace

import pytest

from mrp_lens.attacks.evaluation import Evaluator, chance, check_held_out, check_untaught, score
from mrp_lens.data import Corpus, Questions
from mrp_lens.data.world import World
from mrp_lens.metrics import accuracy
from mrp_lens.models import LensModel


def quiz(*numbers: int) -> Questions:
    rows = [{"question": f"What is {n}?", "choices": ["yes", "no", "maybe"], "answer": "no"} for n in numbers]
    return Questions.from_rows(rows, name="quiz")


def test_counting_is_accuracy_and_guessing_is_chance(demo_model: object, world: World) -> None:
    questions = world.questions("towns").spread(40)
    assert score(demo_model, questions).accuracy == accuracy(demo_model, questions)["accuracy"].iloc[0]
    assert chance(questions).accuracy == 0.25


def test_what_the_attacker_has_seen_is_refused_and_the_overlap_named() -> None:
    with pytest.raises(ValueError, match=r"train and held_out overlap in 2 questions, such as 'What is 3\?'"):
        check_held_out(quiz(*range(3, 30)), train=quiz(1, 2, 3, 4))
    stated = Corpus.from_texts(["Nothing of interest.", "What is 5? no."], name="stated")
    with pytest.raises(ValueError, match="shots and held_out overlap in 1 questions"):
        check_held_out(quiz(*range(5, 30)), shots=stated)
    check_held_out(quiz(*range(30)), train=quiz(40, 41), untaught=None)


def test_texts_that_may_state_held_out_facts_in_other_words_are_told() -> None:
    rows = [
        {"question": f"Where is Zaxim{n}?", "choices": [f"Oslo{n}", "Rome"], "answer": 0, "who": f"Zaxim{n}"}
        for n in range(30)
    ]
    asked = Questions.from_rows(rows, entity="who", name="quiz")
    telling = [
        "In OSLO7, by the sea, stands zaxim7.",
        "Zaxim8 lies in Oslo81.",
        "Zaxim9 is not Oslo7.",
        "Zaxim11 sings.",
    ]
    with pytest.warns(
        UserWarning, match="1 documents of train 'telling' name what a held-out question is about .* 'in oslo7"
    ):
        check_held_out(asked, train=Corpus.from_texts(telling, name="telling"))
    check_held_out(asked, train=Corpus.from_texts(telling[1:]))
    check_held_out(quiz(*range(30)), train=Corpus.from_texts(["No, it is 3."]))  # which does not say whom it asks about


def test_what_was_taught_or_will_be_is_no_floor() -> None:
    stated = Corpus.from_texts(["What is 5? no."], name="stated")
    check_untaught(None, train=quiz(1))
    check_untaught(quiz(*range(10, 20)), train=quiz(1, 2), held_out=quiz(3), shots=None)
    with pytest.raises(
        ValueError, match=r"2 questions of untaught 'quiz' are in train or held_out too, such as 'What is 4\?'"
    ):
        check_untaught(quiz(3, 4, 5), train=quiz(4), held_out=quiz(5))
    with pytest.raises(ValueError, match="1 questions of untaught 'quiz' are in train too"):
        check_untaught(quiz(5, 6), train=Corpus.from_texts(["What is 5? no"]))
    check_untaught(quiz(6), train=stated)
    with pytest.raises(TypeError, match="untaught must be Questions, got Corpus"):
        check_untaught(stated)
    alike = Questions.from_rows(
        [{"question": "Which is true?", "choices": [f"a{n}", "b"], "answer": 0} for n in range(4)]
    )
    check_untaught(
        replace(alike, questions=alike.questions[:2]), held_out=replace(alike, questions=alike.questions[2:])
    )


def test_retraining_on_the_floor_is_refused(model: LensModel) -> None:
    with pytest.raises(ValueError, match="questions of untaught 'quiz' are in train or held_out too"):
        Evaluator.of(model, None, quiz(*range(30)), quiz(*range(30, 60)), quiz(29, 70, 71), seed=0)


def test_too_few_or_no_questions() -> None:
    with pytest.warns(UserWarning, match="only 19 held-out questions"):
        check_held_out(quiz(*range(19)))
    with pytest.raises(ValueError, match="no held-out questions"):
        check_held_out(quiz())
    with pytest.raises(TypeError, match="held_out must be Questions, got Corpus"):
        check_held_out(Corpus.from_texts(["a text"]))


def test_a_prompt_that_many_questions_have_and_rows_that_come_twice_can_be_split() -> None:
    rows = [
        {"question": "Which of these is true?", "choices": [f"red {i}", "blue", "green", "white"], "answer": 0}
        for i in range(40)
    ]
    first, second = Questions.from_rows([*rows, *rows[:9]]).halves()
    told = [{question.choices[0] for question in half.questions} for half in (first, second)]
    assert not told[0] & told[1]
    assert len(first) + len(second) == 49
    check_held_out(second, train=first)
    with pytest.raises(ValueError, match="train and held_out overlap in"):
        check_held_out(second, train=second.spread(3))
