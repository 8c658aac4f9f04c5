"""Changes of the stream: against loops, one text and one state at a time."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mrp_lens.attacks.ablation import ablated, junk_directions, noisy
from mrp_lens.data import Corpus
from mrp_lens.edits import SteeringEdit
from mrp_lens.models import LensModel, load_model
from mrp_lens.models.hooks import hook_name, hooked
from tests.conftest import D_MODEL
from tests.support.edits import all_kinds, logits, projection, weight_edit


def mean_by_hand(model: LensModel, texts: Corpus, layer: int) -> torch.Tensor:
    """Text by text, without batches or padding."""
    kept: list[torch.Tensor] = []

    def keep(activation: torch.Tensor, hook: Any) -> None:
        kept.extend(activation[0, 1:].double())  # all but BOS

    for document in texts.documents:
        ids = model.tokenizer(document.prompt + document.completion, add_special_tokens=False)["input_ids"]
        with hooked(model, [(hook_name(layer), keep)]):
            logits(model, torch.tensor([[model.tokenizer.bos_token_id, *ids]]))
    total = torch.zeros(D_MODEL, dtype=torch.float64)
    for state in kept:
        total = total + state
    return total / len(kept)


@pytest.mark.parametrize("number", range(4))
def test_the_direction_is_that_in_which_the_edit_moves_the_mean_state(
    model: LensModel, texts: tuple[Corpus, Corpus], untouched: None, number: int
) -> None:
    edit = all_kinds(model, 1)[number]
    forget = replace(texts[0], documents=texts[0].documents[:6])
    found = junk_directions(model, edit, forget, batch_size=4)
    assert list(found) == [1, 2, 3], "layer 0 comes before the edit"
    for layer, direction in found.items():
        before = mean_by_hand(model, forget, layer)
        with edit.applied(model):
            moved = mean_by_hand(model, forget, layer) - before
        if not (isinstance(edit, SteeringEdit) and edit.noise):  # whose noise depends on the batches
            torch.testing.assert_close(direction.double(), moved / moved.norm(), atol=1e-4, rtol=0)
        assert float(direction.norm()) == pytest.approx(1.0, abs=1e-6)


def test_the_direction_in_bfloat16_is_close_to_that_in_float32(tiny_folder: Path, backend: Any, texts: Any) -> None:
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        model = load_model(str(tiny_folder), backend=backend, dtype=dtype)
        steering = SteeringEdit.towards(torch.ones(D_MODEL), layer=1, coefficient=3.0)
        found[dtype] = junk_directions(model, steering, texts[0])
    for layer in (1, 2, 3):  # bfloat16 keeps 8 bits of each state
        assert float(found[torch.float32][layer] @ found[torch.bfloat16][layer]) > 0.999


def test_an_edit_that_moves_nothing_has_no_direction(model: LensModel, texts: Any, untouched: None) -> None:
    with pytest.raises(ValueError, match="does not move the mean state of 'forget'"):
        junk_directions(model, weight_edit(model, 1, scale=1.0), texts[0])


def test_ablation_takes_each_direction_out_of_every_state_of_its_layer(
    model: LensModel, tokens: torch.Tensor, untouched: None
) -> None:
    generator = torch.Generator().manual_seed(3)
    directions = {layer: torch.randn(D_MODEL, generator=generator) for layer in (1, 3)}

    def by_hand(layer: int) -> Any:
        u = directions[layer] / directions[layer].norm()

        def hook(activation: torch.Tensor, hook: Any) -> torch.Tensor:
            result = activation.clone()
            for row in range(activation.shape[0]):
                for place in range(activation.shape[1]):
                    state = activation[row, place]
                    result[row, place] = state - sum(state[i] * u[i] for i in range(D_MODEL)) * u
            return result

        return hook

    with projection(1).applied(model):
        with hooked(model, [(hook_name(layer), by_hand(layer)) for layer in directions]):
            wanted = logits(model, tokens)
        plain = logits(model, tokens)
        with ablated(model, directions):
            torch.testing.assert_close(logits(model, tokens), wanted, atol=1e-4, rtol=0)
    assert float((wanted - plain).abs().max()) > 1e-2


def test_noise_has_its_size_starts_anew_with_each_block_and_stays_in_its_layers(
    model: LensModel, tokens: torch.Tensor, untouched: None
) -> None:
    seen: dict[str, torch.Tensor] = {}

    def keep(activation: torch.Tensor, hook: Any) -> None:
        seen[hook.name] = activation.detach().clone()

    def states(size: float, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        with noisy(model, [1], size, seed=seed), hooked(model, [(hook_name(layer), keep) for layer in (0, 1)]):
            found = logits(model, tokens.repeat(20, 1))
        first, second = seen.values()
        return first, second, found

    clean_before, clean, plain = states(0.0, 0)
    before, after, found = states(0.1, 0)
    assert torch.equal(before, clean_before)
    shares = (after - clean).norm(dim=-1) / clean.norm(dim=-1)
    assert float(shares.square().mean()) ** 0.5 == pytest.approx(0.1, rel=0.05)  # 420 states of 32 normal numbers
    drift = ((after - clean) / clean.norm(dim=-1, keepdim=True)).mean()
    assert abs(float(drift)) < 1e-3, "13,440 numbers around 0 with standard deviation 0.018"
    assert not torch.equal((after - clean)[0], (after - clean)[3]), "equal rows get noise of their own"
    assert torch.equal(states(0.1, 0)[2], found)
    assert not torch.equal(states(0.1, 1)[2], found)
    assert not torch.equal(found, plain)
    with pytest.raises(ValueError, match="must be at least 0, got -1"), noisy(model, [1], -1.0):
        pass
