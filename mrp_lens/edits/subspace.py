"""Subspaces of the residual stream as orthonormal bases. Pure tensors, no model."""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from mrp_lens.utils.torch_state import without_autocast

Law = Literal["uniform", "gaussian"]

ORTHONORMAL_TOLERANCE = 1e-4
DEPENDENT_TOLERANCE = 1e-5


@dataclass(frozen=True, eq=False)
class Subspace:
    """A subspace given by orthonormal rows, kept in float32.

    Projecting it out of a state h is `h - (h Q^T) Q` (MRP, arXiv 2508.15449). Two subspaces are the same if their
    projectors `Q^T Q` are, whatever the bases.

    Attributes:
        basis: Q, [rank, d_model], a copy of what is given.

    Raises:
        TypeError: the basis is not a floating point tensor.
        ValueError: wrong number of dimensions, rank 0 or >= d_model, NaN, or rows that are not orthonormal
            (use `Subspace.spanned_by` for those).

    Example:
        >>> x = Subspace(torch.tensor([[1.0, 0.0]]))
        >>> x.project_out(torch.tensor([3.0, 4.0]))
        tensor([0., 4.])
    """

    basis: Float[Tensor, "rank d_model"]

    def __post_init__(self) -> None:
        if not isinstance(self.basis, Tensor) or not self.basis.is_floating_point():
            raise TypeError(f"a basis must be a floating point tensor, got {type(self.basis).__name__}")
        if self.basis.ndim != 2 or not 0 < self.basis.shape[0] < self.basis.shape[1]:
            raise ValueError(
                f"a basis must have shape [rank, d_model] with 0 < rank < d_model, got {list(self.basis.shape)}: "
                "removing every direction would leave no state"
            )
        basis = own_copy(self.basis)
        if not bool(torch.isfinite(basis).all()):
            raise ValueError("a basis must be finite, this one holds NaN or infinity")
        off = float(
            (basis.double() @ basis.double().T - torch.eye(len(basis), dtype=torch.float64, device=basis.device))
            .abs()
            .max()
        )
        if off > ORTHONORMAL_TOLERANCE:
            raise ValueError(
                f"the rows are not orthonormal (off by {off:.2g}); make them so with Subspace.spanned_by(rows)"
            )
        object.__setattr__(self, "basis", basis)

    @classmethod
    def spanned_by(cls, rows: Float[Tensor, "n d_model"], *, tolerance: float = DEPENDENT_TOLERANCE) -> "Subspace":
        """The span of any vectors; directions with a singular value below `tolerance` times the largest are dropped.

        Raises:
            ValueError: the rows are all zero, hold NaN, or span everything.
        """
        if rows.ndim != 2 or not bool(torch.isfinite(rows).all()):
            raise ValueError(f"rows must be finite and of shape [n, d_model], got {list(rows.shape)}")
        _, singular, right = torch.linalg.svd(rows.detach().double(), full_matrices=False)
        if singular.numel() == 0 or float(singular[0]) == 0.0:
            raise ValueError("the rows are all zero and span nothing")
        return cls(right[singular > tolerance * singular[0]].float())

    @classmethod
    def random(cls, rank: int, d_model: int, *, seed: int = 0) -> "Subspace":
        """A uniformly distributed subspace: the control of the same rank."""
        generator = torch.Generator().manual_seed(seed)
        return cls.spanned_by(torch.randn(rank, d_model, generator=generator, dtype=torch.float64))

    @property
    def rank(self) -> int:
        """Number of directions."""
        return int(self.basis.shape[0])

    @property
    def d_model(self) -> int:
        """Width of the stream."""
        return int(self.basis.shape[1])

    def to(self, device: torch.device | str) -> "Subspace":
        """The same subspace on another device."""
        return self if self.basis.device == torch.device(device) else Subspace(self.basis.to(device))

    def project_onto(self, states: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        """The part of the states inside the subspace; computed in float32 or better, returned in the states' dtype."""
        wide = states if states.dtype == torch.float64 else states.float()
        basis = self.basis.to(wide)
        with without_autocast(wide):
            return ((wide @ basis.T) @ basis).type_as(states)

    def project_out(self, states: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        """The states without their part inside the subspace."""
        wide = states if states.dtype == torch.float64 else states.float()
        return (wide - self.project_onto(wide)).type_as(states)

    def join(self, other: "Subspace") -> "Subspace":
        """The smallest subspace that contains both. Keeps this one's rows and adds what the other has beyond them.

        Directions of `other` at an angle below 1e-5 rad to this subspace count as inside it.
        """
        self._check_fits(other)
        mine, theirs = self.basis.double(), other.basis.to(self.basis.device).double()
        exact = torch.linalg.qr(mine.T).Q.T
        rest = theirs - (theirs @ exact.T) @ exact
        _, sines, right = torch.linalg.svd(rest, full_matrices=False)
        added = right[sines > DEPENDENT_TOLERANCE]
        if len(added) == 0:
            return self
        added = added - (added @ exact.T) @ exact  # a second pass, where the first left a small remainder
        return Subspace(torch.cat([mine, torch.linalg.qr(added.T).Q.T]).float())

    def principal_angles(self, other: "Subspace") -> Float[Tensor, "smaller_rank"]:
        """Angles between the two subspaces in radians, ascending, min(rank) of them (Björck and Golub 1973).

        Small angles come from sines and large ones from cosines, so that each is accurate.
        """
        self._check_fits(other)
        small, large = sorted((self.basis.double().cpu(), other.basis.double().cpu()), key=len)
        cosines = torch.linalg.svdvals(small @ large.T).clamp(max=1.0)
        sines = torch.linalg.svdvals(small - (small @ large.T) @ large).flip(0).clamp(max=1.0)[: len(small)]
        return torch.where(cosines**2 > 0.5, torch.arcsin(sines), torch.arccos(cosines)).float()

    def energy_share(self, states: Float[Tensor, "*batch d_model"]) -> float:
        """Share of the states' squared norm that lies inside the subspace, in [0, 1]; rank / d_model if isotropic."""
        wide = states.detach().double()
        basis = self.basis.to(wide)
        return float((wide @ basis.T).square().sum() / wide.square().sum())

    def projector(self) -> Float[Tensor, "d_model d_model"]:
        """Q^T Q in float64: for comparing subspaces, not for applying them."""
        return self.basis.double().T @ self.basis.double()

    def _check_fits(self, other: "Subspace") -> None:
        if self.d_model != other.d_model:
            raise ValueError(f"subspaces of different streams: d_model {self.d_model} and {other.d_model}")


def own_copy(tensor: Float[Tensor, "*rows d_model"]) -> Float[Tensor, "*rows d_model"]:
    """The values in float32, in memory of their own: whoever changes the tensor later does not change the copy. It may be
    differentiated through even if it is made inside `torch.inference_mode()`."""
    with torch.inference_mode(False):
        return tensor.detach().to(torch.float32, copy=True, memory_format=torch.contiguous_format)


def unit(direction: Float[Tensor, " d_model"]) -> Float[Tensor, " d_model"]:
    """A copy of the direction at length 1, in float32.

    Raises:
        TypeError: not a floating point tensor.
        ValueError: not a finite vector other than zero.
    """
    if not isinstance(direction, Tensor) or not direction.is_floating_point():
        raise TypeError(f"direction must be a floating point tensor, got {type(direction).__name__}")
    if direction.ndim != 1 or not bool(torch.isfinite(direction).all()) or float(direction.norm()) == 0.0:
        raise ValueError(
            f"direction must be a finite, non-zero vector [d_model], got shape {list(direction.shape)}, norm {float(direction.norm())}"
        )
    wide = own_copy(direction)
    with torch.inference_mode(False):
        return wide if abs(float(wide.norm()) - 1.0) < 1e-6 else wide / wide.norm()


def random_units(count: int, d_model: int, law: Law, generator: torch.Generator) -> Float[Tensor, "{count} {d_model}"]:
    """Random unit vectors as RMU draws its own: entries from U[0, 1) ("uniform"), or isotropic ("gaussian").

    Two of the first kind have cosine 0.75 with each other on average, two of the second 0.
    """
    draw = torch.rand if law == "uniform" else torch.randn
    directions = draw(count, d_model, generator=generator)
    return directions / directions.norm(dim=-1, keepdim=True)
