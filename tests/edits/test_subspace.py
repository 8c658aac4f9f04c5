import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mrp_lens.edits import exported_hooks
from mrp_lens.edits.subspace import Subspace

D = 12
seeds = st.integers(0, 10_000)
ranks = st.integers(1, 5)


def randn(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@settings(deadline=None)
@given(ranks, seeds)
def test_projecting_out_twice_is_projecting_out_once(rank: int, seed: int) -> None:
    subspace, states = Subspace.random(rank, D, seed=seed), randn(20, D, seed=seed + 1)
    once = subspace.project_out(states)
    torch.testing.assert_close(subspace.project_out(once), once, atol=1e-6, rtol=0)
    assert float((once @ subspace.basis.T).abs().max()) < 1e-5


@settings(deadline=None)
@given(ranks, seeds)
def test_the_projector_is_symmetric_idempotent_and_of_the_stated_rank(rank: int, seed: int) -> None:
    projector = Subspace.random(rank, D, seed=seed).projector()
    assert torch.equal(projector, projector.T)
    torch.testing.assert_close(projector @ projector, projector, atol=1e-6, rtol=0)
    assert float(projector.trace()) == pytest.approx(rank, abs=1e-5)


@settings(deadline=None)
@given(ranks, seeds)
def test_states_in_the_complement_pass_untouched(rank: int, seed: int) -> None:
    full = Subspace.random(D - 1, D, seed=seed).basis
    subspace, complement = Subspace(full[:rank]), full[rank:]
    if not len(complement):
        return
    states = randn(20, len(complement), seed=seed + 1) @ complement
    assert float((subspace.project_out(states) - states).abs().max()) <= 1e-6 * float(states.norm(dim=-1).max())


@settings(deadline=None)
@given(ranks, ranks, seeds, st.integers(0, 3))
def test_joins_commute_and_joining_twice_changes_nothing(rank_a: int, rank_b: int, seed: int, shared: int) -> None:
    a = Subspace.random(rank_a, D, seed=seed)
    own = randn(rank_b, D, seed=seed + 1).double()
    rows = torch.cat([own, randn(shared, rank_a, seed=seed + 2).double() @ a.basis.double()])
    b = Subspace.spanned_by(rows)
    joined = a.join(b)
    torch.testing.assert_close(joined.projector(), b.join(a).projector(), atol=1e-6, rtol=0)
    assert joined.rank == min(torch.linalg.matrix_rank(torch.cat([a.basis, b.basis]).double(), rtol=1e-5).item(), D)
    for part in (a, b):
        again = joined.join(part)
        assert again.rank == joined.rank
        torch.testing.assert_close(again.projector(), joined.projector(), atol=1e-6, rtol=0)
        assert float(joined.project_out(part.basis).abs().max()) < 1e-6


def test_a_product_of_overlapping_projections_leaves_what_the_join_removes() -> None:
    a = Subspace(torch.tensor([[1.0, 0.0, 0.0]]))
    b = Subspace.spanned_by(torch.tensor([[1.0, 1.0, 0.0]]))
    state = torch.tensor([1.0, -1.0, 1.0])
    one_after_the_other = b.project_out(a.project_out(state))
    assert float((one_after_the_other @ a.basis.T).abs()) > 0.1
    assert float((a.join(b).project_out(state) @ a.basis.T).abs()) < 1e-6


def test_dependent_rows_are_dropped() -> None:
    rows = torch.tensor([[1.0, 0, 0, 0], [2.0, 0, 0, 0], [1.0, 1e-9, 0, 0], [0, 0, 3.0, 0]])
    assert Subspace.spanned_by(rows).rank == 2


@pytest.mark.parametrize("angle", [0.0, 1e-4, 0.3, 1.2, math.pi / 2])
def test_principal_angles_of_two_lines_are_the_angle_between_them(angle: float) -> None:
    a = Subspace(torch.tensor([[1.0, 0.0, 0.0]]))
    b = Subspace.spanned_by(torch.tensor([[math.cos(angle), math.sin(angle), 0.0]]).double())
    assert float(a.principal_angles(b)) == pytest.approx(angle, abs=1e-6)


def test_principal_angles_do_not_depend_on_the_order_or_the_basis() -> None:
    a, b = Subspace.random(3, D, seed=1), Subspace.random(5, D, seed=2)
    rotated = Subspace(torch.linalg.qr(randn(3, 3, seed=3)).Q @ a.basis)
    torch.testing.assert_close(a.principal_angles(b), b.principal_angles(rotated), atol=1e-5, rtol=0)
    assert bool((a.principal_angles(b).diff() >= 0).all())


def test_energy_share_of_isotropic_states_is_rank_over_width() -> None:
    states = randn(20_000, D, seed=5)
    assert Subspace.random(3, D, seed=6).energy_share(states) == pytest.approx(3 / D, abs=0.01)
    assert Subspace(torch.eye(2, D)).energy_share(torch.eye(2, D)) == pytest.approx(1.0)


def test_bfloat16_states_come_back_in_bfloat16_with_little_left() -> None:
    subspace, states = Subspace.random(4, 64, seed=0), randn(50, 64, seed=1)
    projected = subspace.project_out(states.bfloat16())
    assert projected.dtype == torch.bfloat16
    assert subspace.energy_share(projected) < 1e-4


@pytest.mark.parametrize(
    ("basis", "message"),
    [
        (torch.eye(4), "0 < rank < d_model"),
        (torch.zeros(0, 4), "0 < rank < d_model"),
        (torch.ones(2, 4), "not orthonormal"),
        (torch.tensor([[float("nan"), 0.0, 0.0]]), "NaN"),
        (torch.ones(4), r"\[rank, d_model\]"),
    ],
)
def test_a_basis_that_is_none_is_refused(basis: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Subspace(basis)


def test_streams_of_different_width_do_not_join() -> None:
    with pytest.raises(ValueError, match="d_model 4 and 5"):
        Subspace.random(1, 4).join(Subspace.random(1, 5))


def test_autocast_leaves_nothing_of_what_is_removed() -> None:
    """In bfloat16 the product with the rows would leave 3e-6 of the removed part's energy, and more."""
    subspace, states = Subspace.random(3, 32), torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
    rows = exported_hooks.Projection(subspace.basis)
    exact = states - states @ subspace.basis.T @ subspace.basis
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for projected in (subspace.project_out(states), rows(states), states - subspace.project_onto(states)):
            assert projected.dtype == torch.float32
            torch.testing.assert_close(projected, exact, atol=1e-6, rtol=0)
            assert subspace.energy_share(projected) < 1e-12
    half = states.bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(subspace.project_out(half), rows(half))
        assert subspace.project_out(half).dtype == torch.bfloat16
    assert subspace.project_out(torch.empty(2, 32, device="meta")).shape == (2, 32)
