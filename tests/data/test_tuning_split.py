from dataclasses import replace

import pytest

from mrp_lens.data import Corpus, Questions
from mrp_lens.data.task import UnlearningTask
from mrp_lens.data.tuning_split import tuning_split
from tests.support.quizzes import colours, quiz

TEXTS = Corpus.from_texts([f"The old man saw {n} houses." for n in range(40)], name="held out")
TASK = UnlearningTask(
    (Corpus.from_texts(["The colour of Zaxim1 is red."], name="forget"),),
    Corpus.from_texts(["A house stood near the garden."], name="retain"),
    TEXTS,
    quiz(0, 30),
    colours(100, 31),
)


def with_entities(questions: Questions) -> Questions:
    """Three questions about each."""
    told = tuple(replace(q, entity=f"e{place // 3}") for place, q in enumerate(questions.questions))
    return replace(questions, questions=told)


@pytest.mark.parametrize("share", [0.2, 0.5, 0.8])
def test_nothing_that_is_measured_is_in_both_parts_and_nothing_is_lost(share: float) -> None:
    task = replace(TASK, questions=with_entities(quiz(0, 30)))
    tuning, reported = tuning_split(task, share, seed=3)
    for part in ("questions", "retain_questions"):
        sides = [set(getattr(each, part).questions) for each in (tuning, reported)]
        assert not sides[0] & sides[1]
        assert sides[0] | sides[1] == set(getattr(task, part).questions)
    entities = [{q.entity for q in each.questions.questions} for each in (tuning, reported) if each.questions]
    assert not entities[0] & entities[1]
    assert len(entities[0]) == int(10 * share)
    texts = [set(each.held_out.documents) for each in (tuning, reported)]
    assert not texts[0] & texts[1]
    assert texts[0] | texts[1] == set(TEXTS.documents)
    assert len(texts[0]) == int(40 * share)
    assert tuning.forget == reported.forget == task.forget
    assert tuning.retain == reported.retain == task.retain


def test_the_seed_decides() -> None:
    assert tuning_split(TASK, seed=1) == tuning_split(TASK, seed=1)
    assert tuning_split(TASK, seed=1)[0] != tuning_split(TASK, seed=2)[0]


def test_text_that_a_fit_sees_tells_no_damage() -> None:
    seen = replace(TASK, retain=Corpus(TEXTS.documents[:38], "retain"))
    tuning, reported = tuning_split(seen)
    assert {*tuning.held_out.documents, *reported.held_out.documents} == set(TEXTS.documents[38:])
    with pytest.raises(ValueError, match="and 0 held-out documents are such; give a retain set of at least 20"):
        tuning_split(replace(TASK, retain=TEXTS))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"questions": None}, "there is none for forget; give questions="),
        ({"retain_questions": None}, "there is none for retain"),
        ({"questions": quiz(0, 1)}, "has 1 question, which cannot be split"),
        ({"questions": Questions(quiz(0, 1).questions * 3)}, "has 1 question, which cannot be split"),
        (
            {"questions": Questions(tuple(replace(q, entity=name) for q in quiz(0, 1).questions for name in "ab"))},
            "same questions again and again",
        ),
        ({"held_out": Corpus(TEXTS.documents[:1] * 3, "one")}, "one document again and again"),
    ],
)
def test_what_cannot_be_parted_is_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tuning_split(replace(TASK, **change))  # type: ignore[arg-type]


def test_a_share_is_between_0_and_1() -> None:
    for share in (0.0, 1.0, -1.0):
        with pytest.raises(ValueError, match=f"a share must be between 0 and 1, got {share}"):
            tuning_split(TASK, share)
