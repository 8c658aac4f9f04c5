"""Questions for attacks with triggers, and what they do, one prompt at a time: what batches are checked against."""

from typing import Any

import numpy as np
import torch

from mrp_lens.attacks.gcg import Slots, TriggerSearch, answer_objective, representation_objective
from mrp_lens.data import Question, Questions
from mrp_lens.edits import Edit
from mrp_lens.models import LensModel

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


def run(model: LensModel, ids: list[int]) -> torch.Tensor:
    tokens = torch.tensor([ids])
    with torch.no_grad():
        logits: Any = model(tokens, attention_mask=torch.ones_like(tokens))
    return logits[0].float().log_softmax(-1)


def plain_log_probability(model: LensModel, prompt: str, choice: str, trigger: list[int], marker: str | None) -> float:
    """Mean over the choice's tokens, one prompt a pass."""
    *context, end = plain_ids(model, prompt, choice, trigger, marker)
    start = sum(map(len, context))
    ids = [token for part in (*context, end) for token in part]
    log_probabilities = run(model, ids)
    return float(np.mean([float(log_probabilities[place - 1, ids[place]]) for place in range(start, len(ids))]))


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
    run(model, ids)
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
