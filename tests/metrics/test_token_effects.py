"""What an edit does to each token, against states read by hand."""

import math
from typing import Any

import pandas as pd
import pytest
import torch
from torch import Tensor

from mrp_lens.data import Corpus
from mrp_lens.edits import ConditionalProjectionEdit, Edit, ProjectionEdit, SteeringEdit, at_strength, edit_on
from mrp_lens.metrics import gate_tokens, token_effects
from mrp_lens.models import LensModel
from mrp_lens.models.hooks import hook_name
from tests.conftest import D_MODEL, LAYERS
from tests.support.edits import beside, conditional, projection, weight_edit
from tests.support.plain import ids_of, states_at

TEXT = "The colour of Zaxim is red."


def text_ids(model: LensModel) -> list[int]:
    found: Any = ids_of(model, TEXT)
    return [int(token) for token in torch.as_tensor(found).reshape(-1)]


def at(frame: pd.DataFrame, hook: str, measure: str) -> Tensor:
    return torch.tensor(frame[frame["hook"] == hook].sort_values("position")[measure].tolist(), dtype=torch.float64)


def states(model: LensModel, edit: Edit | None, hook: str) -> Tensor:
    """Of each token but BOS."""
    with edit_on(model, edit):
        return states_at(model, ids_of(model, TEXT), [hook])[hook][1:].detach().double()


def moved(before: Tensor, after: Tensor) -> Tensor:
    return (after - before).norm(dim=-1) / before.norm(dim=-1)


@pytest.mark.parametrize("site", ["resid_post", "resid_mid", "mlp_out"])
@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_states_move_by_what_is_computed_by_hand(model: LensModel, site: str, strength: float, untouched: None) -> None:
    low, high = hook_name(1, site), hook_name(2, site)
    edit = projection(1, 2, site=site)
    frame = token_effects(model, at_strength(model, edit, strength), text_ids(model))
    below = at_strength(model, ProjectionEdit({low: edit.subspaces()[low]}), strength)
    for hook, lower in ((low, None), (high, below)):
        arrived, rows = states(model, lower, hook), edit.subspaces()[hook].basis.double()
        left = arrived - strength * (arrived @ rows.T) @ rows
        torch.testing.assert_close(at(frame, hook, "own_displacement"), moved(arrived, left), atol=1e-5, rtol=1e-4)
        plain = states(model, None, hook)
        torch.testing.assert_close(at(frame, hook, "displacement"), moved(plain, left), atol=1e-5, rtol=1e-4)
    end = hook_name(LAYERS - 1)
    wanted = moved(states(model, None, end), states(model, at_strength(model, edit, strength), end))
    torch.testing.assert_close(at(frame, end, "displacement"), wanted, atol=1e-5, rtol=1e-4)
    assert frame["share"].isna().all()


def test_gates_are_those_of_gate_tokens_and_the_widest_counts(model: LensModel, untouched: None) -> None:
    first = conditional(1, 2, request="a")
    edit = first + beside(first, request="b")
    frame = token_effects(model, edit, text_ids(model))
    known = gate_tokens(model, edit, Corpus.from_texts([TEXT], name="text"), progress=False)
    for hook in (hook_name(1), hook_name(2)):
        shares = torch.stack([at(known[known["request"] == name], hook, "share") for name in "ab"])
        torch.testing.assert_close(at(frame, hook, "share"), shares.amax(dim=0), atol=1e-5, rtol=1e-4)
    assert frame["token"].iloc[:: frame["hook"].nunique()].tolist() == list(
        dict(zip(known["position"], known["token"], strict=True)).values()
    )
    assert frame[frame["hook"] == hook_name(3)][["share", "own_displacement"]].isna().all(axis=None)


def test_there_is_a_row_for_each_token_and_hook_in_order(model: LensModel, untouched: None) -> None:
    ids = text_ids(model)
    frame = token_effects(model, projection(1, site="attn_out"), ids, prompt=3)
    assert list(frame) == ["position", "token", "part", "hook", "layer", "share", "own_displacement", "displacement"]
    assert list(frame["hook"].unique()) == [hook_name(0), hook_name(1, "attn_out"), *map(hook_name, range(1, LAYERS))]
    assert frame["position"].tolist() == sorted([*range(len(ids) - 1)] * (LAYERS + 1))
    assert frame[frame["position"] < 2]["part"].eq("prompt").all()
    assert frame[frame["position"] >= 2]["part"].eq("answer").all()


def test_two_sites_of_a_layer(model: LensModel, untouched: None) -> None:
    """On the Bridge what is done at resid_mid is done where attn_out is: neither may be taken for the other."""
    edit = projection(1, site="attn_out", request="a") + projection(1, site="resid_mid", request="b")
    frame = token_effects(model, edit, text_ids(model))
    branch = hook_name(1, "attn_out")
    plain, rows = states(model, None, branch), projection(1).subspaces()[hook_name(1)].basis.double()
    wanted = moved(plain, plain - (plain @ rows.T) @ rows)
    for measure in ("own_displacement", "displacement"):
        torch.testing.assert_close(at(frame, branch, measure), wanted, atol=1e-5, rtol=1e-4)


def test_an_edit_of_weights_has_no_step_of_its_own(model: LensModel, untouched: None) -> None:
    frame = token_effects(model, weight_edit(model, 1), text_ids(model))
    assert frame["own_displacement"].isna().all()
    assert at(frame, hook_name(0), "displacement").eq(0.0).all()
    assert at(frame, hook_name(1), "displacement").gt(0.0).all()


def test_positions_of_steering_count_in_the_prompt(model: LensModel, untouched: None) -> None:
    edit = SteeringEdit.towards(torch.ones(D_MODEL), layer=1, coefficient=2.0, mode="add", positions=[-1])
    frame = token_effects(model, edit, text_ids(model), prompt=4)
    steered = at(frame, hook_name(1), "own_displacement").gt(0.0).tolist()
    assert [place for place, on in enumerate(steered) if on] == [2]  # the prompt's last, BOS not counted


def test_of_several_parts_at_one_hook_all_are_one_step(model: LensModel, untouched: None) -> None:
    steering = SteeringEdit.towards(torch.ones(D_MODEL), layer=1, coefficient=2.0, mode="add")
    frame = token_effects(model, steering + conditional(1), text_ids(model))
    hook = hook_name(1)
    plain = states(model, None, hook)
    wanted = moved(plain, states(model, steering + conditional(1), hook))
    torch.testing.assert_close(at(frame, hook, "own_displacement"), wanted, atol=1e-5, rtol=1e-4)
    own = conditional(1)
    assert isinstance(own, ConditionalProjectionEdit)
    share = own.gates("edit")[hook](plain.float() + 2.0 * steering.direction)
    torch.testing.assert_close(at(frame, hook, "share"), share.double(), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("text", "prompt", "message"),
    [("", None, "no token besides BOS"), (TEXT, 0, "prompt must be from 1 to"), (TEXT, 99, "got 99")],
)
def test_bad_input_is_refused(model: LensModel, text: str, prompt: int | None, message: str) -> None:
    ids = text_ids(model) if text else [int(model.tokenizer.bos_token_id)]
    with pytest.raises(ValueError, match=message):
        token_effects(model, projection(1), ids, prompt=prompt)


def test_an_edit_that_does_not_fit_leaves_the_model_as_it_was(model: LensModel, untouched: None) -> None:
    with pytest.raises(ValueError, match="this model has no hook"):
        token_effects(model, projection(9), text_ids(model))
    assert not math.isnan(float(token_effects(model, projection(1), text_ids(model))["displacement"].sum()))
