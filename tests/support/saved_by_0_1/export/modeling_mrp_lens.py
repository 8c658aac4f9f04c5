"""Changes to the residual stream of a plain Hugging Face model, as hooks on its modules.

An exported folder carries a copy of this file, which therefore needs torch and nothing else.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

# In the order in which a block comes to them: a later one has to see what an earlier one did.
SITES = ("resid_pre", "attn_out", "resid_mid", "mlp_out", "resid_post")


class Change(nn.Module):
    """What is done to the states at one place. Its tensors stay in float32 through `.half()` and `.to(dtype)`."""

    def _apply(self, fn: Any, recurse: bool = True) -> "Change":
        for name, buffer in self.named_buffers(recurse=False):
            setattr(self, name, buffer.to(fn(buffer).device))
        return self


class Projection(Change):
    """h <- h - (h Q^T) Q with the orthonormal rows Q, [rank, d_model]."""

    rows: Tensor

    def __init__(self, rows: Tensor) -> None:
        super().__init__()
        self.register_buffer("rows", rows.to(torch.float32))

    def forward(self, states: Tensor) -> Tensor:
        """The states without their part inside the span of the rows."""
        wide = states if states.dtype == torch.float64 else states.float()
        rows = self.rows.to(wide)
        return (wide - (wide @ rows.T) @ rows).type_as(states)


class Steering(Change):
    """h <- t ("replace") or h <- h + t ("add") at all positions, or at some of the prompt."""

    target: Tensor

    def __init__(self, target: Tensor, mode: str, positions: Sequence[int] | None = None) -> None:
        super().__init__()
        self.register_buffer("target", target.to(torch.float32))
        self.mode, self.positions = mode, None if positions is None else list(positions)

    def forward(self, states: Tensor) -> Tensor:
        """The states after steering; steps of cached generation are left alone where positions are chosen."""
        if self.positions is not None and states.shape[1] == 1:
            return states
        wide = states.float()
        target = self.target.to(wide)
        steered = target.expand_as(wide) if self.mode == "replace" else wide + target
        if self.positions is not None:
            chosen = torch.zeros(states.shape[1], dtype=torch.bool, device=states.device)
            chosen[self.positions] = True
            steered = torch.where(chosen[:, None], steered, wide)
        return steered.type_as(states)


def install(
    model: nn.Module, blocks: str, modules: Mapping[str, str], changes: Mapping[tuple[int, str], nn.Module]
) -> list[Any]:
    """Put changes on; returns the handles that take them off.

    Args:
        model: the Hugging Face model.
        blocks: the name of its list of layers.
        modules: "attn_out", "mlp_out" -> the module of a block whose output is added to the stream; "stream" -> the one whose
            input is the stream as the block receives it.
        changes: (layer, site) -> what is done there.
    """
    handles: list[Any] = []
    layers = model.get_submodule(blocks)
    for layer, site in sorted(changes, key=lambda place: (place[0], SITES.index(place[1]))):
        block, change = layers[layer], changes[layer, site]  # type: ignore[index]
        if site == "resid_pre":
            handles.append(block.register_forward_pre_hook(partial(_input, change), with_kwargs=True))
        elif site == "resid_post":
            handles.append(block.register_forward_hook(partial(_output, change)))
        elif site == "resid_mid":
            # No module returns the sum of the stream and the attention's output: the branch is made to return what
            # brings that sum to the changed one.
            entered: list[Tensor] = []
            first, branch = (block.get_submodule(modules[name]) for name in ("stream", "attn_out"))
            handles.append(first.register_forward_pre_hook(partial(_remember, entered)))
            handles.append(branch.register_forward_hook(partial(_sum, change, entered)))
        else:
            handles.append(block.get_submodule(modules[site]).register_forward_hook(partial(_output, change)))
    return handles


def build(model: nn.Module, settings: Mapping[str, Any]) -> None:
    """Give a model the changes that a configuration lists, without their values: these come with its weights."""
    layers = model.get_submodule(settings["blocks"])
    changes: dict[tuple[int, str], nn.Module] = {}
    for entry in settings["changes"]:
        block = layers[entry["layer"]]  # type: ignore[index]
        if not hasattr(block, "edit"):
            block.edit = nn.ModuleDict()
        block.edit[entry["site"]] = nn.Sequential(*(_empty(step) for step in entry["steps"]))
        changes[entry["layer"], entry["site"]] = block.edit[entry["site"]]
    install(model, settings["blocks"], settings["modules"], changes)


def _empty(settings: Mapping[str, Any]) -> nn.Module:
    values = torch.full(settings["shape"], float("nan"), dtype=torch.float32)
    if settings["kind"] == "steering":
        return Steering(values, settings["mode"], settings["positions"])
    return Projection(values)


def _output(change: nn.Module, module: nn.Module, args: Any, output: Any) -> Any:
    return (change(output[0]), *output[1:]) if isinstance(output, tuple) else change(output)


def _input(change: nn.Module, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if args:
        return (change(args[0]), *args[1:]), kwargs
    return args, {**kwargs, "hidden_states": change(kwargs["hidden_states"])}


def _remember(entered: list[Tensor], module: nn.Module, args: tuple[Any, ...]) -> None:
    entered[:] = [args[0]]


def _sum(change: nn.Module, entered: list[Tensor], module: nn.Module, args: Any, output: Any) -> Any:
    stream = entered.pop()
    written = output[0] if isinstance(output, tuple) else output
    wanted = change(stream + written) - stream
    return (wanted, *output[1:]) if isinstance(output, tuple) else wanted


# --- Generated: an edited LlamaForCausalLM. ---

import json

from transformers import LlamaConfig, LlamaForCausalLM

try:  # transformers 5 renames some architectures' tensors on loading, and skips classes that it does not know
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping as renaming_of
    from transformers.conversion_mapping import register_checkpoint_conversion_mapping as register_renaming
except ImportError:
    pass
else:
    renaming = renaming_of("LlamaForCausalLM") or renaming_of(LlamaConfig.model_type)
    if renaming:
        register_renaming("mrp_lens_llama", renaming, overwrite=True)

OWN = ("model_type", "architectures", "auto_map", "mrp_lens", "dtype", "torch_dtype", "transformers_version")


class EditedConfig(LlamaConfig):
    """The settings of the base model, kept apart so that no other class takes this folder for it."""

    model_type = "mrp_lens_llama"

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        own = dict(config_dict)
        base = own.pop("base_config", None)
        if base is not None:
            del own["vocab_size"]
            own = {**base, **own}
        return super().from_dict(own, **kwargs)

    def to_json_string(self, *args, **kwargs):
        flat = json.loads(super().to_json_string(*args, **kwargs))
        nested = {key: flat.pop(key) for key in OWN if key in flat}
        nested.update({"vocab_size": 'this is an edited model: load it with AutoModelForCausalLM.from_pretrained(..., trust_remote_code=True)', "base_config": flat})
        return json.dumps(nested, indent=2, sort_keys=True) + "\n"


class EditedForCausalLM(LlamaForCausalLM):
    """The base model with the edit inside its forward pass."""

    config_class = EditedConfig
    _keep_in_fp32_modules_strict = ["edit"]

    def __init__(self, config):
        super().__init__(config)
        build(self, config.mrp_lens)
        self.post_init()

    @classmethod
    def from_pretrained(cls, *args, output_loading_info=False, **kwargs):
        model, info = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        lost = [name for name in info["missing_keys"] if ".edit." in name]
        if lost:
            raise ValueError(f"the edit's tensors are missing from this folder: {', '.join(sorted(lost))}")
        return (model, info) if output_loading_info else model
