"""Gradient ascent, gradient difference, NPO, noisy RMU and direction ablation."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from mrp_lens import metrics
from mrp_lens.data import Corpus
from mrp_lens.data.task import UnlearningTask
from mrp_lens.edits import ProjectionEdit, WeightEdit
from mrp_lens.methods import METHODS, NPO, RMU, DirectionAblation, GradientAscent, GradientDifference, NoisyRMU
from mrp_lens.models import LensModel, encoder_for, logits_of
from mrp_lens.models.hooks import captured, hook_name
from mrp_lens.runs.report.page import edits_in
from tests.support.commands import fitter
from tests.support.edits import logits

Texts = tuple[Corpus, Corpus]
FIT: dict[str, Any] = {"seed": 0, "progress": False}
TUNED: dict[str, Any] = {"steps": 4, "batch_size": 8}
ROOMY = 64  # more than there are documents: each step sees all of them


def token_losses(model: Any, corpus: Corpus) -> list[list[float]]:
    """-log p of every token after the first, a document at a time."""
    encoder = encoder_for(model)
    values = []
    for row in encoder.encode(corpus.documents):
        tokens = torch.tensor([row.ids])
        with torch.no_grad():
            logs = logits_of(model, tokens, torch.ones_like(tokens, dtype=torch.bool)).float().log_softmax(-1)[0]
        values.append([-float(logs[place - 1, row.ids[place]]) for place in range(1, len(row.ids))])
    return values


def flat_mean(values: list[list[float]]) -> float:
    flat = [value for row in values for value in row]
    return sum(flat) / len(flat)


@pytest.mark.parametrize("micro_batch", [None, 5])
def test_losses_are_those_of_one_document_at_a_time(
    model: LensModel, texts: Texts, micro_batch: int | None, untouched: None
) -> None:
    forget, retain = (token_losses(model, corpus) for corpus in texts)
    every = {"steps": 1, "batch_size": ROOMY, "micro_batch": micro_batch}
    ascent = GradientAscent(**every).fit(model, *texts, **FIT).log.iloc[0]
    assert ascent["forget"] == pytest.approx(-flat_mean(forget), rel=1e-5)
    assert "retain" not in ascent
    difference = GradientDifference(retain_weight=2.5, **every).fit(model, *texts, **FIT).log.iloc[0]
    assert difference["retain"] == pytest.approx(flat_mean(retain), rel=1e-5)
    assert difference["loss"] == pytest.approx(-flat_mean(forget) + 2.5 * flat_mean(retain), rel=1e-5)
    npo = NPO(beta=0.3, **every).fit(model, *texts, **FIT).log.iloc[0]
    assert npo["forget"] == pytest.approx(2 / 0.3 * math.log(2), rel=1e-5)  # p is still what it was


def test_the_loss_of_npo_is_the_papers(model: LensModel, texts: Texts, untouched: None) -> None:
    """After two updates: 2 / beta * mean log(1 + (p / p_before)^beta), counted from the two models."""
    before = token_losses(model, texts[0])
    settings: dict[str, Any] = {"beta": 0.2, "batch_size": ROOMY, "lr": 1e-3}
    fit = NPO(steps=2, **settings).fit(model, *texts, **FIT)
    with fit.edit.applied(model):
        after = token_losses(model, texts[0])
    ratios = [math.exp(sum(old) - sum(new)) for old, new in zip(before, after, strict=True)]
    wanted = sum(2 / 0.2 * math.log(1 + ratio**0.2) for ratio in ratios) / len(ratios)
    # the third row of a longer run is the loss at the weights that two updates leave: rates do not fall before half-time
    third = NPO(steps=6, **settings).fit(model, *texts, **FIT).log["forget"].iloc[2]
    falling = NPO(steps=2, **settings).fit(model, *texts, **FIT)
    assert falling.log["loss"].iloc[1] < falling.log["loss"].iloc[0]
    assert third == pytest.approx(wanted, rel=2e-2)  # the second of two updates is at half the rate


@pytest.mark.parametrize(
    "method",
    [GradientAscent(**TUNED), GradientDifference(retain_weight=1.0, **TUNED), NPO(**TUNED)],
    ids=lambda m: m.name,
)
def test_forget_texts_become_less_likely_and_only_the_named_matrices_change(
    method: Any, model: LensModel, texts: Texts, untouched: None
) -> None:
    fit = method.fit(model, *texts, **FIT)
    assert isinstance(fit.edit, WeightEdit)
    assert fit.edit.layers == (0, 1, 2)  # those of the released RMU, by depth
    before = flat_mean(token_losses(model, texts[0]))
    with fit.edit.applied(model):
        assert flat_mean(token_losses(model, texts[0])) > before
    again = method.fit(model, *texts, **FIT).edit
    assert all(torch.equal(tensor, again.tensors[name]) for name, tensor in fit.edit.tensors.items())


def test_some_layers_and_an_earlier_edit(model: LensModel, texts: Texts, untouched: None) -> None:
    first = NPO(layers=[1, 2], **TUNED).fit(model, *texts, **FIT)
    assert first.edit.layers == (1, 2)
    second = GradientAscent(layers=[2], **TUNED).fit(model, *texts, after=first.edit, **FIT)
    with second.edit.applied(model):
        both = flat_mean(token_losses(model, texts[0]))
    with first.edit.applied(model):
        assert flat_mean(token_losses(model, texts[0])) < both


def test_noise_on_the_retain_branch_is_a_share_of_the_states_norm(
    model: LensModel, texts: Texts, untouched: None
) -> None:
    plain = RMU(layer=2, steps=1, batch_size=ROOMY).fit(model, *texts, **FIT)
    none = NoisyRMU(layer=2, steps=1, batch_size=ROOMY, retain_noise=0.0).fit(model, *texts, **FIT)
    assert none.log["retain"].iloc[0] == plain.log["retain"].iloc[0] == 0.0
    noisy = NoisyRMU(layer=2, steps=1, batch_size=ROOMY, retain_noise=0.3).fit(model, *texts, **FIT)
    assert noisy.log["retain"].iloc[0] == pytest.approx(0.3**2, rel=0.1)


def test_direction_ablation_removes_the_difference_of_means(model: LensModel, texts: Texts, untouched: None) -> None:
    edit = DirectionAblation(layers=[1, 3]).fit(model, *texts, **FIT).edit
    assert isinstance(edit, ProjectionEdit)
    encoder = encoder_for(model)
    for layer in (1, 3):
        means = []
        for corpus in texts:
            states = []
            for row in encoder.encode(corpus.documents):
                tokens = torch.tensor([row.ids])
                with captured(model, [hook_name(layer)]) as store:
                    logits(model, tokens)
                states += [
                    state for state, counts in zip(store[hook_name(layer)][0], row.content, strict=True) if counts
                ]
            means.append(torch.stack(states).double().mean(0))
        wanted = (means[0] - means[1]) / (means[0] - means[1]).norm()
        (direction,) = edit.subspaces()[hook_name(layer)].basis.double()
        assert abs(float(direction @ wanted)) == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize(
    ("method", "words"),
    [
        (NPO(layers=[1, 2], **TUNED), "npo: MLP output matrices of layers 1 and 2 trained on what the model predicts; 4 steps"),
        (GradientAscent(layers=[0], **TUNED), "gradient-ascent: MLP output matrices of layers 0 trained on what the model"),
        (DirectionAblation(layers=[1]), "direction-ablation (request forget): one direction removed from the residual stream at layers 1;"),
        (NoisyRMU(layer=1, **TUNED), "rmu-noise: MLP output matrices of layers 0 and 1 trained to steer forget states of layer 1"),
    ],
)  # fmt: skip
def test_the_page_of_a_run_says_what_each_baseline_did(
    model: LensModel, texts: Texts, method: Any, words: str, tmp_path: Path
) -> None:
    method.fit(model, *texts, **FIT).edit.save_pretrained(tmp_path / "edit")
    (tmp_path / "again").mkdir()
    (tmp_path / "again" / "edit_config.json").write_text((tmp_path / "edit" / "edit_config.json").read_text())
    (told,) = edits_in(tmp_path)
    assert told.sentence.startswith(words)


def test_the_command_line_knows_them() -> None:
    assert fitter("--method", "npo", "--layers", "1,2", "--beta", "0.2") == NPO(layers=[1, 2], beta=0.2)
    assert {type(fitter("--method", name)) for name in METHODS} == set(METHODS.values())
    with pytest.raises(ValueError, match="has no released recipe"):
        fitter("--method", "npo", "--released")


@pytest.mark.slow
@pytest.mark.parametrize(
    "method",
    [
        pytest.param(GradientDifference(), marks=pytest.mark.long),
        NPO(),
        pytest.param(NoisyRMU(), marks=pytest.mark.long),
    ],
    ids=lambda m: m.name,
)
def test_with_their_defaults_they_forget_a_topic_of_the_world_and_keep_the_rest(method: Any, demo_model: Any) -> None:
    """Gradient ascent, which nothing holds back, and direction ablation do not."""
    task = UnlearningTask.from_world("potions")
    assert task.questions is not None
    assert task.retain_questions is not None
    fit = method.fit(demo_model, task.forget, task.retain, seed=0, progress=False)
    with fit.edit.applied(demo_model):
        forgotten, kept = (metrics.accuracy(demo_model, quiz) for quiz in (task.questions, task.retain_questions))
    assert float(forgotten["accuracy"].iloc[0]) < 0.26 + 0.10  # 0.26: never taught
    assert float(kept["accuracy"].iloc[0]) >= 0.95
