"""Small edits of every kind."""

from typing import Any

import pytest
import torch
from torch import Tensor

from mrp_lens.data.tokenization import Encoded
from mrp_lens.edits import ConditionalProjectionEdit, Edit, Gate, ProjectionEdit, SteeringEdit, WeightEdit
from mrp_lens.edits.subspace import Subspace
from mrp_lens.models import LensModel, logits_of, mlp_out_weight, tensor_digests
from mrp_lens.models.hooks import hook_name
from tests.conftest import D_MODEL


def projection(
    *layers: int, rank: int = 3, seed: int = 0, request: str = "edit", site: str = "resid_post"
) -> ProjectionEdit:
    subspaces = {hook_name(layer, site): Subspace.random(rank, D_MODEL, seed=seed + layer) for layer in layers}
    return ProjectionEdit(subspaces, request=request)


def conditional(
    *layers: int, rank: int = 3, seed: int = 0, request: str = "edit", site: str = "resid_post", **gate: Any
) -> ConditionalProjectionEdit:
    """The subspaces of `projection`, each behind a gate along a random direction that opens for about half of the states."""
    plain = projection(*layers, rank=rank, seed=seed, request=request, site=site)
    generator = torch.Generator().manual_seed(seed + 1000)
    settings = {"threshold": 0.0} | gate
    gates = {hook: Gate(torch.randn(D_MODEL, generator=generator), **settings) for hook in plain.hook_names}
    return ConditionalProjectionEdit(plain.subspaces(), gates, request=request)


def behind_several(
    *layers: int, seed: int = 0, request: str = "edit", hard: bool = False, directions: int = 3
) -> ConditionalProjectionEdit:
    """Each subspace behind a gate with several directions, whose thresholds and sharpness differ."""
    plain = projection(*layers, seed=seed, request=request)
    generator = torch.Generator().manual_seed(seed + 2000)
    thresholds = [0.1 + 0.05 * number for number in range(directions)]
    sharpness = [30.0 / (number + 1) for number in range(directions)]
    gates = {
        hook: Gate(torch.randn(directions, D_MODEL, generator=generator), tuple(thresholds), tuple(sharpness), hard)
        for hook in plain.hook_names
    }
    return ConditionalProjectionEdit(plain.subspaces(), gates, request=request)


def beside(
    edit: ProjectionEdit, *, request: str, rank: int = 2, seed: int = 5, **gate: Any
) -> ConditionalProjectionEdit:
    """A later request at the same hooks, with rows that are orthogonal to the edit's."""
    generator = torch.Generator().manual_seed(seed)
    subspaces, gates = {}, {}
    for hook, removed in edit.subspaces().items():
        rows, direction = torch.randn(rank, D_MODEL, generator=generator), torch.randn(D_MODEL, generator=generator)
        subspaces[hook] = Subspace.spanned_by(removed.project_out(rows))
        gates[hook] = Gate(direction, **({"threshold": 0.0} | gate))
    return ConditionalProjectionEdit(subspaces, gates, request=request)


def weight_edit(model: LensModel, layer: int, *, scale: float = 1.5) -> WeightEdit:
    weight = mlp_out_weight(model, layer)
    original = weight.read()
    return WeightEdit({weight.name: original * scale}, {weight.name: tensor_digests(original)})


def logits(model: LensModel, tokens: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return logits_of(model, tokens, torch.ones_like(tokens, dtype=torch.bool))


def log_probabilities(model: LensModel, row: Encoded) -> Tensor:
    """In float64, where a token follows that counts."""
    places = [place for place in range(len(row.ids) - 1) if row.in_loss[place + 1]]
    return logits(model, torch.tensor([row.ids]))[0, places].double().log_softmax(-1)


def all_kinds(model: LensModel, layer: int) -> list[Edit]:
    steering = SteeringEdit.towards(torch.ones(D_MODEL), layer=layer, coefficient=3.0, noise=0.1)
    return [projection(layer), steering, weight_edit(model, layer), projection(layer) + weight_edit(model, layer)]


def written(model: Any, prompts: torch.Tensor, new: int, *, cache: bool = True) -> torch.Tensor:
    """What a model of TransformerLens generates, greedily, after the prompts."""
    whole: torch.Tensor = model.generate(prompts, use_past_kv_cache=cache, max_new_tokens=new, **GREEDY)
    return whole[:, prompts.shape[1] :]


GREEDY = {"do_sample": False, "verbose": False, "stop_at_eos": False, "return_type": "tokens", "prepend_bos": False}


def assert_refused(model: LensModel, edit: Edit, match: str) -> None:
    with pytest.raises(ValueError, match=match), edit.applied(model):
        pass


def directions_of(gate: Gate) -> list[tuple[torch.Tensor, float, float]]:
    """Each direction of a gate, in float64, with its threshold and sharpness."""
    thresholds, steepness = (x if isinstance(x, tuple) else (x,) for x in (gate.threshold, gate.sharpness))
    return list(zip(gate.rows.double(), thresholds, steepness, strict=True))
