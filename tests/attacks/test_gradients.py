"""Gradients towards the input, on the tiny model, against central differences and one question at a time."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from mrp_lens.attacks.gradients import answer_losses, input_gradient, input_gradients
from mrp_lens.data import Question, Questions
from mrp_lens.data.tokenization import PaddingSide
from mrp_lens.edits import Edit, SteeringEdit
from mrp_lens.models import LensModel, encoder_for, load_model
from tests.conftest import D_MODEL, assert_same_state, state_of
from tests.support.edits import all_kinds, projection, weight_edit
from tests.support.families import save_family
from tests.support.states import Subject

QUIZ = Questions.from_rows(
    [
        {"question": "Question: What is the colour of Xim Oline? Answer:", "choices": ["red", "blue"], "answer": 0},
        {"question": "The craft is", "choices": ["fishing boat", "the old man walked"], "answer": 1},
        {"question": "A longer prompt, so that padding matters, says", "choices": ["white", "brown"], "answer": 1},
        {"question": "In every book the taste given for Zaxol is", "choices": ["sweet", "sour"], "answer": 0},
    ],
    name="quiz",
)
GROUPED = Questions(
    tuple(
        type(q)(q.prompt, q.choices, q.answer, group="few" if number < 3 else "one")
        for number, q in enumerate(QUIZ.questions)
    ),
    "grouped",
)


def ids_of(model: LensModel, prompt: str, answer: str) -> tuple[list[int], list[int]]:
    """The prompt's tokens without BOS, and the answer's (which begin with a space, so that they tokenise alone)."""
    return tuple(model.tokenizer(text, add_special_tokens=False)["input_ids"] for text in (prompt, answer))  # type: ignore[return-value]


def plain_loss(model: LensModel, prompt: Sequence[int], answer: Sequence[int], shift: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of one answer with the prompt's embeddings shifted; in the model's own precision, no batch."""
    ids = [model.tokenizer.bos_token_id, *prompt, *answer]
    tokens = torch.tensor([ids])

    def put(activation: torch.Tensor, hook: Any) -> torch.Tensor:
        rest = torch.zeros(len(answer), D_MODEL, dtype=shift.dtype)
        return activation + torch.cat([torch.zeros(1, D_MODEL, dtype=shift.dtype), shift, rest])[None]

    point = model.hook_dict["hook_embed"]
    point.add_hook(put)
    logits: Any = model(tokens, attention_mask=torch.ones_like(tokens))
    point.fwd_hooks.pop().hook.remove()
    log_probabilities = (
        logits[0].log_softmax(-1) if logits.dtype == torch.float64 else logits[0].float().log_softmax(-1)
    )
    places = range(len(ids) - len(answer) - 1, len(ids) - 1)
    return -torch.stack([log_probabilities[place, ids[place + 1]] for place in places]).mean()


def plain_rows(model: LensModel, edit: Edit | None) -> list[dict[str, float]]:
    """Norm, relative norm and loss of each question, one at a time, with autograd through the plain loss."""
    handle = None if edit is None else edit.attach(model)
    rows = []
    for question in QUIZ.questions:
        prompt, answer = ids_of(model, question.prompt, question.choices[question.answer])
        shift = torch.zeros(len(prompt), D_MODEL, dtype=model.W_E.dtype, requires_grad=True)
        loss = plain_loss(model, prompt, answer, shift)
        (gradient,) = torch.autograd.grad(loss, shift)
        norm = sum(float(entry) ** 2 for entry in gradient.flatten()) ** 0.5
        size = sum(float(entry) ** 2 for entry in model.W_E[prompt].detach().flatten()) ** 0.5
        rows.append({"norm": norm, "relative": norm * size, "loss": float(loss.detach())})
    if handle is not None:
        handle.detach()
    return rows


@pytest.mark.parametrize("padding", ["right", "left"])
def test_the_frame_equals_one_question_at_a_time(subject: Subject, padding: PaddingSide) -> None:
    model = subject.model
    edit = weight_edit(model, 2)
    table = input_gradients(model, edit, GROUPED, batch_size=3, padding=padding)
    assert list(zip(table["model"], table["group"], table["n"], strict=True)) == [
        (name, group, n) for name in ("unedited", "edited") for group, n in (("all", 4), ("few", 3), ("one", 1))
    ]
    # A bfloat16 gradient is rounded at every layer on its way back, so it is off by more than one rounding.
    relative = subject.relative if subject.relative < 1e-4 else 0.05
    for name, on in (("unedited", None), ("edited", edit)):
        rows = plain_rows(model, on)
        for group, chosen in (("all", rows), ("few", rows[:3]), ("one", rows[3:])):
            row = table[(table["model"] == name) & (table["group"] == group)].iloc[0]
            norms = [r["norm"] for r in chosen]
            assert row["mean"] == pytest.approx(np.mean(norms), rel=relative)
            assert row["median"] == pytest.approx(np.median(norms), rel=relative)
            assert row["quantile_10"] == pytest.approx(np.quantile(norms, 0.1), rel=relative)
            assert row["quantile_90"] == pytest.approx(np.quantile(norms, 0.9), rel=relative)
            assert row["relative"] == pytest.approx(np.mean([r["relative"] for r in chosen]), rel=relative)
            assert row["loss"] == pytest.approx(np.mean([r["loss"] for r in chosen]), rel=relative)
            if len(chosen) == 1:  # of a single question nothing is known of others
                assert row[["low", "high", "relative_low", "relative_high"]].isna().all()
                continue
            assert row["low"] <= row["mean"] <= row["high"]
            assert row["relative_low"] <= row["relative"] <= row["relative_high"]


def test_the_gradient_equals_central_differences_in_float64(double: Any, backend: str) -> None:
    # HookedTransformer: log-probabilities are read in float32, whose rounding of 2^-24 the gradient carries. The Bridge
    # computes its norms in float32 as well: differences need a longer step against that rounding, and are as good
    # as rounding over step plus step squared.
    step, tolerance = {"hooked": (1e-5, 1e-5), "bridge": (2e-3, 1e-3)}[backend]
    before = state_of(double)
    encoder, question = encoder_for(double), QUIZ.questions[1]
    batch = encoder.collate(encoder.encode([Questions((question,)).right_answers().documents[0]]))
    prompt, answer = ids_of(double, question.prompt, question.choices[question.answer])
    with weight_edit(double, 1).applied(double):
        found = input_gradient(double, lambda: answer_losses(double, batch))
        assert found.gradient.dtype == torch.float64
        differences = torch.zeros(len(prompt), D_MODEL, dtype=torch.float64)
        with torch.no_grad():
            for position in range(len(prompt)):
                for entry in range(D_MODEL):
                    shift = torch.zeros(len(prompt), D_MODEL, dtype=torch.float64)
                    shift[position, entry] = step
                    up, down = (plain_loss(double, prompt, answer, sign * shift) for sign in (1, -1))
                    differences[position, entry] = (up - down) / (2 * step)
    assert_same_state(before, state_of(double))
    largest = float(differences.abs().max())
    assert largest > 1e-3
    torch.testing.assert_close(found.gradient[0, 1 : 1 + len(prompt)], differences, rtol=0, atol=tolerance * largest)


def test_states_that_do_not_depend_on_the_input_have_no_gradient(model: LensModel, untouched: None) -> None:
    pinned = SteeringEdit.towards(torch.ones(D_MODEL), layer=1, coefficient=4.0)
    table = input_gradients(model, pinned, QUIZ).set_index("model")
    assert float(table.loc["edited", "mean"]) == 0.0
    assert float(table.loc["unedited", "mean"]) > 0.0
    assert float(table.loc["edited", "loss"]) > 0.0


def test_both_classes_and_every_kind_of_edit_give_the_same_figures(both: list[LensModel]) -> None:
    hooked, bridge = both
    for one, other in zip(all_kinds(hooked, 1), all_kinds(bridge, 1), strict=True):
        figures = [
            input_gradients(model, edit, QUIZ, seed=2).select_dtypes("number").to_numpy()
            for model, edit in ((hooked, one), (bridge, other))
        ]
        np.testing.assert_allclose(figures[0], figures[1], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("family", ["gpt2", "gemma2"])
def test_relative_norms_do_not_depend_on_where_a_model_scales_its_embeddings(tmp_path: Path, family: str) -> None:
    """gpt2 adds positions behind the hook, gemma2 multiplies its embeddings by the root of the width."""
    model = load_model(str(save_family(family, tmp_path)), backend="bridge")
    encoder = encoder_for(model)
    batch = encoder.collate(encoder.encode(QUIZ.right_answers().documents[:1]))
    found = input_gradient(model, lambda: answer_losses(model, batch))
    # The change of the loss with the embeddings made a little longer, at the embedding matrix itself.
    step, losses = 1e-2, []
    for sign in (1, -1):
        model.hook_dict["hook_embed"].add_hook(lambda activation, hook, sign=sign: activation * (1 + sign * step))
        with torch.no_grad():
            losses.append(float(answer_losses(model, batch)[0]))
        model.hook_dict["hook_embed"].fwd_hooks.pop().hook.remove()
    along = float((found.gradient * found.embeddings).sum())
    assert along == pytest.approx((losses[0] - losses[1]) / (2 * step), rel=0.02, abs=1e-4)


def test_the_same_call_gives_the_same_frame(model: LensModel, untouched: None) -> None:
    first, second = (input_gradients(model, projection(2), QUIZ, seed=3) for _ in range(2))
    pd.testing.assert_frame_equal(first, second)
    assert list(input_gradients(model, None, QUIZ)["model"]) == ["unedited"]


def test_bad_input_is_refused_and_says_why(model: LensModel, untouched: None) -> None:
    with pytest.raises(TypeError, match="questions must be Questions, got list"):
        input_gradients(model, None, [])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no questions in 'none'"):
        input_gradients(model, None, Questions((), "none"))
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        input_gradients(model, None, QUIZ, batch_size=0)
    bare = Questions((Question("", ("red", "blue"), 0),), "bare")
    with pytest.raises(ValueError, match="question 0 of 'bare' has no token before its answer"):
        input_gradients(model, projection(1), bare)
