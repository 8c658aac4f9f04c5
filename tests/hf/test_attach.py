"""Edits on plain Hugging Face models. That they compute what hooks placed by hand compute: tests/export/test_matrix.py."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from mrp_lens.edits import ProjectionEdit, SteeringEdit
from mrp_lens.edits.subspace import Subspace
from mrp_lens.hf import attach
from mrp_lens.models import describe, load_model
from tests.conftest import D_MODEL
from tests.support.edits import conditional, projection, weight_edit
from tests.support.export_edits import TOKENS, assert_exact, log_probabilities
from tests.support.families import save_family


@pytest.fixture
def plain(tiny_folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(tiny_folder).eval()


def state_of_plain(hf_model: Any) -> dict[str, Any]:
    return {
        "weights": {name: tensor.detach().clone() for name, tensor in hf_model.named_parameters()},
        "hooks": sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in hf_model.modules()),
        "flags": [p.requires_grad for p in hf_model.parameters()],
    }


def assert_as_before(before: dict[str, Any], hf_model: Any) -> None:
    after = state_of_plain(hf_model)
    assert before["weights"].keys() == after["weights"].keys()
    assert all(torch.equal(before["weights"][name], after["weights"][name]) for name in after["weights"])
    assert (before["hooks"], before["flags"]) == (after["hooks"], after["flags"])


@pytest.mark.parametrize("kind", range(3))
def test_an_edit_goes_on_and_off(model: Any, plain: Any, kind: int) -> None:
    steering = SteeringEdit.towards(torch.ones(D_MODEL), layer=1, coefficient=2.0, positions=[0, 3, -1])
    edit = (projection(0, 2), weight_edit(model, 1) + projection(1), steering)[kind]
    before, unedited = state_of_plain(plain), log_probabilities(plain)
    handle = attach(plain, edit)
    assert_exact(model, edit, plain)
    handle.detach()
    assert_as_before(before, plain)
    assert torch.equal(log_probabilities(plain), unedited)
    with pytest.raises(ValueError, match="detached already"):
        handle.detach()


def test_a_folder_attaches_and_a_block_ends_it_whatever_was_raised(model: Any, plain: Any, tmp_path: Path) -> None:
    edit = weight_edit(model, 2) + projection(1)
    edit.save_pretrained(tmp_path / "edit")
    before = state_of_plain(plain)
    with attach(plain, tmp_path / "edit"):
        assert_exact(model, edit, plain)
    assert_as_before(before, plain)
    with pytest.raises(RuntimeError, match="inside"), attach(plain, tmp_path / "edit"):
        raise RuntimeError("inside")
    assert_as_before(before, plain)


def test_left_padding_changes_nothing(model: Any, plain: Any) -> None:
    padded, mask = torch.zeros(2, 26, dtype=torch.long), torch.zeros(2, 26, dtype=torch.bool)
    padded[:, 6:], mask[:, 6:] = TOKENS, True
    with attach(plain, projection(0, 3)):
        right = log_probabilities(plain)
        torch.testing.assert_close(log_probabilities(plain, padded, mask)[:, 6:], right, atol=1e-4, rtol=0)


def test_a_copy_of_an_edited_model_is_edited(model: Any, plain: Any) -> None:
    attach(plain, projection(0, 2))
    twin = copy.deepcopy(plain)
    assert torch.equal(log_probabilities(twin), log_probabilities(plain))


def test_two_projections_at_one_hook_are_refused_and_their_sum_is_not(model: Any, plain: Any) -> None:
    first, second = projection(1), projection(1, seed=5, request="other")
    with attach(plain, first):
        before = state_of_plain(plain)
        with pytest.raises(ValueError, match="join them"):
            attach(plain, second)
        assert_as_before(before, plain)
    with attach(plain, first + second):
        assert_exact(model, first + second, plain)


def test_bad_input_is_refused_and_leaves_the_model_as_it_was(
    model: Any, plain: Any, tmp_path: Path, tiny_folder: Path
) -> None:
    wide = ProjectionEdit({"blocks.1.hook_resid_post": Subspace.random(2, 2 * D_MODEL)})
    deep = ProjectionEdit({"blocks.9.hook_resid_post": Subspace.random(2, D_MODEL)})
    odd = ProjectionEdit({"blocks.1.attn.hook_z": Subspace.random(2, D_MODEL)})
    noisy = SteeringEdit.towards(torch.ones(D_MODEL), layer=1, coefficient=1.0, noise=0.1)
    foreign = weight_edit(load_model(save_family("llama", tmp_path / "other", seed=1), backend="bridge"), 1)
    elsewhere = projection(1)
    elsewhere.provenance = {"model": {**describe(model), "n_layers": 40, "name": "somebody's"}}
    before = state_of_plain(plain)
    for edit, match in [
        (wide, "width"),
        (deep, "layers 0..3"),
        (odd, "no counterpart"),
        (noisy, "noise"),
        (foreign + projection(0), "not the matrix"),
        (elsewhere, "somebody's"),
    ]:
        with pytest.raises(ValueError, match=match):
            attach(plain, edit)
        assert_as_before(before, plain)
    with pytest.raises(TypeError, match=r"edit\.attach"):
        attach("a name", projection(1))
    with pytest.raises(ValueError, match="not known here"):
        attach(plain.model, projection(1))
    with pytest.raises(FileNotFoundError, match="edit_config"):
        attach(plain, tmp_path)


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated")
@pytest.mark.parametrize("site", ["resid_pre", "resid_mid", "mlp_out", "resid_post"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_an_edited_model_trains_with_gradient_checkpointing(plain: Any, site: str, reentrant: bool) -> None:
    def gradients() -> list[torch.Tensor]:
        plain.zero_grad()
        plain(input_ids=TOKENS, labels=TOKENS, use_cache=False).loss.backward()
        return [parameter.grad.clone() for parameter in plain.parameters()]

    plain.train()
    with attach(plain, projection(1, 2, site=site)):
        wanted = gradients()
        plain.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        for got, gradient in zip(gradients(), wanted, strict=True):
            torch.testing.assert_close(got, gradient, atol=1e-6, rtol=1e-4)


def test_an_offloaded_model_is_refused(plain: Any) -> None:
    plain.model.layers[3].to("meta")
    with pytest.raises(ValueError, match="offloaded"):
        attach(plain, projection(1))


def test_it_is_known_again_whatever_loaded_it(model: Any, plain: Any, tiny_folder: Path) -> None:
    edit = projection(1)
    edit.provenance = {"model": describe(model)}
    attach(plain, edit).detach()
    half = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.bfloat16)
    attach(half, edit).detach()
    with torch.no_grad():
        plain.get_input_embeddings().weight[0] += 1
    with pytest.raises(ValueError, match="other values"):
        attach(plain, edit)
    attach(plain, edit, check=False).detach()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_an_edit_made_in_half_precision_knows_its_checkpoint_in_full(
    dtype: torch.dtype, backend: str, tiny_folder: Path, tmp_path: Path
) -> None:
    edit = projection(1)
    edit.provenance = {"model": describe(load_model(tiny_folder, backend=backend, dtype=dtype))}
    for precision in (torch.float32, torch.float64, dtype):
        with attach(AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=precision), edit):
            pass
    other = AutoModelForCausalLM.from_pretrained(tiny_folder)
    with torch.no_grad():
        other.get_input_embeddings().weight[0, 0] += 1.0
    with pytest.raises(ValueError, match="its embedding matrix has other values"):
        attach(other, edit)


def test_where_attention_and_mlp_stand_side_by_side_there_is_no_stream_between_them(tmp_path: Path) -> None:
    folder = save_family("neox", tmp_path)
    side_by_side = AutoModelForCausalLM.from_pretrained(folder)
    with pytest.raises(ValueError, match="computes both side by side"):
        attach(side_by_side, projection(1, site="resid_mid"))
    assert_as_before(state_of_plain(AutoModelForCausalLM.from_pretrained(folder)), side_by_side)


def test_saving_a_model_with_hooks_on_says_that_they_are_not_saved(plain: Any, model: Any, tmp_path: Path) -> None:
    with attach(plain, projection(1)):
        for save in (plain.state_dict, lambda: plain.save_pretrained(tmp_path / "saved")):
            with pytest.warns(UserWarning, match="export_hf"):
                save()
    plain.save_pretrained(tmp_path / "after")
    with attach(plain, weight_edit(model, 1)):
        plain.save_pretrained(tmp_path / "weights")  # these hold the edit
        wanted = log_probabilities(plain)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "weights").eval()
    assert torch.equal(log_probabilities(again), wanted)


def test_a_copy_of_a_plain_model_can_lose_the_edit(plain: Any, model: Any) -> None:
    unedited, edit = log_probabilities(plain), projection(1) + weight_edit(model, 1)
    with attach(plain, edit):
        twin = copy.deepcopy(plain)
        with pytest.raises(ValueError, match="already"):
            attach(twin, edit, check=False)
    edit.detach(twin)
    assert torch.equal(log_probabilities(twin), unedited)
    assert_as_before(state_of_plain(plain), twin)


def test_any_order_leaves_the_plain_model_as_it_was(model: Any, plain: Any) -> None:
    before, first = state_of_plain(plain), weight_edit(model, 1)
    with first.applied(model):
        second = weight_edit(model, 1, scale=0.5)
    handles = [attach(plain, edit) for edit in (first, projection(1), second)]
    wanted = log_probabilities(plain)
    handles[0].detach()
    assert torch.equal(log_probabilities(plain), wanted)
    handles[1].detach()
    handles[2].detach()
    assert_as_before(before, plain)


def test_the_inside_of_a_bridge_is_not_attached_to(tiny_folder: Path) -> None:
    bridge: Any = load_model(tiny_folder, backend="bridge")
    with pytest.raises(ValueError, match=r"use edit\.attach\(bridge\)"):
        attach(bridge.original_model, projection(1))


def test_an_edit_attached_in_inference_mode_is_differentiated_through(plain: Any) -> None:
    with torch.inference_mode():
        handle = attach(plain, conditional(1))
    plain(torch.arange(3, 9)[None]).logits.sum().backward()
    assert float(plain.get_input_embeddings().weight.grad.abs().sum()) > 0
    handle.detach()
