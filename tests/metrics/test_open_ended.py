"""Answers in a model's own words, against rouge_score, SQuAD's rules by hand, and what the model writes one by one."""

import random
import re
import string
from collections import Counter
from importlib import import_module
from typing import Any

import numpy as np
import pytest
from rouge_score.rouge_scorer import RougeScorer

from mrp_lens import metrics
from mrp_lens.data import Corpus, Document, Question, Questions
from mrp_lens.metrics.open_ended import exact_match, null_of, rouge_l, token_f1, written_answers
from mrp_lens.models import LensModel
from mrp_lens.models.generation import continuations
from tests.support.plain import ids_of, plain_logits

QUIZ = Questions(
    tuple(
        Question(
            prompt, (" a red house", " the old man walked", " blue"), number % 3, group=("even", "odd")[number % 2]
        )
        for number, prompt in enumerate(["The old man", "The colour of", "A house", "It is the"])
    ),
    "quiz",
)

PUNCTUATION = str.maketrans("", "", string.punctuation)


def greedy(model: LensModel, prompt: str, tokens: int) -> str:
    """One token at a time, one prompt at a time."""
    ids = ids_of(model, prompt)
    for _ in range(tokens):
        ids = [*ids, int(np.argmax(plain_logits(model, ids)))]
        if ids[-1] == model.tokenizer.eos_token_id:
            break
    new = ids[len(ids_of(model, prompt)) :]
    return str(model.tokenizer.decode(new, skip_special_tokens=True)).strip()


def test_every_measure_equals_answers_written_and_scored_one_by_one(model: LensModel, untouched: None) -> None:
    answers = [greedy(model, question.prompt, 4) for question in QUIZ.questions]
    rights = [question.choices[question.answer] for question in QUIZ.questions]
    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    frame = metrics.open_ended(model, QUIZ, max_new_tokens=4, progress=False).set_index(["group", "measure"])
    for group, which in (("all", slice(None)), ("even", slice(0, None, 2)), ("odd", slice(1, None, 2))):
        own, wanted = answers[which], rights[which]
        rouge = [scorer.score(right, answer)["rougeL"].recall for answer, right in zip(own, wanted, strict=True)]
        assert frame.loc[(group, "rouge_l"), "mean"] == pytest.approx(np.mean(rouge), abs=1e-12)
        f1 = [token_f1(answer, right) for answer, right in zip(own, wanted, strict=True)]
        assert frame.loc[(group, "token_f1"), "mean"] == pytest.approx(np.mean(f1), abs=1e-12)
        assert frame.loc[(group, "rouge_l"), "null"] == pytest.approx(null_of(rouge_l, own, wanted))
    chosen = metrics.accuracy(model, QUIZ, progress=False).set_index("group")
    for group in ("all", "even", "odd"):
        row = frame.xs((group, "multiple_choice"))
        assert (row["mean"], row["null"], row["n"]) == tuple(chosen.loc[group, ["accuracy", "chance", "n"]])


def test_answers_side_by_side_are_those_of_one_prompt_at_a_time(model: LensModel, untouched: None) -> None:
    prompts = ["The old man", "The colour of the house is", "The old man", "A", "The house", "It is"]
    together = continuations(model, prompts, max_new_tokens=6)
    assert together == [continuations(model, [prompt], max_new_tokens=6)[0] for prompt in prompts]
    assert together == [greedy(model, prompt, 6) for prompt in prompts]


def test_what_the_model_writes_is_right_in_every_measure(model: LensModel) -> None:
    prompts = ["The old man", "The colour of"]
    answers = continuations(model, prompts, max_new_tokens=5)
    if all(answer.strip(" .,!?'\"") for answer in answers):
        corpus = Corpus(tuple(map(Document, prompts, (f" {answer}" for answer in answers))), "own")
        frame = metrics.open_ended(model, corpus, max_new_tokens=5, progress=False).set_index("measure")
        assert frame.loc[["exact_match", "token_f1"], "mean"].tolist() == [1.0, 1.0]
        assert "multiple_choice" not in frame.index
        assert set(frame["group"]) == {"all"}


@pytest.mark.parametrize(
    ("answer", "right", "exact", "f1", "recall"),
    [
        ("The author is Hsiao Yun-Hwa.", "author is hsiao yunhwa", 1.0, 1.0, None),
        ("a cat", "the cat", 1.0, 1.0, 0.5),
        ("cats and dogs", "dogs", 0.0, 0.5, 1.0),
        ("red red blue", "red blue blue", 0.0, 2 / 3, 2 / 3),
        ("", "red", 0.0, 0.0, 0.0),
        ("a.", "the", 0.0, 0.0, 0.0),
        ("", "A", 0.0, 0.0, 0.0),
        ("the", "A", 0.0, 0.0, 0.0),
        (" a ", "A", 1.0, 1.0, 1.0),
        ("A.", "A", 1.0, 1.0, 1.0),
        ("", "-", 0.0, 0.0, 0.0),
        ("--", "-", 0.0, 0.0, 0.0),
        ("!!!", " !!!", 1.0, 1.0, 0.0),
        ("", "", 1.0, 1.0, 0.0),
        ("", "Москва", 0.0, 0.0, 0.0),
        ("Над Москвой", "над москвой", 1.0, 1.0, 1.0),
        ("Москва", "Москва", 1.0, 1.0, 1.0),
        ("Город Москва.", "Москва", 0.0, 2 / 3, 1.0),
        ("東京", "東京", 1.0, 1.0, 1.0),
        ("東京です。", "東京", 0.0, 2 / 3, 1.0),
        ("京東", "東京", 0.0, 1.0, 0.5),
        ("它是红色", "红色", 0.0, 2 / 3, 1.0),
        ("「红色」\uff01", "红色。", 1.0, 1.0, 1.0),
        ("\uff21\uff22\u3000\uff11", "ab 1", 1.0, 1.0, 1.0),  # wide forms
        ("STRASSE", "Straße", 1.0, 1.0, 1.0),
        ("cafe\u0301s here", "Cafés", 0.0, 2 / 3, 1.0),  # an accent of its own, and no ending taken off
        ("हिन्दी", "हिन्दी", 1.0, 1.0, 1.0),
        ("हिन्दू", "हिन्दी", 0.0, 0.0, 0.0),  # the vowel's mark is part of the word
        ("서울 시", "서울", 0.0, 2 / 3, 1.0),
        ("running fast", "he runs fastest", 0.0, 0.0, 1 / 3),  # ROUGE takes runs and running for one
    ],
)
def test_scores_by_hand(answer: str, right: str, exact: float, f1: float, recall: float | None) -> None:
    assert exact_match(answer, right) == exact
    assert token_f1(answer, right) == pytest.approx(f1)
    if recall is not None:
        assert rouge_l(answer, right) == pytest.approx(recall)


def test_of_ascii_texts_the_words_are_those_of_rouge_score_and_squad() -> None:
    draw, own = random.Random(0), RougeScorer(["rougeL"], use_stemmer=True)
    words = "Running runs the a 1990 o'clock self-made x_y $5.00 relational - ~a^".split()
    symbols = [chr(code) for code in range(128)]
    for _ in range(300):
        answer, right = (" ".join(draw.choices(words, k=6)) + "".join(draw.choices(symbols, k=8)) for _ in range(2))
        assert rouge_l(answer, right) == own.score(right, answer)["rougeL"].recall
        squad = [
            re.sub(r"\b(a|an|the)\b", " ", text.lower().translate(PUNCTUATION)).split() for text in (answer, right)
        ]
        shared = (Counter(squad[0]) & Counter(squad[1])).total()
        assert exact_match(answer, right) == float(squad[0] == squad[1])
        assert token_f1(answer, right) == 2 * shared / (len(squad[0]) + len(squad[1]))


def test_the_control_is_the_answer_to_another_question() -> None:
    assert null_of(exact_match, ["red", "blue"], ["red", "red"]) == 0.5
    assert np.isnan(null_of(exact_match, ["red"], ["red"]))


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many tokens the model was asked to write, call by call; nothing is written."""
    found: list[int] = []

    def remember(model: Any, prompts: list[str], *, max_new_tokens: int, progress: bool) -> list[str]:
        found.append(max_new_tokens)
        return [""] * len(prompts)

    monkeypatch.setattr(import_module("mrp_lens.metrics.open_ended"), "continuations", remember)
    return found


def test_the_longest_right_answer_says_how_much_is_written(model: LensModel, asked: list[int]) -> None:
    rights = [" red", " the old man walked slowly", " a"]
    written_answers(model, Corpus(tuple(Document("It is", right) for right in rights)))
    longest = max(len(ids_of(model, right)) - 1 for right in rights)
    for room in (1, longest + 4):
        written_answers(model, Corpus(tuple(Document("It is", right) for right in rights)), room=room)
    assert asked == [longest, longest, longest + 4]


def test_the_longest_right_answer_leaves_the_prompts_room(model: LensModel, asked: list[int]) -> None:
    context, house = int(model.cfg.n_ctx), len(ids_of(model, "house " * 10)) - 1
    for prompt, right in (("It is", " house" * 500), ("house " * 500, " house" * 500), ("house " * 10, " house" * 500)):
        written_answers(model, Corpus((Document(prompt, right), Document("It", " red")), "long"))
    assert asked == [context - len(ids_of(model, "It is")), context // 2, max(context - 1 - house, context // 2)]


def test_what_cannot_be_asked_is_named(model: Any, untouched: None) -> None:
    with pytest.raises(ValueError, match="nothing is asked in 'none'"):
        metrics.open_ended(model, Corpus((), "none"))
    with pytest.raises(ValueError, match="'bare', document 1 has no prompt to answer; read it with templates"):
        metrics.open_ended(model, Corpus((Document("It is", " red"), Document("", "red")), "bare"))
    with pytest.raises(ValueError, match="max_new_tokens must be at least 1, got 0"):
        metrics.open_ended(model, QUIZ, max_new_tokens=0)


def test_an_answer_ends_at_a_line_break_unless_the_right_one_has_some(
    model: LensModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = "Paris.\nQuestion: What is the capital of Spain?"
    module = import_module("mrp_lens.metrics.open_ended")
    monkeypatch.setattr(module, "continuations", lambda *_, **__: [written, written])
    asked = Corpus((Document("The old man", " Paris\n"), Document("A house", " Paris\nMadrid")), "asked")
    assert written_answers(model, asked) == ["Paris.", written]
