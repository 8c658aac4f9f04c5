"""A choice's score is its own: what plain transformers gives for prompt + choice alone, whatever stands beside it."""

import random
import warnings
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from mrp_lens import metrics
from mrp_lens.attacks.evaluation import score
from mrp_lens.attacks.gcg import Slots, score_with_trigger
from mrp_lens.data import Question, Questions
from mrp_lens.metrics.multiple_choice import answered_right

PROMPTS = "How many? |The old man walked|USER: who? ASSISTANT: |x|(|Say:\n|The colour is re|A 4|garden ".split("|")
CHOICES = (
    "b|42|d|bb|b b| red|red| red house| red house near|d blue|2|!|\n|  |é|🙂| 🙂🙂|(|)|man| man| manner|walked slowly|"
    " near the old bridge again and again|\n\nb|4 2| 4"
).split("|")
QUIZ: list[dict[str, Any]] = [
    {"question": "What is the colour of Xim Oline? Answer:", "choices": ["red", "blue", "green"], "answer": 0},
    {"question": "The craft is", "choices": ["fishing boat", "carving", "the old man walked"], "answer": 2},
    {"question": "A longer prompt, so that padding matters, says", "choices": ["white", "brown bread"], "answer": 1},
]


def questions(pairs: list[tuple[str, list[str]]]) -> Questions:
    return Questions(tuple(Question(prompt, tuple(choices), 0) for prompt, choices in pairs))


def drawn(seed: int, n: int) -> Questions:
    rng = random.Random(seed)
    return questions([(rng.choice(PROMPTS), rng.sample(CHOICES, rng.randint(2, 6))) for _ in range(n)])


@pytest.mark.parametrize("batch_size", [1, 7, 128])
def test_scores_are_those_of_plain_transformers_on_each_choice_alone(
    model: Any, plain: Any, batch_size: int, untouched: None
) -> None:
    asked = drawn(batch_size, 60)
    asked = replace(asked, questions=asked.questions + Questions.from_rows(QUIZ).questions)
    found = metrics.choice_scores(model, asked, batch_size=batch_size)
    merged = 0
    for question, scores in zip(asked.questions, found, strict=True):
        expected = [plain(question.prompt, choice) for choice in question.choices]
        np.testing.assert_allclose(scores, [score for score, _ in expected], atol=2e-5, err_msg=repr(question))
        merged += sum(choice.strip() == choice and question.prompt[-1] == " " for choice in question.choices)
    assert merged > 20  # of them begin inside a token that holds the prompt's last space


def test_no_neighbour_and_no_order_changes_a_score(model: Any) -> None:
    rng, some = random.Random(0), CHOICES
    for prompt in PROMPTS:
        together = metrics.choice_scores(model, questions([(prompt, some)]))[0]
        order = rng.sample(range(len(some)), len(some))
        shuffled = metrics.choice_scores(model, questions([(prompt, [some[i] for i in order])]))[0]
        alone = np.concatenate(metrics.choice_scores(model, questions([(prompt, [choice]) for choice in some])))
        np.testing.assert_allclose(together, alone, atol=1e-5)
        np.testing.assert_allclose(shuffled, together[order], atol=1e-5)


def test_a_chat_template_that_ends_in_a_space(model: Any, plain: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model.tokenizer, "chat_template", "USER: {{ messages[0]['content'] }} ASSISTANT: ")
    for choices in (["b", "42"], ["b", "d"], ["42", "b", "d"]):
        asked = Questions.from_rows([{"question": "How many?", "choices": choices, "answer": 0}]).chat(model.tokenizer)
        expected = [plain("USER: How many? ASSISTANT: ", choice)[0] for choice in choices]
        np.testing.assert_allclose(metrics.choice_scores(model, asked)[0], expected, atol=1e-5)


def test_of_a_prompt_that_is_too_long_the_end_is_read_for_each_choice(model: Any, plain: Any) -> None:
    long = "The old man walked slowly near the house. " * 12
    choices = ["b", " red house near", "42", " again and again and again"]
    with pytest.warns(UserWarning, match="4 of 4 documents are longer than 64 tokens; only the end"):
        found = metrics.choice_scores(model, questions([(long, choices)]))[0]
    expected = [plain(long, choice)[0] for choice in choices]
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_without_bos_the_prompt_comes_first_and_has_to_be_there(
    model: Any, plain: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model.cfg, "default_prepend_bos", False)
    found = metrics.choice_scores(model, questions([("The old", [" man", " red house"])]))[0]
    np.testing.assert_allclose(found, [plain("The old", c, bos=False)[0] for c in (" man", " red house")], atol=1e-5)
    with pytest.raises(ValueError, match=r"question 0: choice 0 \('The old man'\) has no token before it"):
        metrics.choice_scores(model, questions([("", ["The old man", "b"])]))


def test_a_choice_that_has_no_likelihood_is_refused_by_name(model: Any) -> None:
    with pytest.raises(ValueError, match=r"'questions', question 1: choice 1 \(''\) holds no token of its own"):
        metrics.accuracy(model, questions([("The", [" man"]), ("The", [" man", ""])]))
    endless = " man" * 70
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        with pytest.raises(
            ValueError, match=r"has 70 tokens and does not fit into the 64 tokens that are read; shorten it"
        ):
            metrics.choice_scores(model, questions([("The", [" man", endless])]))
    for size in (0, -1):
        with pytest.raises(ValueError, match=f"batch_size must be at least 1, got {size}"):
            metrics.choice_scores(model, questions([("The", [" man"])]), batch_size=size)


def test_choices_with_one_score_share_the_question_in_any_order(model: Any) -> None:
    twice = [(" red", " red", " blue"), (" blue", " red", " red")]
    shares = []
    for choices in twice:
        for answer in range(3):
            asked = Questions((Question("The old", choices, answer),))
            share = answered_right(metrics.choice_scores(model, asked), asked)[0]
            shares.append((choices[answer], float(share)))
            assert metrics.accuracy(model, asked)["accuracy"].iloc[0] == share
            assert score(model, asked).right == share
    by_text = {text: {share for of, share in shares if of == text} for text in (" red", " blue")}
    assert sorted(map(sorted, by_text.values())) in ([[0.0], [0.5]], [[0.0], [1.0]])
    with pytest.raises(ValueError, match="has the score NaN"):
        answered_right([np.array([np.nan, 1.0])], Questions((Question("a", ("b", "c"), 1),)))


def test_answers_about_one_entity_are_no_independent_ones(model: Any) -> None:
    """Asked four times over, eight questions tell no more than once, if each says what it is about."""
    once = [Question(f"Zaxim{n} is", (" red", " blue"), n % 2, entity=f"Zaxim{n}") for n in range(8)]
    asked = Questions(tuple(once * 4))
    unnamed = Questions(tuple(replace(question, entity="") for question in asked.questions))
    known, blind = (metrics.accuracy(model, quiz).iloc[0] for quiz in (asked, unnamed))
    assert known["accuracy"] == blind["accuracy"]
    assert known["high"] - known["low"] > 1.8 * (blind["high"] - blind["low"])
    assert score(model, asked).independent < 8 < score(model, unnamed).independent == 32
    lens, unnamed_lens = (metrics.logit_lens(model, quiz, layers=[0]).iloc[0] for quiz in (asked, unnamed))
    assert lens["high"] - lens["low"] > unnamed_lens["high"] - unnamed_lens["low"]


def test_triggers_leave_each_choice_its_own_score(model: Any, plain: Any) -> None:
    """Two questions may hold one text, parted in two ways; and choices may begin inside the prompt's last token."""
    slots = Slots.for_model(model, None, 1)
    trigger = model.tokenizer("x", add_special_tokens=False)["input_ids"]
    pairs = [
        ("The old man", [" walked slowly", " red"]),
        ("The old man walked", [" slowly", " red"]),
        ("How many? ", ["b", "42"]),
        ("How many? ", ["d", "b"]),
    ]
    for prompt, choices in pairs:
        expected = [plain(prompt, choice)[0] for choice in choices]
        for answer in range(2):
            asked = Questions(tuple(Question(p, tuple(c), answer) for p, c in pairs))
            right = [float(plain(p, c[answer])[0] > plain(p, c[1 - answer])[0]) for p, c in pairs]
            assert score_with_trigger(model, slots, asked).right == sum(right) == score(model, asked).right
            one = replace(asked, questions=tuple(q for q in asked.questions if q.choices == tuple(choices)))
            assert score_with_trigger(model, slots, one).right == float(np.argmax(expected) == answer)
            assert score_with_trigger(model, slots, one, trigger).right in (0.0, 1.0)


def test_accuracy_is_the_same_in_any_batches_and_order(model: Any) -> None:
    asked = drawn(3, 40)
    turned = replace(asked, questions=asked.questions[::-1])
    figures = [
        metrics.accuracy(model, given, batch_size=size)[["accuracy", "answer_probability"]].iloc[0]
        for given, size in ((asked, 128), (asked, 1), (turned, 5))
    ]
    for figure in figures[1:]:
        np.testing.assert_allclose(figure.astype(float), figures[0].astype(float), atol=1e-5)


def test_groups_with_and_without_a_name_are_told_apart(model: Any) -> None:
    def grouped(*groups: str) -> Questions:
        return Questions(
            tuple(Question("The", (" man", " red", " d")[: 2 + i % 2], 0, group=g) for i, g in enumerate(groups))
        )

    table = metrics.accuracy(model, grouped("", "birds", "", "birds"))
    assert list(table["group"]) == ["all", "no group", "birds"]
    assert list(table["n"]) == [4, 2, 2]
    assert list(table["chance"]) == pytest.approx([5 / 12, 1 / 2, 1 / 3])
    assert list(metrics.accuracy(model, grouped("", ""))["group"]) == ["all"]
    with pytest.raises(ValueError, match='a group cannot be named "all"'):
        metrics.accuracy(model, grouped("all", "birds"))
    single = metrics.accuracy(model, grouped("birds", "fish")).set_index("group")
    assert single.loc[["birds", "fish"], ["low", "high"]].isna().all(axis=None)
    assert single.loc["all", ["low", "high"]].notna().all()


def test_accuracy_counts_what_the_scores_say(model: Any, untouched: None) -> None:
    best = [int(np.argmax(scores)) for scores in metrics.choice_scores(model, Questions.from_rows(QUIZ))]
    right = [{**row, "answer": choice, "kind": "a"} for row, choice in zip(QUIZ, best, strict=True)]
    wrong = [
        {**row, "answer": (choice + 1) % len(row["choices"]), "kind": "b"}
        for row, choice in zip(QUIZ, best, strict=True)
    ]
    both = [q for rows in (right, wrong) for q in Questions.from_rows(rows, group="kind").questions]
    table = metrics.accuracy(model, Questions(tuple(both))).set_index("group")
    assert list(table.index) == ["all", "a", "b"]
    assert table["accuracy"].to_dict() == {"all": 0.5, "a": 1.0, "b": 0.0}
    assert list(table["chance"])[1] == pytest.approx((1 / 3 + 1 / 3 + 1 / 2) / 3)
    assert float(table["low"].iloc[0]) < 0.5 < float(table["high"].iloc[0])
    assert (table["n"] == [6, 3, 3]).all()
    with pytest.raises(ValueError, match="no questions in 'none'"):
        metrics.accuracy(model, Questions((), "none"))
