"""Other words for the same questions: what stands before them, that it fits, and that it gives nothing away."""

import re
from dataclasses import replace

import pytest

from mrp_lens.attacks.prompting import few_shot, forget_token, in_context, with_token
from mrp_lens.data import Corpus, Document, Question, Questions
from mrp_lens.models import LensModel
from tests.support.quizzes import quiz


def test_few_shot_shows_solved_questions_of_the_same_group_and_cuts_nothing(model: LensModel) -> None:
    asked, shots = quiz(0, 24), quiz(50, 12)
    solved = {q.prompt + q.choices[q.answer]: q.group for q in shots.questions}
    shown = few_shot(model, asked, shots, separator="\n", seed=4)
    for plain, question in zip(asked.questions, shown.questions, strict=True):
        *lines, last = question.prompt.split("\n")
        assert last == plain.prompt
        assert len(set(lines)) == 4
        assert {solved[line] for line in lines} == {plain.group}
        assert replace(question, prompt=plain.prompt) == plain
    assert few_shot(model, asked, shots, separator="\n", seed=4) == shown
    assert few_shot(model, asked, shots, separator="\n", seed=5) != shown
    long = replace(
        shots, questions=tuple(replace(q, prompt="The old man walked " * 3 + q.prompt) for q in shots.questions)
    )
    with pytest.warns(UserWarning, match="24 of 24 questions are shown with fewer than 4 solved ones"):
        fewer = few_shot(model, asked, long)
    for question in fewer.questions:
        assert 1 <= question.prompt.count("\n") < 4
        for choice in question.choices:
            assert len(model.tokenizer(question.prompt + choice)["input_ids"]) + 1 <= model.cfg.n_ctx
    strangers = replace(asked, questions=tuple(replace(q, group="other") for q in asked.questions))
    assert few_shot(model, strangers, shots).questions[0].prompt.count("\n") == 4


def test_a_context_says_nothing_about_the_question_it_stands_before(model: LensModel) -> None:
    retain = [f"The man walked {word}." for word in ["today", "again", "late", "early"] * 5]
    telling = ["The man saw Zaxim3 today.", "The man walked to the red house.", "The man " + "walked " * 70]
    corpus = Corpus.from_texts(retain + telling, name="retain")
    quizzed = quiz(0, 24)
    asked = replace(quizzed, questions=tuple(replace(q, choices=(" red", " blue")) for q in quizzed.questions))
    wrapped = in_context(model, asked, corpus)
    contexts = []
    for plain, question in zip(asked.questions, wrapped.questions, strict=True):
        assert question.prompt.endswith(f" {plain.prompt}")
        contexts.append(question.prompt.removesuffix(f" {plain.prompt}"))
        assert contexts[-1] in corpus_texts(corpus)
        words = set(re.findall(r"\w+", contexts[-1].lower()))
        assert not words & {"zaxim3", "red"} or plain.prompt != "Zaxim3 is"
        assert "red" not in words, "a choice of every question"
        assert len(contexts[-1]) < 100, "does not fit"
    assert len(set(contexts)) == 4 + ("The man saw Zaxim3 today." in contexts)
    with pytest.warns(UserWarning, match="24 of 24 questions stand without a document"):
        assert in_context(model, asked, Corpus.from_texts(telling[1:], name="telling")) == asked


def test_a_context_in_a_script_without_blanks_does_not_hold_the_answer(model: LensModel) -> None:
    asked = Questions((Question("法国的首都是", ("巴黎", "伦敦"), 0),), "capitals")
    silent = "今天天气很好我们去公园"
    corpus = Corpus.from_texts(["法国的首都是巴黎因此游客很多", "英国的首都是伦敦", silent], name="retain")
    for seed in range(4):
        wrapped = in_context(model, asked, corpus, seed=seed)
        assert wrapped.questions[0].prompt == f"{silent} 法国的首都是"


def corpus_texts(corpus: Corpus) -> list[str]:
    return [document.prompt + document.completion for document in corpus.documents]


def test_the_forget_token_is_the_one_most_of_the_forget_set_and_least_of_the_rest(model: LensModel) -> None:
    forget = Corpus((Document("The potion is", " red."), Document("A potion:", " the old old old one.")), "forget")
    retain = Corpus.from_texts(["The old old house is red.", "A house: the blue one."], name="retain")
    token = forget_token(model, forget, retain)
    assert token.strip() == "potion"
    given = with_token(model, quiz(0, 2), token)
    wanted = model.tokenizer(" potion", add_special_tokens=False)["input_ids"]
    assert len(wanted) == 1
    for plain, question in zip(quiz(0, 2).questions, given.questions, strict=True):
        assert question.prompt.endswith(f" {plain.prompt}")
        assert model.tokenizer(question.prompt, add_special_tokens=False)["input_ids"][:1] == wanted
    with pytest.raises(ValueError, match="no token of 'numbers' is made of letters"):
        forget_token(model, Corpus.from_texts(["1 2 3."], name="numbers"), retain)


def test_a_bos_that_a_template_writes_stands_in_front_alone(model: LensModel) -> None:
    bos = model.tokenizer.bos_token
    asked, shots = (
        replace(plain, questions=tuple(replace(q, prompt=f"{bos}Now {q.prompt} so") for q in plain.questions))
        for plain in (quiz(0, 4), quiz(50, 12))
    )
    retain = Corpus.from_texts(["The man walked."] * 3)
    wrapped = (
        few_shot(model, asked, shots, k=1),
        in_context(model, asked, retain),
        with_token(model, asked, "x"),
    )
    for questions in wrapped:
        for plain, question in zip(asked.questions, questions.questions, strict=True):
            assert question.prompt.startswith(bos)
            assert question.prompt.count(bos) == 1
            assert question.prompt.endswith(plain.prompt.removeprefix(bos))
            assert len(question.prompt) > len(plain.prompt)
