"""A NaN is never a number: whatever meets one stops, and says where it comes from."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mrp_lens import attacks, metrics
from mrp_lens.data import Corpus, Document, Questions
from mrp_lens.data.task import UnlearningTask
from mrp_lens.edits import SteeringEdit
from mrp_lens.metrics.bootstrap import TokenMean
from mrp_lens.metrics.controls import verdict
from mrp_lens.models import encoder_for, load_model
from mrp_lens.models.finite import NonFiniteError, non_finite
from mrp_lens.models.generation import continuations, written_texts
from mrp_lens.models.hooks import hook_name, hooked
from mrp_lens.runs.report.diagnostics import diagnostics
from mrp_lens.training.losses import predictions
from tests.conftest import D_MODEL
from tests.support.every_measure import HELD_OUT, LEARN, OF_A_MODEL, QUIZ, SENTENCES, TEXTS, U

HUGE = SteeringEdit.towards(torch.eye(D_MODEL)[0], layer=1, coefficient=1e6)  # float16 ends at 65504


@pytest.fixture(scope="module")
def half(backend: Any, tiny_folder: Path) -> Any:
    return load_model(str(tiny_folder), backend=backend, dtype=torch.float16)


@pytest.fixture(scope="module")
def damaged(backend: Any, tiny_folder: Path) -> tuple[Any, str]:
    """A model of which one number, in a matrix of layer 2, is NaN; and the matrix's name."""
    model = load_model(str(tiny_folder), backend=backend)
    named = model.named_parameters()
    name, matrix = next((n, p) for n, p in named if ".2." in n and ".mlp." in n and p.ndim == 2)
    with torch.no_grad():
        matrix[3, 5] = math.nan
    return model, name.replace("._original_component", "")


@pytest.mark.parametrize("name", OF_A_MODEL)
def test_every_metric_and_attack_refuses_an_overflow_and_names_its_place(name: str, half: Any) -> None:
    with HUGE.applied(half), pytest.raises(NonFiniteError) as caught:
        OF_A_MODEL[name](half)
    message = str(caught.value)
    assert "blocks.1.hook_resid_post" in message
    assert "in float16" in message
    assert "load it in float32 or bfloat16, or weaken the edit" in message
    assert "\n" not in message
    assert np.isfinite(np.concatenate(metrics.choice_scores(half, QUIZ))).all()  # the model is as it was


@pytest.mark.parametrize("name", OF_A_MODEL)
def test_every_metric_and_attack_names_a_damaged_weight(name: str, damaged: tuple[Any, str]) -> None:
    model, weight = damaged
    if name in ("proposition_1", "variance_by_coefficient"):
        pytest.skip("replaces the states of the last layer, which the damage does not reach")
    with pytest.raises(NonFiniteError) as caught:
        OF_A_MODEL[name](model)
    assert "the first state that does is blocks.2.hook_mlp_out" in str(caught.value)
    assert f"weight {weight} holds NaN or infinity itself: load an undamaged checkpoint" in str(caught.value)


def test_what_writes_text_and_what_looks_at_it_refuse_likewise(damaged: tuple[Any, str], texts: Any) -> None:
    model, _ = damaged
    place = r"the first state that does is blocks\.2\.hook_mlp_out"
    with pytest.raises(NonFiniteError, match=place):
        continuations(model, ["The old"])
    with pytest.raises(NonFiniteError, match=place):
        written_texts(model, 2, max_new_tokens=3, seed=0, progress=False)
    with pytest.raises(NonFiniteError, match=place):
        diagnostics(model, UnlearningTask((texts[0],), texts[1], texts[1]), {"unedited": None}, {}, progress=False)


def test_a_later_token_stops_generation_too(model: Any) -> None:
    first = continuations(model, ["The old"], max_new_tokens=1)[0]
    token = model.tokenizer(" " + first, add_special_tokens=False)["input_ids"][-1]
    with (
        infinite_embedding(model, token),
        pytest.raises(NonFiniteError, match=rf"hook_embed, at the token .*id {token};"),
    ):
        continuations(model, ["The old"], max_new_tokens=5)


@contextmanager
def infinite_embedding(model: Any, token: int) -> Iterator[None]:
    """One number of one token's embedding is infinite."""
    row = model.W_E.data[token]
    before = row.clone()
    row[4] = math.inf
    assert bool(torch.isinf(model.W_E[token]).any())
    try:
        yield
    finally:
        row.copy_(before)


def test_a_broken_embedding_of_one_token_stops_only_the_texts_that_hold_it(model: Any, untouched: None) -> None:
    token = model.tokenizer(" garden", add_special_tokens=False)["input_ids"][0]
    without = Corpus.from_texts([text for text in SENTENCES if "garden" not in text])
    expected = metrics.perplexity(model, without)
    with infinite_embedding(model, token):
        assert metrics.perplexity(model, without).equals(expected)
        with pytest.raises(
            NonFiniteError, match=rf"hook_embed, at the token ' garden', id {token};.*embed.* holds NaN or"
        ):
            metrics.perplexity(model, TEXTS)


@pytest.mark.parametrize("padding", ["left", "right"])
def test_padding_may_hold_anything(padding: Any, model: Any, untouched: None) -> None:
    expected = metrics.alignment(model, TEXTS, U, padding=padding)
    sure = metrics.token_confidence(model, QUIZ, mode="forced", padding=padding)
    read: list[torch.Tensor] = []
    pad = model.tokenizer.pad_token_id
    handle = model.embed.register_forward_pre_hook(lambda _module, args: read.append(args[0]))
    last = hook_name(int(model.cfg.n_layers) - 1)  # behind it no token reads another
    spoil = hooked(model, [(last, lambda states, hook: states.masked_fill((read[-1] == pad)[..., None], math.nan))])
    try:
        with spoil:
            assert metrics.alignment(model, TEXTS, U, padding=padding).equals(expected)
            assert metrics.token_confidence(model, QUIZ, mode="forced", padding=padding).equals(sure)
        assert any(bool((tokens == pad).any()) for tokens in read)
    finally:
        handle.remove()


def test_where_padding_on_the_left_breaks_a_model_that_is_said(double: Any, backend: str) -> None:
    """The Bridge in float64 makes NaN of it, which the next layer's real tokens read."""
    frames = [metrics.alignment(double, TEXTS, U)]
    if backend == "hooked":
        frames.append(metrics.alignment(double, TEXTS, U, padding="left"))
    else:
        with pytest.raises(NonFiniteError, match=r"in float64\. Its weights are finite.* and pad on the right"):
            metrics.alignment(double, TEXTS, U, padding="left")
    for frame in frames:
        assert np.isfinite(frame["cosine"]).all()


def test_logits_of_minus_infinity_rule_tokens_out_and_harm_no_probability(model: Any, untouched: None) -> None:
    """As a mask over logits does; the others' probabilities are those of the softmax over what is left."""
    banned = model.tokenizer(" man", add_special_tokens=False)["input_ids"][0]
    plain = metrics.choice_scores(model, QUIZ)

    def mask(_module: Any, _args: Any, logits: torch.Tensor) -> torch.Tensor:
        return logits.index_fill(-1, torch.tensor(banned), -math.inf)

    handle = model.unembed.register_forward_hook(mask)
    try:
        assert QUIZ.questions[0].choices[0] == " man"
        scores = metrics.choice_scores(model, QUIZ)
        assert scores[0][0] == -math.inf
        assert scores[0][1] > plain[0][1]  # the probability that was taken away is shared among the others
        assert metrics.accuracy(model, QUIZ)["answer_probability"].notna().all()
        assert metrics.confidence(model, QUIZ, mode="forced")["mean"].notna().all()
        assert metrics.logit_lens(model, QUIZ)["probability"].notna().all()
        row = metrics.perplexity(model, TEXTS).iloc[0]  # one of four documents holds the token
        assert (row["perplexity"], row["high"]) == (math.inf, math.inf)
        assert row["low"] > 0
        with pytest.raises(NonFiniteError, match="the logits above layer 3 hold NaN or infinity"):
            OF_A_MODEL["proposition_1"](model)
        with (
            pytest.raises(NonFiniteError, match="rule out a token"),
            attacks.relearned(model, None, **LEARN | {"train": TEXTS}),
        ):
            pass
    finally:
        handle.remove()


def test_a_rate_that_breaks_the_model_is_told_from_a_broken_model(model: Any, damaged: Any, untouched: None) -> None:
    curves = attacks.relearn(model, None, held_out=HELD_OUT, lr=1e30, **LEARN)
    assert (list(curves["step"]), curves.attrs["interrupted"]) == ([0], False)
    with pytest.raises(NonFiniteError, match=r"retraining at lr 1e\+30 made the loss NaN or infinite; give a lower lr"):
        attacks.relearned(model, None, lr=1e30, **LEARN).__enter__()
    with pytest.raises(NonFiniteError, match=r"the losses hold NaN or infinity: .* blocks\.2\.hook_mlp_out"):
        attacks.relearned(damaged[0], None, lr=1e-3, **LEARN).__enter__()


def test_what_cannot_be_found_again_is_said_to_be_random(model: Any) -> None:
    batch = encoder_for(model).collate(encoder_for(model).encode([Document("", "The old man")]))
    error = non_finite(model, batch.tokens, batch.attention_mask, "the logits")
    assert "gave finite values" in str(error)
    assert predictions(model, batch).isfinite().all()


def test_means_intervals_and_verdicts_of_nan_are_refused() -> None:
    with pytest.raises(ValueError, match="1 of 3 values are NaN"):
        metrics.bootstrap_interval(np.array([1.0, math.nan, 2.0]))
    with pytest.raises(ValueError, match="no values"):
        metrics.bootstrap_interval(np.array([]))
    with pytest.raises(ValueError, match="NaN or infinite"):
        TokenMean().add(torch.tensor([1.0, math.nan]), torch.tensor([0, 0]))
    with pytest.raises(ValueError, match="says nothing"):
        verdict(math.nan, 0.2)
    assert np.isnan(metrics.bootstrap_interval(np.array([0.5]))).all()  # of a single value no spread is known


def test_layers_above_that_do_not_react_give_no_coefficient(model: Any) -> None:
    with SteeringEdit.towards(U, layer=2, coefficient=1.0).applied(model):
        frame = metrics.predicted_coefficient(model, TEXTS, U).set_index("layer")
    assert frame.loc[[0, 1], ["coefficient", "low", "high", "std"]].isna().all(axis=None)
    assert frame.loc[[2, 3]].notna().all(axis=None)


def test_a_question_that_is_nothing_is_refused_before_the_model_reads(model: Any) -> None:
    with pytest.raises(ValueError, match="no questions in 'none'"):
        metrics.accuracy(model, Questions((), "none"))
