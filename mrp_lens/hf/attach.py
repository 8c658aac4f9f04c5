"""`attach`: an edit on a plain Hugging Face model, taken off again at will."""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mrp_lens.edits import Attached, Edit, ProjectionEdit, SteeringEdit, WeightEdit, exported_hooks, load_edit
from mrp_lens.edits.prompt_positions import count_in_prompts
from mrp_lens.models import Layout, check_same_model, hf_weights
from mrp_lens.models.architectures import layout_of
from mrp_lens.models.attachments import AppliedEdit, TorchHook, entries_on, putting_on
from mrp_lens.models.hooks import hook_name, layer_of, site_of

Steps = Mapping[tuple[int, str], list[nn.Module]]
"""(layer, site) -> what is done to the states there, in order."""


def attach(hf_model: Any, edit: Edit | str | Path, *, check: bool = True) -> Attached:
    """Put an edit on a plain Hugging Face model, for `generate`, evaluation harnesses, pipelines.

    Projections and steering become hooks on its modules, new matrices are written into it. Hooks are no weights:
    `hf_model.save_pretrained` saves the *unedited* model, with a warning; `mrp_lens.export_hf` writes the edited one.
    `edit.detach(hf_model)` takes the edit off, too, and off a `copy.deepcopy` of the model, which carries it as well. What
    `torch.compile` made is compiled anew after an edit is put on or taken off.

    Args:
        hf_model: GPT-2, GPT-NeoX, Llama, Mistral, Qwen2, Qwen3, Gemma-2 or Phi-3 with its language-model head, in any
            precision. It may be quantised, as long as the edit holds no matrices.
        edit: an edit, or where it was saved: a folder, or a name on the Hub (`load_edit`).
        check: refuse a model other than the one the edit was made for, as `edit.applied` does: hooks are not refused on a
            fine-tune that left the embedding as it was.

    Returns:
        The handle, as of `edit.attach`.

    Raises:
        TypeError: not a Hugging Face model.
        ValueError: an architecture that is not known (a wrapper such as peft's, too), another model, layers that it does not
            have, a model of which parts are offloaded, steering with noise, a projection where one is on, an edit that is on, or
            the model inside of a TransformerBridge.

    Example:
        >>> fit.edit.save_pretrained("runs/mine/edit")
        >>> with attach(hf_model, "runs/mine/edit"):
        ...     written = hf_model.generate(**inputs, max_new_tokens=2)
    """
    if not (isinstance(hf_model, nn.Module) and hasattr(hf_model, "config")):
        raise TypeError(
            f"expected a Hugging Face model, got {type(hf_model).__name__}; on a TransformerLens model use edit.attach(model)"
        )
    layout = layout_of(type(hf_model).__name__)
    if any("._original_component." in name for name, _ in hf_model.named_parameters()):
        raise ValueError("this model is the inside of a TransformerBridge; use edit.attach(bridge)")
    if any(parameter.is_meta for parameter in hf_model.parameters()):
        raise ValueError(
            "parts of this model are offloaded (on the meta device) and cannot be read or written; load it whole"
        )
    chosen = edit if isinstance(edit, Edit) else load_edit(edit)
    with torch.inference_mode(False):  # what is made inside of it is never differentiated through
        steps = steps_of(chosen)
    with putting_on(hf_model, chosen) as entry:
        for part in chosen.parts:
            if check and "model" in part.provenance:
                check_same_model(hf_model, part.provenance["model"])
        _check_places(hf_model, steps)
        _reserve(hf_model, entry, steps)
        for part in chosen.parts:
            if isinstance(part, WeightEdit):
                part.write_into(hf_model, hf_weights(hf_model), entry, check=check)
        entry.hooks += [TorchHook(handle) for handle in _hook(hf_model, layout, steps)]
        if steps:
            entry.hooks.append(TorchHook(hf_model.register_state_dict_pre_hook(_warn_of_hooks)))
        if any(isinstance(part, SteeringEdit) and part.positions is not None for part in chosen.parts):
            entry.hooks += count_in_prompts(hf_model)
    return Attached(hf_model, entry)


def _warn_of_hooks(*_: Any) -> None:
    """Hooks are no weights, so whoever saves these saves another model than the one that runs."""
    warnings.warn(
        "an edit is attached to this model as hooks, which are no part of its weights: what state_dict() returns, and save_pretrained or "
        "push_to_hub save, is the model without them. mrp_lens.export_hf(...) writes the edited model",
        UserWarning,
        stacklevel=3,
    )


def steps_of(edit: Edit) -> Steps:
    """What the edit's hooks do, and where; nothing for its matrices.

    Raises:
        ValueError: steering with noise, which no Hugging Face model could repeat.
    """
    steps: dict[tuple[int, str], list[nn.Module]] = {}
    for part in edit.parts:
        if isinstance(part, ProjectionEdit):
            for hook in part.subspaces():
                steps.setdefault(place_of(hook), []).append(part.change_at(hook))
        elif isinstance(part, SteeringEdit):
            if part.noise > 0.0:
                raise ValueError(
                    f"steering with noise ({part.noise:g}) draws anew at every pass and exists in TransformerLens only; use noise=0"
                )
            target = part.coefficient * part.direction
            steps.setdefault(place_of(part.hook), []).append(exported_hooks.Steering(target, part.mode, part.positions))
    return steps


def place_of(hook: str) -> tuple[int, str]:
    """(layer, site) of a hook's name.

    Raises:
        ValueError: it has no counterpart in a Hugging Face model.
    """
    site = site_of(hook)
    if site not in exported_hooks.SITES or hook != hook_name(layer_of(hook), site):
        raise ValueError(f"{hook} has no counterpart in a Hugging Face model; {', '.join(exported_hooks.SITES)} have")
    return layer_of(hook), site


def _check_places(hf_model: Any, steps: Steps) -> None:
    """Refuse layers, sites and widths that the model does not have."""
    n_layers, d_model = int(hf_model.config.num_hidden_layers), int(hf_model.config.hidden_size)
    if getattr(hf_model.config, "use_parallel_residual", False) and any(site == "resid_mid" for _, site in steps):
        raise ValueError(
            "the edit changes the stream between attention and MLP (resid_mid), and this model computes both side by side: it has none"
        )
    for (layer, site), (first, *_) in steps.items():
        width = int(next(first.buffers()).shape[-1])
        if layer >= n_layers or width != d_model:
            raise ValueError(
                f"the edit changes layer {layer} ({site}) of a stream of width {width}; this model has layers 0..{n_layers - 1} and width "
                f"{d_model}: the edit was made for another model"
            )


def _reserve(hf_model: nn.Module, entry: AppliedEdit, steps: Steps) -> None:
    """Note where projections are; refuse a second one at the same place."""
    kinds = (exported_hooks.Projection, exported_hooks.ConditionalProjection)
    mine = [place for place, done in steps.items() if any(isinstance(step, kinds) for step in done)]
    if any(place in other.places for other in entries_on(hf_model) for place in mine):
        raise ValueError(
            "another projection is on at one of these hooks; two projections after one another do not remove both subspaces. "
            "Detach it and join them: attach(hf_model, edit_a + edit_b)"
        )
    entry.places += mine


def _hook(hf_model: nn.Module, layout: Layout, steps: Steps) -> list[Any]:
    device = next(hf_model.parameters()).device
    with torch.inference_mode(False):
        changes = {place: nn.Sequential(*done).to(device) for place, done in steps.items()}
    return exported_hooks.install(hf_model, layout.blocks, layout.modules, changes)
