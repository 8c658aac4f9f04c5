"""Triggers and the search for them, on the tiny model, against loops over single prompts and single tokens."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mrp_lens.attacks.evaluation import score
from mrp_lens.attacks.gcg import Slots, score_with_trigger
from mrp_lens.models import LensModel
from tests.support.edits import projection
from tests.support.states import PRECISIONS, Subject, subject_in
from tests.support.triggers import (
    HELD_OUT,
    LENGTH,
    TRAIN,
    UNTAUGHT,
    plain_accuracy,
    plain_answer_loss,
    plain_representation_loss,
    search_on,
)


@pytest.fixture(params=PRECISIONS)
def subject(request: pytest.FixtureRequest, model: Any, tiny_folder: Path, backend: str) -> Iterator[Subject]:
    yield from subject_in(request.param, model, tiny_folder, backend)


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
