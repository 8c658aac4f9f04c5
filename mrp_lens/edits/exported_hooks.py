"""Changes to the residual stream of a plain Hugging Face model, as hooks on its modules.

An exported folder carries a copy of this file, which therefore needs torch and nothing else.
"""

import hashlib
import json
import math
import threading
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from contextvars import ContextVar
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

# In the order in which a block comes to them: a later one has to see what an earlier one did.
SITES = ("resid_pre", "attn_out", "resid_mid", "mlp_out", "resid_post")

HASH = "sha256"  # of a configuration's settings, among them
MODES = ("replace", "add")
NUMBERS = ("threshold", "sharpness")  # of a gate, for each of its directions


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
        with without_autocast(wide):
            return (wide - (wide @ rows.T) @ rows).type_as(states)


class ConditionalProjection(Change):
    """h <- h - sum_i g_i(h) (h Q_i^T) Q_i: of each subspace as much is removed as its gate says of the state that comes in.

    Args:
        values: [rank + directions, d_model], the orthonormal rows of all Q_i, then the unit directions of each gate.
        gates: for each Q_i in order its "rank" and its "gate": "threshold", "sharpness" and "hard", or None: always removed.
    """

    values: Tensor

    def __init__(self, values: Tensor, gates: Sequence[Mapping[str, Any]]) -> None:
        super().__init__()
        self.register_buffer("values", values.to(torch.float32))
        self.gates = [dict(entry) for entry in gates]

    def forward(self, states: Tensor) -> Tensor:
        """The states without as much of their parts inside the subspaces as the gates say."""
        wide = states if states.dtype == torch.float64 else states.float()
        rank = sum(entry["rank"] for entry in self.gates)
        rows, directions = self.values[:rank].to(wide), self.values[rank:]
        each = []
        for entry in self.gates:
            gate = entry["gate"]
            own = 0 if gate is None else len(_numbers(gate["threshold"]))
            each.append(shares(wide, directions[:own], **gate) if own else torch.ones_like(wide[..., 0]))
            directions = directions[own:]
        by_row = [
            share[..., None].expand(*share.shape, own["rank"]) for share, own in zip(each, self.gates, strict=True)
        ]
        with without_autocast(wide):
            return (wide - ((wide @ rows.T) * torch.cat(by_row, dim=-1)) @ rows).type_as(states)


def shares(
    states: Tensor,
    direction: Tensor,
    threshold: float | Sequence[float] | Tensor,
    sharpness: float | Sequence[float] | Tensor,
    hard: bool = False,
) -> Tensor:
    """How far a gate is open for each state, in float32 or better: sigmoid(sharpness * (cos(h, w) - threshold)), or 1 where
    the cosine is above the threshold and else 0; of several directions, as far as the one that opens it furthest. A zero
    state has the cosine 0. Differentiable unless `hard`.

    Args:
        states: [..., d_model].
        direction: w, the unit vector [d_model], or several, [directions, d_model].
        threshold: the cosine at which the gate is half open, or one for each direction.
        sharpness: how quickly it opens there, or one for each direction; of no meaning to a hard gate.
        hard: open or closed, with nothing in between.

    Returns:
        [...], in [0, 1].
    """
    wide = states if states.dtype == torch.float64 else states.float()
    directions = direction.to(wide).reshape(-1, direction.shape[-1])
    thresholds, steepness = (torch.as_tensor(each).to(wide).reshape(-1) for each in (threshold, sharpness))
    with without_autocast(wide):
        beyond = nn.functional.linear(nn.functional.normalize(wide, dim=-1), directions) - thresholds
    opened = (steepness * beyond).amax(dim=-1)
    return (opened > 0.0).to(wide) if hard else torch.sigmoid(opened)


class Steering(Change):
    """h <- t ("replace") or h <- h + t ("add") at all positions, or at some of the prompt."""

    target: Tensor

    def __init__(self, target: Tensor, mode: str, positions: Sequence[int] | None = None) -> None:
        super().__init__()
        self.register_buffer("target", target.to(torch.float32))
        self.mode, self.positions = mode, None if positions is None else list(positions)

    def forward(self, states: Tensor) -> Tensor:
        """The states after steering; of a prompt's continuation they are left alone where positions are chosen."""
        wide = states if states.dtype == torch.float64 else states.float()
        target = self.target.to(wide)
        steered = target.expand_as(wide) if self.mode == "replace" else wide + target
        if self.positions is not None:
            chosen = in_prompt(id(self), self.positions, wide)
            steered = torch.where(chosen[:, None], steered, wide)
        return steered.type_as(states)


def without_autocast(states: Tensor) -> Any:
    """Inside, matrix products are computed in the precision of what is multiplied."""
    kind = states.device.type
    return torch.autocast(kind, enabled=False) if kind in ("cpu", "cuda", "mps", "xpu") else nullcontext()


# By place of steering the length of the prompt that `generate` works on; None outside of `generate`.
_lengths: ContextVar[dict[int, int] | None] = ContextVar("lengths", default=None)

# Ways of generating whose first pass is not the prompt, or in which later ones cannot be told from it.
UNCOUNTABLE = ("assistant_model", "prompt_lookup_num_tokens", "prefill_chunk_size", "past_key_values", "cache")


class Prompt:
    """Inside, one call of `generate`: its first pass is the prompt, in which positions count."""

    def __init__(self, arguments: Mapping[str, Any]) -> None:
        sources = (arguments, getattr(arguments.get("generation_config"), "__dict__", {}))
        for name in UNCOUNTABLE:
            if any(source.get(name) is not None for source in sources):
                raise ValueError(
                    f"the model is steered at positions of the prompt, which cannot be told with {name}; leave it out"
                )
        self.lengths: dict[int, int] = {}

    def __enter__(self) -> None:
        self.token = _lengths.set(self.lengths)

    def __exit__(self, *_: Any) -> None:
        _lengths.reset(self.token)


def counts_positions(settings: Mapping[str, Any]) -> bool:
    """Whether a configuration lists steering at positions of the prompt."""
    return any(step.get("positions") is not None for change in settings["changes"] for step in change["steps"])


def in_prompt(place: int, positions: Sequence[int], states: Tensor) -> Tensor:
    """Which positions of a pass are the chosen ones of the prompt, [seq].

    Inside `generate` that is counted in its first pass: a later one either holds the whole text anew (without a cache), or
    nothing of the prompt. Elsewhere each pass is a prompt, except over a single token, which is taken for a step with a cache.
    """
    length = states.shape[1]
    lengths = _lengths.get()
    continued = length == 1 if lengths is None else place in lengths and length <= lengths[place]
    prompt = length if lengths is None else lengths.setdefault(place, length)
    chosen = torch.zeros(length, dtype=torch.bool, device=states.device)
    for position in () if continued else positions:
        if not -prompt <= position < prompt:
            raise ValueError(f"position {position} is outside a prompt of {prompt} tokens")
        chosen[position % prompt] = True
    return chosen


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
            entered: dict[int, Tensor] = {}
            first, branch = (block.get_submodule(modules[name]) for name in ("stream", "attn_out"))
            handles.append(first.register_forward_pre_hook(partial(_remember, entered)))
            handles.append(branch.register_forward_hook(partial(_sum, change, entered)))
        else:
            module = block.get_submodule(modules[site])
            sums = [key for key, hook in module._forward_hooks.items() if getattr(hook, "func", None) is _sum]
            handles.append(module.register_forward_hook(partial(_output, change)))
            # A change at resid_mid is made here too, and comes after all at attn_out, whenever these were put on.
            for key in sums:
                module._forward_hooks.move_to_end(key)
    return handles


def build(model: Any, settings: Any) -> None:
    """Give a model the changes that a configuration lists, without their values: these come with its weights.

    Raises:
        ValueError: the settings are not those that were exported.
    """
    check_settings(settings, int(model.config.num_hidden_layers), int(model.config.hidden_size))
    layers = model.get_submodule(settings["blocks"])
    changes: dict[tuple[int, str], nn.Module] = {}
    for entry in settings["changes"]:
        block = layers[entry["layer"]]
        if not hasattr(block, "edit"):
            block.edit = nn.ModuleDict()
        block.edit[entry["site"]] = nn.Sequential(*(_empty(step) for step in entry["steps"]))
        changes[entry["layer"], entry["site"]] = block.edit[entry["site"]]
    install(model, settings["blocks"], settings["modules"], changes)


def check_settings(settings: Any, n_layers: int, width: int) -> None:
    """Refuse settings of an edit that were changed since they were written, or that no edit of such a model has.

    Raises:
        ValueError: says what is wrong.
    """
    known = isinstance(settings, dict) and set(settings) == {"blocks", "modules", "changes", HASH}
    if not known or settings[HASH] != hash_of({key: value for key, value in settings.items() if key != HASH}):
        raise ValueError(
            "the edit's settings in config.json are missing or were changed since this folder was exported (their hash does not match): "
            "another model would load; fetch the folder again, or export it again"
        )
    try:
        whole = _are_changes(settings["changes"], n_layers, width)
    except (AttributeError, IndexError, KeyError, TypeError):
        whole = False
    if not whole:
        raise ValueError(
            f"the edit's settings in config.json are none of an edit on {n_layers} layers of width {width}; fetch the folder again, or export "
            "it again"
        )


def _are_changes(changes: Sequence[Mapping[str, Any]], n_layers: int, width: int) -> bool:
    """Whether these are changes at places that a model of this size has, each once."""
    places = [(change["layer"], change["site"]) for change in changes]
    return (
        len(set(places)) == len(places) > 0
        and all(_is_count(layer, n_layers) and site in SITES for layer, site in places)
        and all(change["steps"] for change in changes)
        and all(_is_step(step, width) for change in changes for step in change["steps"])
    )


def _is_step(step: Mapping[str, Any], width: int) -> bool:
    """Whether a step has the shape and the settings of its kind."""
    shape, positions = step["shape"], step.get("positions")
    if step["kind"] == "projection":
        return len(shape) == 2 and _is_count(shape[0] - 1, width) and shape[1] == width
    if step["kind"] == "conditional-projection":
        return _are_gates(step["gates"], shape, width)
    chosen = positions is None or all(type(position) is int for position in positions)
    return bool(step["kind"] == "steering" and shape == [width] and step["mode"] in MODES and chosen)


def _are_gates(entries: Sequence[Mapping[str, Any]], shape: Sequence[int], width: int) -> bool:
    """Whether these are the ranks and gates of a tensor of that shape, each gate with numbers that it can have."""
    gates = [entry["gate"] for entry in entries if entry["gate"] is not None]
    ranks = [entry["rank"] for entry in entries]
    return (
        all(_is_count(rank - 1, width) for rank in ranks)
        and 0 < sum(ranks) < width
        and all(_is_gate(gate) for gate in gates)
        and list(shape) == [sum(ranks) + sum(len(_numbers(gate["threshold"])) for gate in gates), width]
    )


def _is_gate(gate: Mapping[str, Any]) -> bool:
    """Whether a gate has the numbers of one, for each of its directions."""
    thresholds, steepness = (_numbers(gate[name]) for name in NUMBERS)
    return (
        set(gate) == {*NUMBERS, "hard"}
        and type(gate["hard"]) is bool
        and type(gate["threshold"]) is type(gate["sharpness"])
        and len(thresholds) == len(steepness) > 0
        and all(type(each) is float for each in (*thresholds, *steepness))
        and all(math.isfinite(each) for each in thresholds)
        and all(0.0 < each < math.inf for each in steepness)
    )


def _numbers(value: Any) -> Sequence[Any]:
    """Of a gate with one direction or several: one for each."""
    return value if isinstance(value, list) else [value]


def _is_count(value: Any, below: int) -> bool:
    return type(value) is int and 0 <= value < below


def check_values(model: nn.Module, settings: Mapping[str, Any]) -> None:
    """Refuse tensors of an edit that are not those that were exported. Offloaded ones cannot be read, and pass.

    Raises:
        ValueError: names one.
    """
    layers = model.get_submodule(settings["blocks"])
    for change in settings["changes"]:
        for number, step in enumerate(change["steps"]):
            (name, values), *_ = layers[change["layer"]].edit[change["site"]][number].named_buffers()  # type: ignore[index]
            if not values.is_meta and hash_of_values(values) != step["values_sha256"]:
                raise ValueError(
                    f"the edit's tensor {name} at layer {change['layer']} ({change['site']}) was changed since this folder was exported (its "
                    "hash does not match): another model would load; fetch the folder again, or export it again"
                )


def hash_of(settings: Mapping[str, Any]) -> str:
    """SHA-256 of settings, whatever the order of their names."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def hash_of_values(values: Tensor) -> str:
    """SHA-256 of a tensor's values in float32."""
    return hashlib.sha256(values.detach().to("cpu", torch.float32).contiguous().numpy().tobytes()).hexdigest()


def _empty(settings: Mapping[str, Any]) -> nn.Module:
    values = torch.full(settings["shape"], float("nan"), dtype=torch.float32)
    if settings["kind"] == "steering":
        return Steering(values, settings["mode"], settings["positions"])
    if settings["kind"] == "conditional-projection":
        return ConditionalProjection(values, settings["gates"])
    return Projection(values)


def _output(change: nn.Module, module: nn.Module, args: Any, output: Any) -> Any:
    return (change(output[0]), *output[1:]) if isinstance(output, tuple) else change(output)


def _input(change: nn.Module, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if args:
        return (change(args[0]), *args[1:]), kwargs
    return args, {**kwargs, "hidden_states": change(kwargs["hidden_states"])}


def _remember(entered: dict[int, Tensor], module: nn.Module, args: tuple[Any, ...]) -> None:
    entered[threading.get_ident()] = args[0]  # by thread: several may run the model at once


def _sum(change: nn.Module, entered: dict[int, Tensor], module: nn.Module, args: Any, output: Any) -> Any:
    stream = entered.pop(threading.get_ident())
    written = output[0] if isinstance(output, tuple) else output
    wanted = change(stream + written) - stream
    return (wanted, *output[1:]) if isinstance(output, tuple) else wanted
