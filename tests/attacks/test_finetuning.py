"""What retraining changes: plain AdamW on the checkpoint's tensors, the same on both classes and in every precision."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.utils.parametrize import is_parametrized
from transformers import AutoModelForCausalLM

from mrp_lens.attacks import relearned
from mrp_lens.attacks.finetuning import Attacker, reach_of
from mrp_lens.data import Corpus
from mrp_lens.models import LensModel, available_backends, checkpoint_tensors, encoder_for, load_model, mlp_out_weight
from mrp_lens.models.weights import weights_by_name
from mrp_lens.training.optim import MasterAdamW, Trainable
from tests.conftest import D_MODEL, LAYERS, assert_same_state, state_of
from tests.support.edits import logits, projection
from tests.support.families import FAMILIES, NO_HOOKED, save_family
from tests.support.quizzes import colours

TAUGHT = colours(100)


def test_retraining_is_plain_adamw_on_the_checkpoint(model: LensModel, tiny_folder: Path) -> None:
    """Against Hugging Face's model, a loop of four lines and torch's AdamW."""
    documents = Corpus.from_texts(["The colour of Zaxim1 is red.", "A tower near the harbour, seen again."])
    reference = AutoModelForCausalLM.from_pretrained(tiny_folder, attn_implementation="eager", dtype=torch.float32)
    optimizer = torch.optim.AdamW(reference.parameters(), lr=1e-3, weight_decay=0.0)
    rows = [row.ids for row in encoder_for(model).encode(documents.documents)]
    for _ in range(4):
        optimizer.zero_grad()
        losses = [
            torch.nn.functional.cross_entropy(
                reference(torch.tensor([ids])).logits[0, :-1], torch.tensor(ids[1:]), reduction="sum"
            )
            for ids in rows
        ]
        (torch.stack(losses).sum() / sum(len(ids) - 1 for ids in rows)).backward()
        optimizer.step()
    probe = torch.tensor([rows[0][:6]])
    with (
        relearned(model, None, train=documents, steps=4, lr=1e-3, batch_size=2, progress=False),
        torch.no_grad(),
    ):
        torch.testing.assert_close(logits(model, probe), reference(probe).logits, atol=2e-3, rtol=0)
        assert float((logits(model, probe) - logits(load_model(tiny_folder), probe)).abs().max()) > 0.05


@pytest.mark.slow
@pytest.mark.parametrize("family", sorted(set(FAMILIES) - NO_HOOKED))
def test_both_classes_are_retrained_alike(family: str, tmp_path: Path) -> None:
    """Also where TransformerLens adds zero biases (all but GPT-2 and NeoX) or keeps tied embeddings twice (Mistral here, GPT-2)."""
    if len(available_backends()) < 2:
        pytest.skip("needs HookedTransformer (TransformerLens 3)")
    folder = save_family(family, tmp_path)
    probe = torch.arange(3, 33).view(2, 15)
    moved = {}
    for backend in ("hooked", "bridge"):
        loaded = load_model(folder, backend=backend)
        before, plain = state_of(loaded), logits(loaded, probe)
        with relearned(loaded, projection(1), train=TAUGHT, steps=4, lr=1e-3, batch_size=8, progress=False):
            moved[backend] = logits(loaded, probe) - plain
        assert_same_state(before, state_of(loaded))
    assert float(moved["hooked"].abs().max()) > 0.1
    torch.testing.assert_close(moved["hooked"], moved["bridge"], atol=5e-3, rtol=0)


def test_bfloat16_models_learn_from_steps_smaller_than_their_precision(backend: str, tiny_folder: Path) -> None:
    half = load_model(tiny_folder, backend=backend, dtype=torch.bfloat16)
    before = state_of(half)
    weight = mlp_out_weight(half, 1)
    old = weight.read()
    with relearned(half, None, train=TAUGHT, steps=40, lr=1e-4, batch_size=8, progress=False):
        changed = (weight.read() != old).float().mean()
    assert float(changed) > 0.2  # one step of 1e-4 changes next to no bfloat16 weight
    assert_same_state(before, state_of(half))


@pytest.mark.parametrize("family", ["gpt2", "neox", "phi3"])
def test_of_joint_matrices_the_parts_that_a_bridge_computes_with_are_trained(family: str, tmp_path: Path) -> None:
    """It holds both; a master of the joint one would write its old values over what was learned in half precision."""
    folder = save_family(family, tmp_path)
    bridge = load_model(folder, backend="bridge", dtype=torch.bfloat16)
    tensors = [tensor.parameter for tensor in checkpoint_tensors(bridge)]
    plain = AutoModelForCausalLM.from_pretrained(folder)
    assert sum(tensor.numel() for tensor in tensors) == sum(tensor.numel() for tensor in plain.parameters())
    spans = sorted((tensor.data_ptr(), tensor.numel()) for tensor in tensors if tensor.is_contiguous())
    assert all(start + 2 * count <= following for (start, count), (following, _) in pairwise(spans))
    assert (
        weights_by_name(bridge).keys() & {"transformer.h.0.attn.qkv.weight", "gpt_neox.layers.0.attention.qkv.weight"}
        == set()
    )
    moved = [tensor for tensor in checkpoint_tensors(bridge) if ".q." in tensor.name and tensor.name.endswith("weight")]
    before = [tensor.parameter.detach().clone() for tensor in moved]
    assert len(moved) == int(bridge.cfg.n_layers)
    with relearned(bridge, None, train=TAUGHT, steps=3, lr=1e-2, batch_size=8, progress=False):
        assert all(
            float((tensor.parameter.detach() - old).abs().max()) > 5e-3
            for tensor, old in zip(moved, before, strict=True)
        )


def test_parameters_before_at_and_after_the_edit(model: LensModel) -> None:
    edit = projection(1, 2)
    reached: dict[str, set[int]] = {}
    for parameters in ("before", "at", "after"):
        old = {tensor.name: tensor.parameter.detach().clone() for tensor in checkpoint_tensors(model)}
        with relearned(model, edit, train=TAUGHT, steps=1, lr=1e-2, parameters=parameters, progress=False):
            reached[parameters] = {
                tensor.depth
                for tensor in checkpoint_tensors(model)
                if not torch.equal(tensor.parameter, old[tensor.name])
            }
    assert reached == {"before": {-1, 0}, "at": {1, 2}, "after": {3, LAYERS}}


def test_low_rank_updates_have_that_rank(tiny_folder: Path) -> None:
    bridge = load_model(tiny_folder, backend="bridge")
    matrices = [tensor for tensor in checkpoint_tensors(bridge) if tensor.parameter.ndim == 2 and tensor.depth >= 0]
    with relearned(bridge, None, train=TAUGHT, steps=2, lr=1e-2, parameters="lora", lora_rank=2, progress=False):
        updated = [m for m in bridge.modules() if isinstance(m, torch.nn.Linear) and is_parametrized(m)]
        assert len(updated) == len(matrices) - 1  # all but the unembedding
        for module in updated:
            old: Any = module.parametrizations
            update = module.weight - old.weight.original
            assert int(torch.linalg.matrix_rank(update.detach(), atol=1e-6)) == 2


def test_low_rank_updates_reach_every_expert_and_come_off_again(tmp_path: Path) -> None:
    bridge: Any = load_model(str(save_family("mixtral", tmp_path)), backend="bridge")
    experts = [module for module in bridge.modules() if hasattr(module, "is_transposed")]
    old = {name: parameter.detach().clone() for name, parameter in bridge.named_parameters()}
    with relearned(bridge, None, train=TAUGHT, steps=2, lr=1e-2, parameters="lora", lora_rank=2, progress=False):
        assert len(experts) == bridge.cfg.n_layers
        for module in experts:
            for name in ("gate_up_proj", "down_proj"):
                update = getattr(module, name) - module.parametrizations[name].original
                ranks = torch.linalg.matrix_rank(update.detach(), atol=1e-6).tolist()
                assert len(ranks) == 3
                assert max(ranks) == 2  # an expert that no token met stays
    now = dict(bridge.named_parameters())
    assert list(now) == list(old)
    assert all(torch.equal(now[name], parameter) for name, parameter in old.items())


def test_rates_follow_the_width_and_low_rank_factors_move_faster(model: LensModel) -> None:
    rates = Attacker().rates(model, None)
    assert rates[1] == pytest.approx(0.128 / D_MODEL)
    assert rates[0] < rates[1] < rates[2]
    assert Attacker(parameters="lora").rates(model, None)[1] == pytest.approx(1.28 / D_MODEL)


def test_masters_collect_both_copies_of_a_tied_embedding() -> None:
    first, second = torch.nn.Parameter(torch.zeros(2, 3)), torch.nn.Parameter(torch.zeros(3, 2))
    trained = Trainable(torch.zeros(2, 3), (first, second))
    optimizer = MasterAdamW([trained], lr=0.1)
    first.grad, second.grad = torch.ones(2, 3), torch.full((3, 2), 2.0)
    optimizer.step()
    assert torch.equal(trained.master.grad, torch.full((2, 3), 3.0))
    assert torch.equal(first, second.T)
    assert float(first.detach().max()) < 0
    optimizer.zero_grad()
    assert first.grad is second.grad is None


def test_reach_needs_an_edit_only_where_places_matter() -> None:
    assert all(reach_of(None, "all")(depth) for depth in range(-1, LAYERS + 1))
