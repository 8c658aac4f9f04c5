"""Projections behind gates, against the formula written out in float64 on the states that come in."""

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mrp_lens.edits import ConditionalProjectionEdit, EditStack, Gate, ProjectionEdit, load_edit
from mrp_lens.edits.gate import shares
from mrp_lens.edits.parts import projection_in, without_hooks, without_projections
from mrp_lens.edits.subspace import Subspace
from mrp_lens.models import LensModel, describe, load_model
from mrp_lens.models.hooks import captured, hook_name
from tests.conftest import D_MODEL, assert_same_state, state_of
from tests.support.edit_folders import read, write
from tests.support.edits import (
    assert_refused,
    behind_several,
    beside,
    conditional,
    directions_of,
    logits,
    projection,
    weight_edit,
    written,
)

SITES = ("resid_post", "resid_pre", "resid_mid", "mlp_out", "attn_out")
HOOK = hook_name(1)


def by_hand(states: Tensor, edit: ProjectionEdit, hook: str) -> Tensor:
    """h - sum_i g_i(h) (h Q_i^T) Q_i, state by state and request by request."""
    changed = []
    for h in states.double().reshape(-1, D_MODEL):
        lost = torch.zeros(D_MODEL, dtype=torch.float64)
        for request in edit.requests:
            subspace, gate = edit.subspaces(request).get(hook), edit.gates(request).get(hook)
            if subspace is None:
                continue
            share = 1.0
            if gate is not None:
                share = share_by_hand(h, gate)
            for q in subspace.basis.double():
                lost += share * float(h @ q) * q
        changed.append(h - lost)
    return torch.stack(changed).view(states.shape)


def share_by_hand(h: Tensor, gate: Gate) -> float:
    """Of one state: the widest that one of the gate's directions opens it."""
    length, opened = math.sqrt(float(h @ h)), []
    for w, threshold, sharpness in directions_of(gate):
        cosine = float(h @ w) / length if length else 0.0
        soft = 1.0 / (1.0 + math.exp(-sharpness * (cosine - threshold)))
        opened.append(float(cosine > threshold) if gate.hard else soft)
    return max(opened)


def states_at(model: LensModel, hook: str, tokens: Tensor) -> Tensor:
    with captured(model, [hook]) as states:
        logits(model, tokens)
    return states[hook]


@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize("site", SITES)
def test_each_state_loses_what_its_gate_says(
    model: LensModel, tokens: Tensor, site: str, hard: bool, untouched: None
) -> None:
    hook, edit = hook_name(2, site), conditional(2, site=site, hard=hard)
    before = states_at(model, hook, tokens)
    share = edit.gates("edit")[hook](before)
    assert share.shape == before.shape[:-1]
    assert 0.1 < float((share > 0.5).double().mean()) < 0.9
    with edit.applied(model):
        after = states_at(model, hook, tokens)
    torch.testing.assert_close(after.double(), by_hand(before, edit, hook), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("hard", [False, True])
def test_a_gate_with_several_directions_opens_as_far_as_the_one_that_opens_it_furthest(
    model: LensModel, tokens: Tensor, hard: bool, untouched: None
) -> None:
    edit = behind_several(1, hard=hard) + conditional(2, request="one")
    assert isinstance(edit, ConditionalProjectionEdit)
    edit = edit + beside(edit, request="beside", hard=hard)
    assert isinstance(edit, ConditionalProjectionEdit)
    before = states_at(model, HOOK, tokens)
    gate = edit.gates("edit")[HOOK]
    alone = [Gate(*each, hard) for each in directions_of(gate)]
    widest = torch.stack([each(before) for each in alone])
    torch.testing.assert_close(gate(before), widest.amax(dim=0), atol=1e-6, rtol=1e-6)
    assert set(widest.argmax(dim=0).flatten().tolist()) == {0, 1, 2}  # each direction opens it somewhere
    with edit.applied(model):
        after = states_at(model, HOOK, tokens)
    torch.testing.assert_close(after.double(), by_hand(before, edit, HOOK), atol=1e-5, rtol=1e-5)
    control = edit.random_like(seed=1)
    assert isinstance(control, ConditionalProjectionEdit)
    assert control.gates("random edit") == edit.gates("edit")


def test_gates_of_several_requests_look_at_the_state_that_comes_in(
    model: LensModel, tokens: Tensor, untouched: None
) -> None:
    first = conditional(1, request="a")
    second = beside(first, request="b")
    third = beside(first + second, request="c", seed=9, hard=True)  # type: ignore[arg-type]
    before = states_at(model, HOOK, tokens)
    found = []
    for edit in (first + second + third, third + second + first, second + (third + first)):
        assert isinstance(edit, ConditionalProjectionEdit)
        with edit.applied(model):
            found.append(states_at(model, HOOK, tokens))
        torch.testing.assert_close(found[-1].double(), by_hand(before, edit, HOOK), atol=1e-5, rtol=1e-5)
    for other in found[1:]:
        torch.testing.assert_close(found[0], other, atol=1e-5, rtol=1e-5)


def test_where_all_gates_are_open_nothing_is_left_of_the_joint_subspace(
    model: LensModel, tokens: Tensor, untouched: None
) -> None:
    first = conditional(1, request="a", threshold=-2.0, hard=True)
    edit = first + beside(first, request="b", threshold=-2.0, sharpness=100.0)
    assert isinstance(edit, ConditionalProjectionEdit)
    assert edit.subspaces()[HOOK].rank == 5
    with edit.applied(model):
        states = states_at(model, HOOK, tokens)
    for request in edit.requests:
        assert edit.subspaces(request)[HOOK].energy_share(states) < 1e-10
    plain = states_at(model, HOOK, tokens)
    with conditional(1, threshold=2.0, hard=True).applied(model):  # and where they are shut, all of it is
        assert torch.equal(states_at(model, HOOK, tokens), plain)


@pytest.mark.parametrize("gated_first", [True, False])
def test_a_plain_projection_joins_in_either_order(
    model: LensModel, tokens: Tensor, gated_first: bool, untouched: None
) -> None:
    gated = conditional(1, request="gated")
    same_hook = ProjectionEdit(beside(gated, request="x").subspaces(), request="plain")
    other = ProjectionEdit({hook_name(3): Subspace.random(2, D_MODEL, seed=4)}, request="other")
    edit = gated + (same_hook + other) if gated_first else (other + same_hook) + gated
    assert isinstance(edit, ConditionalProjectionEdit)
    assert edit.requests == (("gated", "plain", "other") if gated_first else ("other", "plain", "gated"))
    assert edit.gates("plain") == {}
    with edit.applied(model), captured(model, [hook_name(3)]) as late:
        after = states_at(model, HOOK, tokens)
        assert other.subspaces()[hook_name(3)].energy_share(late[hook_name(3)]) < 1e-10
    before = states_at(model, HOOK, tokens)
    torch.testing.assert_close(after.double(), by_hand(before, edit, HOOK), atol=1e-5, rtol=1e-5)
    assert same_hook.subspaces()[HOOK].energy_share(after) < 1e-10
    alone = edit.without("gated")
    assert type(alone) is ProjectionEdit
    assert edit.without("plain", "other") == gated


def test_plain_requests_that_overlap_each_other_are_joined_beside_a_gate(
    model: LensModel, tokens: Tensor, untouched: None
) -> None:
    gated = conditional(1, request="gated")
    rows = beside(gated, request="x", rank=3).subspaces()[HOOK].basis
    tilted = Subspace.spanned_by(torch.stack([rows[0] + rows[1], rows[2]]))
    a, b = (ProjectionEdit({HOOK: s}, request=n) for s, n in ((Subspace(rows[:1]), "a"), (tilted, "b")))
    edit = a + gated + b
    assert isinstance(edit, ConditionalProjectionEdit)
    with edit.applied(model):
        assert Subspace(rows).energy_share(states_at(model, HOOK, tokens)) < 1e-10


def test_a_request_can_be_taken_back_and_a_twin_is_known(model: LensModel, tokens: Tensor, untouched: None) -> None:
    first = conditional(1, 2, request="a")
    second = beside(first, request="b")
    both = first + second
    assert isinstance(both, ConditionalProjectionEdit)
    assert both.without("b") == first
    assert both.without("a") == second
    assert both + first == both
    with both.without("b").applied(model):
        taken_back = logits(model, tokens)
    with first.applied(model):
        assert torch.equal(logits(model, tokens), taken_back)
    with pytest.raises(ValueError, match="nothing would be left"):
        both.without("a", "b")
    for other in (conditional(1, 2, request="a", threshold=0.3), projection(1, 2, request="a")):
        for one, two in ((first, other), (other, first)):
            with pytest.raises(ValueError, match="request 'a', with different rows or gates"):
                one + two
    assert first != conditional(1, 2, request="a", threshold=0.3)
    assert first != projection(1, 2, request="a")


def test_rows_that_overlap_behind_gates_are_refused() -> None:
    first = conditional(1, request="a")
    for other in (conditional(1, seed=3, request="b"), projection(1, seed=3, request="b"), projection(1, request="b")):
        for one, two in ((first, other), (other, first)):
            with pytest.raises(
                ValueError, match=r"overlap at blocks.1.hook_resid_post .*fit the later request with after="
            ):
                one + two
    assert isinstance(first + conditional(2, request="b"), ConditionalProjectionEdit)


def test_the_control_has_the_same_gates_and_ranks_and_other_rows() -> None:
    first = conditional(1, 2, request="a")
    edit = first + beside(first, request="b") + ProjectionEdit({hook_name(0): Subspace.random(2, D_MODEL)}, request="c")
    assert isinstance(edit, ConditionalProjectionEdit)
    control = edit.random_like(seed=3)
    assert isinstance(control, ConditionalProjectionEdit)
    assert set(control.requests) == {"random a", "random b", "random"}
    for name in "ab":
        assert control.gates(f"random {name}") == edit.gates(name)
        ranks = {hook: subspace.rank for hook, subspace in edit.subspaces(name).items()}
        assert {hook: subspace.rank for hook, subspace in control.subspaces(f"random {name}").items()} == ranks
    angles = control.subspaces("random a")[HOOK].principal_angles(edit.subspaces("a")[HOOK])
    assert float(angles.min()) > 1e-3
    assert edit.random_like(seed=3) == control
    assert edit.random_like(seed=4) != control


def test_saved_and_loaded_it_is_the_same_bit_for_bit(
    model: LensModel, tokens: Tensor, tmp_path: Path, untouched: None
) -> None:
    first = conditional(1, 2, request="a", threshold=0.1, sharpness=7.5)
    only_some = ConditionalProjectionEdit(
        beside(first, request="x").subspaces(), {HOOK: Gate(torch.ones(D_MODEL), 0.0, hard=True)}, request="b"
    )
    edit = first + only_some
    edit.provenance = {"method": "by hand", "model": describe(model)}
    edit.save_pretrained(tmp_path / "edit")
    again = load_edit(tmp_path / "edit")
    assert type(again) is ConditionalProjectionEdit
    assert again == edit
    assert again.provenance == edit.provenance
    assert again.gates("b") == {HOOK: Gate(torch.ones(D_MODEL), 0.0, hard=True)}
    with edit.applied(model):
        expected = logits(model, tokens)
    with again.applied(model):
        assert torch.equal(logits(model, tokens), expected)
    stacked = edit + weight_edit(model, 3)
    stacked.save_pretrained(tmp_path / "stack")
    assert isinstance(stacked, EditStack)
    assert load_edit(tmp_path / "stack") == stacked
    assert isinstance(ProjectionEdit.from_pretrained(tmp_path / "edit"), ConditionalProjectionEdit)


@pytest.mark.parametrize("directions", [1, 4])
def test_so_is_one_whose_gates_have_several_directions(
    directions: int, model: LensModel, tokens: Tensor, tmp_path: Path, untouched: None
) -> None:
    edit = behind_several(1, 2, directions=directions) + conditional(3, request="one")
    assert isinstance(edit, ConditionalProjectionEdit)
    edit.save_pretrained(tmp_path / "edit")
    again = load_edit(tmp_path / "edit")
    assert isinstance(again, ConditionalProjectionEdit)
    assert again == edit
    for hook, gate in edit.gates("edit").items():
        loaded = again.gates("edit")[hook]
        assert loaded.direction.shape == (directions, D_MODEL)
        assert torch.equal(loaded.direction, gate.direction)
        assert loaded.numbers == gate.numbers
    again.save_pretrained(tmp_path / "again")
    for name in ("edit.safetensors", "edit_config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "edit" / name).read_bytes()
    with edit.applied(model):
        expected = logits(model, tokens)
    with again.applied(model):
        assert torch.equal(logits(model, tokens), expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda gate: gate | {"threshold": gate["threshold"][:2]}, "threshold must be one number for each of 3"),
        (lambda gate: gate | {"threshold": 0.1}, "threshold must be one number for each of 3"),
        (lambda gate: gate | {"sharpness": [1.0, 0.0, 1.0]}, "sharpness must be above 0"),
        (lambda gate: gate | {"sharpness": 30.0}, "not as an edit saves them"),
        (lambda gate: gate | {"threshold": ["0", 0.1, 0.2]}, "threshold must be a number"),
        (lambda gate: gate | {"threshold": [[0.0], 0.1, 0.2]}, "threshold must be a number"),
    ],
)
def test_a_folder_with_other_numbers_of_several_directions_is_refused(
    change: Any, message: str, tmp_path: Path
) -> None:
    behind_several(1).save_pretrained(tmp_path / "edit")
    config, tensors = read(tmp_path / "edit")
    entry = config["settings"]["hooks"][0]
    entry["gate"] = change(entry["gate"])
    with pytest.raises(ValueError, match=message):
        load_edit(write(tmp_path / "changed", config, tensors))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda gate: gate | {"sharpness": 0.0}, "sharpness must be above 0"),
        (lambda gate: gate | {"threshold": "0.1"}, "'threshold' must be int or float"),
        (lambda gate: gate | {"hard": 1}, "'hard' must be bool"),
        (lambda gate: gate | {"tensor": "elsewhere"}, "elsewhere"),
        (lambda gate: gate | {"tensor": f"rows.0.{HOOK}"}, "each of 3 directions"),
        (lambda gate: gate | {"extra": 1}, "not as an edit saves them"),
        (lambda gate: None, "needs a gate"),
        (lambda gate: [], "'gate' must be"),
    ],
)
def test_a_folder_with_another_gate_is_refused(change: Any, message: str, tmp_path: Path) -> None:
    conditional(1).save_pretrained(tmp_path / "edit")
    config, tensors = read(tmp_path / "edit")
    entry = config["settings"]["hooks"][0]
    entry["gate"] = change(entry["gate"])
    with pytest.raises(ValueError, match=message):
        load_edit(write(tmp_path / "changed", config, tensors))


def test_an_edit_leaves_nothing_behind_and_is_copied_with_the_model(own: Any, tokens: Tensor) -> None:
    before, plain, edit = state_of(own), logits(own, tokens), conditional(0, 3)
    with edit.applied(own):
        assert float((logits(own, tokens) - plain).abs().max()) > 1e-3
    assert_same_state(before, state_of(own))
    edit.attach(own)
    twin = copy.deepcopy(own)
    edited = logits(own, tokens)
    edit.detach(own)
    assert torch.equal(logits(twin, tokens), edited)
    edit.detach(twin)
    assert torch.equal(logits(twin, tokens), plain)


def test_a_second_projection_at_its_hook_has_to_be_joined(model: LensModel, untouched: None) -> None:
    with conditional(1).applied(model):
        assert_refused(model, projection(1), "Join them")
    with projection(1).applied(model):
        assert_refused(model, conditional(1, seed=4), "Join them")
    with pytest.raises(ValueError, match="join them"):
        EditStack([projection(1), conditional(1, seed=4)])


def test_no_weight_can_hold_it(model: LensModel, untouched: None) -> None:
    edit = conditional(1, site="mlp_out")
    for chosen in (edit, edit + weight_edit(model, 1)):
        with pytest.raises(ValueError, match="gate looks at each state"), chosen.applied_in_weights(model):
            pass
        with pytest.raises(ValueError, match="gate looks at each state"):
            chosen.merge_(model)
        with pytest.raises(ValueError, match="gate looks at each state"):
            edit.write_over(model)


def test_generation_is_the_same_with_and_without_a_cache_and_batched(model: LensModel, untouched: None) -> None:
    edit = conditional(1, 3, sharpness=60.0)
    prompts = torch.randint(3, model.cfg.d_vocab, (3, 6), generator=torch.Generator().manual_seed(2))
    plain = written(model, prompts, 8)
    with edit.applied(model):
        cached, uncached = (written(model, prompts, 8, cache=cache) for cache in (True, False))
        single = torch.cat([written(model, prompts[i : i + 1], 8) for i in range(3)])
    assert torch.equal(cached, uncached)
    assert torch.equal(cached, single)
    assert not torch.equal(cached, plain)


def test_a_bfloat16_model_is_gated_in_float32(backend: str, tiny_folder: Path, tokens: Tensor) -> None:
    half = load_model(str(tiny_folder), backend=backend, dtype=torch.bfloat16)  # type: ignore[arg-type]
    edit = conditional(1)
    before = states_at(half, HOOK, tokens)
    with edit.applied(half):
        after = states_at(half, HOOK, tokens)
    assert after.dtype == torch.bfloat16
    assert edit.gates("edit")[HOOK](before).dtype == torch.float32
    wanted = by_hand(before, edit, HOOK).to(torch.bfloat16)
    torch.testing.assert_close(after, wanted, atol=0, rtol=2**-7)
    assert float((after == wanted).double().mean()) > 0.99
    change, wide = edit.change_at(HOOK), before.float()
    outside = change(wide)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(change(wide), outside)


def test_parts_of_an_edit_know_it_for_a_projection(model: LensModel, untouched: None) -> None:
    gated, matrix = conditional(1), weight_edit(model, 2)
    edit = matrix + gated
    assert projection_in(edit) == gated
    assert without_projections(edit) == EditStack([matrix])
    assert without_hooks(edit) == matrix
    assert without_hooks(gated) is None
    with EditStack([matrix, gated]).applied(model):
        pass


# --- the gate


def test_a_zero_state_has_the_cosine_0() -> None:
    zero = torch.zeros(1, 2, D_MODEL)
    gate = Gate(torch.ones(D_MODEL), threshold=0.1, sharpness=20.0)
    torch.testing.assert_close(gate(zero), torch.full((1, 2), 1 / (1 + math.exp(2.0))))
    assert torch.equal(Gate(torch.ones(D_MODEL), -0.1, hard=True)(zero), torch.ones(1, 2))
    assert torch.equal(Gate(torch.ones(D_MODEL), 0.0, hard=True)(zero), torch.zeros(1, 2))


def test_shares_are_differentiable_in_everything() -> None:
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(2, 3, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    direction = torch.randn(5, generator=generator, dtype=torch.float64, requires_grad=True)
    threshold, sharpness = (torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (0.2, 3.0))
    assert torch.autograd.gradcheck(shares, (states, direction, threshold, sharpness))
    zero = torch.zeros(1, 5, requires_grad=True)
    shares(zero, direction, threshold, sharpness).sum().backward()
    assert zero.grad is not None
    assert bool(torch.isfinite(zero.grad).all())


def test_shares_of_several_directions_are_differentiable_in_everything() -> None:
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(2, 3, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    directions = torch.randn(4, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    numbers = [torch.rand(4, generator=generator, dtype=torch.float64) + 0.5 for _ in range(2)]
    assert torch.autograd.gradcheck(shares, (states, directions, *(each.requires_grad_() for each in numbers)))


def test_a_gate_with_several_directions_normalises_each_and_has_a_number_for_each() -> None:
    rows = torch.arange(1.0, 3 * D_MODEL + 1).view(3, D_MODEL)
    gate = Gate(rows, (0, 0.1, 0.2), 5)  # type: ignore[arg-type]
    torch.testing.assert_close(gate.direction.norm(dim=1), torch.ones(3))
    assert gate.d_model == D_MODEL
    assert torch.equal(gate.rows, gate.direction)
    assert gate.numbers == {"threshold": [0.0, 0.1, 0.2], "sharpness": [5.0, 5.0, 5.0], "hard": False}
    assert gate == Gate(gate.direction, [0.0, 0.1, 0.2], [5.0] * 3)  # type: ignore[arg-type]
    assert len({gate, Gate(gate.direction, (0.0, 0.1, 0.2), (5.0,) * 3)}) == 1
    assert gate != Gate(gate.direction, (0.0, 0.1, 0.3), 5.0)
    assert gate != Gate(gate.direction.flip(0), (0.0, 0.1, 0.2), 5.0)


def test_a_gate_normalises_its_direction_and_equals_its_twin() -> None:
    direction = torch.arange(1.0, D_MODEL + 1)
    gate = Gate(direction, 1)  # type: ignore[arg-type]
    assert float(gate.direction.norm()) == pytest.approx(1.0, abs=1e-6)
    assert type(gate.threshold) is float
    assert gate == Gate(3.0 * direction, 1.0) or torch.allclose(gate.direction, Gate(3.0 * direction, 1.0).direction)
    assert gate == Gate(gate.direction, 1.0)
    assert len({gate, Gate(gate.direction, 1.0)}) == 1
    assert gate != Gate(-direction, 1.0)
    assert gate != Gate(direction, 1.0, hard=True)
    assert gate != "gate"


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"direction": torch.zeros(8)}, ValueError, "non-zero"),
        ({"direction": torch.full((8,), math.nan)}, ValueError, "finite"),
        ({"direction": torch.ones(2, 2, 8)}, ValueError, "vector"),
        ({"direction": torch.ones(0, 8), "threshold": ()}, ValueError, "vector"),
        ({"direction": torch.eye(8)}, ValueError, "threshold must be one number for each of 8 directions, got 0.0"),
        ({"direction": torch.eye(2, 8), "threshold": (0.1,)}, ValueError, r"each of 2 directions, got \(0.1,\)"),
        ({"direction": torch.eye(2, 8), "threshold": (0.1, math.nan)}, ValueError, "threshold must be a finite"),
        ({"direction": torch.eye(2, 8), "threshold": (0.1, None)}, TypeError, "threshold must be a number"),
        ({"direction": torch.eye(2, 8), "threshold": (0.1,) * 2, "sharpness": (1.0,) * 3}, ValueError, "each of 2"),
        ({"direction": torch.eye(2, 8), "threshold": (0.1,) * 2, "sharpness": (1.0, 0.0)}, ValueError, "above 0"),
        ({"direction": torch.zeros(2, 8), "threshold": (0.1,) * 2}, ValueError, "non-zero"),
        ({"threshold": (0.1, 0.2)}, ValueError, "threshold must be one number for each of 1 directions"),
        ({"direction": [1.0, 0.0]}, TypeError, "tensor"),
        ({"threshold": math.nan}, ValueError, "threshold must be a finite"),
        ({"threshold": "0.1"}, TypeError, "threshold must be a number"),
        ({"sharpness": 0.0}, ValueError, "sharpness must be above 0"),
        ({"sharpness": math.inf}, ValueError, "sharpness must be a finite"),
        ({"sharpness": True}, TypeError, "sharpness must be a number"),
        ({"hard": 1}, TypeError, "hard must be True or False"),
    ],
)
def test_a_gate_that_makes_no_sense_is_refused(arguments: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Gate(**({"direction": torch.ones(8), "threshold": 0.0} | arguments))


def test_gates_that_fit_no_subspace_are_refused(model: LensModel, untouched: None) -> None:
    subspaces, gate = {HOOK: Subspace.random(2, D_MODEL)}, Gate(torch.ones(D_MODEL), 0.0)
    for gates, error, message in (
        ({}, ValueError, "needs a gate"),
        ({hook_name(2): gate}, ValueError, "no subspace there; it has some at blocks.1.hook_resid_post"),
        ({HOOK: Gate(torch.ones(8), 0.0)}, ValueError, "d_model 8, the subspace 32"),
        ({HOOK: torch.ones(D_MODEL)}, TypeError, "expected a Gate, got Tensor"),
    ):
        with pytest.raises(error, match=message):
            ConditionalProjectionEdit(subspaces, gates)  # type: ignore[arg-type]
    edit = ConditionalProjectionEdit(subspaces, {HOOK: gate})
    with pytest.raises(ValueError, match="no request 'x'"):
        edit.gates("x")
    with pytest.raises(ValueError, match="no request 'x'"):
        ConditionalProjectionEdit.from_requests({"edit": subspaces}, {"x": {HOOK: gate}})
    assert repr(edit) == f"ConditionalProjectionEdit(requests=['edit'], rank per hook={{'{HOOK}': 2}})"
    assert projection(1).gates("edit") == {}
    wide = ConditionalProjectionEdit({HOOK: Subspace.random(2, 64)}, {HOOK: Gate(torch.ones(64), 0.0)})
    assert_refused(model, wide, "d_model 64, the model 32")
