"""A choice's score is its own: what plain transformers gives for prompt + choice alone, whatever stands beside it."""

import random
import warnings
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mrp_lens import metrics
from mrp_lens.attacks.evaluation import score
from mrp_lens.attacks.gcg import Slots, score_with_trigger
from mrp_lens.data import Corpus, Question, Questions
from mrp_lens.metrics.multiple_choice import answered_right
from mrp_lens.utils.validation import generator_for, int_seed

CONTEXT = 64
PROMPTS = [
    "How many? ",
    "The old man walked",
    "USER: who? ASSISTANT: ",
    "x",
    "(",
    "Say:\n",
    "The colour is re",
    "A 4",
    "garden ",
]
CHOICES = [
    *[
        "b",
        "42",
        "d",
        "bb",
        "b b",
        " red",
        "red",
        " red house",
        " red house near",
        "d blue",
        "2",
        "",
        "!",
        "\n",
        "  ",
        "é",
        "🙂",
        " 🙂🙂",
    ],
    *[
        "(",
        ")",
        "man",
        " man",
        " manner",
        "walked slowly",
        " near the old bridge again and again",
        "\n\nb",
        "4 2",
        " 4",
    ],
]


@pytest.fixture(scope="module")
def plain(tiny_folder: Path) -> Any:
    """The same checkpoint in plain transformers: prompt, choice -> mean log-probability, and how many tokens that is of."""
    import transformers

    reference = transformers.AutoModelForCausalLM.from_pretrained(tiny_folder, attn_implementation="eager").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_folder)

    @cache
    def score(prompt: str, choice: str, bos: bool = True) -> tuple[float, int]:
        ids = tokenizer(prompt + choice, add_special_tokens=False)["input_ids"]
        # A token counts if the text up to its end is longer than the prompt.
        first = next(i for i in range(len(ids)) if len(tokenizer.decode(ids[: i + 1])) > len(prompt))
        count = len(ids) - first
        ids = ([tokenizer.bos_token_id] if bos else []) + ids[-(CONTEXT - bos) :]
        with torch.no_grad():
            logs = reference(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
        return float(np.mean([logs[i - 1, ids[i]] for i in range(len(ids) - count, len(ids))])), count

    return score


def questions(pairs: list[tuple[str, list[str]]]) -> Questions:
    return Questions(tuple(Question(prompt, tuple(choices), 0) for prompt, choices in pairs))


def drawn(seed: int, n: int) -> Questions:
    rng = random.Random(seed)
    some = [choice for choice in CHOICES if choice]
    return questions([(rng.choice(PROMPTS), rng.sample(some, rng.randint(2, 6))) for _ in range(n)])


@pytest.mark.parametrize("batch_size", [1, 7, 128])
def test_scores_are_those_of_plain_transformers_on_each_choice_alone(
    model: Any, plain: Any, batch_size: int, untouched: None
) -> None:
    asked = drawn(batch_size, 60)
    found = metrics.choice_scores(model, asked, batch_size=batch_size)
    merged = 0
    for question, scores in zip(asked.questions, found, strict=True):
        expected = [plain(question.prompt, choice) for choice in question.choices]
        np.testing.assert_allclose(scores, [score for score, _ in expected], atol=2e-5, err_msg=repr(question))
        merged += sum(choice.strip() == choice and question.prompt[-1] == " " for choice in question.choices)
    assert merged > 20  # of them begin inside a token that holds the prompt's last space


def test_no_neighbour_and_no_order_changes_a_score(model: Any) -> None:
    rng = random.Random(0)
    some = [choice for choice in CHOICES if choice]
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


def test_texts_longer_than_the_context_of_one_token_and_of_split_characters(model: Any, plain: Any) -> None:
    texts = ["The old man walked slowly near the house. " * 12, "🙂🙂 é ü 中文", "The sage.", ""]
    with pytest.warns(UserWarning, match="1 of 4 documents are longer"):
        row = metrics.perplexity(model, Corpus.from_texts(texts)).iloc[0]
    tokenizer = model.tokenizer
    total = tokens = 0.0
    for text in texts[:3]:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"][: CONTEXT - 1]
        score, count = plain("", tokenizer.decode(ids))
        assert count == len(ids)
        total, tokens = total + score * count, tokens + count
    assert (row["documents"], row["tokens"]) == (3, tokens)
    assert row["perplexity"] == pytest.approx(np.exp(-total / tokens), rel=1e-5)


def test_seeds_of_numpy_are_seeds_and_others_are_refused() -> None:
    drawn_by = [torch.rand(3, generator=generator_for(seed)) for seed in (np.int64(3), 3)]  # type: ignore[arg-type]
    assert torch.equal(*drawn_by)
    assert type(int_seed(np.uint8(7))) is int  # type: ignore[arg-type]
    for seed in (True, np.True_, 1.5, "3", None):
        with pytest.raises(TypeError, match="seed must be an int"):
            generator_for(seed)  # type: ignore[arg-type]
