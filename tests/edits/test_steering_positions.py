"""Steering at positions of the prompt writes the same with and without a cache; the oracle is a loop of whole passes."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from mrp_lens.edits import SteeringEdit
from mrp_lens.hf import attach
from mrp_lens.models import LensModel, is_bridge, load_model
from tests.conftest import D_MODEL
from tests.support.edits import GREEDY, written
from tests.support.export_edits import exported, write
from tests.support.families import save_family

NEW = 8
LAYER = 1
PROMPTS = torch.randint(3, 800, (3, 6), generator=torch.Generator().manual_seed(2))
PLACES = [[-1], [0, -2], [2], [-6, 5, 5]]


def edit_at(positions: list[int] | None, mode: str = "replace") -> SteeringEdit:
    direction = torch.randn(D_MODEL, generator=torch.Generator().manual_seed(1))
    return SteeringEdit.towards(direction, layer=LAYER, coefficient=5.0, mode=mode, positions=positions)  # type: ignore[arg-type]


def by_hand(hf_model: Any, edit: SteeringEdit, prompts: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Greedy whole passes of plain transformers, the states at the prompt's positions changed by an index."""
    width = prompts.shape[1]
    target = edit.coefficient * edit.direction
    assert edit.positions is not None
    places = sorted({position % width for position in edit.positions})

    def hook(module: Any, args: Any, output: Any) -> Any:
        states = (output[0] if isinstance(output, tuple) else output).clone()
        states[:, places] = target if edit.mode == "replace" else states[:, places] + target
        return (states, *output[1:]) if isinstance(output, tuple) else states

    layers = hf_model.transformer.h if hasattr(hf_model, "transformer") else hf_model.model.layers
    handle = layers[LAYER].register_forward_hook(hook)
    tokens = prompts
    mask = torch.ones_like(prompts) if mask is None else mask.long()
    with torch.no_grad():
        for _ in range(NEW):
            positions = (mask.cumsum(1) - 1).clamp(min=0)
            output = hf_model(input_ids=tokens, attention_mask=mask, position_ids=positions, use_cache=False)
            best = output.logits[:, -1:].argmax(-1)
            tokens, mask = torch.cat([tokens, best], dim=1), torch.cat([mask, torch.ones_like(best)], dim=1)
    handle.remove()
    return tokens[:, width:]


def written_by_hf(
    hf_model: Any, prompts: torch.Tensor, mask: torch.Tensor | None = None, **options: Any
) -> torch.Tensor:
    hf_model.generation_config.eos_token_id = None
    mask = torch.ones_like(prompts) if mask is None else mask
    output: torch.Tensor = hf_model.generate(
        input_ids=prompts, attention_mask=mask.long(), max_new_tokens=NEW, do_sample=False, pad_token_id=0, **options
    )
    return output[:, prompts.shape[1] :]


@pytest.fixture(scope="module")
def plain(tiny_folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(tiny_folder).eval()


@pytest.mark.parametrize("positions", PLACES)
@pytest.mark.parametrize("mode", ["replace", "add"])
def test_generate_writes_the_same_with_and_without_cache(
    model: LensModel, plain: Any, positions: list[int], mode: str, untouched: None
) -> None:
    edit = edit_at(positions, mode)
    wanted = by_hand(plain, edit, PROMPTS)
    with edit.applied(model):
        assert torch.equal(written(model, PROMPTS, NEW, cache=True), wanted)
        assert torch.equal(written(model, PROMPTS, NEW, cache=False), wanted)
        for cache in (True, False) if is_bridge(model) else ():
            assert torch.equal(written_by_hf(model.original_model, PROMPTS, use_cache=cache), wanted)  # type: ignore[attr-defined]
    assert not torch.equal(written(model, PROMPTS, NEW, cache=True), wanted)
    with attach(plain, edit):
        for cache in (True, False):
            assert torch.equal(written_by_hf(plain, PROMPTS, use_cache=cache), wanted)
    assert "generate" not in vars(plain)
    assert not torch.equal(written_by_hf(plain, PROMPTS), wanted)


def test_a_prompt_of_one_token_is_steered(model: LensModel, plain: Any, untouched: None) -> None:
    edit, prompt = edit_at([-1]), PROMPTS[:1, :1]
    wanted = by_hand(plain, edit, prompt)
    with edit.applied(model), attach(plain, edit):
        for cache in (True, False):
            assert torch.equal(written(model, prompt, NEW, cache=cache), wanted)
            assert torch.equal(written_by_hf(plain, prompt, use_cache=cache), wanted)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_exported_and_attached_models_too_in_batches_padded_on_the_left(
    family: str, backend: str, tmp_path: Path
) -> None:
    folder = save_family(family, tmp_path / family)
    lens = load_model(folder, backend=backend)  # type: ignore[arg-type]
    edit = edit_at([-1, -3], "add")
    loaded = exported(write(lens, edit, tmp_path / "out", "module"))
    attached = AutoModelForCausalLM.from_pretrained(folder)
    padded, mask = torch.zeros(3, 9, dtype=torch.long), torch.zeros(3, 9, dtype=torch.bool)
    for row, length in enumerate((9, 4, 6)):
        padded[row, 9 - length :], mask[row, 9 - length :] = torch.arange(20 * row + 5, 20 * row + 5 + length), True
    wanted = by_hand(AutoModelForCausalLM.from_pretrained(folder), edit, padded, mask)
    with attach(attached, edit):
        for cache in (True, False):
            assert torch.equal(written_by_hf(loaded, padded, mask, use_cache=cache), wanted)
            assert torch.equal(written_by_hf(attached, padded, mask, use_cache=cache), wanted)
            assert torch.equal(written_by_hf(copy.deepcopy(loaded), padded, mask, use_cache=cache), wanted)


def test_two_edits_at_positions_come_and_go_in_any_order(model: LensModel, plain: Any, untouched: None) -> None:
    first, second = edit_at([-1]), edit_at([0])
    first.attach(model)
    second.attach(model)
    first.detach(model)
    for cache in (True, False):
        assert torch.equal(written(model, PROMPTS, NEW, cache=cache), by_hand(plain, second, PROMPTS))
    second.detach(model)
    assert "generate" not in vars(model)


def test_a_copy_generates_with_its_own_steering(own: Any, plain: Any) -> None:
    with edit_at([-1]).applied(own):
        twin = copy.deepcopy(own)
    assert not torch.equal(written(own, PROMPTS, NEW, cache=True), by_hand(plain, edit_at([-1]), PROMPTS))
    for cache in (True, False):
        assert torch.equal(written(twin, PROMPTS, NEW, cache=cache), by_hand(plain, edit_at([-1]), PROMPTS))


def test_streams_count_in_their_prompt(model: LensModel, plain: Any) -> None:
    if not hasattr(model, "generate_stream"):
        pytest.skip("this class has no generate_stream")
    edit = edit_at([-1])
    with edit.applied(model):
        for cache in (True, False):
            options = {"max_new_tokens": NEW, "use_past_kv_cache": cache, "max_tokens_per_yield": 3, **GREEDY}
            got = torch.cat(list(model.generate_stream(PROMPTS[:1], **options)), dim=1)  # type: ignore[attr-defined]
            assert torch.equal(got[:, -NEW:], by_hand(plain, edit, PROMPTS[:1]))


@pytest.mark.parametrize("option", [{"prompt_lookup_num_tokens": 2}, {"prefill_chunk_size": 2}])
def test_ways_to_generate_that_hide_the_prompt_are_refused(plain: Any, option: dict[str, int]) -> None:
    with attach(plain, edit_at([-1])), pytest.raises(ValueError, match=next(iter(option))):
        written_by_hf(plain, PROMPTS, **option)


def test_positions_are_whole_numbers_inside_the_prompt(model: LensModel, untouched: None) -> None:
    for wrong in ("abc", 3, [1.5], [True], [None]):
        with pytest.raises(TypeError, match="positions must be a list of whole numbers"):
            edit_at(wrong)  # type: ignore[arg-type]
    with edit_at([6]).applied(model), pytest.raises(ValueError, match="position 6 is outside a prompt of 6 tokens"):
        written(model, PROMPTS, NEW, cache=True)
