"""MRP's gates: detectors of the topic, before and in training."""

from typing import Any

import pytest
import torch

from mrp_lens.data import Corpus
from mrp_lens.edits import ConditionalProjectionEdit, ProjectionEdit
from mrp_lens.methods import MRP, UnconditionalMRP
from mrp_lens.methods.mrp.gates import _clusters, _gate, gate_loss
from mrp_lens.models import LensModel

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


def test_a_gates_loss_is_the_cross_entropy_of_its_decisions() -> None:
    shares = {"one": torch.tensor([[0.9, 0.2]]), "two": torch.tensor([[0.5, 0.2]])}
    content = torch.tensor([[True, False]])
    expected = -(torch.tensor([0.9, 0.5]).log().mean())
    assert float(gate_loss(shares, content, lost=True)) == pytest.approx(float(expected))
    kept = -(torch.tensor([0.1, 0.5]).log().mean())
    assert float(gate_loss(shares, content, lost=False)) == pytest.approx(float(kept))


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
