"""Every figure is computed a second time in numpy, from states read one document at a time without padding."""

import numpy as np
import pandas as pd
import pytest
import torch

from mrp_lens.data import Corpus
from mrp_lens.data.tokenization import PaddingSide
from mrp_lens.edits import Edit, ProjectionEdit, SteeringEdit
from mrp_lens.edits.subspace import Subspace
from mrp_lens.metrics.geometry import Moments, geometry, propagation
from mrp_lens.metrics.pca import principal_angles, principal_plane
from mrp_lens.models import LensModel
from mrp_lens.models.hooks import hook_name
from tests.conftest import D_MODEL, LAYERS
from tests.support.edits import projection, weight_edit
from tests.support.states import GROUPS, Array, Subject, matrix, plain_passes, plain_states

PADDINGS: list[PaddingSide] = ["right", "left"]


def plain_share(states: Array, subspace: Subspace) -> float:
    rows = subspace.basis.double().numpy()
    return sum(float((row @ h) ** 2) for row in rows for h in states) / sum(float(h @ h) for h in states)


def plain_effective_rank(states: Array) -> float:
    values = np.abs(np.linalg.eigvalsh(np.cov(states.T)))
    shares = [value / values.sum() for value in values if value > 0]
    return float(np.exp(-sum(share * np.log(share) for share in shares)))


def edit_named(kind: str, model: LensModel) -> tuple[Edit, dict[str, Subspace]]:
    """An edit and what it removes at each hook."""
    if kind == "projection":
        return projection(1, 2), projection(1, 2).subspaces()
    if kind == "weight":
        return weight_edit(model, 1), {}
    if kind == "both":
        return weight_edit(model, 0) + projection(2, rank=5), projection(2, rank=5).subspaces()
    return SteeringEdit.towards(torch.ones(D_MODEL), layer=1, coefficient=3.0, mode="add"), {}


@pytest.mark.parametrize(
    ("kind", "padding"),
    [("projection", "right"), ("projection", "left"), ("weight", "right"), ("both", "left"), ("steering", "right")],
)
def test_every_column_of_geometry_equals_the_plain_calculation(
    subject: Subject, kind: str, padding: PaddingSide
) -> None:
    model, (edit, removed) = subject.model, edit_named(kind, subject.model)
    plain = plain_passes(model, [hook_name(layer) for layer in range(LAYERS)], edit)
    frame = geometry(model, GROUPS, edit, batch_size=4, padding=padding)
    assert list(frame["group"].unique()) == ["forget", "retain"]
    assert len(frame) == 2 * 2 * LAYERS
    for row in frame.to_dict("records"):
        hook = hook_name(row["layer"])
        before, states = (matrix(plain[row["group"], when][hook]) for when in ("before", row["when"]))
        distance = np.sqrt(np.mean([np.sum((a - b) ** 2) for a, b in zip(states, before, strict=True)]))
        norm = np.mean([np.sqrt(h @ h) for h in states])
        assert row["documents"] == (10 if row["group"] == "forget" else 7)
        assert row["tokens"] == len(states)
        assert row["norm"] == subject.close(norm)
        expected = distance / np.sqrt(np.mean([h @ h for h in before]))
        assert row["displacement"] == subject.close(expected, scale=1.0)
        assert row["effective_rank"] == subject.close(plain_effective_rank(states))
        if hook in removed:
            assert row["removed_rank"] == removed[hook].rank
            assert row["removed_energy"] == subject.close(plain_share(states, removed[hook]), scale=0.01)
            assert row["removed_energy_null"] == removed[hook].rank / D_MODEL
        else:
            assert row["removed_rank"] == 0
            assert np.isnan(row["removed_energy"])
            assert np.isnan(row["removed_energy_null"])


def test_a_projection_leaves_nothing_where_it_stands_and_moves_nothing_below(subject: Subject) -> None:
    frame = geometry(subject.model, GROUPS, projection(2))
    before, after = frame[frame["when"] == "before"], frame[frame["when"] == "after"]
    rounding = subject.relative**2 if subject.relative > 1e-3 else 1e-13  # of the dtype, squared
    assert after[after["layer"] == 2]["removed_energy"].max() < rounding
    assert before[before["layer"] == 2]["removed_energy"].min() > 0.01
    assert before["displacement"].max() == after[after["layer"] < 2]["displacement"].max() == 0.0
    assert after[after["layer"] >= 2]["displacement"].min() > 0.05


def test_without_spread_the_other_columns_are_the_same(model: LensModel, untouched: None) -> None:
    edit = projection(2)
    whole, quick = (geometry(model, GROUPS, edit, spread=spread) for spread in (True, False))
    left_out = ["effective_rank", "removed_energy"]
    assert whole["effective_rank"].notna().all()
    assert quick[left_out].isna().all(axis=None)
    pd.testing.assert_frame_equal(quick.drop(columns=left_out), whole.drop(columns=left_out))


def test_without_an_edit_there_are_only_rows_before(model: LensModel, untouched: None) -> None:
    alone = geometry(model, GROUPS["forget"], layers=[1, 3], site="mlp_out")
    assert alone[["group", "when", "layer"]].to_numpy().tolist() == [["facts", "before", 1], ["facts", "before", 3]]
    states = matrix(plain_states(model, GROUPS["forget"], ["blocks.3.hook_mlp_out"])["blocks.3.hook_mlp_out"])
    assert alone["effective_rank"][1] == pytest.approx(plain_effective_rank(states), rel=1e-4)
    assert set(principal_angles(model, GROUPS, rank=2)["when"]) == {"before"}
    assert set(principal_plane(model, GROUPS, layer=1)["when"]) == {"before"}


def test_a_projection_is_found_under_the_bridges_other_name_of_the_hook(model: LensModel, untouched: None) -> None:
    point = model.hook_dict["blocks.1.hook_resid_post"]
    for name in [name for name, other in model.hook_dict.items() if other is point]:
        edit = ProjectionEdit({name: Subspace.random(3, D_MODEL)})
        assert (geometry(model, GROUPS, edit, layers=[1])["removed_rank"] == 3).all()


def test_fewer_documents_are_a_choice_by_seed(model: LensModel, untouched: None) -> None:
    corpus = GROUPS["forget"]
    frames = [geometry(model, corpus, documents=4, seed=seed, layers=[2]) for seed in (0, 0, 1)]
    assert frames[0].equals(frames[1])
    assert not frames[0].equals(frames[2])
    assert frames[0]["documents"].tolist() == [4]
    whole = geometry(model, corpus, documents=None, layers=[2])
    assert whole.equals(geometry(model, corpus, documents=10, layers=[2]))
    possible = {tuple(sorted(set(range(10)) - {left})) for left in range(10)}
    nine = geometry(model, corpus, documents=9, layers=[2])["norm"][0]
    states = plain_states(model, corpus, [hook_name(2)])[hook_name(2)]
    norms = [np.mean([np.linalg.norm(h) for key, h in states.items() if key[0] in kept]) for kept in possible]
    assert min(abs(nine - norm) for norm in norms) < 1e-5 * nine


def test_noise_is_drawn_anew_for_every_batch(model: LensModel, untouched: None) -> None:
    """Pure noise fills nearly all directions; were it the same in all batches, no more than a document has tokens."""
    corpus = Corpus.from_texts(["A baker slept."] * 30)
    noisy = SteeringEdit.towards(torch.ones(D_MODEL), layer=1, coefficient=1.0, noise=1.0)
    for edit in (noisy, noisy + weight_edit(model, 2)):
        frame = geometry(model, corpus, edit, layers=[1], batch_size=1)
        assert frame["tokens"][0] / 30 < 8 < 22 < float(frame["effective_rank"].iloc[-1]) < D_MODEL
    assert noisy.seed == 0


def test_states_that_are_all_the_same_have_no_effective_rank(model: LensModel, untouched: None) -> None:
    edit = SteeringEdit.towards(torch.ones(D_MODEL), layer=1, coefficient=3.0)
    before, after = geometry(model, GROUPS["forget"], edit, layers=[1]).to_dict("records")
    assert 1.0 < before["effective_rank"] < D_MODEL
    assert np.isnan(after["effective_rank"])
    assert after["norm"] == pytest.approx(3.0, rel=1e-6)


def test_states_isotropic_in_k_dimensions_have_effective_rank_k() -> None:
    basis = Subspace.random(5, 20, seed=3).basis.double()
    moments = Moments(20)
    for part in (basis, -basis):
        moments.add(7.0 * part + 2.0, documents=1)  # a mean of their own, which must not count
    assert moments.effective_rank == pytest.approx(5.0, abs=1e-9)
    assert moments.tokens == 10
    uneven = Moments(20)
    uneven.add(torch.cat([3.0 * basis[:1], -3.0 * basis[:1], basis[1:2], -basis[1:2]]), documents=1)
    assert uneven.effective_rank == pytest.approx(np.exp(-0.9 * np.log(0.9) - 0.1 * np.log(0.1)))
    same = Moments(20)
    same.add(basis[:1].repeat(9, 1), documents=1)
    assert np.isnan(same.effective_rank)
    zero = Moments(20)
    zero.add(torch.zeros(3, 20), documents=1)
    assert np.isnan(zero.energy_share(Subspace(basis)))


def test_the_null_of_the_removed_energy_is_the_mean_over_random_subspaces() -> None:
    """Of any states, here most anisotropic ones; 4,000 subspaces, four standard errors."""
    moments = Moments(20)
    moments.add(torch.randn(50, 20, generator=torch.Generator().manual_seed(0)) * torch.arange(20) + 5.0, documents=1)
    shares = [moments.energy_share(Subspace.random(4, 20, seed=seed)) for seed in range(4000)]
    assert abs(np.mean(shares) - 4 / 20) < 4 * np.std(shares) / np.sqrt(len(shares))


@pytest.mark.parametrize("padding", PADDINGS)
def test_propagation_equals_the_plain_calculation(subject: Subject, padding: PaddingSide) -> None:
    model = subject.model
    removed = projection(0, 2).subspaces() | projection(1, rank=5, site="mlp_out").subspaces()
    edit = ProjectionEdit(removed) + weight_edit(model, 2)
    frame = propagation(model, GROUPS, edit, batch_size=4, padding=padding)
    sources = [(0, "blocks.0.hook_resid_post"), (1, "blocks.1.hook_mlp_out"), (2, "blocks.2.hook_resid_post")]
    cells = [(group, *source, layer) for group in GROUPS for source in sources for layer in range(source[0], LAYERS)]
    assert [tuple(row) for row in frame[["group", "source", "hook", "layer"]].to_numpy()] == cells
    plain = plain_passes(model, [*(hook_name(layer) for layer in range(LAYERS)), "blocks.1.hook_mlp_out"], edit)
    for row in frame.to_dict("records"):
        at, subspace = row["hook"] if row["layer"] == row["source"] else hook_name(row["layer"]), removed[row["hook"]]
        for when in ("before", "after"):
            states = matrix(plain[row["group"], when][at])
            assert row[when] == subject.close(plain_share(states, subspace), scale=0.01)
        assert row["null"] == subspace.rank / D_MODEL
        assert (row["documents"], row["tokens"]) == (10 if row["group"] == "forget" else 7, len(states))
        assert row["after"] < 1e-5 or row["layer"] > row["source"]
    assert frame[frame["layer"] > frame["source"]]["after"].min() > 1e-4  # later layers write it again


def test_what_cannot_be_followed_is_refused_by_name(model: LensModel, untouched: None) -> None:
    for other in (weight_edit(model, 1), SteeringEdit.towards(torch.ones(D_MODEL), layer=1, coefficient=3.0)):
        with pytest.raises(ValueError, match="holds no projection whose subspace could be followed"):
            propagation(model, GROUPS, other)
