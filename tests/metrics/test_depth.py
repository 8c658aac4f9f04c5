"""Depth by patching, against states put in one document at a time."""

from typing import Any

import numpy as np
import plotly.graph_objects as go
import pytest
import torch

from mrp_lens import metrics, plots
from mrp_lens.data import Corpus
from mrp_lens.data.task import UnlearningTask
from mrp_lens.metrics.depth import depths_of
from mrp_lens.models import LensModel, load_model
from tests.conftest import LAYERS
from tests.support.edits import projection, weight_edit
from tests.support.families import save_family
from tests.support.plain import ids_of, states_at

CORPUS = Corpus.from_rows(
    [{"p": "The old", "c": " man walked slowly."}, {"p": "The colour", "c": " is red."}, {"p": "A", "c": " house."}],
    prompt="{p}",
    completion="{c}",
    name="three",
)
HOOKS = [f"blocks.{layer}.hook_resid_post" for layer in range(LAYERS)]


def patched(host: Any, source: dict[str, torch.Tensor], ids: list[int], start: int, layer: int, answer: bool) -> float:
    """Mean log-probability of the tokens from `start` on, the layer's states being the source's."""

    def put(activation: torch.Tensor, hook: Any) -> torch.Tensor:
        changed = activation.clone()
        first = start - 1 if answer else 0
        last = len(ids) - 1 if answer else len(ids)
        changed[0, first:last] = source[HOOKS[layer]][first:last]
        return changed

    point = host.hook_dict[HOOKS[layer]]
    point.add_hook(put)
    tokens = torch.tensor([ids])
    with torch.no_grad():
        logs = host(tokens, attention_mask=torch.ones_like(tokens))[0].double().log_softmax(-1)
    point.fwd_hooks.pop().hook.remove()
    return float(np.mean([float(logs[at - 1, ids[at]]) for at in range(start, len(ids))]))


@pytest.mark.parametrize("into", ["edited", "unedited"])
@pytest.mark.parametrize("positions", ["all", "answer"])
def test_every_layer_equals_states_put_in_by_hand(
    model: LensModel, other: LensModel, into: Any, positions: Any, untouched: None
) -> None:
    edit = weight_edit(model, 1)
    lost: dict[str, list[list[float]]] = {"edited": [], "reference": []}
    answer = positions == "answer"
    for document in CORPUS.documents:
        ids, start = ids_of(model, document.prompt + document.completion), len(ids_of(model, document.prompt))
        with torch.no_grad():
            known = states_at(model, ids, HOOKS)
            with edit.applied(model):
                changed = states_at(model, ids, HOOKS)
                if into == "edited":
                    own = [patched(model, known, ids, start, layer, answer) for layer in range(LAYERS)]
            never = states_at(other, ids, HOOKS)
        if into == "edited":
            theirs = [patched(other, known, ids, start, layer, answer) for layer in range(LAYERS)]
        else:
            own = [patched(model, changed, ids, start, layer, answer) for layer in range(LAYERS)]
            theirs = [patched(model, never, ids, start, layer, answer) for layer in range(LAYERS)]
        before = patched(model, known, ids, start, 0, answer)  # its own states change nothing
        lost["edited"].append([before - value for value in own])
        lost["reference"].append([before - value for value in theirs])
    frame = metrics.depth(
        model,
        edit,
        CORPUS,
        reference=other,
        into=into,
        positions=positions,
        threshold=0.0,
        batch_size=2,
        progress=False,
    )
    mine, full = np.array(lost["edited"]), np.array(lost["reference"])
    for name, expected in (("log_probability", mine), ("never_saw", full)):
        assert (frame["unedited"] - frame[name]).tolist() == pytest.approx(expected.mean(axis=0).tolist(), abs=2e-5)
    depths = []
    for own_losses, full_losses in zip(mine, full, strict=True):
        counted = [(d, f) for d, f in zip(own_losses, full_losses, strict=True) if f > 0]
        if counted:
            depths.append(sum(f * min(max(d / f, 0), 1) for d, f in counted) / sum(f for _, f in counted))
    assert frame["depth"].tolist() == pytest.approx([np.mean(depths)] * LAYERS, abs=1e-3)
    assert frame["counted"].iloc[0] == len(depths)
    assert frame["layer"].tolist() == list(range(LAYERS))


@pytest.mark.parametrize("into", ["edited", "unedited"])
def test_the_unedited_model_has_depth_0_and_one_that_never_saw_1(
    model: LensModel, other: LensModel, into: Any, untouched: None
) -> None:
    for edited, expected in ((model, 0.0), (weight_edit(model, 1, scale=1.0), 0.0), (other, 1.0)):
        frame = metrics.depth(model, edited, CORPUS, reference=other, into=into, threshold=0.0, progress=False)
        assert frame["depth"].tolist() == pytest.approx([expected] * LAYERS, abs=1e-6)
        assert (frame["edited"] == frame["unedited"]).all() == (edited is not other)
    turned = metrics.depth(other, model, CORPUS, reference=model, into=into, threshold=0.0, progress=False)
    assert frame["edited"].tolist() == turned["unedited"].tolist()  # as `other` answers, unpatched


def test_the_score_is_the_published_one_by_hand() -> None:
    """Two documents of three layers; the third lacks nothing in the reference and does not count."""
    expected = np.array([[2.0, 1.0, 0.01], [0.5, 0.5, 0.5], [0.0, 0.01, -1.0]])
    lost = np.array([[1.0, 3.0, 5.0], [-1.0, 0.25, 0.5], [1.0, 1.0, 1.0]])
    assert depths_of(lost, expected, 0.05).tolist() == pytest.approx([(1.0 + 1.0) / 3.0, (0.0 + 0.25 + 0.5) / 1.5])


def test_an_edit_is_no_deeper_than_its_last_layer_from_below(model: LensModel, other: LensModel) -> None:
    """From the layer on behind which nothing is edited, the unedited states give the unedited answer."""
    frame = metrics.depth(model, weight_edit(model, 1), CORPUS, reference=other, progress=False).set_index("layer")
    lost = (frame["unedited"] - frame["log_probability"]).abs()
    assert lost[0] > 1e-4
    assert lost[1:].max() < 1e-5


def test_random_tokens_are_drawn_by_the_seed_alone(model: LensModel, other: LensModel, untouched: None) -> None:
    first, again, third = (
        metrics.depth(model, projection(1), CORPUS, reference=other, seed=seed, layers=[1, 3], progress=False)
        for seed in (0, 0, 1)
    )
    assert first.equals(again)
    assert (first["random"] != third["random"]).any()
    assert first["layer"].tolist() == [1, 3]
    assert first["log_probability"].tolist() == pytest.approx(third["log_probability"].tolist())


def test_the_picture_tells_each_depth(model: LensModel, other: LensModel) -> None:
    task = UnlearningTask((CORPUS,), CORPUS, CORPUS)
    measured = metrics.Measured(model=model, task=task, edit=projection(1), reference=other, progress=False)
    frame = metrics.METRICS["depth"].measure(measured)
    assert frame is not None
    assert frame["into"].unique().tolist() == ["edited", "unedited"]
    figure = plots.depth(frame)
    assert isinstance(figure, go.Figure)
    numbers = frame.groupby("into")["depth"].first()
    said = [annotation.text for annotation in figure.layout.annotations]
    assert [f"depth {number:.2f}" in text for number, text in zip(numbers, said, strict=True)] == [True, True]
    row = metrics.METRICS["depth"].row
    assert row is not None
    assert row(frame)["depth"] == numbers["edited"]
    assert row(frame)["depth_of_states"] == numbers["unedited"]
    bare = metrics.Measured(model=model, task=task, edit=projection(1), progress=False)
    assert metrics.METRICS["depth"].measure(bare) is None


def test_what_cannot_be_compared_is_named(model: Any, other: Any, untouched: None, tmp_path: Any, backend: Any) -> None:
    edit = projection(1)
    with pytest.raises(ValueError, match="a model that never saw the answers; give reference="):
        metrics.depth(model, edit, CORPUS, reference=None)
    with pytest.raises(ValueError, match=f"layer {LAYERS} is out of range"):
        metrics.depth(model, edit, CORPUS, reference=other, layers=[LAYERS])
    for corpus, message in ((Corpus((), "none"), "'none' holds no token"), (Corpus.from_texts([""]), "holds no token")):
        with pytest.raises(ValueError, match=message):
            metrics.depth(model, edit, corpus, reference=other)
    shallow = load_model(save_family("llama", tmp_path, num_hidden_layers=2), backend=backend)
    with pytest.raises(ValueError, match=f"n_layers is {LAYERS} and 2"):
        metrics.depth(model, edit, CORPUS, reference=shallow)
