"""What is asked of a model of either class: logits, layers, weights, and what its type promises."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from mrp_lens.models import (
    LensModel,
    check_layers,
    is_bridge,
    load_model,
    logits_at,
    logits_of,
    mlp_out_weight,
)
from tests.conftest import LAYERS
from tests.support.families import save_family


def test_logits_equal_hugging_faces_on_a_padded_batch(model: Any, tiny_folder: Path, untouched: None) -> None:
    reference = AutoModelForCausalLM.from_pretrained(tiny_folder)
    tokens = torch.randint(3, model.cfg.d_vocab, (2, 9), generator=torch.Generator().manual_seed(0))
    for side in ("right", "left"):
        mask = torch.ones_like(tokens, dtype=torch.bool)
        mask[0, slice(6, None) if side == "right" else slice(0, 3)] = False
        with torch.no_grad():
            positions = (mask.long().cumsum(-1) - 1).clamp(min=0)
            expected = reference(
                input_ids=tokens, attention_mask=mask.long(), position_ids=positions
            ).logits.log_softmax(-1)
            got = logits_of(model, tokens, mask).log_softmax(-1)
        assert float((got - expected)[mask].abs().max()) < 1e-4


def test_logits_at_some_positions_are_those_of_a_whole_pass_and_no_others_are_computed(
    model: Any, untouched: None
) -> None:
    tokens = torch.randint(3, model.cfg.d_vocab, (3, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(tokens, dtype=torch.bool)
    mask[0, 6:] = False
    wanted = mask & (torch.arange(9) % 2 == 1)
    computed: list[int] = []
    handle = model.unembed.register_forward_hook(lambda _module, _args, output: computed.append(output[..., 0].numel()))
    with torch.no_grad():
        whole = logits_of(model, tokens, mask)
        for positions in (wanted, torch.zeros_like(mask)):
            got = logits_at(model, tokens, mask, positions)
            torch.testing.assert_close(got, whole[positions], atol=1e-5, rtol=1e-5)
    handle.remove()
    assert computed == [27, int(wanted.sum()), 0]
    fails = ("blocks.1.hook_resid_post", lambda states, hook: states[:, :, :, 0])
    with pytest.raises(IndexError), model.hooks(fwd_hooks=[fails]):
        logits_at(model, tokens, mask, wanted)
    assert torch.equal(logits_of(model, tokens, mask), whole)  # after a pass that failed as well


def test_weights_are_as_in_the_checkpoint(model: Any, tiny_folder: Path) -> None:
    state = AutoModelForCausalLM.from_pretrained(tiny_folder).state_dict()
    for layer in range(LAYERS):
        weight = mlp_out_weight(model, layer)
        assert torch.equal(weight.read(), state[weight.name])
    with pytest.raises(ValueError, match="out of range"):
        mlp_out_weight(model, LAYERS)


def test_a_mixture_of_experts_has_no_single_output_matrix_for_any_method(tmp_path: Path, backend: str) -> None:
    mixture = load_model(save_family("mixtral", tmp_path), backend=backend)  # type: ignore[arg-type]
    with pytest.raises(
        ValueError, match=r"no single MLP output matrix .* can be trained or replaced.* such as MRP"
    ) as caught:
        mlp_out_weight(mixture, 0)
    assert "RMU" not in str(caught.value)


def test_a_loaded_model_has_what_its_type_says(model: Any) -> None:
    if sys.version_info < (3, 12):  # from there on a torch module's parts are not looked for
        assert isinstance(model, LensModel)
        assert not isinstance(torch.nn.Linear(1, 1), LensModel)
    text = "The old man walked."
    logits, cache = model.run_with_cache(text, names_filter=["blocks.1.hook_resid_post"])
    assert torch.equal(logits, model(model.to_tokens(text)))
    assert cache["blocks.1.hook_resid_post"].shape[-1] == model.cfg.d_model == model.W_U.shape[0]
    assert str(model.to_string(model.to_tokens(text)[0, 1:])).strip() == text
    assert model.to_single_token(" man") == model.to_tokens(text)[0, 3]
    seen: list[Any] = []
    with model.hooks(fwd_hooks=[("blocks.1.hook_resid_post", lambda states, hook: seen.append(states))]):
        model(text)
    assert torch.equal(seen[0], cache["blocks.1.hook_resid_post"])


def test_is_bridge_refuses_other_things() -> None:
    with pytest.raises(TypeError, match="expected a HookedTransformer or a TransformerBridge, got Linear"):
        is_bridge(torch.nn.Linear(1, 1))  # type: ignore[arg-type]


def test_layers_are_a_list_of_whole_numbers_of_any_kind(model: LensModel) -> None:
    for layers in ([2, 0, 2], np.array([0, 2]), range(0, 3, 2), (np.int64(2), 0), {0, 2}):
        chosen = check_layers(model, layers)
        assert chosen == (0, 2)
        assert {type(layer) for layer in chosen} == {int}
    for wrong in (2, "12", np.int64(2), [1.0], [True], [np.bool_(True)], ["1"], None):
        with pytest.raises(TypeError, match="layers must be a list of whole numbers such as"):
            check_layers(model, wrong)  # type: ignore[arg-type]
