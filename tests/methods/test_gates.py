"""MRP's gates: detectors of the topic, before and in training."""

from typing import Any

import pytest
import torch

from mrp_lens.data import Corpus, Document
from mrp_lens.data.tokenization import parts_of
from mrp_lens.edits import ConditionalProjectionEdit, ProjectionEdit
from mrp_lens.methods import MRP, UnconditionalMRP
from mrp_lens.methods.base import states_at
from mrp_lens.methods.mrp import gates
from mrp_lens.methods.mrp.gates import (
    LearnedGate,
    _clusters,
    _gate,
    before_what_counts,
    gate_loss,
    gate_weights,
    start_gates,
)
from mrp_lens.models import LensModel, encoder_for
from mrp_lens.models.hooks import hook_name

Texts = tuple[Corpus, Corpus]
QUICK: dict[str, Any] = {"layers": [1, 2], "rank": 2, "steps": 3, "batch_size": 8}


def test_a_gate_tells_states_apart_that_lie_in_several_directions() -> None:
    generator = torch.Generator().manual_seed(0)
    centres = torch.linalg.qr(torch.randn(32, 8, generator=generator)).Q.T * 6
    states = torch.cat([centre + torch.randn(100, 32, generator=generator) for centre in centres])
    lost, kept = states[:400], states[400:]
    gate = _gate(lost, kept, 4, generator)
    assert gate.direction.shape == (4, 32)
    with torch.no_grad():
        assert float((gate(lost) > 0.5).float().mean()) > 0.95
        assert float((gate(kept) > 0.5).float().mean()) < 0.05
        assert torch.allclose(gate.gate()(lost), gate(lost), atol=1e-5)
    assert sorted(len(part) for part in _clusters(lost, 4, generator)) == [100, 100, 100, 100]


def test_hooks_whose_states_take_too_much_memory_together_are_read_in_groups(
    model: LensModel, texts: Texts, monkeypatch: pytest.MonkeyPatch
) -> None:
    hooks = [hook_name(layer) for layer in range(3)]
    encoder = encoder_for(model)
    sides = [encoder.encode(side.documents) for side in texts]
    read: list[int] = []

    def counted(*given: Any, **how: Any) -> dict[str, torch.Tensor]:
        read.append(len(given[3]))
        return states_at(*given, **how)

    def started() -> dict[str, LearnedGate]:
        generator = torch.Generator().manual_seed(0)
        return start_gates(model, encoder, *sides, hooks=hooks, directions=1, generator=generator)

    monkeypatch.setattr(gates, "states_at", counted)
    together = started()
    monkeypatch.setattr(gates, "NUMBERS", 2 * 3 * gates.STATES * int(model.cfg.d_model))
    in_groups = started()
    assert read == [3] * 3 + [2] * 3 + [1] * 3
    assert list(in_groups) == list(together) == hooks
    for hook in hooks:  # all of the texts are read: in another order, the same states
        torch.testing.assert_close(in_groups[hook].direction, together[hook].direction, atol=1e-2, rtol=0)


def test_a_gates_loss_is_the_cross_entropy_of_its_decisions() -> None:
    shares = {"one": torch.tensor([[0.9, 0.2]]), "two": torch.tensor([[0.5, 0.2]])}
    weights = torch.tensor([[0.7, 0.0]])
    expected = -(torch.tensor([0.9, 0.5]).log().mean())
    assert float(gate_loss(shares, weights, lost=True)) == pytest.approx(0.7 * float(expected))
    kept = -(torch.tensor([0.1, 0.5]).log().mean())
    assert float(gate_loss(shares, weights, lost=False)) == pytest.approx(0.7 * float(kept))


def test_half_of_a_gates_loss_on_forget_documents_is_on_the_tokens_before_what_counts(model: LensModel) -> None:
    encoder = encoder_for(model)
    question, text = encoder.encode([Document("What is the colour of the house?", " red"), Document("", "the old man")])
    batch = encoder.collate([question, text])
    told = [sum(row.in_loss[1:]) for row in (question, text)]
    assert told[0] < len(question.ids) / 2
    opening = gate_weights(batch, batch, lost=True)
    assert float(opening.sum()) == pytest.approx(1.0)
    before = before_what_counts(batch)
    assert before[0].nonzero()[:, 0].tolist() == [
        place - 1 for place, counted in enumerate(question.in_loss) if counted
    ]
    assert float(opening[before].sum()) >= 0.5 + 0.5 * int(before.sum()) / int(batch.content_mask.sum()) - 1e-6
    closing = gate_weights(batch, batch, lost=False)
    assert closing[batch.content_mask].unique().numel() == 1
    parts = [gate_weights(part, batch, lost=True) for part in parts_of(batch, 1)]
    assert torch.allclose(torch.cat(parts), opening)


def test_mrp_is_conditional_and_the_paper_s_is_not(model: LensModel, texts: Texts, untouched: None) -> None:
    fit = MRP(**QUICK).fit(model, *texts, seed=0, progress=False)
    assert isinstance(fit.edit, ConditionalProjectionEdit)
    assert set(fit.edit.gates("forget")) == set(fit.edit.hook_names)
    plain = UnconditionalMRP(**QUICK).fit(model, *texts, seed=0, progress=False)
    assert type(plain.edit) is ProjectionEdit
    start = MRP(**QUICK).start(model, *texts, seed=0)
    assert isinstance(start, ConditionalProjectionEdit)


def test_the_same_seed_gives_the_same_gates(model: LensModel, texts: Texts, untouched: None) -> None:
    fit = MRP(**QUICK, gate_directions=1).fit(model, *texts, seed=0, progress=False)
    again = MRP(**QUICK, gate_directions=1).fit(model, *texts, seed=0, progress=False)
    assert fit.edit == again.edit
    assert (fit.log["gate"] > 0.0).all()
