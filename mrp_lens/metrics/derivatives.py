"""The layers above a point of the stream as a function of the states there, and its Jacobian times vectors."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from mrp_lens.finite import NonFiniteError, non_finite
from mrp_lens.model import LensModel, dtype_of, logits_of
from mrp_lens.stream import captured, frozen, hook_name, hooked
from mrp_lens.torch_state import refuse_inference_tensors

Output = Literal["logits", "stream"]

BLOCK = 8  # singular vectors that are iterated together: the leading one then converges as (sigma_9 / sigma_1)^4
ITERATIONS = 100
TOLERANCE = 1e-5  # relative change of the largest squared singular value at which the iteration ends


@dataclass(frozen=True)
class LayersAbove:
    """What the layers above a layer make of its resid_post, as a function of shifts of the states there.

    The states are those the model has, whatever edits are on it: with a SteeringEdit applied the Jacobian is that
    at c u. No Jacobian is ever formed; `jvp` is forward-mode, `vjp` reverse-mode differentiation. Both raise
    NonFiniteError where an output or a derivative is NaN or infinite.

    Attributes:
        model: HookedTransformer or TransformerBridge.
        layer: shifts are added to what leaves blocks.{layer}.hook_resid_post.
        tokens: [batch, seq]. A single row serves shifts, tangents and cotangents of any batch size.
        attention_mask: True for real tokens.
        moved: positions whose states are shifted; shifts and tangents elsewhere are ignored.
        read: for each row, the position whose output is read.
        output: "logits", or "stream": what leaves the last block, before the final norm.
    """

    model: LensModel
    layer: int
    tokens: Int[Tensor, "rows seq"]
    attention_mask: Bool[Tensor, "rows seq"]
    moved: Bool[Tensor, "rows seq"]
    read: Int[Tensor, " rows"]
    output: Output = "logits"

    def outputs(self, shifts: Float[Tensor, "batch seq d_model"]) -> Float[Tensor, "batch width"]:
        """The outputs with the states shifted, in the model's dtype; differentiable in the shifts."""

        def shift(activation: Tensor, hook: Any) -> Tensor:
            return activation + self._masked(shifts, activation)

        return self._run(shift, len(shifts))

    def jvp(self, tangents: Float[Tensor, "batch seq d_model"]) -> Float[Tensor, "batch width"]:
        """J v: by how much the outputs change, to first order, along shifts; in the model's dtype."""

        def attach(activation: Tensor, hook: Any) -> Tensor:
            # contiguous: an edit may hand on one vector expanded to all positions, which cannot hold tangents
            with warnings.catch_warnings():  # torch compiles its decompositions at the first call, with torch.jit
                warnings.filterwarnings("ignore", message="`torch.jit", category=DeprecationWarning)
                dual: Tensor = forward_ad.make_dual(activation.contiguous(), self._masked(tangents, activation))
            return dual

        with torch.no_grad(), forward_ad.dual_level():
            primal, tangent = forward_ad.unpack_dual(self._run(attach, len(tangents)))
            return torch.zeros_like(primal) if tangent is None else self._checked(tangent)

    def vjp(self, cotangents: Float[Tensor, "batch width"]) -> Float[Tensor, "batch seq d_model"]:
        """J^T w, in float32 or better; zero where no state is moved."""
        refuse_inference_tensors(self.model.parameters())
        dtype = torch.promote_types(cotangents.dtype, torch.float32)
        shape = (len(cotangents), self.tokens.shape[1], self.model.cfg.d_model)
        with torch.enable_grad():
            shifts = torch.zeros(shape, dtype=dtype, device=self.tokens.device, requires_grad=True)
            outputs = self.outputs(shifts)
            (gradient,) = torch.autograd.grad(outputs, shifts, cotangents.to(outputs))
        return self._checked(gradient)

    @property
    def inputs(self) -> int:
        """Number of coordinates that are shifted in a row: moved positions times d_model."""
        return int(self.moved[0].sum()) * int(self.model.cfg.d_model)

    def spread(self, coordinates: Float[Tensor, "batch inputs"]) -> Float[Tensor, "batch seq d_model"]:
        """The coordinates at the moved positions of the single row, zero elsewhere."""
        width = int(self.model.cfg.d_model)
        shifts = coordinates.new_zeros(len(coordinates), self.tokens.shape[1], width)
        shifts[:, self.moved[0]] = coordinates.reshape(len(coordinates), -1, width)
        return shifts

    def _masked(self, shifts: Tensor, activation: Tensor) -> Tensor:
        return torch.where(self.moved[..., None], shifts, 0.0).to(activation)

    def _run(self, hook: Callable[[Tensor, Any], Tensor], batch: int) -> Tensor:
        tokens, mask = (t.expand(batch, -1).contiguous() for t in (self.tokens, self.attention_mask))
        final = hook_name(self.model.cfg.n_layers - 1)
        # The fused attention kernels have no forward-mode derivative.
        with (
            frozen(self.model),
            sdpa_kernel(SDPBackend.MATH),
            hooked(self.model, [(hook_name(self.layer), hook)]),
            captured(self.model, [final]) as store,
        ):
            logits = logits_of(self.model, tokens, mask)
            values = logits if self.output == "logits" else store[final]
            values = values[torch.arange(batch, device=values.device), self.read.expand(batch)]
            if not bool(torch.isfinite(values.detach()).all()):
                raise non_finite(self.model, tokens, mask, f"the {self.output} above layer {self.layer}")
        return values

    def _checked(self, derivative: Tensor) -> Tensor:
        if not bool(torch.isfinite(derivative).all()):
            dtype = str(dtype_of(self.model)).removeprefix("torch.")
            raise NonFiniteError(
                f"the derivative of the {self.output} above layer {self.layer} holds NaN or infinity; the model is in {dtype}: load it in "
                "float32 or bfloat16, or weaken the edit"
            )
        return derivative


class JacobianSize(NamedTuple):
    """How much a Jacobian magnifies: over all directions, and along the one it magnifies most."""

    squared_norm: float  # of Frobenius: the trace of J J^T
    top_eigenvalue: float  # of J J^T: the square of the largest singular value


def jacobian_size(above: LayersAbove, *, probes: int, batch_size: int, generator: torch.Generator) -> JacobianSize:
    """||J||_F^2 and sigma_max(J)^2 of a single row, without forming J.

    The largest singular value comes from block power iteration, the norm from one product for each coordinate of the
    input where these are at most `probes`. With more coordinates it is Hutchinson's estimate: the leading eight
    singular directions exactly, the rest from `probes` random signs outside them (as in Hutch++, arXiv 2010.09649).

    Args:
        above: with a single row.
        probes: products J v that the norm may cost.
        batch_size: of the products.
        generator: on the CPU.
    """
    leading, squares = _leading_directions(above, generator)
    exact = above.inputs <= probes
    total = 0.0
    for start in range(0, above.inputs if exact else probes, batch_size):
        if exact:
            directions = torch.eye(above.inputs, device=leading.device)[start : start + batch_size]
        else:
            count = min(batch_size, probes - start)
            signs = torch.randint(0, 2, (count, above.inputs), generator=generator).to(leading) * 2 - 1
            directions = signs - (signs @ leading.T) @ leading
        total += float(above.jvp(above.spread(directions)).double().square().sum())
    return JacobianSize(total if exact else float(squares.sum()) + total / probes, float(squares[0]))


def _leading_directions(
    above: LayersAbove, generator: torch.Generator
) -> tuple[Float[Tensor, "block inputs"], Float[Tensor, " block"]]:
    """Leading right singular directions, and J's squared singular values on their span in descending order."""
    draws = torch.randn(above.inputs, min(BLOCK, above.inputs), generator=generator)
    directions = torch.linalg.qr(draws).Q.T.to(above.tokens.device)
    before = 0.0
    for _ in range(ITERATIONS):
        images = above.jvp(above.spread(directions))
        squares = torch.linalg.svdvals(images.double()).square()
        top = float(squares[0])
        if top - before <= TOLERANCE * top:
            break
        before = top
        pulled = above.vjp(images)[:, above.moved[0]].flatten(1)
        directions = torch.linalg.qr(pulled.T.float()).Q.T
    return directions, squares
