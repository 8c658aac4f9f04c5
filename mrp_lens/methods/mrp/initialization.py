"""Where MRP's rows start: principal directions of forget states, beyond the retain states' mean or outside their span."""

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from mrp_lens.data.tokenization import Encoded, Encoder
from mrp_lens.methods.base import states_at
from mrp_lens.models import LensModel

Start = Literal["difference", "complement", "code", "random"]
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
    complete: bool = False,
) -> dict[str, Rows]:
    """Orthonormal rows at each hook, orthogonal to those of earlier requests.

    "difference" takes the top principal directions of the forget states less the mean of the retain states: what a forget state
    has beyond an average one, whether or not retain states vary along it too.

    "complement" follows the figure of the MRP paper (arXiv 2508.15449): forget states minus their part in the retain
    states' span, then the top principal directions of what is left. The span is *truncated* to the principal
    components that hold a share `retain_energy`: the states of enough tokens span everything, and the recipe taken
    literally leaves rounding noise. "code" swaps the two sides, as the released code does.

    Where a short forget set has fewer directions than `rank`, `complete` adds random ones; else that is an error.

    Raises:
        ValueError: fewer usable directions than `rank`, and not `complete`.
    """
    if init == "random":
        return {
            hook: orthonormal(
                torch.randn(rank, model.cfg.d_model, generator=generator).to(encoder.device), taken.get(hook)
            )
            for hook in hooks
        }
    sides = [states_at(model, encoder, rows, hooks, generator) for rows in (forget, retain)]
    left_side, right_side = sides[::-1] if init == "code" else sides
    rows = {}
    for hook in hooks:
        states = left_side[hook]
        if init == "difference":
            beyond = states - right_side[hook].mean(dim=0)
        else:
            beyond = without(states, top_directions(right_side[hook], energy=retain_energy))
        rest = without(beyond, taken.get(hook))
        singular, right = principal_directions(rest)
        usable = int((singular > USABLE * torch.linalg.matrix_norm(states.double())).sum())
        if usable < rank and not complete:
            raise ValueError(
                f"{hook}: rank {rank} is above the {usable} directions that {len(states)} states leave outside the other "
                "side's span; lower rank or retain_energy, or give more text"
            )
        found = right[: min(rank, usable)].float()
        if usable < rank:
            random = torch.randn(rank - usable, model.cfg.d_model, generator=generator).to(found)
            found = torch.cat([found, without(random, found)])
        rows[hook] = orthonormal(found, taken.get(hook))
    return rows


def top_directions(states: Float[Tensor, "states d_model"], *, energy: float) -> Rows:
    """The fewest principal directions (uncentred) with a share `energy` of the squared norm, at most d_model / 2."""
    singular, right = principal_directions(states)
    share = singular.square().cumsum(0) / singular.square().sum()
    count = min(int((share < energy).sum()) + 1, states.shape[1] // 2)
    return right[:count].float()


def principal_directions(
    states: Float[Tensor, "states d_model"],
) -> tuple[Float[Tensor, " directions"], Float[Tensor, "directions d_model"]]:
    """Singular values, falling, and right singular vectors, from the d_model x d_model Gram matrix in float64: exact down to
    about 1e-8 of the largest, for a fraction of the time of a decomposition of the states themselves."""
    values, vectors = torch.linalg.eigh(states.double().T @ states.double())
    return values.flip(0).clamp(min=0.0).sqrt(), vectors.T.flip(0)


def without(states: Float[Tensor, "states d_model"], basis: Rows | None) -> Float[Tensor, "states d_model"]:
    """The states less their part in the span of orthonormal rows; differentiable."""
    return states if basis is None else states - (states @ basis.to(states).T) @ basis.to(states)


def orthonormal(rows: Rows, taken: Rows | None) -> Rows:
    """Orthonormal rows spanning what `rows` span beyond `taken`; differentiable."""
    beyond = without(without(rows, taken), taken)  # twice: once leaves a remainder of rounding
    return rearrange(torch.linalg.qr(rearrange(beyond, "rank d -> d rank")).Q, "d rank -> rank d")
