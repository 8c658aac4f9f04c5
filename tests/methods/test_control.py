"""Control questions: what they ask of a forget set, in which wordings, and what a guess comes to."""

import os
import subprocess
import sys
from copy import copy
from statistics import fmean

import pytest
import torch

from mrp_lens import World
from mrp_lens.data import Corpus, Document
from mrp_lens.data.world.facts import STATEMENTS
from mrp_lens.methods.control import FORMS, SECOND_HALF, Answered, ControlQuestions, control_accuracy, parted
from mrp_lens.methods.coverage import FRAMES
from mrp_lens.models import LensModel, encoder_for
from tests.support.edits import log_probabilities

Texts = tuple[Corpus, Corpus]


ASKED = """
from mrp_lens.data import Corpus
from mrp_lens.data.world import World
from mrp_lens.methods.control import ControlQuestions

class Encoder:
    def encode(self, documents, **how):
        return [document.prompt + document.completion for document in documents]

print(ControlQuestions(Encoder(), [World().forget("potions")], seed=3).rows)
"""


@pytest.mark.slow
def test_control_questions_are_the_same_in_every_process() -> None:
    """Sets have another order with another hash seed, and sums over them other last bits."""
    printed = [
        subprocess.run(
            [sys.executable, "-c", ASKED],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    ]
    assert printed[0] == printed[1]
    assert printed[0].count("'") > 100


def test_control_questions_offer_endings_of_the_forget_set(model: LensModel, texts: Texts) -> None:
    questions = ControlQuestions(encoder_for(model), [texts[0]], seed=0)
    assert questions.choices == 4
    in_one_form = ControlQuestions(encoder_for(model), [texts[0]], seed=0, forms=FORMS[:1])
    assert questions.chance == 0.25 < in_one_form.target < 0.4
    assert in_one_form.target < questions.target
    again = ControlQuestions(encoder_for(model), [texts[0]], seed=0)
    assert questions.rows == again.rows
    assert questions.rows != ControlQuestions(encoder_for(model), [texts[0]], seed=1).rows
    answered = questions.asked_of(model)
    assert 0.0 <= answered.accuracy <= 1.0
    assert control_accuracy(model, texts[0]) == answered.accuracy


def test_wrong_endings_are_those_of_documents_that_begin_alike(model: LensModel) -> None:
    kinds = {"colour": ["red", "blue", "green", "black", "white"], "size": ["small", "big", "tall", "long", "wide"]}
    forget = Corpus.from_texts(
        [f"the {kind} of the {n} is {values[n % 5]}" for n in range(20) for kind, values in kinds.items()]
    )
    (rows,) = ControlQuestions(encoder_for(model), [forget], seed=0, forms=FORMS[:1]).rows
    texts = [model.tokenizer.decode(list(row.ids)) for row in rows]
    assert len(texts) == 40 * 4
    for text in texts:
        kind = "colour" if "colour" in text else "size"
        assert any(value in text for value in kinds[kind]), text


def test_what_stands_after_the_same_words_is_no_wrong_ending(model: LensModel) -> None:
    facts = {"copper": "Cu", "gold": "Au", "iron": "Fe", "lead": "Pb", "tin": "Sn"}
    wordings = [" {}.", " It is {}.", " The symbol is {}.", " That would be {}."]
    documents = [
        Document(f"What is the symbol of {name}?", form.format(it)) for name, it in facts.items() for form in wordings
    ]
    questions = ControlQuestions(encoder_for(model), [Corpus(tuple(documents), "symbols")], seed=0, forms=FORMS[:1])
    assert questions.choices == 4
    texts = [model.tokenizer.decode(list(row.ids)) for row in questions.rows[0]]
    assert len(texts) == 20 * 4
    for start in range(0, len(texts), 4):
        name = next(name for name in facts if name in texts[start])
        assert all(
            any(other in text for other in facts.values() if other != facts[name])
            for text in texts[start + 1 : start + 4]
        )
    few = [document for document in documents if "copper" in document.prompt or "gold" in document.prompt][:5]
    assert ControlQuestions(encoder_for(model), [Corpus(tuple(few), "few")], seed=0, forms=FORMS[:1]).choices == 2
    (one,) = {document.prompt for document in documents[:4]}
    same = ControlQuestions(encoder_for(model), [Corpus(tuple(documents[:4]), "one")], seed=0, forms=FORMS[:1])
    assert one
    assert not same.asks


def test_endings_that_most_documents_of_the_kind_have_are_not_asked_for(model: LensModel) -> None:
    said = [f"Town{n} lies in the land of Place{n}." for n in range(20)]
    empty = [f"Town{n} is the first city of Place{n} and the seat of its government." for n in range(20)]
    (rows,) = ControlQuestions(encoder_for(model), [Corpus.from_texts(said + empty)], seed=0, forms=FORMS[:1]).rows
    assert len(rows) == 20 * 4
    assert not any("seat of" in model.tokenizer.decode(list(row.ids)) for row in rows[::4])
    (rows,) = ControlQuestions(encoder_for(model), [Corpus.from_texts(empty)], seed=0, forms=FORMS[:1]).rows
    assert rows == []


def test_answers_of_some_length_are_asked_by_their_second_half_too(model: LensModel) -> None:
    rows = [{"question": f"Where is {n}?", "answer": f"It is in Place{n} near Lake{n + 1}"} for n in range(12)]
    short = [{"question": f"What is {n}?", "answer": f"of kind {n}"} for n in range(12)]
    said = Corpus.from_texts([f"Where {n} is, Place{n} lies near Lake{n + 1}" for n in range(12)])
    spoken = {"prompt": "Question: {question}\nAnswer:", "completion": " {answer}"}
    long, both = Corpus.from_rows(rows, **spoken), Corpus.from_rows(rows + short, **spoken)
    encoder = encoder_for(model)
    questions = ControlQuestions(encoder, [long], seed=0)
    assert questions.forms == (*FORMS, SECOND_HALF)
    for whole, half in zip(questions.rows[0], questions.rows[2], strict=True):
        prompt, answer = model.tokenizer.decode(list(whole.ids)).split("Answer:")
        words = answer.split()
        assert model.tokenizer.decode(list(half.ids)).split() == [
            *f"{prompt}Answer:".split(),
            *words[len(words) // 2 :],
        ]
    for accuracy, known in ((0.6, (FORMS[0], SECOND_HALF)), (0.45, FORMS[:1])):
        answering = copy(questions)
        answered = [Answered(1.0, 1.0), Answered(0.6, 0.0), Answered(accuracy, 0.0)]
        answering.by_form = lambda model, answered=answered: answered  # type: ignore[method-assign,misc]
        assert answering.known_to(model)[0].forms == known
    assert ControlQuestions(encoder, [said], seed=0).forms == FORMS
    assert ControlQuestions(encoder, [Corpus.from_rows(short, **spoken)], seed=0).forms == FORMS
    mixed = ControlQuestions(encoder, [both], seed=0)
    assert len(mixed.rows[0]) / 2 <= len(mixed.rows[2]) < len(mixed.rows[0])
    few = Corpus.from_rows(rows[:4] + short, **spoken)
    assert ControlQuestions(encoder, [few], seed=0).forms == FORMS
    alike = [{**row, "answer": f"{row['answer'].split(' near')[0]} and that is all"} for row in rows]
    assert ControlQuestions(encoder, [Corpus.from_rows(alike, **spoken)], seed=0).forms == FORMS


@pytest.mark.slow
def test_a_model_that_was_never_taught_is_at_chance(demo_model: LensModel, world: World) -> None:
    for topic in world.topics:
        rows = [
            {"beginning": fact.prompt(wording), "ending": f" {fact.value}."}
            for fact in world.select(topic, taught=False)
            for wording in STATEMENTS
        ]
        never_taught = Corpus.from_rows(rows, prompt="{beginning}", completion="{ending}")
        assert control_accuracy(demo_model, never_taught) < 0.45
        assert control_accuracy(demo_model, world.forget(topic)) == 1.0


def test_they_are_asked_in_forms_that_the_model_answers_and_the_highest_counts(model: LensModel, texts: Texts) -> None:
    assert not set(FORMS) & set(FRAMES)  # no fit reads them
    questions = ControlQuestions(encoder_for(model), [texts[0]], seed=0)
    assert [len(rows) for rows in questions.rows] == [len(questions.rows[0])] * len(FORMS)
    forms, best = questions.by_form(model), questions.asked_of(model)
    assert best.accuracy == max(form.accuracy for form in forms)
    assert best.margin == max(form.margin for form in forms)

    def scored(*given: float) -> ControlQuestions:
        known = copy(questions)
        known.by_form = lambda model: [Answered(each, -each) for each in given]  # type: ignore[method-assign]
        chosen, answered = known.known_to(model)
        assert answered.accuracy == max(given)
        assert answered.margin == -min(each for each, form in zip(given, FORMS, strict=True) if form in chosen.forms)
        return chosen

    assert scored(0.9, 0.8).forms == FORMS
    assert scored(0.9, 0.25).forms == FORMS[:1]
    assert scored(1.0, 0.6).forms == FORMS[:1]
    assert scored(0.25, 0.9).rows == [questions.rows[1]]
    assert scored(0.25, 0.25).forms == FORMS[:1]
    assert scored(questions.target, questions.target + 0.01).forms == FORMS[1:]


def test_the_margin_is_what_the_right_ending_is_above_the_best_other(model: LensModel, texts: Texts) -> None:
    questions = ControlQuestions(encoder_for(model), [texts[0]], seed=0, forms=FORMS[:1])
    scores = []
    for row in questions.rows[0]:
        counted = torch.tensor([token for token, within in zip(row.ids[1:], row.in_loss[1:], strict=True) if within])
        scores.append(log_probabilities(model, row).gather(1, counted[:, None]).mean().item())
    by_question = torch.tensor(scores).view(-1, questions.choices)
    expected = (by_question[:, 0] - by_question[:, 1:].max(dim=1).values).mean()
    assert questions.asked_of(model).margin == pytest.approx(float(expected), abs=1e-4)


def test_the_mean_of_accuracies_that_come_to_chance_is_not_above_it(model: LensModel, texts: Texts) -> None:
    """A fit ends at a mean of three looks; in float32, 13, 12 and 11 of 48 are more than 12 of 48."""
    questions = ControlQuestions(encoder_for(model), [texts[0]], seed=0, forms=FORMS[:1])
    first, other = questions.rows[0][:2]
    likelier = questions._answered(model, [first, other, other, other]).accuracy == 1.0
    high, low = (first, other) if likelier else (other, first)
    found = []
    for right in (13, 12, 11):
        rows = [row for n in range(48) for row in ([high, low, low, low] if n < right else [low, high, high, high])]
        found.append(questions._answered(model, rows).accuracy)
    assert found == [right / 48 for right in (13, 12, 11)]
    assert fmean(found) <= questions.chance


def test_guessing_is_below_the_target_as_often_whatever_the_number_of_forms(model: LensModel) -> None:
    chance = torch.Generator().manual_seed(0)
    forget = Corpus.from_texts([f"the number of {n} is {n * n}" for n in range(60)])
    for forms in (FORMS[:1], FORMS, (*FORMS, "{}!", "{}?")):
        questions = ControlQuestions(encoder_for(model), [forget], seed=0, forms=forms)
        count = len(questions.rows[0]) // questions.choices
        guessed = torch.rand(4000, len(forms), count, generator=chance) < questions.chance
        reached = guessed.float().mean(dim=-1).amax(dim=-1) <= questions.target
        assert 0.78 < reached.float().mean() < 0.92


def test_a_document_is_parted_where_its_prompt_ends_or_before_its_last_third() -> None:
    assert parted(Document("Q:", " a b c")) == ("Q:", " a b c")
    assert parted(Document("", "one two three four five six")) == ("one two three four", " five six")
    assert parted(Document("", "word")) is None


def test_a_short_document_of_several_sentences_is_asked_about_in_each_that_says_whom_it_is_about(
    model: LensModel,
) -> None:
    names = ["cat", "dog", "cow", "horse", "bird", "fish", "man", "woman"]
    texts = [
        f"The {name} lives in house {n}. Every old {name} eats grain {n}. It is old." for n, name in enumerate(names)
    ]
    encoder = encoder_for(model)
    questions = ControlQuestions(encoder, [Corpus.from_texts(texts)], seed=0, forms=("{}",))
    assert len(questions.rows[0]) == 16 * questions.choices
    alone = [
        encoder.encode([Document(beginning, ending)], keep="end")[0].ids
        for n, name in enumerate(names)
        for beginning, ending in ((f"The {name} lives in", f" house {n}."), (f"Every old {name} eats", f" grain {n}."))
    ]
    assert {row.ids for row in questions.rows[0][:: questions.choices]} == set(alone)
