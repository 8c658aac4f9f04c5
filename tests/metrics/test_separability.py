"""How well sides can be told apart: against a calculation by hand, on sides that differ and on sides that do not."""

import sys
from typing import Any

import numpy as np
import pytest
import torch

from mrp_lens import World, metrics
from mrp_lens.data import Corpus
from mrp_lens.models import LensModel
from mrp_lens.models.hooks import captured, hook_name

FORGET = Corpus.from_texts([f"The colour of Zaxim{n} is blue." for n in range(6)], name="forget")
RETAIN = Corpus.from_texts([f"An old man walked {n} times." for n in range(5)], name="retain")  # begin unlike: no ties


def test_the_areas_are_those_of_a_calculation_by_hand(model: LensModel, monkeypatch: pytest.MonkeyPatch) -> None:
    width, calls = int(model.cfg.d_model), []

    def fixed(inside: torch.Tensor, outside: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        calls.append((len(inside), len(outside)))
        weights = torch.zeros(width)
        weights[len(calls) - 1] = 1.0  # the detector of one entry, the control of the next
        return weights, torch.tensor(0.1)

    monkeypatch.setattr(sys.modules["mrp_lens.metrics.separability"], "logistic_regression", fixed)
    frame = metrics.separability(model, FORGET, RETAIN, layers=[1], seed=3, progress=False)
    order = torch.Generator().manual_seed(3)
    asked = []
    for corpus in (FORGET, RETAIN):
        places = sorted(torch.randperm(len(corpus), generator=order).tolist()[1::2])
        asked.append([corpus.documents[place].completion for place in places])
    scores: list[list[Any]] = []
    for texts in asked:
        scores.append([])
        for text in texts:
            with captured(model, [hook_name(1)]) as found, torch.no_grad():
                model(model.to_tokens(text))
            states = found[hook_name(1)][0]
            if model.tokenizer.bos_token_id is not None and model.to_tokens(text)[0, 0] == model.tokenizer.bos_token_id:
                states = states[1:]
            scores[-1].append((states / states.norm(dim=-1, keepdim=True))[:, :2].double().numpy())
    for which, column in ((0, "auc"), (1, "null")):
        pairs = [
            (a > b) + 0.5 * (a == b)
            for own in scores[0]
            for a in own[:, which]
            for other in scores[1]
            for b in other[:, which]
        ]
        assert frame.loc[frame["unit"] == "token", column].item() == pytest.approx(np.mean(pairs), abs=1e-6)
        means = [[each[:, which].mean() for each in side] for side in scores]
        pairs = [(a > b) + 0.5 * (a == b) for a in means[0] for b in means[1]]
        assert frame.loc[frame["unit"] == "document", column].item() == pytest.approx(np.mean(pairs), abs=1e-6)
    assert list(frame["forget_documents"]) == [3, 3]
    assert list(frame["retain_documents"]) == [2, 2]
    assert len(calls) == 2  # the control learns from as many states, of other sides


def test_a_topic_is_told_from_others_and_one_half_of_a_topic_is_not(demo_model: LensModel) -> None:
    world = World()
    potions, others = world.forget("potions").spread(80), world.retain(without="potions").spread(80)
    told: Any = metrics.separability(demo_model, potions, others, layers=[3], progress=False).set_index("unit")
    assert told.loc["document", "auc"] > 0.95
    assert told.loc["document", "auc"] >= told.loc["token", "auc"] > 0.7
    for column in ("low", "high"):
        assert np.isfinite(told[column]).all()
    order = torch.randperm(len(potions), generator=torch.Generator().manual_seed(0)).tolist()
    halves = [Corpus(tuple(potions.documents[i] for i in order[start::2]), "half") for start in (0, 1)]
    alike: Any = metrics.separability(demo_model, *halves, layers=[3], progress=False).set_index("unit")
    assert alike.loc["token", "low"] < 0.6


def test_the_same_seed_gives_the_same_and_the_model_stays(model: LensModel, untouched: None) -> None:
    one, two = (metrics.separability(model, FORGET, RETAIN, layers=[0, 2], seed=5, progress=False) for _ in range(2))
    assert one.equals(two)
    assert list(one["layer"]) == [0, 0, 2, 2]


def test_too_few_documents_are_refused(model: LensModel) -> None:
    few = Corpus.from_texts(["One.", "Two.", "Three."], name="few")
    with pytest.raises(
        ValueError, match="forget: 3 different documents are too few to learn from half of them; give at least 4"
    ):
        metrics.separability(model, few, RETAIN, progress=False)
    with pytest.raises(ValueError, match="layer 99 is out of range"):
        metrics.separability(model, FORGET, RETAIN, layers=[99], progress=False)


def test_a_text_that_comes_several_times_lies_on_one_side(model: LensModel) -> None:
    """Copies in both halves would be documents that the detector has seen."""
    once, thrice = (
        metrics.separability(model, Corpus(FORGET.documents * times, "forget"), RETAIN, layers=[1], progress=False)
        for times in (1, 3)
    )
    assert once.equals(thrice)
    with pytest.raises(ValueError, match="forget: 1 different documents are too few"):
        metrics.separability(model, Corpus(FORGET.documents[:1] * 8, "forget"), RETAIN, progress=False)
