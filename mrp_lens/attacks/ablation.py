"""Changing the stream of an edited model without training: one direction taken out of it, or noise added."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mrp_lens.data import Corpus
from mrp_lens.edits import Edit, edit_on, projection_hook
from mrp_lens.edits.subspace import Subspace, unit
from mrp_lens.metrics.activations import StateReader, hooks_at
from mrp_lens.models import LensModel, device_at
from mrp_lens.models.hooks import HookFunction, hook_name, hooked
from mrp_lens.utils.validation import generator_for

UNMOVED = 1e-5
"""A mean that an edit moves by less than this share of the mean state's norm is rounding, and gives no direction."""


def junk_directions(
    model: LensModel, edit: Edit, texts: Corpus, *, batch_size: int = 32, progress: bool = True
) -> dict[int, Float[Tensor, " d_model"]]:
    """Layer -> unit direction in which the edit moves the mean state there (Łucki et al., arXiv 2409.18025).

    The mean of resid_post over content tokens (no pads, no BOS), edited less unedited. Layers that the edit does not
    move, such as those before the edited ones, are left out.

    Args:
        model: without the edit.
        edit: is put on and taken off again.
        texts: what the edit acts on, such as the forget corpus; prompts and completions are read alike.
        batch_size: documents at a time.
        progress: show progress bars.

    Raises:
        ValueError: the edit moves no layer.
    """
    before = _mean_states(model, None, texts, batch_size=batch_size, progress=progress)
    after = _mean_states(model, edit, texts, batch_size=batch_size, progress=progress)
    moved = {layer: after[layer] - mean for layer, mean in before.items() if _moved(after[layer] - mean, mean)}
    if not moved:
        raise ValueError(
            f"the edit does not move the mean state of {texts.name!r} at any layer, so there is no direction to remove; is it the edit "
            "for these texts?"
        )
    return {layer: unit(difference) for layer, difference in moved.items()}


def ablated(model: LensModel, directions: Mapping[int, Float[Tensor, " d_model"]]) -> AbstractContextManager[None]:
    """A `with` block in which each layer's direction is taken out of resid_post: h <- h - (h . u) u, at every token.

    Args:
        model: with the edit on; the directions go after what the edit does at the same hook.
        directions: layer -> u, [d_model].
    """
    return hooked(
        model,
        [
            (hook_name(layer), projection_hook(Subspace(unit(direction)[None]).to(device_at(model, layer))))
            for layer, direction in directions.items()
        ],
    )


@contextmanager
def noisy(model: LensModel, layers: Sequence[int], size: float, *, seed: int = 0) -> Iterator[None]:
    """A `with` block in which resid_post of some layers is h + size * |h| * z / sqrt(d_model), z ~ N(0, I), at every token.

    Args:
        model: with the edit on; the noise goes after what the edit does at the same hook.
        layers: where.
        size: length of the noise in units of the state's, on average over z.
        seed: of z, which starts anew with each block: the same batches get the same noise.

    Raises:
        ValueError: a negative size, or a layer that the model does not have.
    """
    if not size >= 0.0:
        raise ValueError(f"the size of the noise is a share of the state's norm and must be at least 0, got {size}")
    generator = generator_for(seed)
    hooks: list[tuple[str, HookFunction]] = [
        (name, _noise_hook(size, generator)) for name in hooks_at(model, layers, "resid_post").values()
    ]
    with hooked(model, hooks):
        yield


def _noise_hook(size: float, generator: torch.Generator) -> HookFunction:
    def hook(activation: Tensor, hook: Any) -> Tensor:
        wide = activation.float()
        drawn = torch.randn(wide.shape, generator=generator).to(wide.device) / wide.shape[-1] ** 0.5
        return (wide + size * wide.norm(dim=-1, keepdim=True) * drawn).type_as(activation)

    return hook


def _mean_states(
    model: LensModel, edit: Edit | None, texts: Corpus, *, batch_size: int, progress: bool
) -> dict[int, Float[Tensor, " d_model"]]:
    """Layer -> mean over content tokens of resid_post, float64."""
    hooks = hooks_at(model, None, "resid_post")
    totals = {layer: torch.zeros(model.cfg.d_model, dtype=torch.float64) for layer in hooks}
    tokens = 0
    with edit_on(model, edit):
        for batch in StateReader(model, batch_size=batch_size, progress=progress).read(texts, [*hooks.values()]):
            tokens += len(batch.rows)
            for layer, name in hooks.items():
                totals[layer] += batch.states[name].double().sum(dim=0).cpu()
    return {layer: total / tokens for layer, total in totals.items()}


def _moved(difference: Float[Tensor, " d_model"], mean: Float[Tensor, " d_model"]) -> bool:
    return float(difference.norm()) > UNMOVED * float(mean.norm())
