"""Proposition 1 of "On Effects of Steering Latent Representation" against what noise does to a model's logits."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from typing import Literal, get_args

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from mrp_lens.data import Document
from mrp_lens.edits import SteeringEdit
from mrp_lens.metrics.activations import direction_for
from mrp_lens.metrics.bootstrap import CONFIDENCE
from mrp_lens.metrics.sensitivity import JacobianSize, LayersAbove, jacobian_size
from mrp_lens.models import LensModel, check_layers, encoder_for, logits_of
from mrp_lens.models.finite import non_finite
from mrp_lens.models.hooks import captured, frozen, hook_name
from mrp_lens.utils.progress import progress_bar
from mrp_lens.utils.torch_state import ordinary_torch
from mrp_lens.utils.validation import generator_for, int_seed

Positions = Literal["last", "all"]

KEYS = "prompt layer coefficient positions noise".split()
RESAMPLES = 400
LEADING = 32  # principal directions of the sample in which its largest eigenvalue is resampled
POWER_ITERATIONS = 10
COLUMNS = 4096  # of the vocabulary, taken to float64 at a time


@ordinary_torch(gradients=False)
def proposition_1(
    model: LensModel,
    prompts: Sequence[str],
    direction: Float[Tensor, " _width"],
    *,
    layer: int,
    coefficient: float,
    noise: Sequence[float],
    positions: Positions = "last",
    samples: int = 4096,
    batch_size: int = 512,
    seed: int = 0,
    progress: bool = True,
) -> pd.DataFrame:
    """Mean and covariance of the logits when h_l = c u + eps, eps ~ N(0, eta I): predicted and measured.

    Proposition 1 of arXiv 2408.06223 says that the logits then are about Gaussian with mean W g(c u) and covariance
    eta W J J^T W^T: g the layers above and the final norm, W the unembedding, J the Jacobian of g at c u. It is a
    first-order expansion, exact as eta goes to 0, that the paper did not measure. Predicted: products with W J
    (`jacobian_size` says when the trace is an estimate). Measured: logits at the last position under a SteeringEdit.

    Args:
        model: HookedTransformer or TransformerBridge. In half precision rounding adds a noise of its own.
        prompts: each is studied by itself.
        direction: u, [d_model], of any length but 0.
        layer: whose resid_post is replaced. The last: g is the final norm alone.
        coefficient: c, in the units of the stream (compare `norm`).
        noise: eta, variances per coordinate.
        positions: "last": the state of the last position alone is replaced, as in the paper's formula. "all": all of
            them, BOS too, each with noise of its own; the predicted covariance then sums over positions.
        samples: draws of the noise for each prompt and eta.
        batch_size: of the passes.
        seed: of noise, probes and bootstrap.
        progress: show a progress bar.

    Returns:
        For each prompt (`prompt`, its place) and eta (`noise`) a row for each `statistic`, with `layer`,
        `coefficient`, `positions`, and `norm`, the L2 norm of the unedited state at that layer and last position.
        "mean": `measured`, the distance of the sample mean from W g(c u) in units of the logits' total standard
        deviation (root of the measured trace), against `predicted` 0; 95% of what sampling alone gives lies from
        `low` to `high`; `inside`: measured <= high; `error`: measured.
        "trace" and "top_eigenvalue" of the covariance: `predicted`; `measured` in the sample, whose top eigenvalue is
        biased upwards; `low`, `high`, 95% bootstrap interval (basic bootstrap for the top eigenvalue, which takes the
        bias off where that stands out from the others); `inside`: the prediction lies in it; `error`: measured / predicted - 1.

    Raises:
        TypeError, ValueError: no prompts or an empty one, noise <= 0, a coefficient that is not finite, unknown
            positions, a layer that does not exist, a direction of the wrong size or zero; NonFiniteError where states or
            logits are NaN or infinite (also -infinity: ruled out tokens have no variance).
    """
    setting = _Setting(model, _tokenised(model, prompts), direction, layer, positions, samples, batch_size)
    rows = []
    for logits in setting.sampled([coefficient], noise, seed, progress):
        mean, trace, top = logits.distance, logits.trace, logits.top_eigenvalue
        off, traces = logits.resampled()
        for statistic, predicted, measured, (low, high) in (
            ("mean", 0.0, mean, _interval(off)),
            ("trace", logits.predicted.squared_norm, trace, _interval(traces)),
            ("top_eigenvalue", logits.predicted.top_eigenvalue, top, _interval(2 * top - logits.resampled_tops())),
        ):
            error = measured if statistic == "mean" else measured / predicted - 1
            inside = measured <= high if statistic == "mean" else low <= predicted <= high
            rows.append((*logits.keys, statistic, predicted, measured, low, high, error, inside, logits.norm))
    return pd.DataFrame(rows, columns=[*KEYS, *"statistic predicted measured low high error inside norm".split()])


@ordinary_torch(gradients=False)
def variance_by_coefficient(
    model: LensModel,
    prompts: Sequence[str],
    direction: Float[Tensor, " _width"],
    *,
    layer: int,
    coefficients: Sequence[float],
    noise: float,
    positions: Positions = "last",
    samples: int = 1024,
    batch_size: int = 512,
    seed: int = 0,
    progress: bool = True,
) -> pd.DataFrame:
    """Total variance of the logits as c grows: arXiv 2408.06223 argues that it grows too, and did not measure it.

    Args:
        coefficients: c, in the units of the stream.
        noise: eta, the variance per coordinate.
        model, prompts, direction, layer, positions, samples, batch_size, seed, progress: as in `proposition_1`.

    Returns:
        A row for each prompt and coefficient, columns as in `proposition_1`: `predicted` and `measured` are the trace
        of the logits' covariance at the last position; `max_logit` is the mean over draws of the largest logit.

    Raises:
        TypeError, ValueError: as `proposition_1`.
    """
    setting = _Setting(model, _tokenised(model, prompts), direction, layer, positions, samples, batch_size)
    rows = []
    for logits in setting.sampled(coefficients, [noise], seed, progress):
        limits = _interval(logits.resampled()[1])
        largest = float((logits.deviations + logits.expected).amax(dim=1).double().mean())
        rows.append((*logits.keys, logits.predicted.squared_norm, logits.trace, *limits, logits.norm, largest))
    return pd.DataFrame(rows, columns=[*KEYS, *"predicted measured low high norm max_logit".split()])


@dataclass(frozen=True)
class _Logits:
    """The logits of a prompt at a coefficient and noise: what is predicted of them, and draws."""

    keys: tuple[int, int, float, str, float]  # as KEYS
    norm: float
    predicted: JacobianSize  # of the logits, with the noise
    expected: Float[Tensor, " d_vocab"]  # W g(c u)
    deviations: Float[Tensor, "samples d_vocab"]  # of the draws from it
    weights: Float[Tensor, "resamples samples"]  # of the draws in bootstrap resamples, float64; a row sums to 1

    @property
    def distance(self) -> float:  # of the sample mean from `expected`, in total standard deviations
        return float(self._offset.norm()) / self.trace**0.5

    @property
    def trace(self) -> float:
        return float(self._squares.sum()) / (len(self.deviations) - 1)

    @property
    def top_eigenvalue(self) -> float:
        return float(torch.linalg.svdvals(self._leading)[0].square()) / (len(self.deviations) - 1)

    def resampled(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """For each resample: how far its mean moves, in total standard deviations, and its trace."""
        moved = sum((self.weights @ part.double()).square().sum(dim=1) for part in self._centred.split(COLUMNS, dim=1))
        size = len(self.deviations)
        traces = (self.weights @ self._squares - moved) * size / (size - 1)
        return (moved / self.trace).sqrt().cpu().numpy(), traces.cpu().numpy()

    def resampled_tops(self) -> NDArray[np.float64]:
        """The top eigenvalue of each resample, within the sample's leading principal directions."""
        size, rank = self._leading.shape
        products = torch.einsum("ni,nj->nij", self._leading, self._leading).reshape(size, -1)
        moments = (self.weights @ products).reshape(-1, rank, rank)
        means = self.weights @ self._leading
        covariances = moments - torch.einsum("ri,rj->rij", means, means)
        return (torch.linalg.eigvalsh(covariances)[:, -1] * size / (size - 1)).cpu().numpy()

    @cached_property
    def _offset(self) -> Float[Tensor, " d_vocab"]:
        return self.deviations.mean(dim=0, dtype=torch.float64)

    @cached_property
    def _centred(self) -> Float[Tensor, "samples d_vocab"]:
        return self.deviations - self._offset.to(self.deviations)

    @cached_property
    def _squares(self) -> Float[Tensor, " samples"]:
        return self._centred.square().sum(dim=1, dtype=torch.float64)

    @cached_property
    def _leading(self) -> Float[Tensor, "samples rank"]:
        """The centred draws in their leading principal directions, by block power iteration from the first draws."""
        basis = torch.linalg.qr(self._centred[:LEADING].T).Q
        for _ in range(POWER_ITERATIONS):
            basis = torch.linalg.qr(self._centred.T @ (self._centred @ basis)).Q
        return (self._centred @ basis).double()


@dataclass(frozen=True)
class _Setting:
    """What stays the same over prompts, coefficients and noises."""

    model: LensModel
    prompts: Sequence[Int[Tensor, "1 _seq"]]
    direction: Float[Tensor, " d_model"]
    layer: int
    positions: Positions
    samples: int
    batch_size: int

    def __post_init__(self) -> None:
        check_layers(self.model, [self.layer])
        direction_for(self.model, self.direction)
        if self.positions not in get_args(Positions):
            raise ValueError(f"unknown positions {self.positions!r}; choose 'last' or 'all'")
        if self.samples < 2:
            raise ValueError(f"samples must be at least 2, got {self.samples}: a variance needs two")

    def sampled(
        self, coefficients: Sequence[float], noises: Sequence[float], seed: int, progress: bool
    ) -> Iterator[_Logits]:
        for name, values, lowest in (("coefficient", coefficients, -math.inf), ("noise", noises, 0.0)):
            if not len(values) or not all(lowest < value < math.inf for value in values):
                allowed = "a variance above 0" if name == "noise" else "a finite number"
                raise ValueError(f"{name} must be {allowed}, or several, got {list(values)}")
        probes, random = generator_for(seed), np.random.default_rng(int_seed(seed))
        uniform = np.full(self.samples, 1 / self.samples)
        steered = list(product(enumerate(self.prompts), coefficients))
        with progress_bar(total=len(steered) * len(noises), desc="sampling logits", progress=progress) as bar:
            for (prompt, tokens), coefficient in steered:
                norm = self.norm(tokens)
                expected, size = self.linearised(tokens, coefficient, probes)
                for noise in noises:
                    deviations = self.deviations(tokens, coefficient, noise, expected, int(random.integers(2**31)))
                    counts = random.multinomial(self.samples, uniform, size=RESAMPLES)
                    weights = torch.from_numpy(counts / self.samples).to(deviations.device)
                    keys = (prompt, self.layer, float(coefficient), self.positions, float(noise))
                    predicted = JacobianSize(noise * size.squared_norm, noise * size.top_eigenvalue)
                    yield _Logits(keys, norm, predicted, expected, deviations, weights)
                    bar.update()

    def edit(self, tokens: Int[Tensor, "1 seq"], coefficient: float, noise: float, seed: int) -> SteeringEdit:
        # A prompt of one token has the same first and last position; by position it would count as a cached step.
        chosen = [-1] if self.positions == "last" and tokens.shape[1] > 1 else None
        return SteeringEdit.towards(
            self.direction, layer=self.layer, coefficient=coefficient, noise=noise, positions=chosen, seed=seed
        )

    def norm(self, tokens: Int[Tensor, "1 seq"]) -> float:
        """Of the unedited state at the last position."""
        name = hook_name(self.layer)
        with frozen(self.model), torch.no_grad(), captured(self.model, [name]) as store:
            logits_of(self.model, tokens, torch.ones_like(tokens, dtype=torch.bool))
        norm = float(store[name][0, -1].float().norm())
        if not math.isfinite(norm):
            raise non_finite(self.model, tokens, torch.ones_like(tokens, dtype=torch.bool), f"states at {name}")
        return norm

    def linearised(
        self, tokens: Int[Tensor, "1 seq"], coefficient: float, generator: torch.Generator
    ) -> tuple[Float[Tensor, " d_vocab"], JacobianSize]:
        """W g(c u), and the size of W J there."""
        places = torch.arange(tokens.shape[1], device=tokens.device)
        moved = places[None] >= (0 if self.positions == "all" else places[-1])
        above = LayersAbove(self.model, self.layer, tokens, torch.ones_like(moved), moved, places[-1:])
        with self.edit(tokens, coefficient, 0.0, 0).applied(self.model), torch.no_grad():
            expected = above.outputs(torch.zeros(1, *tokens.shape[1:], len(self.direction)).to(tokens.device))
            size = jacobian_size(above, probes=self.samples, batch_size=self.batch_size, generator=generator)
        return expected[0].float(), size

    def deviations(
        self, tokens: Int[Tensor, "1 seq"], coefficient: float, noise: float, expected: Tensor, seed: int
    ) -> Float[Tensor, "samples d_vocab"]:
        """Logits at the last position less W g(c u), for draws of the noise."""
        parts = []
        with frozen(self.model), torch.no_grad(), self.edit(tokens, coefficient, noise, seed).applied(self.model):
            for start in range(0, self.samples, self.batch_size):
                rows = tokens.repeat(min(self.batch_size, self.samples - start), 1)
                real = torch.ones_like(rows, dtype=torch.bool)
                logits = logits_of(self.model, rows, real)[:, -1].float()
                if not bool(torch.isfinite(logits).all()):
                    raise non_finite(self.model, rows, real, "the logits")
                parts.append(logits - expected)
        deviations = torch.cat(parts)
        if bool((deviations == deviations[0]).all()):
            raise ValueError(
                f"noise {noise} is lost in the rounding of states of length {coefficient}; give a larger one, or load the model in float32"
            )
        return deviations


def _tokenised(model: LensModel, prompts: Sequence[str]) -> list[Int[Tensor, "1 _seq"]]:
    """A row of tokens for each prompt; of a prompt that is too long its end."""
    if isinstance(prompts, str) or not len(prompts):
        raise ValueError(f"expected a list of prompts, at least one, got {prompts!r}")
    encoder = encoder_for(model)
    rows = encoder.encode([Document(prompt, "") for prompt in prompts], keep="end")
    empty = [place for place, row in enumerate(rows) if not any(row.content)]
    if empty:
        raise ValueError(f"prompt {empty[0]} is {prompts[empty[0]]!r}, without a token; leave it out")
    return [encoder.collate([row]).tokens for row in rows]


def _interval(values: NDArray[np.float64]) -> tuple[float, float]:
    low, high = np.quantile(values, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)
