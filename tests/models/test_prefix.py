"""Texts that begin alike give behind their beginning, which is read once, what whole passes do."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from mrp_lens import metrics
from mrp_lens.data import Document, Questions
from mrp_lens.edits import ProjectionEdit, SteeringEdit
from mrp_lens.edits.subspace import Subspace
from mrp_lens.models import encoder_for
from mrp_lens.models.hooks import hook_name

ASKED = Questions.from_rows(
    [
        {
            "question": f"The old man walked slowly near {place} , as on every other morning of that long year, and then he",
            "choices": choices,
            "answer": 0,
        }
        for place in ("the red house", "a river", "the end of the long white road") * 6
        for choices in (["went home", "sat down in the garden", "slept"], ["sang", "went away"])
    ],
    prompt="{question}",
)
HOOK = hook_name(1)


def projection(model: Any) -> ProjectionEdit:
    return ProjectionEdit({HOOK: Subspace.random(4, model.cfg.d_model, seed=0)})


def steering(model: Any, **how: Any) -> SteeringEdit:
    direction = torch.randn(model.cfg.d_model, generator=torch.Generator().manual_seed(0))
    return SteeringEdit(HOOK, direction, coefficient=5.0, mode="add", **how)


def tokens_read(model: Any, edit: Any, asked: Questions = ASKED) -> tuple[list[Any], int]:
    """The scores of all choices, and how many tokens went into the first block."""
    read = []
    handle = model.embed.register_forward_pre_hook(lambda _module, given: read.append(given[0].numel()))
    try:
        with edit.applied(model):
            return metrics.choice_scores(model, asked, progress=False), sum(read)
    finally:
        handle.remove()


def alone(model: Any, edit: Any, asked: Questions = ASKED) -> list[list[float]]:
    """The same from one choice at a time, which has nothing to share."""
    with edit.applied(model):
        return [
            [
                float(metrics.choice_scores(model, Questions((replace(question, choices=(choice,), answer=0),)))[0][0])
                for choice in question.choices
            ]
            for question in asked.questions[:6]
        ]


def test_a_prompt_is_read_once_for_all_choices(model: Any, untouched: None) -> None:
    edit = projection(model)
    scores, read = tokens_read(model, edit)
    for found, expected in zip(scores, alone(model, edit), strict=False):
        assert found.tolist() == pytest.approx(expected, abs=2e-5)
    rows = encoder_for(model).encode(
        [Document(question.prompt, choice) for question in ASKED.questions for choice in question.choices]
    )
    assert read < 0.65 * sum(
        len(row.ids) for row in rows
    )  # prompts alone are 0.42; with what was compared with whole passes


@pytest.mark.parametrize("letters", [False, True])
def test_what_all_prompts_begin_with_is_read_once(model: Any, letters: bool, untouched: None) -> None:
    edit, places = projection(model), ("the red house", "a river", "the end of the white road")
    asked = Questions(
        tuple(
            replace(
                question,
                prompt=f"The old man walked, as on every other morning of that year, near {places[n % 3]}, then",
                choices=(" a", " b") if letters else question.choices,  # one token each: a pass a question
            )
            for n, question in enumerate(ASKED.questions)
        )
    )
    scores, read = tokens_read(model, edit, asked)
    for found, expected in zip(scores, alone(model, edit, asked), strict=False):
        assert found.tolist() == pytest.approx(expected, abs=2e-5)
    prompts = encoder_for(model).encode([Document("", question.prompt) for question in asked.questions])
    assert read < sum(len(row.ids) for row in prompts)  # less than the prompts alone, choices and comparison included


@pytest.mark.parametrize("positions", [[0], [1], [2, 3]])
def test_an_edit_that_counts_positions_gives_what_it_does_in_whole_passes(
    model: Any, positions: list[int], untouched: None
) -> None:
    edit = steering(model, positions=positions)
    scores, _ = tokens_read(model, edit)
    for found, expected in zip(scores, alone(model, edit), strict=False):
        assert found.tolist() == pytest.approx(expected, abs=2e-5)
