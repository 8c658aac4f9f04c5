"""How the layers above react to a change of the stream: to noise, and to RMU's direction."""

import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from mrp_lens.data import Corpus
from mrp_lens.data.tokenization import PaddingSide, TokenBatch
from mrp_lens.metrics.activations import StateReader, Texts, direction_for, groups_of, hooks_at
from mrp_lens.metrics.bootstrap import TokenMean, bootstrap_interval
from mrp_lens.models import LensModel, logits_of
from mrp_lens.models.finite import check_finite, check_states, non_finite
from mrp_lens.models.hooks import captured, frozen, hook_name, hooked, run_segment
from mrp_lens.utils.torch_state import ordinary_torch, refuse_inference_tensors
from mrp_lens.utils.validation import check_whole, generator_for

Output = Literal["logits", "stream"]

BLOCK = 8  # singular vectors that are iterated together: the leading one then converges as (sigma_9 / sigma_1)^4
ITERATIONS = 100
TOLERANCE = 1e-5  # relative change of the largest squared singular value at which the iteration ends
DEFAULT_SHARE = 0.1  # length of the noise as a share of the mean norm at layer 0, where no law is given
MEASURES = ("sensitivity", "input_ratio", "norm", "noise")


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
        check_finite(self.model, derivative, f"the derivative of the {self.output} above layer {self.layer}")
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


@ordinary_torch(gradients=False)
def noise_sensitivity(
    model: LensModel,
    texts: Texts,
    *,
    layers: Sequence[int] | None = None,
    noise: float | None = None,
    relative: float | None = None,
    draws: int = 1,
    seed: int = 0,
    batch_size: int = 32,
    max_length: int | None = None,
    padding: PaddingSide = "right",
    progress: bool = True,
) -> pd.DataFrame:
    """||g(h + xi) - g(h)||^2 / ||g(h)||^2 per layer, xi ~ N(0, noise * I): arXiv 2408.06223 finds it fall with depth.

    g is the layers above, read as the stream that leaves the last block (before the final norm), so that ||g(h)|| is
    the same at every layer. Each content token's state at blocks.{layer}.hook_resid_post gets its own xi, all in the
    same pass. The draws are the same at all layers up to their scale, and whichever layers and groups are asked for.

    Args:
        model: HookedTransformer or TransformerBridge, with the edit on if there is one.
        texts: a corpus, or several by name: {"forget": ..., "retain": ...}. Pads and BOS get no noise.
        layers: where noise is added. None: all.
        noise: variance per coordinate, the same at all layers, as in the paper. None, and no `relative`: that for
            which the length of xi is a tenth of the texts' mean norm at layer 0.
        relative: instead of `noise`, the length of xi (root mean square) over that of the batch's states at the same
            layer. Norms grow with depth, and this noise with them.
        draws: of the noise for each token; their mean counts.
        seed: of the noise, which also depends on the batches.
        batch_size, max_length, padding, progress: as in `alignment`.

    Returns:
        One row a group and layer: `group`, `layer`, `documents`, `tokens`; `noise`, variance per coordinate (its mean
        over tokens); `sensitivity`, mean over tokens, with its 95% interval over documents `low`, `high`; the control
        `input_ratio`, mean of ||xi||^2 / ||h||^2: what would come out if the layers above did nothing; `norm`, mean
        L2 norm of the states in units of the stream.

    Raises:
        TypeError, ValueError: no texts, no token, a layer that does not exist, both `noise` and `relative`, either not
            above 0, draws below 1, or a state that is 0; NonFiniteError where states are NaN or infinite.
    """
    if noise is not None and relative is not None:
        raise ValueError(f"give noise or relative, not both; got noise={noise}, relative={relative}")
    for name, value in (("noise", noise), ("relative", relative)):
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"{name} must be a finite number above 0, got {value}")
    check_whole(draws=draws)
    groups, hooks = groups_of(texts), hooks_at(model, layers, "resid_post")
    reader = StateReader(model, None, None, seed, batch_size, max_length, padding, progress)
    if noise is None and relative is None:
        noise = _default_noise(reader, groups)
    rows = []
    for group, corpus in groups.items():
        generator = generator_for(seed)  # anew, so that no group depends on the others
        means = {layer: {name: TokenMean() for name in MEASURES} for layer in hooks}
        for places, batch in reader.batches(corpus):
            units = torch.randn(draws, int(batch.content_mask.sum()), model.cfg.d_model, generator=generator)
            documents = torch.tensor(places)[batch.content_mask.nonzero()[:, 0].cpu()]
            clean = _streams(model, batch, {*hooks.values(), _final(model)})
            for layer, hook in hooks.items():
                states = clean[hook].float()
                mean_square = float(states.double().square().mean())
                variance = relative**2 * mean_square if relative is not None else noise
                assert variance is not None
                reactions = [_reaction(model, batch, hook, clean, variance**0.5 * unit) for unit in units]
                changes = (torch.stack(parts).mean(dim=0) for parts in zip(*reactions, strict=True))
                norm = states.norm(dim=-1)
                values = (*changes, norm, torch.full_like(norm, variance))
                for name, value in zip(MEASURES, values, strict=True):
                    means[layer][name].add(value, documents)
        for layer, mean in means.items():
            sensitivity = mean["sensitivity"]
            rows.append(
                {"group": group, "layer": layer, "documents": sensitivity.documents, "tokens": int(sensitivity.tokens)}
                | {"noise": mean["noise"].mean, "sensitivity": sensitivity.mean}
                | dict(zip(("low", "high"), sensitivity.interval(least=0.0), strict=True))
                | {"input_ratio": mean["input_ratio"].mean, "norm": mean["norm"].mean}
            )
    return pd.DataFrame(rows)


@ordinary_torch(gradients=False)
def predicted_coefficient(
    model: LensModel,
    texts: Texts,
    direction: Float[Tensor, " _width"],
    *,
    layers: Sequence[int] | None = None,
    batch_size: int = 32,
    max_length: int | None = None,
    padding: PaddingSide = "right",
    seed: int = 0,
    progress: bool = True,
) -> pd.DataFrame:
    """c = ||J h|| / ||J u|| * cos(J u, J h), Eq. 19 of arXiv 2408.06223 with eps = 0: the c u that acts most like h.

    It is the least-squares c in J h = c J u: the multiple of u that the layers above, to first order, turn into what
    is closest to what they make of h. J is the Jacobian of the layers above at the model's state h of the last content
    token of each document, with all other states as they are, from that state to the stream that leaves the last
    block at the same position. The final norm is left out: it ignores the length of what it gets, so that with it
    J h nearly vanishes at the last layers, whatever h is.

    Args:
        model: HookedTransformer or TransformerBridge, with the edit on if there is one.
        texts: a corpus, or several by name: {"forget": ..., "retain": ...}.
        direction: u, [d_model], of any length but 0; c is for it at length 1.
        layers: whose resid_post is h. None: all.
        batch_size: documents at a time.
        max_length: tokens at which documents are cut. None: the model's context length.
        padding: "right" or "left".
        seed: of the bootstrap.
        progress: show a progress bar.

    Returns:
        One row a group and layer: `group`, `layer`, `documents`; `coefficient`, mean over documents in units of the
        stream, with its 95% bootstrap interval `low`, `high`, and `std` over documents; the control `projection`, mean
        of u . h: what would come out if the layers above did nothing; `norm`, mean L2 norm of those states. The
        coefficient and its columns are NaN where the layers above do not react to u at all (an edit replaces what they
        make of it); `low` and `high` also with a single document.

    Raises:
        TypeError, ValueError: no texts, no token, a layer that does not exist, a direction of the wrong size or zero;
            NonFiniteError where states or derivatives are NaN or infinite.
    """
    u = direction_for(model, direction)
    groups, hooks = groups_of(texts), hooks_at(model, layers, "resid_post")
    reader = StateReader(model, None, None, seed, batch_size, max_length, padding, progress)
    rows = []
    for group, corpus in groups.items():
        found: dict[int, list[Tensor]] = {layer: [] for layer in hooks}
        for _, batch in reader.batches(corpus):
            places = torch.arange(batch.tokens.shape[1], device=batch.tokens.device)
            last = (batch.content_mask * places).amax(dim=1)
            moved = places == last[:, None]
            clean = _streams(model, batch, hooks.values(), moved)
            for layer, hook in hooks.items():
                states = clean[hook].float()
                above = LayersAbove(model, layer, batch.tokens, batch.attention_mask, moved, last, "stream")
                of_states = above.jvp(states[:, None] * moved[..., None]).double()
                of_direction = above.jvp((u * moved[..., None]).float()).double()
                reaction = of_direction.square().sum(dim=1)
                coefficient = (of_direction * of_states).sum(dim=1) / reaction.where(reaction > 0, math.nan)
                found[layer].append(
                    torch.stack([coefficient, (states @ u).double(), states.norm(dim=1).double()]).cpu()
                )
        for layer, parts in found.items():
            coefficients, projections, norms = torch.cat(parts, dim=1).numpy()
            known = not np.isnan(coefficients).any()
            low, high = bootstrap_interval(coefficients, seed=seed) if known else (math.nan, math.nan)
            rows.append(
                {"group": group, "layer": layer, "documents": len(coefficients)}
                | {
                    "coefficient": float(coefficients.mean()),
                    "low": low,
                    "high": high,
                    "std": float(coefficients.std()),
                }
                | {"projection": float(projections.mean()), "norm": float(norms.mean())}
            )
    return pd.DataFrame(rows)


def _streams(
    model: LensModel, batch: TokenBatch, names: Iterable[str], chosen: Bool[Tensor, "batch seq"] | None = None
) -> dict[str, Float[Tensor, "tokens d_model"]]:
    """What leaves the hooks at the chosen positions (None: the content tokens), without gradient."""
    last = model.cfg.n_layers - 1
    with frozen(model), torch.no_grad(), captured(model, names) as store:
        run_segment(model, batch.tokens, batch.attention_mask, first=last, last=last)
    states = {name: states[batch.content_mask if chosen is None else chosen] for name, states in store.items()}
    check_states(model, batch, states)
    return states


def _reaction(
    model: LensModel, batch: TokenBatch, hook: str, clean: Mapping[str, Tensor], shift: Float[Tensor, "tokens d_model"]
) -> tuple[Float[Tensor, " tokens"], Float[Tensor, " tokens"]]:
    """For each content token ||g(h + xi) - g(h)||^2 / ||g(h)||^2, and ||xi||^2 / ||h||^2 as the dtype rounds it."""
    before = clean[hook].float()
    moved = (before + shift.to(before)).type_as(clean[hook])

    def put(activation: Tensor, hook: Any) -> Tensor:
        changed = activation.clone()
        changed[batch.content_mask.to(changed.device)] = moved.to(changed.device)
        return changed

    final = _final(model)
    with hooked(model, [(hook, put)]):
        after = _streams(model, batch, [final])[final].float()
    stream = clean[final].float()
    pairs = ((after - stream, stream), (moved.float() - before, before))
    if not bool(before.any(dim=-1).all() and stream.any(dim=-1).all()):
        raise ValueError(
            f"a state at {hook} or behind the last block is 0, of which nothing is a share; leave that layer out"
        )
    sensitivity, input_ratio = (change.square().sum(dim=-1) / of.square().sum(dim=-1) for change, of in pairs)
    return sensitivity, input_ratio


def _final(model: LensModel) -> str:
    return hook_name(model.cfg.n_layers - 1)


def _default_noise(reader: StateReader, groups: Mapping[str, Corpus]) -> float:
    """The variance for which a draw is DEFAULT_SHARE of the mean norm at layer 0, over all groups' tokens."""
    norms, first = TokenMean(), hook_name(0)
    for corpus in groups.values():
        for batch in reader.read(corpus, [first]):
            norms.add(batch.states[first].float().norm(dim=-1), batch.rows)
    return (DEFAULT_SHARE * norms.mean) ** 2 / float(reader.model.cfg.d_model)
