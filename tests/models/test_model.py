import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from mrp_lens.models import (
    LensModel,
    ModelMismatchError,
    available_backends,
    check_layers,
    is_bridge,
    load_model,
    logits_of,
    mlp_out_weight,
)
from mrp_lens.models.hooks import captured, check_hook_names, hook_name, layer_of, run_segment
from tests.conftest import LAYERS


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


def test_a_path_that_names_another_family_loads(tiny_folder: Path, tmp_path: Path, backend: str) -> None:
    folder = tmp_path / "my-gemma-of-gpt2"
    shutil.copytree(tiny_folder, folder)
    assert is_bridge(load_model(folder, backend=backend)) == (backend == "bridge")  # type: ignore[arg-type]


def test_weights_are_as_in_the_checkpoint(model: Any, tiny_folder: Path) -> None:
    state = AutoModelForCausalLM.from_pretrained(tiny_folder).state_dict()
    for layer in range(LAYERS):
        weight = mlp_out_weight(model, layer)
        assert torch.equal(weight.read(), state[weight.name])
    with pytest.raises(ValueError, match="out of range"):
        mlp_out_weight(model, LAYERS)


def test_a_model_that_differs_from_hugging_face_is_refused(
    tiny_folder: Path, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import mrp_lens.models.load as load

    real = load._expected

    def other(hf_model: Any, *settings: Any) -> Any:
        """What Hugging Face would say if it had lost the last norm's weights."""
        with torch.no_grad():
            kept = hf_model.model.norm.weight.clone()
            hf_model.model.norm.weight.fill_(1.0)
            probe = real(hf_model, *settings)
            hf_model.model.norm.weight.copy_(kept)
        return probe

    monkeypatch.setattr(load, "_expected", other)
    with pytest.raises(ModelMismatchError, match="differ from Hugging Face's by"):
        load_model(tiny_folder, backend=backend)  # type: ignore[arg-type]


@pytest.mark.skipif("hooked" in available_backends(), reason="TransformerLens 3 has HookedTransformer")
def test_without_hooked_transformer_the_remedy_is_named(tiny_folder: Path) -> None:
    with pytest.raises(ImportError, match="use backend='bridge' or install transformer-lens<4"):
        load_model(tiny_folder, backend="hooked")
    assert is_bridge(load_model(tiny_folder))


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


@pytest.mark.parametrize("last", [0, 1, LAYERS - 1])
def test_replaying_a_segment_is_exact_and_takes_other_weights(model: Any, last: int, untouched: None) -> None:
    tokens = torch.randint(3, model.cfg.d_vocab, (2, 6), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(tokens, dtype=torch.bool)
    mask[1, 4:] = False
    name, weight = hook_name(last), mlp_out_weight(model, last)
    with captured(model, [name]) as store:
        segment = run_segment(model, tokens, mask, first=max(0, last - 2), last=last)
        expected = store[name]
        segment.replay({})
        assert torch.equal(store[name], expected)
        master = (weight.read() * 2).requires_grad_()
        segment.replay({last: {weight.key: weight.to_model(master)}})
        changed = store[name]
    assert not torch.allclose(changed, expected)
    (gradient,) = torch.autograd.grad(changed.sum(), master)
    assert float(gradient.abs().max()) > 0


def test_hook_names() -> None:
    assert hook_name(3) == "blocks.3.hook_resid_post"
    assert layer_of("blocks.12.hook_mlp_out") == 12
    with pytest.raises(ValueError, match="unknown site"):
        hook_name(3, "resid")


def test_unknown_hooks_get_a_suggestion(model: Any) -> None:
    with pytest.raises(ValueError, match=r"close to it: .*blocks.1.hook_resid_post"):
        check_hook_names(model, ["blocks.1.hook_resid_pos"])


def test_layers_are_a_list_of_whole_numbers_of_any_kind(model: LensModel) -> None:
    for layers in ([2, 0, 2], np.array([0, 2]), range(0, 3, 2), (np.int64(2), 0), {0, 2}):
        chosen = check_layers(model, layers)
        assert chosen == (0, 2)
        assert {type(layer) for layer in chosen} == {int}
    for wrong in (2, "12", np.int64(2), [1.0], [True], [np.bool_(True)], ["1"], None):
        with pytest.raises(TypeError, match="layers must be a list of whole numbers such as"):
            check_layers(model, wrong)  # type: ignore[arg-type]
