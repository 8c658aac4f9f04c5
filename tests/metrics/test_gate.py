"""Shares and firing of gates, against one document at a time, without batch or padding, and the formula by hand."""

import math
from typing import Any

import pandas as pd
import pytest
import torch

from mrp_lens import metrics
from mrp_lens.data import Corpus, Questions
from mrp_lens.edits import ConditionalProjectionEdit, Edit, SteeringEdit, edit_on
from mrp_lens.models import LensModel
from mrp_lens.models.hooks import hook_name
from tests.conftest import D_MODEL
from tests.support.edits import beside, conditional, directions_of, projection, weight_edit
from tests.support.plain import ids_of, states_at
from tests.support.states import GROUPS

QUIZ = Questions.from_rows(
    [
        {"question": f"The colour of Zaxim{i} is", "choices": [" red", " blue and so on"], "answer": i % 2}
        for i in range(3)
    ],
    prompt="{question}",
)


def shares_by_hand(
    model: LensModel, edit: ConditionalProjectionEdit, request: str, hook: str, text: str, below: Edit | None = None
) -> list[float]:
    """g(h) at each token but BOS, of the states that come to the hook with `below` on."""
    with edit_on(model, below):
        states = states_at(model, ids_of(model, text), [hook])[hook][1:].detach().double()
    gate = edit.gates(request)[hook]
    ((w, threshold, sharpness),) = directions_of(gate)
    cosines = [float(h @ w) / math.sqrt(float(h @ h)) for h in states]
    if gate.hard:
        return [float(cosine > threshold) for cosine in cosines]
    return [1 / (1 + math.exp(-sharpness * (cosine - threshold))) for cosine in cosines]


def of_gate(frame: pd.DataFrame, request: str, hook: str) -> pd.DataFrame:
    return frame[(frame["request"] == request) & (frame["hook"] == hook)]


def texts_of(corpus: Corpus) -> list[str]:
    return [document.prompt + document.completion for document in corpus.documents]


@pytest.mark.parametrize("site", ["resid_post", "resid_mid", "attn_out"])
def test_each_token_has_the_share_of_the_state_that_comes_in(model: LensModel, site: str, untouched: None) -> None:
    first = conditional(1, 2, request="a", site=site)
    edit = first + beside(first, request="b")
    assert isinstance(edit, ConditionalProjectionEdit)
    low, high = hook_name(1, site), hook_name(2, site)
    below_both = ConditionalProjectionEdit.from_requests(
        {name: {low: edit.subspaces(name)[low]} for name in "ab"}, {name: {low: edit.gates(name)[low]} for name in "ab"}
    )
    frame = metrics.gate_tokens(model, edit, GROUPS, limit=None, batch_size=3, progress=False)
    assert list(frame.columns) == ["group", "document", "position", "token", "request", "hook", "layer", "share"]
    assert set(frame["layer"]) == {1, 2}
    for group, corpus in GROUPS.items():
        for number, text in enumerate(texts_of(corpus)):
            rows = frame[(frame["group"] == group) & (frame["document"] == number)]
            for request in "ab":
                for hook, on in ((low, None), (high, below_both)):
                    own = of_gate(rows, request, hook)
                    wanted = shares_by_hand(model, edit, request, hook, text, on)
                    assert own["share"].tolist() == pytest.approx(wanted, abs=2e-4)
                    assert own["position"].tolist() == list(range(len(wanted)))
                    ids = ids_of(model, text)[1:]
                    assert own["token"].tolist() == [model.tokenizer.decode([token]) for token in ids]


def test_precision_and_recall_are_counts_of_tokens(model: LensModel, untouched: None) -> None:
    edit, hook = conditional(1, threshold=0.05), hook_name(1)
    row = metrics.gate(model, edit, GROUPS["forget"], GROUPS["retain"], batch_size=4, progress=False).iloc[0]
    shares = {
        side: [shares_by_hand(model, edit, "edit", hook, text) for text in texts_of(corpus) if text]
        for side, corpus in GROUPS.items()
    }
    flat = {side: [share for document in of for share in document] for side, of in shares.items()}
    fired = {side: sum(share > 0.5 for share in of) for side, of in flat.items()}
    assert 0 < fired["retain"] < len(flat["retain"])
    assert row["precision"] == pytest.approx(fired["forget"] / sum(fired.values()))
    assert row["precision_null"] == pytest.approx(len(flat["forget"]) / sum(map(len, flat.values())))
    assert row["recall"] == pytest.approx(fired["forget"] / len(flat["forget"]))
    assert row["retain_firing"] == pytest.approx(fired["retain"] / len(flat["retain"]))
    for side in GROUPS:
        assert row[f"{side}_share"] == pytest.approx(sum(flat[side]) / len(flat[side]), abs=1e-4)
        firing = [any(share > 0.5 for share in document) for document in shares[side]]
        assert row[f"{side}_documents_firing"] == pytest.approx(sum(firing) / len(firing))
        assert (row[f"{side}_tokens"], row[f"{side}_documents"]) == (len(flat[side]), len(firing))
    never = metrics.gate(model, conditional(1, threshold=2.0), GROUPS["forget"], GROUPS["retain"], progress=False)
    assert math.isnan(never["precision"].iloc[0])
    assert never["recall"].iloc[0] == 0.0


def test_questions_are_read_with_their_right_choice_or_as_prompts_alone(model: LensModel, untouched: None) -> None:
    edit, hook = conditional(2), hook_name(2)
    right = [question.prompt + question.choices[question.answer] for question in QUIZ.questions]
    prompts = [question.prompt for question in QUIZ.questions]
    for part, texts in (("all", right), ("prompt", prompts)):
        row = metrics.gate(model, edit, QUIZ, GROUPS["forget"], part=part, progress=False).iloc[0]  # type: ignore[arg-type]
        wanted = [share for text in texts for share in shares_by_hand(model, edit, "edit", hook, text)]
        assert row["forget_tokens"] == len(wanted)
        assert row["forget_share"] == pytest.approx(sum(wanted) / len(wanted), abs=1e-4)
        assert row["recall"] == pytest.approx(sum(share > 0.5 for share in wanted) / len(wanted))
    frame = metrics.gate_tokens(model, edit, QUIZ, limit=2, progress=False)
    assert frame["document"].nunique() == 2
    assert set(frame["group"]) == {QUIZ.name}


def test_the_rest_of_a_stack_is_on_while_gates_are_read(model: LensModel, untouched: None) -> None:
    """Also a matrix below, and steering at the same hook, before the gate or after it."""
    gated, hook = conditional(2), hook_name(2)
    steering = SteeringEdit.towards(torch.ones(D_MODEL), layer=2, coefficient=3.0, mode="add")
    below = weight_edit(model, 1) + projection(0, request="plain")
    text = texts_of(GROUPS["retain"])[0]
    for edit, on in ((below + gated, below), (steering + gated, steering), (gated + steering, None)):
        found = metrics.gate_tokens(model, edit, GROUPS["retain"].spread(1), progress=False)
        assert set(found["request"]) == {"edit"}
        assert found["share"].tolist() == pytest.approx(shares_by_hand(model, gated, "edit", hook, text, on), abs=2e-4)


def test_batches_and_seeds_choose_no_other_figures(subject: Any) -> None:
    model, edit = subject.model, conditional(1, 3)
    one, many = (
        metrics.gate(model, edit, GROUPS["forget"], GROUPS["retain"], batch_size=size, progress=False)
        for size in (1, 32)
    )
    pd.testing.assert_frame_equal(one, many, atol=2e-2)
    few = [metrics.gate_tokens(model, edit, GROUPS["forget"], limit=3, seed=seed, progress=False) for seed in (0, 0, 1)]
    pd.testing.assert_frame_equal(few[0], few[1])
    assert set(few[0]["document"]) != set(few[2]["document"])


@pytest.mark.parametrize("edit", [projection(1), SteeringEdit.towards(torch.ones(D_MODEL), layer=1, coefficient=1.0)])
def test_an_edit_without_a_gate_is_refused(model: LensModel, edit: Edit, untouched: None) -> None:
    with pytest.raises(ValueError, match="has no gate that could fire"):
        metrics.gate(model, edit, GROUPS["forget"], GROUPS["retain"])
    with pytest.raises(ValueError, match="has no gate that could fire"):
        metrics.gate_tokens(model, edit, GROUPS)


def test_what_cannot_be_read_is_refused(model: LensModel, untouched: None) -> None:
    edit, forget, retain = conditional(1), GROUPS["forget"], GROUPS["retain"]
    calls: list[tuple[dict[str, Any], str]] = [
        ({"retain": Corpus((), "none")}, "'none', which is empty"),
        ({"part": "prompt"}, "no document in .* has a prompt"),
        ({"documents": 0}, "documents must be at least 1"),
    ]
    for changed, message in calls:
        arguments = {"edit": edit, "forget": forget, "retain": retain, "progress": False} | changed
        with pytest.raises(ValueError, match=message):
            metrics.gate(model, **arguments)
