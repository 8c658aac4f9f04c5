"""Triggers and the search for them, on the tiny model, against loops over single prompts and single tokens."""

import logging
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from mrp_lens.attacks.evaluation import score
from mrp_lens.attacks.gcg import (
    Jailbreak,
    Slots,
    TriggerSearch,
    answer_objective,
    jailbreak,
    representation_objective,
    score_with_trigger,
)
from mrp_lens.data import Question, Questions
from mrp_lens.edits import Edit, SteeringEdit
from mrp_lens.models import LensModel, load_model
from tests.conftest import D_MODEL
from tests.support.edits import all_kinds, projection
from tests.support.families import save_family
from tests.support.states import Subject

pytestmark = pytest.mark.filterwarnings("ignore:only .* held-out questions:UserWarning")

LENGTH, LAYER = 3, 2
COLOURS = ("red", "blue", "green", "white", "gold")


def quiz(start: int, count: int, name: str) -> Questions:
    """Prompts and choices of unequal length."""
    questions = []
    for number in range(start, start + count):
        prompt = f"Question: What is the {'colour' if number % 2 else 'old colour'} of Zaxim{number}? Answer:"
        choices = tuple(f" {COLOURS[(number + shift) % 5]}" + " brown" * (shift == number % 3) for shift in range(3))
        questions.append(Question(prompt, choices, number % 3))
    return Questions(tuple(questions), name)


TRAIN, HELD_OUT, UNTAUGHT = quiz(0, 5, "train"), quiz(5, 6, "held-out"), quiz(11, 4, "untaught")


def search_on(model: LensModel, objective: str = "answer", marker: str | None = None, **settings: int) -> TriggerSearch:
    slots = Slots.for_model(model, marker, LENGTH)
    chosen = (
        answer_objective(model, slots, TRAIN)
        if objective == "answer"
        else representation_objective(model, slots, TRAIN, layer=LAYER, batch_size=2)
    )
    numbers = {"candidates": 6, "top": 5, "batch": 3, "batch_size": 8} | settings
    return TriggerSearch(model, slots, chosen, **numbers, generator=torch.Generator().manual_seed(4))


def plain_ids(model: LensModel, prompt: str, choice: str, trigger: list[int], marker: str | None) -> list[list[int]]:
    """BOS, what stands before the trigger, the trigger, the rest of the prompt, the choice: each tokenised alone.

    (The tests' prompts, marker with its space, and choices begin words, so that tokens never reach over.)
    """
    at = 0 if marker is None else prompt.rindex(marker)
    before, behind, end = (
        model.tokenizer(text, add_special_tokens=False)["input_ids"] for text in (prompt[:at], prompt[at:], choice)
    )
    return [[model.tokenizer.bos_token_id], before, trigger, behind, end]


def log_probabilities_of(model: LensModel, ids: list[int]) -> torch.Tensor:
    tokens = torch.tensor([ids])
    with torch.no_grad():
        logits: Any = model(tokens, attention_mask=torch.ones_like(tokens))
    return logits[0].float().log_softmax(-1)


def plain_log_probability(model: LensModel, prompt: str, choice: str, trigger: list[int], marker: str | None) -> float:
    """Mean over the choice's tokens, one prompt a pass."""
    *context, end = plain_ids(model, prompt, choice, trigger, marker)
    start = sum(map(len, context))
    ids = [token for part in (*context, end) for token in part]
    found = log_probabilities_of(model, ids)
    return float(np.mean([float(found[place - 1, ids[place]]) for place in range(start, len(ids))]))


def plain_accuracy(model: LensModel, questions: Questions, trigger: list[int], marker: str | None) -> float:
    right = 0
    for question in questions.questions:
        scores = [plain_log_probability(model, question.prompt, c, trigger, marker) for c in question.choices]
        right += scores.index(max(scores)) == question.answer
    return right / len(questions)


def plain_answer_loss(model: LensModel, trigger: list[int], marker: str | None) -> float:
    losses = [-plain_log_probability(model, q.prompt, q.choices[q.answer], trigger, marker) for q in TRAIN.questions]
    return float(np.mean(losses))


def plain_states(model: LensModel, ids: list[int]) -> torch.Tensor:
    seen: list[torch.Tensor] = []
    point = model.hook_dict[f"blocks.{LAYER}.hook_resid_post"]
    point.add_hook(lambda activation, hook: seen.append(activation[0].double()))
    log_probabilities_of(model, ids)
    point.fwd_hooks.pop().hook.remove()
    return seen[0]


def plain_representation_loss(model: LensModel, edit: Edit, trigger: list[int], marker: str | None) -> float:
    losses = []
    for question in TRAIN.questions:
        bos, before, middle, behind, _ = plain_ids(model, question.prompt, "", trigger, marker)
        wanted = plain_states(model, bos + before + behind)[-1]
        with edit.applied(model):
            found = plain_states(model, bos + before + middle + behind)[-1]
        distance = sum((float(a) - float(b)) ** 2 for a, b in zip(found, wanted, strict=True))
        losses.append(distance / sum(float(b) ** 2 for b in wanted))
    return float(np.mean(losses))


@pytest.mark.slow
@pytest.mark.parametrize("marker", [None, " Answer:"])
def test_the_losses_and_accuracies_equal_loops_over_single_prompts(subject: Subject, marker: str | None) -> None:
    model, edit = subject.model, projection(1, 2)
    vocabulary = search_on(model).vocabulary
    for trigger in (vocabulary[[40, 300, 7]], vocabulary[[800, 11, 150]], torch.tensor([], dtype=torch.long)):
        ids = trigger.tolist()
        with edit.applied(model):
            assert search_on(model, marker=marker).loss(trigger) == subject.close(plain_answer_loss(model, ids, marker))
            slots = Slots.for_model(model, marker, LENGTH)
            right = score_with_trigger(model, slots, HELD_OUT, ids, batch_size=4)
            if subject.relative < 1e-4:  # bfloat16 has ties, which rounding breaks
                assert right.accuracy == plain_accuracy(model, HELD_OUT, ids, marker)
        search = search_on(model, "representation", marker)
        with edit.applied(model):
            loss = search.loss(trigger)
        # In bfloat16 each state is off by up to 2^-8 of itself, a distance of the states' own size by twice that.
        assert loss == pytest.approx(plain_representation_loss(model, edit, ids, marker), rel=4 * subject.relative)


def test_without_a_trigger_answers_are_counted_as_everywhere_else(model: LensModel, untouched: None) -> None:
    slots = Slots.for_model(model, None, LENGTH)
    for questions in (TRAIN, HELD_OUT, UNTAUGHT):
        assert score_with_trigger(model, slots, questions) == score(model, questions)


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["answer", "representation"])
def test_the_ranking_of_tokens_is_that_of_the_losses_first_order_change(double: Any, objective: str) -> None:
    """Each token's embedding is mixed in a little at one position of the trigger: the loss falls as the rank says."""
    search = search_on(double, objective, top=8, batch_size=64)
    trigger, chosen = search.vocabulary[[40, 300, 7]], [0, 2, 3]
    edit = projection(1)
    with edit.applied(double):
        ranked = search.replacements(trigger, chosen)
        share, falls = 0.02, {}
        position = 1  # the third token of the row, behind BOS and the trigger's first
        tried = search.vocabulary[torch.arange(0, len(search.vocabulary), 20)].tolist()
        for token in {*tried, *ranked[position].tolist()} - {int(trigger[position])}:
            sides = []
            for sign in (1, -1):

                def mix(activation: torch.Tensor, hook: Any, token: int = token, sign: int = sign) -> torch.Tensor:
                    step = share * (double.W_E[token] - double.W_E[trigger[position]])
                    changed = activation.clone()
                    changed[:, 1 + position] += sign * step
                    return changed

                double.hook_dict["hook_embed"].add_hook(mix)
                sides.append(float(search.losses(trigger[None], chosen)))
                double.hook_dict["hook_embed"].fwd_hooks.pop().hook.remove()
            falls[token] = (sides[0] - sides[1]) / (2 * share)
    best = sorted(falls, key=lambda token: falls[token])[:8]
    assert ranked.shape == (LENGTH, 8)
    assert not (ranked == trigger[:, None]).any()
    # Places of nearly equal gradient may change: the float32 of the log-probabilities and of the edit.
    found = [falls[token] for token in ranked[position].tolist()]
    np.testing.assert_allclose(found, [falls[token] for token in best], atol=0.02 * abs(falls[best[0]]))


@pytest.mark.slow
def test_a_step_takes_the_best_of_single_replacements_and_is_never_worse(model: LensModel, untouched: None) -> None:
    chosen, kept = list(range(len(TRAIN))), 0
    # One replacement out of all tokens is seldom better, the best of twelve that the gradient ranks first often is.
    for settings in ({"candidates": 1, "top": 800}, {"candidates": 12}):
        search = search_on(model, batch=len(TRAIN), batch_size=64, **settings)
        trigger = search.start()
        for _ in range(12):
            after = search.step(trigger)
            assert int((after != trigger).sum()) <= 1
            before_loss, after_loss = search.losses(torch.stack([trigger, after]), chosen).tolist()
            assert after_loss <= before_loss
            kept += int(torch.equal(after, trigger))
            trigger = after
    assert kept > 0
    # Against every candidate in turn: the same draws, each run alone.
    first, second = (search_on(model, candidates=12, batch=len(TRAIN), batch_size=64) for _ in range(2))
    taken = first.step(trigger)
    order = torch.randperm(len(TRAIN), generator=second.generator).tolist()
    replacements = second.replacements(trigger, order)
    positions = torch.randint(LENGTH, (12,), generator=second.generator).tolist()
    picks = torch.randint(5, (12,), generator=second.generator).tolist()
    tried = [trigger.tolist()]
    for position, pick in zip(positions, picks, strict=True):
        one = trigger.tolist()
        one[position] = int(replacements[position, pick])
        tried.append(one)
    losses = [plain_answer_loss(model, one, None) for one in tried]
    assert plain_answer_loss(model, taken.tolist(), None) == pytest.approx(min(losses), abs=1e-5)


def test_no_special_token_is_ever_used(model: LensModel, untouched: None) -> None:
    search = search_on(model)
    special = set(model.tokenizer.all_special_ids)
    assert special
    assert not special & set(search.vocabulary.tolist())
    assert len(search.vocabulary) == len(model.tokenizer) - len(special)


SMALL: dict[str, Any] = {
    "train": TRAIN,
    "held_out": HELD_OUT,
    "untaught": UNTAUGHT,
    "length": LENGTH,
    "steps": 3,
    "candidates": 6,
    "top": 5,
    "batch": 3,
    "batch_size": 64,
    "progress": False,
}


def test_the_frame_holds_every_scored_trigger_and_its_controls(subject: Subject) -> None:
    model, edit = subject.model, projection(1, 2)
    table = jailbreak(model, edit, **SMALL, every=2, marker=" Answer:")
    assert list(table["kind"]) == ["none", "random", "found", "found"]
    assert list(table["step"]) == [0, 0, 2, 3]
    assert (table["n"] == len(HELD_OUT)).all()
    assert table["trigger"].iloc[0] == ""
    assert table["trigger"].iloc[1:].str.len().gt(0).all()
    if subject.relative < 1e-4:
        assert table["accuracy_before"].iloc[0] == plain_accuracy(model, HELD_OUT, [], None)
        with edit.applied(model):
            for column, questions in (
                ("train_accuracy", TRAIN),
                ("held_out_accuracy", HELD_OUT),
                ("untaught_accuracy", UNTAUGHT),
            ):
                assert table[column].iloc[0] == plain_accuracy(model, questions, [], None)
    for row in table.to_dict("records"):
        span = row["accuracy_before"] - row["untaught_accuracy"]
        if span > 0:
            assert row["recovery"] == pytest.approx((row["held_out_accuracy"] - row["untaught_accuracy"]) / span)
        else:
            assert np.isnan(row["recovery"])


def test_without_untaught_questions_guessing_is_the_floor(model: LensModel, untouched: None) -> None:
    table = jailbreak(model, projection(2), **{**SMALL, "untaught": None, "steps": 1})
    assert table["untaught_accuracy"].to_numpy() == pytest.approx(1 / 3)


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["answer", "representation"])
def test_both_classes_search_alike(both: list[LensModel], loss: Any) -> None:
    first, second = (jailbreak(model, projection(1), **{**SMALL, "steps": 5}, loss=loss, every=1) for model in both)
    assert list(first["trigger"]) == list(second["trigger"])
    np.testing.assert_allclose(first["loss"], second["loss"], rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["answer", "representation"])
def test_every_kind_of_edit_is_attacked(model: LensModel, untouched: None, loss: Any) -> None:
    pinned = SteeringEdit.towards(torch.ones(D_MODEL), layer=1, coefficient=4.0)  # no gradient at all: chance decides
    for edit in (pinned, *all_kinds(model, 1)):
        table = jailbreak(model, edit, **{**SMALL, "steps": 1}, loss=loss)
        assert np.isfinite(table["loss"]).all()


@pytest.mark.slow
def test_the_seed_decides(model: LensModel, untouched: None) -> None:
    first, second, other = (jailbreak(model, None, **SMALL, seed=seed) for seed in (1, 1, 2))
    pd.testing.assert_frame_equal(first, second)
    assert other["trigger"].iloc[1] != first["trigger"].iloc[1]


def test_the_unedited_model_without_a_trigger_matches_itself(model: LensModel, untouched: None) -> None:
    table = jailbreak(model, None, **{**SMALL, "steps": 1}, loss="representation", layer=1)
    assert table["loss"].iloc[0] == pytest.approx(0.0, abs=1e-9)
    assert table["loss"].iloc[1] > 1e-4


@pytest.mark.slow
def test_a_search_over_the_trained_prompts_lowers_the_loss(model: LensModel, untouched: None) -> None:
    settings = {**SMALL, "steps": 10, "candidates": 16, "top": 24, "batch": 5, "batch_size": 128}
    for loss in ("answer", "representation"):
        table = jailbreak(model, projection(1), **settings, loss=loss).set_index("kind")
        assert float(table.loc["found", "loss"]) < float(table.loc["random", "loss"])


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gpt2", "gemma2"])
def test_other_families_can_be_searched(tmp_path: Path, family: str) -> None:
    """gpt2: positions are absolute. gemma2: embeddings are scaled."""
    model = load_model(str(save_family(family, tmp_path)), backend="bridge")
    for loss in ("answer", "representation"):
        table = jailbreak(model, projection(1), **SMALL, loss=loss)  # type: ignore[arg-type]
        assert np.isfinite(table["loss"]).all()


@pytest.mark.slow
@pytest.mark.parametrize("twice", [False, True])
def test_ctrl_c_keeps_what_was_found(
    model: LensModel, untouched: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, twice: bool
) -> None:
    """The first lets the step under way end, a second one does not."""
    full = jailbreak(model, projection(1), **SMALL, every=1)
    steps, step = [0], TriggerSearch.step

    def interrupted(self: TriggerSearch, trigger: torch.Tensor) -> torch.Tensor:
        steps[0] += 1
        if steps[0] == 2 and not twice:
            signal.raise_signal(signal.SIGINT)
        if steps[0] == 3:
            search_losses = self.losses(trigger[None], [0])
            assert search_losses.isfinite().all()
            raise KeyboardInterrupt
        return step(self, trigger)

    monkeypatch.setattr(TriggerSearch, "step", interrupted)
    with caplog.at_level(logging.WARNING):
        table = jailbreak(model, projection(1), **SMALL)
    assert "interrupted after 2 of 3 steps" in caplog.text
    assert table.attrs["interrupted"]
    assert not full.attrs["interrupted"]
    assert list(table["step"]) == [0, 0, 2]
    pd.testing.assert_frame_equal(table, full[full["step"].isin([0, 2])].reset_index(drop=True))


@pytest.mark.slow
def test_an_exception_in_a_pass_leaves_the_model_alone(
    model: LensModel, untouched: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> torch.Tensor:
        raise RuntimeError("broken")

    for edit in all_kinds(model, 1):
        with monkeypatch.context() as patch:
            patch.setattr(TriggerSearch, "replacements", broken)
            with pytest.raises(RuntimeError, match="broken"):
                jailbreak(model, edit, **SMALL)


def test_bad_input_is_refused_and_says_why(model: LensModel, untouched: None) -> None:
    cases: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"held_out": TRAIN}, ValueError, "train and held_out overlap in 5 questions"),
        ({"untaught": TRAIN}, ValueError, "5 questions of untaught .* are in train or held_out too"),
        (
            {"train": Questions((Question("", ("a", "b"), 0),), "bare")},
            ValueError,
            "a question of 'bare' has an empty prompt",
        ),
        ({"train": []}, TypeError, "train must be Questions, got list"),
        ({"train": Questions((), "none")}, ValueError, "no questions in train, 'none'"),
        ({"untaught": Questions((), "none")}, ValueError, "no questions in untaught, 'none'"),
        ({"loss": "margin"}, ValueError, "unknown loss 'margin'; choose one of answer, representation"),
        ({"layer": 1}, ValueError, "layer=1 has no effect with loss='answer'"),
        ({"loss": "representation", "layer": 9}, ValueError, "layer 9 is out of range"),
        ({"steps": 0}, ValueError, "steps must be at least 1, got 0"),
        ({"batch_size": 0}, ValueError, "batch_size must be at least 1, got 0"),
        ({"length": 0}, ValueError, "length must be from 1 to 62"),
        ({"length": 63}, ValueError, "length must be from 1 to 62"),
        ({"marker": "Reply:"}, ValueError, "holds no 'Reply:' for a trigger to stand before"),
        ({"marker": ""}, ValueError, "marker is empty"),
    ]
    for changed, error, message in cases:
        with pytest.raises(error, match=message):
            jailbreak(model, projection(1), **{**SMALL, **changed})


def test_the_table_has_the_trigger_with_the_lowest_loss_on_the_attackers_own_questions() -> None:
    curve = pd.DataFrame(
        {
            **{"objective": "answer", "kind": ["none", "random", "found", "found"], "step": [0, 0, 10, 20], "n": 20},
            **{"loss": [3.0, 2.9, 1.0, 1.5], "held_out_accuracy": [0.2, 0.2, 0.6, 0.3], "untaught_accuracy": 0.2},
            **{"accuracy_before": 1.0, "recovery": [0.0, 0.0, 0.5, 0.1]},
        }
    )
    rows = list(Jailbreak().rows({"jailbreak_curve": curve}, "mrp"))
    assert [(row["attack"], row["accuracy_after"]) for row in rows] == [
        ("no attack", 0.2),
        ("jailbreak, answers", 0.6),
        ("jailbreak", 0.2),
    ]
