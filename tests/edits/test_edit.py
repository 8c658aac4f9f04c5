from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mrp_lens.edits import (
    ConditionalProjectionEdit,
    Edit,
    EditStack,
    Gate,
    ProjectionEdit,
    SteeringEdit,
    WeightEdit,
)
from mrp_lens.edits.subspace import Subspace
from mrp_lens.models import LensModel, describe, load_model, mlp_out_weight, tensor_digests
from mrp_lens.models.hooks import captured, hook_name
from tests.conftest import D_MODEL, LAYERS, assert_same_state, state_of
from tests.support.edits import all_kinds, assert_refused, conditional, logits, projection, weight_edit, written
from tests.support.families import save_family

EDGE_LAYERS = [0, LAYERS // 2, LAYERS - 1]


@pytest.mark.parametrize("layer", EDGE_LAYERS)
@pytest.mark.parametrize("site", ["resid_post", "resid_pre", "resid_mid", "mlp_out", "attn_out"])
def test_a_projection_removes_its_subspace_at_its_hook(
    model: LensModel, tokens: torch.Tensor, layer: int, site: str, untouched: None
) -> None:
    edit, name = projection(layer, site=site), hook_name(layer, site)
    subspace = edit.subspaces()[name]
    with edit.applied(model), captured(model, [name]) as states:
        logits(model, tokens)
        assert subspace.energy_share(states[name]) < 1e-10
    with captured(model, [name]) as states:
        logits(model, tokens)
        assert subspace.energy_share(states[name]) > 1e-3


@pytest.mark.parametrize("layer", EDGE_LAYERS)
@pytest.mark.parametrize("kind", range(4))
def test_an_edit_changes_the_output_and_leaves_nothing_behind(
    model: LensModel, tokens: torch.Tensor, layer: int, kind: int
) -> None:
    before, plain = state_of(model), logits(model, tokens)
    edit = all_kinds(model, layer)[kind]
    with edit.applied(model):
        assert float((logits(model, tokens) - plain).abs().max()) > 1e-3
    assert_same_state(before, state_of(model))
    assert torch.equal(logits(model, tokens), plain)
    with pytest.raises(RuntimeError, match="inside"), edit.applied(model):
        raise RuntimeError("inside")
    assert_same_state(before, state_of(model))


def test_attach_survives_reset_hooks_and_detach_restores(
    model: LensModel, tokens: torch.Tensor, untouched: None
) -> None:
    plain, edit = logits(model, tokens), projection(1, 2)
    edit.attach(model)
    edited = logits(model, tokens)
    model.reset_hooks()  # type: ignore[attr-defined]
    assert torch.equal(logits(model, tokens), edited)
    assert not torch.equal(edited, plain)
    with pytest.raises(ValueError, match="attached to this model already"):
        edit.attach(model)
    edit.detach(model)
    assert torch.equal(logits(model, tokens), plain)
    with pytest.raises(ValueError, match="not attached"):
        edit.detach(model)


def test_detach_says_when_the_hooks_were_already_gone(model: LensModel, untouched: None) -> None:
    edit = projection(1)
    edit.attach(model)
    model.reset_hooks(including_permanent=True)  # type: ignore[attr-defined]
    with pytest.warns(UserWarning, match="removed before detach"):
        edit.detach(model)


def test_hooks_of_the_user_see_the_edited_states(model: LensModel, tokens: torch.Tensor) -> None:
    name, edit = hook_name(2), projection(2)
    with edit.applied(model):
        _, cache = model.run_with_cache(tokens, names_filter=name)  # type: ignore[attr-defined]
    assert edit.subspaces()[name].energy_share(cache[name]) < 1e-10


@settings(deadline=None, max_examples=20)
@given(st.integers(1, 4), st.integers(1, 4), st.integers(0, 1000))
def test_adding_projections_commutes_and_adding_twice_changes_nothing(rank_a: int, rank_b: int, seed: int) -> None:
    a = projection(1, 2, rank=rank_a, seed=seed, request="a")
    b = projection(2, 3, rank=rank_b, seed=seed + 50, request="b")
    one, other, twice = a + b, b + a, a + b + a
    assert isinstance(one, ProjectionEdit)
    assert isinstance(other, ProjectionEdit)
    assert isinstance(twice, ProjectionEdit)
    assert one.requests == ("a", "b") == twice.requests
    assert one.hook_names == tuple(hook_name(layer) for layer in (1, 2, 3))
    for name in one.hook_names:
        for same in (other, twice):
            torch.testing.assert_close(
                one.subspaces()[name].projector(), same.subspaces()[name].projector(), atol=1e-6, rtol=0
            )


def test_a_request_can_be_taken_back() -> None:
    a, b = projection(1, request="a"), projection(1, 2, seed=9, request="b")
    both = a + b
    assert isinstance(both, ProjectionEdit)
    left = both.without("b")
    assert left.requests == ("a",)
    assert torch.equal(left.subspaces()[hook_name(1)].basis, a.subspaces()[hook_name(1)].basis)
    assert hook_name(2) not in left.hook_names
    with pytest.raises(ValueError, match="no request 'c'"):
        both.without("c")
    with pytest.raises(ValueError, match="nothing would be left"):
        both.without("a", "b")
    with pytest.raises(ValueError, match="request 'a', with different rows"):
        a + projection(1, seed=77, request="a")


def test_two_projections_on_one_hook_must_be_joined(model: LensModel, untouched: None) -> None:
    with (
        projection(1).applied(model),
        pytest.raises(ValueError, match=r"Join them"),
        projection(1, seed=5).applied(model),
    ):
        pass


def test_weight_edits_apply_in_order_and_refuse_another_base(
    model: LensModel, tokens: torch.Tensor, untouched: None
) -> None:
    first = weight_edit(model, 1)
    with first.applied(model):
        second = weight_edit(model, 1, scale=0.5)
    both = first + second
    assert isinstance(both, EditStack)
    with both.applied(model):
        weight = mlp_out_weight(model, 1)
        torch.testing.assert_close(weight.read(), next(iter(second.tensors.values())))
    before = state_of(model)
    assert_refused(model, second, "not the matrix that this edit replaces")
    assert_refused(model, (second + first), "not the matrix that this edit replaces")
    assert_same_state(before, state_of(model))


def test_a_stack_that_cannot_be_applied_leaves_the_model_as_it_was(model: LensModel, untouched: None) -> None:
    broken = (
        projection(1) + weight_edit(model, 1) + SteeringEdit.towards(torch.ones(D_MODEL), layer=99, coefficient=1.0)
    )
    assert_refused(model, broken, r"no hook 'blocks\.99")


def test_steering_replaces_or_adds(model: LensModel, tokens: torch.Tensor, untouched: None) -> None:
    name = hook_name(1)
    direction = torch.arange(1.0, D_MODEL + 1)
    unit = direction / direction.norm()
    with captured(model, [name]) as states:
        logits(model, tokens)
        plain = states[name]
    with SteeringEdit.towards(direction, layer=1, coefficient=7.0).applied(model), captured(model, [name]) as states:
        logits(model, tokens)
        torch.testing.assert_close(states[name], (7.0 * unit).expand_as(plain))
    with (
        SteeringEdit.towards(direction, layer=1, coefficient=7.0, mode="add", positions=[0, -1]).applied(model),
        captured(model, [name]) as states,
    ):
        logits(model, tokens)
        moved = states[name] - plain
        torch.testing.assert_close(moved[:, [0, -1]], (7.0 * unit).expand_as(moved[:, [0, -1]]), atol=1e-5, rtol=0)
        assert float(moved[:, 1:-1].abs().max()) == 0.0


def test_steering_noise_has_the_stated_variance_and_repeats_with_its_seed(model: LensModel, untouched: None) -> None:
    name = hook_name(1)
    tokens = torch.randint(3, model.cfg.d_vocab, (16, 32), generator=torch.Generator().manual_seed(0))
    edit = SteeringEdit.towards(torch.ones(D_MODEL), layer=1, coefficient=5.0, noise=0.25, seed=3)
    drawn = []
    for _ in range(2):
        with edit.applied(model), captured(model, [name]) as states:
            logits(model, tokens)
            drawn.append(states[name])
    assert torch.equal(*drawn)
    noise = drawn[0] - 5.0 * edit.direction
    assert float(noise.var()) == pytest.approx(0.25, rel=0.05)
    assert float(noise.mean()) == pytest.approx(0.0, abs=0.02)


@pytest.mark.parametrize("kind", range(4))
def test_generate_with_and_without_cache_and_batched_agree(model: LensModel, kind: int, untouched: None) -> None:
    edit = (
        all_kinds(model, 2)[kind]
        if kind != 1
        else SteeringEdit.towards(torch.ones(D_MODEL), layer=2, coefficient=0.4, mode="add")
    )
    prompts = torch.randint(3, model.cfg.d_vocab, (3, 6), generator=torch.Generator().manual_seed(2))
    plain = written(model, prompts, 6)
    with edit.applied(model):
        cached, uncached = (written(model, prompts, 6, cache=cache) for cache in (True, False))
        single = torch.cat([written(model, prompts[i : i + 1], 6) for i in range(3)])
        greedy = prompts
        for _ in range(6):
            greedy = torch.cat([greedy, logits(model, greedy)[:, -1].argmax(-1, keepdim=True)], dim=1)
    assert torch.equal(cached, uncached)
    assert torch.equal(cached, single)
    assert torch.equal(cached, greedy[:, prompts.shape[1] :])
    assert not torch.equal(cached, plain)


def test_positions_leave_generated_tokens_alone(model: LensModel, untouched: None) -> None:
    name = hook_name(1)
    edit = SteeringEdit.towards(torch.ones(D_MODEL), layer=1, coefficient=9.0, positions=[-1])
    target = 9.0 * edit.direction
    steered = []
    with edit.applied(model), captured(model, [name]) as states:
        tokens = torch.tensor([[5, 6, 7, 8]])
        logits(model, tokens)
        steered.append(torch.allclose(states[name][0, -1], target))
        written(model, tokens, 3)
        steered.append(torch.allclose(states[name][0, -1], target))
    assert steered == [True, False]


def test_bfloat16_models_take_edits_made_in_float32(backend: str, tiny_folder: Path, model: LensModel) -> None:
    half = load_model(str(tiny_folder), backend=backend, dtype=torch.bfloat16)  # type: ignore[arg-type]
    for edit in all_kinds(model, 1):
        tokens = torch.tensor([[5, 6, 7]])
        plain = logits(half, tokens)
        with edit.applied(half):
            edited = logits(half, tokens)
        assert edited.dtype == torch.bfloat16
        assert not torch.equal(edited, plain)
        assert torch.equal(logits(half, tokens), plain)


# --- bad input


def test_unknown_hooks_and_layers_are_named(model: LensModel, untouched: None) -> None:
    for name in ("blocks.9.hook_resid_post", "blocks.1.hook_residual"):
        edit = ProjectionEdit({name: Subspace.random(2, D_MODEL)})
        assert_refused(model, edit, name)
    with pytest.raises(ValueError, match="not the name of a hook inside a block"):
        ProjectionEdit({"embed": Subspace.random(2, D_MODEL)})


def test_an_edit_for_another_model_is_refused(model: LensModel, backend: str, tmp_path: Path, untouched: None) -> None:
    assert_refused(model, ProjectionEdit({hook_name(1): Subspace.random(2, 16)}), "d_model 16, the model 32")
    other = load_model(str(save_family("llama", tmp_path / "other", seed=5)), backend=backend)  # type: ignore[arg-type]
    edit = projection(1)
    edit.provenance = {"model": describe(other)}
    with edit.applied(other):
        pass
    assert_refused(model, edit, "embedding matrix has other values")
    with edit.applied(model, check=False):
        pass
    assert_refused(model, weight_edit(other, 1), "not the matrix")


def test_steering_refuses_what_it_cannot_do(model: LensModel, untouched: None) -> None:
    for direction in (torch.zeros(D_MODEL), torch.full((D_MODEL,), float("nan"))):
        with pytest.raises(ValueError, match="finite, non-zero"):
            SteeringEdit.towards(direction, layer=1, coefficient=1.0)
    with pytest.raises(ValueError, match="variance"):
        SteeringEdit.towards(torch.ones(D_MODEL), layer=1, coefficient=1.0, noise=-1.0)
    edit = SteeringEdit.towards(torch.ones(D_MODEL), layer=1, coefficient=1.0, positions=[7])
    with pytest.raises(ValueError, match="position 7 is outside"), edit.applied(model):
        logits(model, torch.tensor([[5, 6, 7]]))


def made_for(edit: Edit, name: str = "one", **differing: Any) -> Edit:
    """The edit, with a model in its record."""
    hashes = {"float32": "a", "bfloat16": "b", "float16": "c"}
    described = {"name": name, "n_layers": LAYERS, "d_model": D_MODEL, "d_vocab": 9, "embedding": hashes} | differing
    edit.provenance = {"model": described}
    return edit


@pytest.mark.parametrize(
    ("differing", "what"),
    [({"n_layers": 9}, f"n_layers {LAYERS} and 9"), ({"embedding": {"float32": "z"}}, "embedding matrices have other")],
)
def test_edits_of_two_models_are_not_added(differing: dict[str, Any], what: str) -> None:
    one = made_for(projection(1, request="a"))
    steering = SteeringEdit.towards(torch.ones(D_MODEL), layer=1, coefficient=2.0)
    for edit in (projection(2, request="b"), steering, conditional(2, request="c")):
        other = made_for(edit, "other", **differing)
        for pair in ((one, other), (other, one), (one + projection(3, request="d"), other)):
            with pytest.raises(ValueError, match="different models") as refused:
                pair[0] + pair[1]
            assert all(name in str(refused.value) for name in ("'one'", "'other'"))
        with pytest.raises(ValueError, match=what):
            one + other


def test_what_is_known_of_the_model_stays_with_a_sum() -> None:
    one, built = made_for(projection(1, request="a")), projection(2, request="b")
    assert (one + built).provenance["model"] == (built + one).provenance["model"] == one.provenance["model"]
    coarse = made_for(projection(2, request="b"), "coarse", embedding={"float32": "x", "bfloat16": "b"})
    for both in (one + coarse, coarse + one):  # of one checkpoint in two precisions
        assert both.provenance["model"]["embedding"] == {"bfloat16": "b"}


def test_an_edit_has_copies_of_what_it_is_given(model: LensModel) -> None:
    rows, direction = torch.eye(2, D_MODEL), torch.nn.functional.normalize(torch.ones(D_MODEL), dim=0)
    weight = mlp_out_weight(model, 1)
    values = weight.read()
    digests = {weight.name: tensor_digests(values)}
    edits = [
        ProjectionEdit({hook_name(1): Subspace(rows)}),
        SteeringEdit(hook_name(1), direction, 2.0),
        ConditionalProjectionEdit({hook_name(1): Subspace(rows)}, {hook_name(1): Gate(direction, threshold=0.1)}),
        WeightEdit({weight.name: values}, digests),
    ]
    before = [{name: tensor.clone() for name, tensor in edit.to_parts()[1].items()} for edit in edits]
    for tensor in (rows, direction, values):
        tensor.zero_()
    for edit, known in zip(edits, before, strict=True):
        tensors = edit.to_parts()[1]
        assert all(torch.equal(tensors[name], tensor) for name, tensor in known.items())
    assert WeightEdit.of_own({weight.name: values}, digests).tensors[weight.name].data_ptr() == values.data_ptr()


@pytest.mark.parametrize("kind", range(3))
def test_an_edit_that_went_on_in_inference_mode_is_differentiated_through(
    own: Any, tokens: torch.Tensor, kind: int
) -> None:
    direction = torch.arange(1.0, D_MODEL + 1)
    with torch.inference_mode():
        edit = [conditional(1), projection(1), SteeringEdit.towards(direction, layer=1, coefficient=2.0, mode="add")][
            kind
        ]
        handle = edit.attach(own)
    own(tokens, return_type="logits").sum().backward()
    assert float(own.W_E.grad.abs().sum()) > 0
    handle.detach()
