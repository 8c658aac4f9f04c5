"""Less of an edit and more: exactly so much of the way, nothing and all of it at the ends; and single directions."""

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mrp_lens.edits import (
    ConditionalProjectionEdit,
    Direction,
    Edit,
    EditStack,
    ProjectionEdit,
    SteeringEdit,
    WeightEdit,
    at_strength,
    most_strength,
)
from mrp_lens.edits.wrapped import WrappedEdit
from mrp_lens.models import LensModel, describe, mlp_out_weight
from mrp_lens.models.hooks import captured, hook_name
from tests.conftest import D_MODEL
from tests.support.edits import assert_refused, behind_several, beside, conditional, logits, projection, weight_edit

LAYER = 1
KINDS = ("projection", "conditional", "replace", "add", "weight", "stack")


def edit_of(kind: str, model: LensModel, site: str = "resid_post") -> Edit:
    direction = torch.randn(D_MODEL, generator=torch.Generator().manual_seed(3))
    if kind in ("replace", "add"):
        return SteeringEdit.towards(direction, layer=LAYER, coefficient=3.0, mode=kind, site=site)  # type: ignore[arg-type]
    return {
        "projection": projection(LAYER, site=site),
        "conditional": conditional(LAYER, site=site),
        "weight": weight_edit(model, LAYER),
        "stack": projection(LAYER, site=site) + weight_edit(model, LAYER),
    }[kind]


def states(model: LensModel, edit: Edit | None, tokens: Tensor, hook: str) -> Tensor:
    with captured(model, [hook]) as store:
        if edit is None:
            logits(model, tokens)
            return store[hook].double()
    with edit.applied(model), captured(model, [hook]) as store:
        logits(model, tokens)
    return store[hook].double()


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_the_unedited_model_and_1_is_the_edit(
    model: LensModel, tokens: Tensor, kind: str, untouched: None
) -> None:
    edit, plain = edit_of(kind, model), logits(model, tokens)
    with at_strength(model, edit, 0.0).applied(model):
        assert torch.equal(logits(model, tokens), plain)
    assert at_strength(model, edit, 1.0) is edit
    with at_strength(model, edit, 0.5).applied(model):
        half = logits(model, tokens)
    with edit.applied(model):
        whole = logits(model, tokens)
    assert not torch.equal(half, plain)
    assert not torch.equal(half, whole)
    assert torch.equal(logits(model, tokens), plain)


@pytest.mark.parametrize("site", ["resid_post", "resid_mid", "attn_out"])
@pytest.mark.parametrize("kind", ["projection", "conditional", "replace", "add"])
def test_states_go_so_much_of_the_way(model: LensModel, tokens: Tensor, kind: str, site: str, untouched: None) -> None:
    edit, hook = edit_of(kind, model, site), hook_name(LAYER, site)
    plain, whole = (states(model, each, tokens, hook) for each in (None, edit))
    for strength in (0.25, 0.5, *((2.0,) if kind == "add" else ())):
        found = states(model, at_strength(model, edit, strength), tokens, hook)
        torch.testing.assert_close(found, plain + strength * (whole - plain), atol=1e-4, rtol=1e-4)
    if kind == "projection":
        assert isinstance(edit, ProjectionEdit)
        rows = edit.subspaces()[hook].basis.double()
        torch.testing.assert_close(
            states(model, at_strength(model, edit, 0.25), tokens, hook),
            plain - 0.25 * (plain @ rows.T) @ rows,
            atol=1e-4,
            rtol=1e-4,
        )


def test_where_two_sites_of_a_layer_are_edited_each_goes_so_much_of_the_way(double: LensModel, tokens: Tensor) -> None:
    """On the Bridge a change at resid_mid is made where that of attn_out is."""
    both = projection(LAYER, site="attn_out", request="a") + projection(LAYER, site="resid_mid", request="b")
    mid = hook_name(LAYER, "resid_mid")
    first = states(double, at_strength(double, projection(LAYER, site="attn_out"), 0.5), tokens, mid)
    found = states(double, at_strength(double, both, 0.5), tokens, mid)
    rows = projection(LAYER).subspaces()[hook_name(LAYER)].basis.double()
    torch.testing.assert_close(found, first - 0.5 * (first @ rows.T) @ rows, atol=1e-6, rtol=1e-6)


def test_matrices_go_so_much_of_the_way_also_of_several_edits_after_one_another(
    model: LensModel, untouched: None
) -> None:
    weight = mlp_out_weight(model, LAYER)
    own, first = weight.read(), weight_edit(model, LAYER)
    with first.applied(model):
        second = weight_edit(model, LAYER)  # 1.5 * 1.5
    for edit, factor in ((first, 1.5), (EditStack([first, second]), 2.25)):
        for strength in (0.5, 2.0):
            with at_strength(model, edit, strength).applied(model):
                torch.testing.assert_close(weight.read(), own + strength * (factor - 1.0) * own)
    assert torch.equal(weight.read(), own)


def test_a_strength_that_makes_no_sense_is_refused(model: LensModel) -> None:
    edit = projection(LAYER)
    for strength in (-0.1, 1.1, math.inf, math.nan):
        with pytest.raises(ValueError, match="strength must be a number from 0 to 1"):
            at_strength(model, edit, strength)
    with pytest.raises(TypeError, match="strength must be a number, got '1'"):
        at_strength(model, edit, "1")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"strength must be a number from 0, got -1"):
        at_strength(model, edit_of("add", model), -1.0)
    limits = {kind: most_strength(edit_of(kind, model)) for kind in KINDS}
    assert limits == dict.fromkeys(KINDS, 1.0) | {"add": math.inf, "weight": math.inf}


def test_what_is_no_whole_edit_is_neither_saved_nor_merged_nor_put_on_twice(
    model: LensModel, tmp_path: Path, untouched: None
) -> None:
    half = at_strength(model, projection(LAYER, site="mlp_out"), 0.5)
    with pytest.raises(ValueError, match=r"cannot be saved: it is an edit at strength 0\.5"):
        half.save_pretrained(tmp_path / "half")
    with pytest.raises(ValueError, match=r"it is an edit at strength 0\.5"):
        half.merge_(model)
    with half.applied(model):
        assert_refused(model, half, "attached to this model already")
        assert_refused(model, projection(LAYER, site="mlp_out"), "another projection is on")
    with pytest.raises(ValueError, match="has no strength"):
        at_strength(model, half, 0.5)


def test_an_edit_of_another_model_is_refused_at_any_strength(model: LensModel, untouched: None) -> None:
    other = {"blocks.9.weight": torch.ones(3, 3)}
    for edit in (projection(9), WeightEdit(other, {"blocks.9.weight": {"float32": ""}})):
        assert_refused(model, at_strength(model, edit, 0.5), "this model has no")


def test_a_wrapped_edit_says_which_part_and_hook_is_wrapped(model: LensModel, tokens: Tensor) -> None:
    steering = SteeringEdit.towards(torch.ones(D_MODEL), layer=2, coefficient=1.0, mode="add")
    edit, seen = conditional(1) + steering, []

    def noting(part: Edit, hook: str, function: object) -> object:
        seen.append((type(part), hook))
        return function

    watched = WrappedEdit(WrappedEdit(edit, noting), noting)
    with watched.applied(model):
        found = logits(model, tokens)
    with edit.applied(model):
        assert torch.equal(logits(model, tokens), found)
    assert set(seen) == {(ConditionalProjectionEdit, hook_name(1)), (SteeringEdit, hook_name(2))}
    assert len(seen) == 4
    assert watched.layers == edit.layers


def test_single_directions_alone_and_left_out() -> None:
    edit = projection(1, 2, rank=2, request="a") + projection(2, rank=1, seed=9, request="b")
    assert isinstance(edit, ProjectionEdit)
    assert edit.directions == (
        *(Direction("a", hook_name(layer), row) for layer in (1, 2) for row in (0, 1)),
        Direction("b", hook_name(2), 0),
    )
    chosen = edit.directions[3]
    alone = edit.with_directions([chosen])
    assert alone.directions == (Direction("a", hook_name(2), 0),)
    assert torch.equal(alone.subspaces()[hook_name(2)].basis, edit.subspaces("a")[hook_name(2)].basis[1:])
    others = edit.with_directions(each for each in edit.directions if each != chosen)
    assert len(others.directions) == 4
    assert edit.with_directions(edit.directions) == edit


def test_no_fit_made_what_is_left_of_its_edit(model: LensModel, untouched: None) -> None:
    edit, weights = projection(1, rank=2), weight_edit(model, 1)
    for each in (edit, weights):
        each.provenance = {"model": describe(model), "method": "MRP"}
    for changed in (edit.with_directions(edit.directions[:1]), at_strength(model, weights, 0.5)):
        assert changed.provenance == {"model": describe(model)}


def test_directions_keep_their_gates() -> None:
    first = conditional(1, 2, rank=2, request="a")
    edit = first + beside(first, request="b", rank=1)
    assert isinstance(edit, ProjectionEdit)
    alone = edit.with_directions([Direction("b", hook_name(2), 0)])
    assert isinstance(alone, ConditionalProjectionEdit)
    assert alone.gates("b") == {hook_name(2): edit.gates("b")[hook_name(2)]}
    several = behind_several(1)
    assert several.with_directions(several.directions[:1]).gates("edit") == several.gates("edit")


def test_directions_that_there_are_not_are_refused() -> None:
    edit = projection(1, rank=2)
    with pytest.raises(ValueError, match=r"no direction \('edit', 'blocks.1.hook_resid_post', 2\)"):
        edit.with_directions([Direction("edit", hook_name(1), 2)])
    with pytest.raises(ValueError, match="needs a direction at least"):
        edit.with_directions([])
