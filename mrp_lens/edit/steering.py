"""What RMU drives a model towards, as a hook: states replaced by (or moved along) a fixed direction."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor
from typing_extensions import override

from mrp_lens.edit.base import Edit, Undo, check_width
from mrp_lens.model import LensModel, device_of
from mrp_lens.stream import add_hooks, check_hook_names, hook_name, layer_of, remove_hooks
from mrp_lens.subspace import unit

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
        noise: eta, the variance of eps per coordinate.
        positions: prompt positions to change, counted as in a list (-1: the last); None: all. With positions, passes
            over a single token are left alone: these are the steps of cached generation. Positions count padding, so
            pad on the left when they are negative and the batch is ragged.
        seed: of the noise, which is drawn from a generator of its own and starts anew each time the edit is put on.

    Raises:
        TypeError, ValueError: a direction that is not a finite non-zero vector, an unknown mode, negative noise.
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
        if mode not in ("replace", "add"):
            raise ValueError(f"unknown mode {mode!r}; choose 'replace' or 'add'")
        if not noise >= 0.0:
            raise ValueError(f"noise is a variance and must be at least 0, got {noise}")
        self.hook = hook
        self.direction = unit(direction)
        self.coefficient = float(coefficient)
        self.mode = mode
        self.noise = float(noise)
        self.positions = None if positions is None else tuple(int(position) for position in positions)
        self.seed = seed
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
    def install(self, model: LensModel, *, check: bool = True) -> Undo:
        check_hook_names(model, [self.hook])
        check_width(model, len(self.direction), "the direction")
        self._check_model(model, check)
        device = device_of(model)
        target = self.coefficient * self.direction.to(device)
        generator = torch.Generator().manual_seed(self.seed)

        def hook(activation: Tensor, hook: Any) -> Tensor:
            if self.positions is not None and activation.shape[1] == 1:
                return activation
            wide = activation.float()
            steered = target.expand_as(wide) if self.mode == "replace" else wide + target
            if self.noise > 0.0:
                steered = steered + self.noise**0.5 * torch.randn(wide.shape, generator=generator).to(device)
            if self.positions is not None:
                chosen = torch.zeros(activation.shape[1], dtype=torch.bool, device=device)
                chosen[list(self._inside(activation.shape[1]))] = True
                steered = torch.where(chosen[:, None], steered, wide)
            return steered.type_as(activation)

        handles = add_hooks(model, [(self.hook, hook)])
        return lambda: remove_hooks(handles)

    def _inside(self, length: int) -> tuple[int, ...]:
        assert self.positions is not None
        for position in self.positions:
            if not -length <= position < length:
                raise ValueError(f"position {position} is outside a prompt of {length} tokens")
        return self.positions

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
        return cls(
            settings["hook"],
            tensors["direction"],
            settings["coefficient"],
            mode=settings["mode"],
            noise=settings["noise"],
            positions=settings["positions"],
            seed=settings["seed"],
        )

    def __repr__(self) -> str:
        return f"SteeringEdit({self.hook!r}, coefficient={self.coefficient:g}, mode={self.mode!r}, noise={self.noise:g}, positions={self.positions})"
