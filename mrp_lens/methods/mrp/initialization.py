"""MRP's rows: where they start (principal directions of forget states outside the retain states' span), and as they learn."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor
from torch.nn import Module

from mrp_lens.data.tokenization import Encoded, Encoder
from mrp_lens.edits import ProjectionEdit
from mrp_lens.edits.subspace import Subspace
from mrp_lens.methods.base import states_at
from mrp_lens.models import LensModel
from mrp_lens.models.hooks import HookFunction

Start = Literal["complement", "code", "random"]
Rows = Float[Tensor, "_rank d_model"]

USABLE = 1e-6  # a singular value below this share of the states' norm is rounding noise, not a direction


def start_rows(
    model: LensModel,
    encoder: Encoder,
    forget: Sequence[Encoded],
    retain: Sequence[Encoded],
    *,
    hooks: Sequence[str],
    taken: Mapping[str, Rows],
    rank: int,
    init: Start,
    retain_energy: float,
    generator: torch.Generator,
) -> dict[str, Rows]:
    """Orthonormal rows at each hook, orthogonal to those of earlier requests.

    "complement" follows the figure of the MRP paper (arXiv 2508.15449): forget states minus their part in the retain
    states' span, then the top principal directions of what is left. The span is *truncated* to the principal
    components that hold a share `retain_energy`: the states of enough tokens span everything, and the recipe taken
    literally leaves rounding noise. "code" swaps the two sides, as the released code does.

    Raises:
        ValueError: fewer usable directions than `rank`.
    """
    if init == "random":
        return {
            hook: orthonormal(
                torch.randn(rank, model.cfg.d_model, generator=generator).to(encoder.device), taken.get(hook)
            )
            for hook in hooks
        }
    sides = [states_at(model, encoder, rows, hooks, generator) for rows in (forget, retain)]
    left_side, right_side = sides if init == "complement" else sides[::-1]
    rows = {}
    for hook in hooks:
        states = left_side[hook]
        rest = without(without(states, top_directions(right_side[hook], energy=retain_energy)), taken.get(hook))
        _, singular, right = torch.linalg.svd(rest.double(), full_matrices=False)
        usable = int((singular > USABLE * torch.linalg.matrix_norm(states.double())).sum())
        if usable < rank:
            raise ValueError(
                f"{hook}: rank {rank} is above the {usable} directions that {len(states)} states leave outside the other "
                "side's span; lower rank or retain_energy, or give more text"
            )
        rows[hook] = orthonormal(right[:rank].float(), taken.get(hook))
    return rows


def top_directions(states: Float[Tensor, "states d_model"], *, energy: float) -> Rows:
    """The fewest principal directions (uncentred) with a share `energy` of the squared norm, at most d_model / 2."""
    _, singular, right = torch.linalg.svd(states.double(), full_matrices=False)
    share = singular.square().cumsum(0) / singular.square().sum()
    count = min(int((share < energy).sum()) + 1, states.shape[1] // 2)
    return right[:count].float()


def without(states: Float[Tensor, "states d_model"], basis: Rows | None) -> Float[Tensor, "states d_model"]:
    """The states less their part in the span of orthonormal rows; differentiable."""
    return states if basis is None else states - (states @ basis.to(states).T) @ basis.to(states)


def orthonormal(rows: Rows, taken: Rows | None) -> Rows:
    """Orthonormal rows spanning what `rows` span beyond `taken`; differentiable."""
    beyond = without(without(rows, taken), taken)  # twice: once leaves a remainder of rounding
    return rearrange(torch.linalg.qr(rearrange(beyond, "rank d -> d rank")).Q, "d rank -> rank d")


@dataclass
class LearnedRows:
    """The rows under training: W at each hook, with what the earlier requests remove, whose rows they stay orthogonal to."""

    rows: dict[str, Rows]
    taken: Mapping[str, Rows]
    earlier: Mapping[str, Module]
    on: bool = True
    alone: bool = False

    def hooks(self) -> list[tuple[str, HookFunction]]:
        """Hook functions that do what the earlier requests' edit does, and remove what W spans, in float32."""
        return [(hook, self._hook(hook)) for hook in dict.fromkeys([*self.rows, *self.taken])]

    def _hook(self, name: str) -> HookFunction:
        def project(activation: Tensor, hook: Any) -> Tensor:
            if not self.on:
                return activation
            left = rearrange(activation.float(), "batch seq d -> (batch seq) d")
            taken = self.taken.get(name)
            if name in self.earlier and not self.alone:
                left = self.earlier[name](left)  # first, so that its gates see what comes in
            if name in self.rows:
                left = without(left, orthonormal(self.rows[name], taken))
            return left.view_as(activation).type_as(activation)

        return project

    @contextmanager
    def off(self) -> Iterator[None]:
        """The model without any projection, so that what later requests keep is measured against it, not against what
        earlier requests left."""
        self.on = False
        try:
            yield
        finally:
            self.on = True

    @contextmanager
    def with_all(self) -> Iterator[None]:
        """The model as the edit makes it, whichever requests the step under way trains with."""
        alone, self.alone = self.alone, False
        try:
            yield
        finally:
            self.alone = alone

    def edit(self, request: str, record: Mapping[str, Any]) -> ProjectionEdit:
        """The rows as they are now."""
        subspaces = {
            hook: Subspace(orthonormal(rows.detach(), self.taken.get(hook)).cpu()) for hook, rows in self.rows.items()
        }
        return ProjectionEdit(subspaces, request=request, provenance=record)
