"""What RMU drives a model towards, as a hook: states replaced by (or moved along) a fixed direction."""

import math
from collections.abc import Mapping, Sequence
from types import NoneType
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor
from typing_extensions import override

from mrp_lens.edits.base import Edit, Wrapper, as_it_is, check_width
from mrp_lens.edits.exported_hooks import in_prompt
from mrp_lens.edits.prompt_positions import count_in_prompts
from mrp_lens.edits.serialization import setting
from mrp_lens.edits.subspace import unit
from mrp_lens.models import Layout, LensModel, device_at
from mrp_lens.models.attachments import AppliedEdit
from mrp_lens.models.hooks import add_hooks, check_hook_names, hook_name, layer_of
from mrp_lens.utils.validation import check_one_of, int_seed, whole_numbers

Mode = Literal["replace", "add"]


class SteeringEdit(Edit):
    """h <- c u + eps ("replace") or h <- h + c u + eps ("add"), eps ~ N(0, noise * I).

    With "replace" this is Assumption 1 of "On Effects of Steering Latent Representation" (arXiv 2408.06223) put into
    effect without any training.

    Args:
        hook: name of the hook point, such as "blocks.7.hook_resid_post".
        direction: [d_model]; normalised to length 1.
        coefficient: c, in the units of the stream.
        mode: "replace" or "add".
        noise: eta, the variance of eps per coordinate; drawn anew at every pass, so that with noise `generate` depends on
            whether there is a cache.
        positions: prompt positions to change, counted as in a list (-1: the last); None: all. They count in the prompt and
            are fixed when `generate` starts, so that it writes the same with and without a cache: what is generated is never
            steered. Outside of `generate` each pass is a prompt of its own, except a pass over a single token, which is left
            alone: it is a step of somebody's own loop with a cache. Positions count padding, so pad on the left when they
            are negative and the batch is ragged. Metrics that score pass prompt and answer as one text, padded on the right: there
            a negative position is near the end of the batch's longest row, behind what is predicted, so figures depend on
            `batch_size` and say nothing of the edit; judge such an edit by what `generate` and `ml.continuations` write.
        seed: of the noise, which is drawn from a generator of its own and starts anew each time the edit is put on.

    Raises:
        TypeError: text in the place of a number.
        ValueError: a direction that is not a finite non-zero vector, an unknown mode, negative noise, a coefficient or noise
            that is not finite.
    """

    kind = "steering"

    def __init__(
        self,
        hook: str,
        direction: Float[Tensor, " d_model"],
        coefficient: float,
        *,
        mode: Mode = "replace",
        noise: float = 0.0,
        positions: Sequence[int] | None = None,
        seed: int = 0,
        provenance: Mapping[str, Any] | None = None,
    ) -> None:
        layer_of(hook)
        check_one_of(Mode, mode=mode)
        for name, value in (("coefficient", coefficient), ("noise", noise)):
            if isinstance(value, bool | str):
                raise TypeError(f"{name} must be a number, got {value!r}")
            if not math.isfinite(value):
                raise ValueError(f"{name} must be a finite number, got {value!r}")
        if not noise >= 0.0:
            raise ValueError(f"noise is a variance and must be at least 0, got {noise}")
        self.hook = hook
        self.direction = unit(direction)
        self.coefficient = float(coefficient)
        self.mode = mode
        self.noise = float(noise)
        self.positions = None if positions is None else whole_numbers(positions, "positions")
        self.seed = int_seed(seed)
        self.provenance = dict(provenance or {})

    @classmethod
    def towards(
        cls,
        direction: Float[Tensor, " d_model"],
        *,
        layer: int,
        coefficient: float,
        site: str = "resid_post",
        mode: Mode = "replace",
        noise: float = 0.0,
        positions: Sequence[int] | None = None,
        seed: int = 0,
    ) -> "SteeringEdit":
        """Steer at a layer: the arguments of the class, with the hook named by layer and site."""
        name = hook_name(layer, site)
        return cls(name, direction, coefficient, mode=mode, noise=noise, positions=positions, seed=seed)

    @property
    @override
    def layers(self) -> tuple[int, ...]:
        return (layer_of(self.hook),)

    @override
    def _put_on(self, model: LensModel, entry: AppliedEdit, *, check: bool, wrapped: Wrapper = as_it_is) -> None:
        check_hook_names(model, [self.hook])
        check_width(model, len(self.direction), "the direction")
        with torch.inference_mode(False):  # what is made inside of it is never differentiated through
            target = self.coefficient * self.direction.to(device_at(model, layer_of(self.hook)))
        generator = torch.Generator().manual_seed(self.seed)
        place = id(generator)  # of this one hook, whatever else is on

        def hook(activation: Tensor, hook: Any) -> Tensor:
            wide = activation if activation.dtype == torch.float64 else activation.float()
            t = target.to(wide)
            steered = t.expand_as(wide) if self.mode == "replace" else wide + t
            if self.noise > 0.0:
                noise = torch.randn(wide.shape, generator=generator, dtype=torch.float32, device="cpu")
                steered = steered + self.noise**0.5 * noise.to(wide)
            if self.positions is not None:
                steered = torch.where(in_prompt(place, self.positions, wide)[:, None], steered, wide)
            return steered.type_as(activation)

        entry.hooks += add_hooks(model, [(self.hook, wrapped(self, self.hook, hook))])
        if self.positions is not None:
            entry.hooks += count_in_prompts(model)

    @override
    def why_not_mergeable(self, layout: Layout | None) -> str | None:
        return "steering overwrites states, which no matrix of the model does"

    @override
    def to_parts(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        settings = {
            "hook": self.hook,
            "coefficient": self.coefficient,
            "mode": self.mode,
            "noise": self.noise,
            "positions": None if self.positions is None else list(self.positions),
            "seed": self.seed,
        }
        return settings, {"direction": self.direction}

    @classmethod
    @override
    def from_parts(cls, settings: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> "SteeringEdit":
        direction = tensors["direction"]
        if (
            direction.dtype != torch.float32
            or direction.ndim != 1
            or abs(float(direction.double().norm()) - 1.0) > 1e-4
        ):
            raise ValueError(
                f"the direction must be a vector of length 1 in float32, got {direction.dtype} and shape {list(direction.shape)}"
            )
        return cls(
            setting(settings, "hook", str),
            direction,
            setting(settings, "coefficient", (int, float)),
            mode=setting(settings, "mode", str),
            noise=setting(settings, "noise", (int, float)),
            positions=setting(settings, "positions", (list, NoneType)),
            seed=setting(settings, "seed", int),
        )

    def __repr__(self) -> str:
        return f"SteeringEdit({self.hook!r}, coefficient={self.coefficient:g}, mode={self.mode!r}, noise={self.noise:g}, positions={self.positions})"
