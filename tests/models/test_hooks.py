"""Hook points by name, and a part of the model run again from captured states."""

from typing import Any

import pytest
import torch

from mrp_lens.models import mlp_out_weight
from mrp_lens.models.hooks import captured, check_hook_names, hook_name, hook_points, layer_of, run_segment
from tests.conftest import LAYERS


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


def test_the_points_of_names_are_those_of_the_models_dictionary(model: Any) -> None:
    known = model.hook_dict
    points = hook_points(model, known)
    assert len(points) > 90
    assert all(found is point for found, point in zip(points, known.values(), strict=True))
    for name in ("blocks.1", "cfg.n_layers", "blocks.9.hook_resid_post", ""):
        with pytest.raises(ValueError, match=f"this model has no hook {name!r}"):
            hook_points(model, [name])
