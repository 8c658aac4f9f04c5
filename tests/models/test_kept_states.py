"""A pass that begins behind what no training changes gives what a whole one does."""

from functools import partial
from typing import Any

import pytest
import torch

from mrp_lens.data import Corpus
from mrp_lens.data.tokenization import Encoded, TokenBatch
from mrp_lens.models import encoder_for, kept_states
from mrp_lens.models.hooks import hook_name, hooked, layer_of
from mrp_lens.models.kept_states import KeptStates
from mrp_lens.training.losses import cross_entropy, predictions
from tests.conftest import LAYERS

Texts = tuple[Corpus, Corpus]


@pytest.fixture
def rows(model: Any, texts: Texts) -> list[Encoded]:
    return encoder_for(model).encode([*texts[0].documents, *texts[1].documents])


@pytest.fixture
def batch(model: Any, rows: list[Encoded]) -> TokenBatch:
    """Rows of both lengths, in another order than they are read in."""
    return encoder_for(model).collate([rows[20], rows[3], rows[17], rows[0]])


def kept(model: Any, rows: list[Encoded], layer: int) -> KeptStates:
    states = KeptStates(model, layer)
    states.read(encoder_for(model), rows, passes=1.0)
    return states


def layers_run(model: Any, states: KeptStates, batch: TokenBatch) -> list[int]:
    ran: list[int] = []
    hooks = [(hook_name(layer), lambda state, hook: ran.append(layer_of(hook.name))) for layer in range(LAYERS)]
    with torch.no_grad(), hooked(model, hooks), states.entered(batch):
        predictions(model, batch)
    return ran


@pytest.mark.parametrize("layer", [1, 2, LAYERS])
def test_predictions_are_those_of_a_whole_pass(
    model: Any, rows: list[Encoded], batch: TokenBatch, layer: int, untouched: None
) -> None:
    states = kept(model, rows, layer)
    assert set(states.states) == {row.ids for row in rows}
    assert layers_run(model, states, batch) == list(range(layer, LAYERS))
    with torch.no_grad():
        whole = predictions(model, batch)
        with states.entered(batch):
            torch.testing.assert_close(predictions(model, batch), whole, rtol=1e-4, atol=1e-5)


def shifted(state: torch.Tensor, hook: Any, *, by: torch.Tensor) -> torch.Tensor:
    return state + by


def test_gradients_reach_what_changes_a_later_layer(model: Any, rows: list[Encoded], batch: TokenBatch) -> None:
    found: list[torch.Tensor] = []
    for states in (KeptStates(model, 2), kept(model, rows, 2)):
        shift = torch.zeros(model.cfg.d_model, requires_grad=True)
        with hooked(model, [(hook_name(2), partial(shifted, by=shift))]), states.entered(batch):
            loss = cross_entropy(predictions(model, batch), batch).mean()
        found += torch.autograd.grad(loss, shift)
    assert float(found[0].abs().max()) > 1e-6
    torch.testing.assert_close(found[1], found[0], rtol=1e-3, atol=1e-6)


def test_a_batch_with_a_text_that_was_not_read_is_passed_whole(
    model: Any, rows: list[Encoded], batch: TokenBatch
) -> None:
    for states in (kept(model, rows[:16], 2), KeptStates(model, 2)):
        assert layers_run(model, states, batch) == list(range(LAYERS))


def test_nothing_is_kept_where_that_does_not_pay(
    model: Any, rows: list[Encoded], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not kept(model, rows, 0).states  # nothing lies below
    once = KeptStates(model, 2)
    once.read(encoder_for(model), rows, passes=0.9)
    assert not once.states
    size = sum(len(row.ids) for row in {row.ids: row for row in rows}.values()) * model.cfg.d_model * 4
    monkeypatch.setattr(kept_states, "BYTES", size)
    assert kept(model, rows, 2).states
    monkeypatch.setattr(kept_states, "BYTES", size - 1)
    assert not kept(model, rows, 2).states


def test_a_model_whose_later_blocks_read_more_of_earlier_ones_is_passed_whole(model: Any, rows: list[Encoded]) -> None:
    seen: list[torch.Tensor] = []

    def remember(_block: Any, _args: Any, output: Any) -> None:
        seen[:] = [output[0] if isinstance(output, tuple) else output]

    def add(_block: Any, _args: Any, output: Any) -> Any:
        return (output[0] + seen[0], *output[1:]) if isinstance(output, tuple) else output + seen[0]

    handles = [model.blocks[0].register_forward_hook(remember), model.blocks[2].register_forward_hook(add)]
    try:
        assert not kept(model, rows, 2).states
    finally:
        for handle in handles:
            handle.remove()
    assert kept(model, rows, 2).states
