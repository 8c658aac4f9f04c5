"""Confidence per token against loops over single questions, without batch, padding or shared code."""

import copy
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from mrp_lens import metrics
from mrp_lens.data import Corpus, Document, Question, Questions
from mrp_lens.data.tokenization import PaddingSide
from mrp_lens.data.world import World
from mrp_lens.metrics.confidence import MEASURES, confidence, token_confidence
from mrp_lens.models import load_model
from mrp_lens.models.generation import continuations
from mrp_lens.models.hooks import hooked
from tests.conftest import assert_same_state, state_of
from tests.support.edits import projection
from tests.support.plain import ids_of, plain_logits
from tests.support.states import Subject

COLUMNS = ["group", "mode", "question", "position", "token", *MEASURES]
QUIZ = Questions(
    (
        Question("The craft is", (" fishing boat", " the old man walked"), 1, "towns"),
        Question("Question: What is the colour of Xim Oline? Answer:", (" red", " blue"), 0, "potions"),
        Question("A longer prompt, so that padding matters, says", (" white", " brown bread"), 1),
        Question("The old", (" woman slept", " house"), 0, "towns"),
    )
)

# Of logits and nats, and relative of probabilities. The tiny model's logits are below 1 (spread 0.3), where numbers in
# bfloat16 are 0.004 apart: batched and single matrix products may round to different ones.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 0.01}


def plain_measures(logits: Sequence[float], token: int) -> dict[str, float]:
    top, second = sorted(logits, reverse=True)[:2]
    total = sum(math.exp(logit - top) for logit in logits)
    probabilities = [math.exp(logit - top) / total for logit in logits]
    return {
        "max_logit": top,
        "max_probability": max(probabilities),
        "entropy": -sum(p * math.log(p) for p in probabilities if p > 0),
        "margin": math.log(max(probabilities)) - math.log(math.exp(second - top) / total),
        "probability": probabilities[token],
    }


def assert_measured(row: pd.Series, logits: Sequence[float], token: int, tolerance: float) -> None:
    for measure, expected in plain_measures(logits, token).items():
        relative = measure in ("max_probability", "probability")
        rel, absolute = (tolerance, 0.0) if relative else (0.0, tolerance)
        assert row[measure] == pytest.approx(expected, rel=rel, abs=absolute), measure


@pytest.fixture(scope="module")
def demo(backend: str) -> Any:
    """A trained model, which ends what it writes."""
    return load_model("demo", backend=backend)


@pytest.mark.parametrize("padding", ["right", "left"])
def test_forced_equals_reading_one_token_at_a_time(subject: Subject, padding: PaddingSide) -> None:
    frame = token_confidence(subject.model, QUIZ, mode="forced", batch_size=3, padding=padding)
    assert (list(frame.columns), set(frame["mode"])) == (COLUMNS, {"forced"})
    place = 0
    for number, question in enumerate(QUIZ.questions):
        ids = ids_of(subject.model, question.prompt + question.choices[question.answer])
        start = len(ids_of(subject.model, question.prompt))
        for position, end in enumerate(range(start, len(ids))):
            row = frame.iloc[place]
            assert (row["group"], row["question"], row["position"]) == (question.group or "no group", number, position)
            assert row["token"] == subject.model.tokenizer.decode([ids[end]])
            assert_measured(row, plain_logits(subject.model, ids[:end]), ids[end], TOLERANCE[subject.model.W_E.dtype])
            place += 1
    assert place == len(frame)


@pytest.mark.parametrize("padding", ["right", "left"])
def test_generated_equals_a_plain_greedy_loop(subject: Subject, padding: PaddingSide) -> None:
    tolerance = TOLERANCE[subject.model.W_E.dtype]
    frame = token_confidence(subject.model, QUIZ, tokens=6, batch_size=3, padding=padding)
    assert (list(frame.columns), set(frame["mode"])) == (COLUMNS, {"generated"})
    for number, question in enumerate(QUIZ.questions):
        part = frame[frame["question"] == number]
        assert set(part["group"]) == {question.group or "no group"}
        assert list(part["position"]) == list(range(6))
        ids = ids_of(subject.model, question.prompt)
        for _, row in part.iterrows():
            logits = plain_logits(subject.model, ids)
            # Rounding may decide between two that are as likely: follow the one that was taken.
            same_text = [
                token for token in range(len(logits)) if subject.model.tokenizer.decode([token]) == row["token"]
            ]
            token = max(same_text, key=logits.__getitem__)
            assert logits[token] >= max(logits) - tolerance
            assert_measured(row, logits, token, tolerance)
            ids.append(token)


@pytest.mark.slow
@pytest.mark.parametrize("padding", ["right", "left"])
def test_what_is_generated_is_what_generate_writes(demo: Any, model: Any, padding: PaddingSide) -> None:
    prompts = [question.prompt for question in QUIZ.questions]
    for writer, tokens in [(demo, 30), (demo, 3), (model, 20)]:
        frame = token_confidence(writer, QUIZ, tokens=tokens, batch_size=3, padding=padding)
        written = ["".join(part["token"]).removesuffix("</s>").strip() for _, part in frame.groupby("question")]
        assert written == continuations(writer, prompts, max_new_tokens=tokens)
        assert frame.groupby("question").size().max() <= tokens


def test_a_question_ends_with_its_end_of_text_token(demo: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []

    def record(activation: torch.Tensor, hook: Any) -> None:
        assert not demo.training
        sizes.append(len(activation))

    monkeypatch.setattr(demo, "training", True)
    before = state_of(demo)
    with hooked(demo, [("blocks.0.hook_resid_post", record)]):
        frame = token_confidence(demo, QUIZ, tokens=20)
    assert_same_state(before, state_of(demo))
    ends = frame["token"] == demo.tokenizer.eos_token
    lengths = frame.groupby("question").size()
    assert 1 < len(set(lengths)) <= max(lengths) < 20
    assert (frame[ends].set_index("question")["position"] == lengths - 1).all()
    assert ends.sum() == len(QUIZ)  # it counts, and is the last one
    assert sizes == [int((lengths > step).sum()) for step in range(max(lengths))]


def test_without_an_end_of_text_token_none_ends_early(demo: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    ending = token_confidence(demo, QUIZ, tokens=12).groupby("question").size()
    endless = copy.deepcopy(demo.tokenizer)
    endless.eos_token = None
    assert endless.eos_token_id is None
    monkeypatch.setattr(demo, "tokenizer", endless)
    monkeypatch.setattr(demo.generation_config, "eos_token_id", None)
    endings = token_confidence(demo, QUIZ, tokens=12).groupby("question").size()
    assert max(ending) < min(endings) == 12


def test_a_question_ends_at_an_end_of_the_generation_config(demo: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    before = token_confidence(demo, QUIZ, tokens=12)
    words = [demo.tokenizer.convert_tokens_to_ids(token) for token in demo.tokenizer.get_vocab()]
    named = next(token for token in words if demo.tokenizer.decode([token]) == before["token"].iloc[2])
    monkeypatch.setattr(demo.generation_config, "eos_token_id", [demo.tokenizer.eos_token_id, *same_text(demo, named)])
    after = token_confidence(demo, QUIZ, tokens=12)
    for number, part in before.groupby("question"):
        tokens = part["token"].tolist()
        ends = [place for place, token in enumerate(tokens) if token == demo.tokenizer.decode([named])]
        expected = tokens[: ends[0] + 1] if ends else tokens
        assert after[after["question"] == number]["token"].tolist() == expected
    assert len(after) < len(before)


def same_text(model: Any, token: int) -> list[int]:
    """All tokens that read as this one."""
    return [
        other
        for other in range(model.cfg.d_vocab)
        if model.tokenizer.decode([other]) == model.tokenizer.decode([token])
    ]


def test_groups_have_the_names_that_accuracy_gives_them(model: Any) -> None:
    for quiz in (QUIZ, Questions(QUIZ.questions[2:3], "one"), Questions(QUIZ.questions[:2], "named")):
        names = set(metrics.accuracy(model, quiz, progress=False)["group"])
        found = set(token_confidence(model, quiz, mode="forced", tokens=1, progress=False)["group"])
        assert found == (names if len(names) == 1 else names - {"all"})


@pytest.mark.parametrize("mode", ["generated", "forced"])
def test_an_edit_that_is_on_is_measured(model: Any, mode: str, untouched: None) -> None:
    plain = token_confidence(model, QUIZ, mode=mode, tokens=1)
    with projection(2).applied(model):
        edited = token_confidence(model, QUIZ, mode=mode, tokens=1)
        logits = [max(plain_logits(model, ids_of(model, question.prompt))) for question in QUIZ.questions]
    np.testing.assert_allclose(edited["max_logit"], logits, atol=1e-5)
    assert (np.abs(plain["max_logit"] - edited["max_logit"]) > 1e-3).all()


@pytest.mark.parametrize("padding", ["right", "left"])
def test_a_long_prompt_keeps_its_end_and_leaves_room_for_what_is_generated(
    model: Any, padding: PaddingSide, untouched: None
) -> None:
    long = Corpus((Document("The old man walked slowly. " * 20, " red"), Document("The old", " man")), "long")
    with pytest.warns(UserWarning, match=r"1 of 2 documents are longer than 54 tokens; only the end"):
        frame = token_confidence(model, long, tokens=10, padding=padding)
    assert list(frame.groupby("question").size()) == [10, 10]
    whole = ids_of(model, long.documents[0].prompt)
    ids = [whole[0], *whole[-53:]]
    for largest in frame[frame["question"] == 0]["max_logit"]:
        logits = plain_logits(model, ids)
        assert largest == pytest.approx(max(logits), abs=1e-5)
        ids.append(int(np.argmax(logits)))
    assert len(ids) == model.cfg.n_ctx


def test_a_long_prompt_keeps_its_end_before_the_answer(model: Any, untouched: None) -> None:
    long = Corpus((Document("The old man walked slowly. " * 20, " red and blue"), Document("The old", " man")), "long")
    with pytest.warns(UserWarning, match=r"1 of 2 prompts leave no room .* 64 tokens"):
        frame = token_confidence(model, long, mode="forced")
    whole = ids_of(model, long.documents[0].prompt + " red and blue")
    start = len(ids_of(model, long.documents[0].prompt))
    part = frame[frame["question"] == 0]
    assert len(part) == len(whole) - start
    assert "".join(part["token"]).strip() == "red and blue"
    kept = [whole[0], *whole[-63:]]  # BOS and the end
    for place, (_, row) in enumerate(part.iterrows(), start=64 - len(part)):
        assert_measured(row, plain_logits(model, kept[:place]), kept[place], 1e-5)


@pytest.mark.parametrize("prompt", ["", "The old man said"])
def test_of_a_long_answer_the_first_tokens_are_measured(model: Any, prompt: str, untouched: None) -> None:
    text = " Rain fell on the old harbour, and then" * 20
    frame = token_confidence(model, Corpus((Document(prompt, text),), "long"), mode="forced", tokens=5)
    ids, start = ids_of(model, prompt + text), len(ids_of(model, prompt))
    assert list(frame["position"]) == [0, 1, 2, 3, 4]
    assert list(frame["token"]) == [model.tokenizer.decode([token]) for token in ids[start : start + 5]]
    for place, (_, row) in enumerate(frame.iterrows(), start=start):
        assert_measured(row, plain_logits(model, ids[:place]), ids[place], 1e-5)


def test_a_first_token_that_nothing_precedes_is_not_measured(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model.cfg, "default_prepend_bos", False)
    corpus = Corpus((Document("", ""), Document("", "The old man walked"), Document("The old", " man")), "plain")
    frame = token_confidence(model, corpus, mode="forced", tokens=2)
    ids = model.tokenizer("The old man walked", add_special_tokens=False)["input_ids"]
    first = frame[frame["question"] == 1]
    assert list(first["token"]) == [model.tokenizer.decode([token]) for token in ids[1:3]]
    assert_measured(first.iloc[0], plain_logits(model, ids[:1]), ids[1], 1e-5)
    assert set(frame["question"]) == {1, 2}
    with pytest.raises(ValueError, match="question 0 of 'plain' has an empty prompt"):
        token_confidence(model, corpus)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["generated", "forced"])
def test_the_summary_is_what_numpy_says_of_the_tokens(demo: Any, world: World, mode: str) -> None:
    quiz = Questions(world.questions().questions[::50] + QUIZ.questions[2:3], "both")
    frame = token_confidence(demo, quiz, mode=mode, tokens=8)
    table = confidence(demo, quiz, mode=mode, tokens=8, seed=3)
    groups = list(frame["group"].unique())
    assert list(zip(table["group"], table["measure"], strict=True)) == [(g, m) for g in groups for m in MEASURES]
    generator = np.random.default_rng(11)
    for _, row in table.iterrows():
        values = frame[frame["group"] == row["group"]]
        column = values[row["measure"]].to_numpy()
        numbers = (mode, len(column), values["question"].nunique())
        assert (row["mode"], row["tokens"], row["questions"]) == numbers
        assert row["mean"] == pytest.approx(np.mean(column))
        assert row["std"] == pytest.approx(np.std(column))
        of_question = [column[values["question"] == number] for number in values["question"].unique()]
        if len(of_question) == 1:
            assert np.isnan([row["low"], row["high"]]).all()
            continue
        means = [
            np.concatenate([of_question[i] for i in generator.integers(len(of_question), size=len(of_question))]).mean()
            for _ in range(2000)
        ]
        low, high = np.quantile(means, [0.025, 0.975])
        # A quantile of 2,000 resamples is known to 0.06 standard errors, 0.015 of the interval's width.
        np.testing.assert_allclose([row["low"], row["high"]], [low, high], atol=0.08 * (high - low))
    pd.testing.assert_frame_equal(table, confidence(demo, quiz, mode=mode, tokens=8, seed=3))
    assert not table["low"].equals(confidence(demo, quiz, mode=mode, tokens=8, seed=4)["low"])


def test_the_control_is_a_model_that_guesses_uniformly(model: Any) -> None:
    expected = plain_measures([0.0] * model.cfg.d_vocab, 0) | {"max_logit": float("nan")}
    table = confidence(model, QUIZ, mode="forced")
    np.testing.assert_allclose(table["uniform"], table["measure"].map(expected), atol=1e-12)
    mean = {measure: part["mean"] for measure, part in table.groupby("measure")}
    assert (mean["entropy"] < expected["entropy"]).all()
    assert (mean["max_probability"] > expected["max_probability"]).all()


@pytest.mark.parametrize("mode", ["generated", "forced"])
def test_sets_by_name_are_groups_and_each_counts_its_own_questions(model: Any, mode: str) -> None:
    answers = QUIZ.right_answers()
    by_name = token_confidence(model, {"forget": QUIZ, "retain": answers}, mode=mode, tokens=2, batch_size=3)
    alone = token_confidence(model, answers, mode=mode, tokens=2)
    assert list(by_name["group"].unique()) == ["forget", "retain"]
    assert list(alone["group"].unique()) == [answers.name]
    for name in ("forget", "retain"):
        part = by_name[by_name["group"] == name].reset_index(drop=True)
        pd.testing.assert_frame_equal(part.drop(columns="group"), alone.drop(columns="group"), atol=1e-5)
    table = confidence(model, {"forget": QUIZ, "retain": answers}, mode=mode, tokens=2)
    assert list(table.groupby("group")["questions"].first().items()) == [("forget", 4), ("retain", 4)]


def test_bad_input_is_refused_with_the_remedy(model: Any, untouched: None) -> None:
    with pytest.raises(ValueError, match="no questions in 'none'"):
        confidence(model, Questions((), "none"))
    with pytest.raises(ValueError, match="no questions in 'none'"):
        confidence(model, {"forget": QUIZ, "retain": Corpus((), "none")})
    with pytest.raises(ValueError, match="name at least one set"):
        confidence(model, {})
    with pytest.raises(ValueError, match="unknown mode 'sampled'; choose one of generated, forced"):
        confidence(model, QUIZ, mode="sampled")
    for tokens in (0, -1, 63):
        with pytest.raises(ValueError, match=rf"tokens must be from 1 to 62 .*, got {tokens}"):
            confidence(model, QUIZ, tokens=tokens)
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        confidence(model, QUIZ, batch_size=0)
    texts = Corpus.from_texts(["The old man"], name="texts")
    with pytest.raises(ValueError, match=r"question 0 of 'retain' has an empty prompt.*use mode='forced'"):
        confidence(model, {"forget": QUIZ, "retain": texts})
    with pytest.raises(ValueError, match=r"no answer in 'retain' holds a token .*mode='generated'"):
        confidence(model, {"forget": QUIZ, "retain": Corpus((Document("The old", ""),), "empty")}, mode="forced")
    with pytest.raises(TypeError):
        confidence(model, ["The old man"])
