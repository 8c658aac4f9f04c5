"""RMU (arXiv 2403.03218) and Adaptive RMU (arXiv 2408.06223): a few MLP matrices learn to steer forget states away."""

from dataclasses import dataclass, replace
from typing import Any, Literal, Self

from jaxtyping import Float
from torch import Tensor
from typing_extensions import override

from mrp_lens.checks import given, one_of, positive
from mrp_lens.methods.steering import Mask, States, Steering
from mrp_lens.model import LensModel

Coefficient = Literal["token", "sample", "first_batch"]

_RELEASED: dict[str, Any] = {
    "batch_size": 4,
    "positions": "all",
    "padding": "left",
    "shuffle": False,
    "optimizer": "transformers_adamw",
    "eps": 1e-6,
}
C_SHARE = 2.0  # c over the mean norm of the forget states


@dataclass(frozen=True, kw_only=True)
class RMU(Steering):
    """Representation Misdirection for Unlearning (WMDP, arXiv 2403.03218).

    L = mean_forget ||h_l - c u||^2 / d + alpha * mean_retain ||h_l - h_l^frozen||^2 / d, over the tokens of the batch
    (pads and BOS excluded, see `positions`); u is a random unit vector. Only the MLP output matrices of layers
    l-2, l-1, l learn.

    Args:
        layer: l. None: 7/32 of the depth, as in the released Zephyr-7B recipe, at least 2.
        steering_coeff: c. None: twice the mean norm of the forget states at l.
        alpha: weight of the retain term. None: four times the square of c over the mean norm of the forget states.
        lr: of AdamW. None: derived from the size of the trained matrices' entries.
        steps, batch_size: updates, and documents an update on each side.
        micro_batch: documents a pass, if a batch does not fit into memory.
        max_length: tokens at which documents are cut. None: 512, or the context if that is shorter.
        direction: "uniform": entries of u from U[0, 1), as released; "gaussian": isotropic.
        site, trained_layers: where the states are read, and which layers learn, if not as above.
        positions: "content", or "all" to count pads and BOS as the released code does.
        padding: "right", or "left" as the released code has it; of no effect unless pads are counted.
        shuffle: False: batches in the order of the corpora, as the released code takes them.
        optimizer: "adamw", or "transformers_adamw": as in transformers 4, which the released code uses.
        eps: of the optimizer.
        retain_noise: Gaussian noise on the states that retain text is held to, as a share of their norm; see `NoisyRMU`.

    Example:
        >>> fit = RMU().fit(model, forget, retain, seed=0)  # doctest: +SKIP
    """

    steering_coeff: float | None = None

    name = "rmu"

    @classmethod
    def released(
        cls, *, layer: int = 7, steering_coeff: float = 6.5, alpha: float = 1200.0, lr: float = 5e-5, steps: int = 150
    ) -> "RMU":
        """The recipe of the released code for Zephyr-7B: batches of 4 in the corpora's order, padded on the left, pads and
        BOS counted, transformers 4's AdamW.

        The released code pads with EOS (set `model.tokenizer.pad_token`), and cuts texts at 512 tokens. What a model
        computes at pads is its implementation's choice: the Bridge's states there are Hugging Face's,
        HookedTransformer's are not."""
        return cls(
            layer=layer,
            steering_coeff=steering_coeff,
            alpha=alpha,
            lr=lr,
            steps=steps,
            **_RELEASED,
        )

    @override
    def _placed(self, model: LensModel) -> Self:
        positive(steering_coeff=self.steering_coeff)
        return super()._placed(model)

    @override
    def _scaled(self, norm: float) -> Self:
        return replace(self, steering_coeff=given(self.steering_coeff, C_SHARE * norm))

    @override
    def _share(self, norm: float) -> float:
        return float(given(self.steering_coeff, 0.0)) / norm

    @override
    def _coefficient(self, states: States, mask: Mask, first: float | None) -> float:
        return float(given(self.steering_coeff, 0.0))


@dataclass(frozen=True, kw_only=True)
class NoisyRMU(RMU):
    """RMU with random noise on the retain branch: the idea of RNA (arXiv 2501.19202), so that a forget token inside a retain
    text breaks less. The paper's own formula and scale were not to be had: the noise here is drawn anew for every token, a
    tenth of its state's norm.

    The arguments are those of `RMU`.
    """

    retain_noise: float = 0.1

    name = "rmu-noise"


@dataclass(frozen=True, kw_only=True)
class AdaptiveRMU(Steering):
    """Adaptive RMU (arXiv 2408.06223, Eq. 24): RMU with c = beta * ||h_l^frozen|| of the forget states.

    Args:
        beta: factor on the norm; the paper tries 2, 3, 5, 10 and reports 5.
        coefficient: whose norm: "token": each token's own; "sample": the mean over each document's tokens (Eq. 24);
            "first_batch": one number a corpus, the mean over its first batch (the released code).

    The other arguments are those of `RMU`.
    """

    beta: float = 5.0
    coefficient: Coefficient = "token"

    name = "adaptive-rmu"

    @classmethod
    def released(
        cls, *, layer: int = 7, beta: float = 5.0, alpha: float = 1200.0, lr: float = 5e-5, steps: int = 500
    ) -> "AdaptiveRMU":
        """The recipe of the released code: as `RMU.released`, with c = beta times the mean norm of the corpus's first
        batch. The paper trains 500 steps with c from each sample's own norm."""
        return cls(
            layer=layer,
            beta=beta,
            alpha=alpha,
            lr=lr,
            steps=steps,
            **_RELEASED,
            coefficient="first_batch",
        )

    @override
    def _placed(self, model: LensModel) -> Self:
        positive(beta=self.beta)
        one_of(Coefficient, coefficient=self.coefficient)
        return super()._placed(model)

    @override
    def _share(self, norm: float) -> float:
        return self.beta

    @override
    def _coefficient(self, states: States, mask: Mask, first: float | None) -> float | Float[Tensor, "batch #seq 1"]:
        norms = states.norm(dim=-1) * mask
        if self.coefficient == "token":
            return self.beta * norms[..., None]
        if self.coefficient == "sample":
            return self.beta * (norms.sum(dim=1) / mask.sum(dim=1).clamp(min=1))[:, None, None]
        return self.beta * float(norms.sum() / mask.sum()) if first is None else first
