"""Reading and changing the residual stream through hook points, in the same way on both TransformerLens classes."""

import difflib
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, Literal, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mrp_lens.data.tokenization import TokenBatch
from mrp_lens.models.attachments import check_on, exclusive
from mrp_lens.models.base import check_lens_model, device_of, forward, is_bridge, modules_of
from mrp_lens.models.memory import in_halves
from mrp_lens.models.protocol import LensModel

Site = Literal[
    "resid_pre", "attn_out", "resid_mid", "mlp_out", "resid_post"
]  # in the order in which a pass comes to them
SITES: tuple[str, ...] = get_args(Site)
HOOK_NAME = re.compile(r"blocks\.(0|[1-9][0-9]{0,5})\.[A-Za-z0-9_.]+")
HookFunction = Callable[[Tensor, Any], Tensor | None]


def hook_name(layer: int, site: str = "resid_post") -> str:
    """`blocks.{layer}.hook_{site}`.

    Raises:
        ValueError: the site is none of resid_pre, attn_out, resid_mid, mlp_out, resid_post.
    """
    if site not in SITES:
        raise ValueError(f"unknown site {site!r}; choose one of {', '.join(SITES)}")
    return f"blocks.{layer}.hook_{site}"


def layer_of(name: str) -> int:
    """The layer in a hook name such as `blocks.3.hook_resid_post`."""
    match = HOOK_NAME.fullmatch(name) if isinstance(name, str) else None
    if match is None:
        raise ValueError(
            f"{name!r} is not the name of a hook inside a block; expected something like 'blocks.3.hook_resid_post'"
        )
    return int(match.group(1))


def site_of(name: str) -> str:
    """The site in a hook name: `resid_post` of `blocks.3.hook_resid_post`."""
    return name.rsplit("hook_", 1)[-1]


def place_in_block(name: str) -> tuple[int, int]:
    """In which order a pass comes to hooks: by layer and site; hooks of other sites come last."""
    site = site_of(name)
    return layer_of(name), SITES.index(site) if site in SITES else len(SITES)


def check_hook_names(model: LensModel, names: Iterable[str]) -> None:
    """Refuse names that the model does not have (TransformerBridge 3.9 would ignore them).

    Raises:
        TypeError, ValueError: as `hook_points`.
    """
    hook_points(model, names)


def hook_points(model: LensModel, names: Iterable[str]) -> list[Any]:
    """The hook points of these names, those of `model.hook_dict`; a Bridge puts that together anew whenever it is looked at, which of
    30 layers takes as long as a short pass.

    Raises:
        TypeError: not a model of TransformerLens.
        ValueError: names the unknown hook, the layers there are, and the closest known names.
    """
    check_lens_model(model)
    return [_hook_point(model, name) for name in names]


def _hook_point(model: LensModel, name: str) -> Any:
    from transformer_lens.hook_points import HookPoint  # loaded with the model

    with suppress(AttributeError, TypeError):
        point = attrgetter(name)(model)
        if isinstance(point, HookPoint):
            return point
    known = model.hook_dict
    if name in known:
        return known[name]
    close = difflib.get_close_matches(name, known, n=3)
    hint = f"; close to it: {', '.join(close)}" if close else ""
    raise ValueError(
        f"this model has no hook {name!r}: its layers are 0..{model.cfg.n_layers - 1} and the usual sites are "
        f"{', '.join('hook_' + site for site in SITES)}{hint}"
    )


@dataclass(frozen=True)
class HookHandle:
    """A hook that was added, and can be removed without touching any other."""

    point: Any
    entry: Any

    def present(self) -> bool:
        """Whether it is still on."""
        return any(entry is self.entry for entry in self.point.fwd_hooks)

    def remove(self) -> bool:
        """Remove the hook; False if somebody else had removed it before."""
        present = self.present()
        self.entry.hook.remove()
        self.point.fwd_hooks = [entry for entry in self.point.fwd_hooks if entry is not self.entry]
        return present


def add_hooks(model: LensModel, hooks: Iterable[tuple[str, HookFunction]]) -> list[HookHandle]:
    """Add permanent hooks, which survive a plain `model.reset_hooks()`; nothing is added if a name is unknown."""
    pairs = list(hooks)
    check_hook_names(model, (name for name, _ in pairs))
    placed = _to_the_stream(model, pairs)
    handles = []
    for point, (_, function) in zip(hook_points(model, (name for name, _ in placed)), placed, strict=True):
        sums = [entry for entry in point.fwd_hooks if isinstance(entry.user_hook, _ChangeOfSum)]
        point.add_hook(function, is_permanent=True)
        handles.append(HookHandle(point, point.fwd_hooks[-1]))
        if sums and not isinstance(function, _ChangeOfSum):
            # On the Bridge a change at resid_mid is made here, and comes after all at attn_out, whenever these were added.
            for entry in sums:
                point._forward_hooks.move_to_end(entry.hook.id)
            point.fwd_hooks = [*(entry for entry in point.fwd_hooks if entry not in sums), *sums]
    return handles


def _to_the_stream(model: LensModel, pairs: list[tuple[str, HookFunction]]) -> list[tuple[str, HookFunction]]:
    """The hooks as they have to be placed so that they act on the stream.

    On the Bridge `hook_resid_mid` is the input of the norm before the MLP: what is changed there does not reach the
    stream, as it does in HookedTransformer. So the attention's output is made to bring the stream to the changed sum.

    Raises:
        ValueError: the Bridge has no such points in this architecture.
    """
    placed: list[tuple[str, HookFunction]] = []
    for name, function in pairs:
        if not (is_bridge(model) and name.endswith(".hook_resid_mid")):
            placed.append((name, function))
            continue
        block = name.removesuffix("hook_resid_mid")
        change = _ChangeOfSum(function)
        names = (f"{block}ln1.hook_in", f"{block}hook_attn_out")
        check_hook_names(model, names)
        placed += zip(names, (change.remember, change), strict=True)
    return placed


class _ChangeOfSum:
    """A function of (stream + attention's output) as one that sees the stream (`remember`) and one that sees that output."""

    def __init__(self, function: HookFunction) -> None:
        self.function = function
        self.entered: dict[int, Tensor] = {}  # by thread: several may run the model at once

    def remember(self, activation: Tensor, hook: Any) -> None:
        self.entered[threading.get_ident()] = activation

    def __call__(self, activation: Tensor, hook: Any) -> Tensor | None:
        stream = self.entered.pop(threading.get_ident())
        changed = self.function(stream + activation, hook)
        return None if changed is None else changed - stream


def remove_hooks(handles: Iterable[HookHandle]) -> bool:
    """Remove every one of them; False if some had been removed before."""
    present = [handle.remove() for handle in handles]
    return all(present)


@contextmanager
def hooked(model: LensModel, hooks: Iterable[tuple[str, HookFunction]]) -> Iterator[None]:
    """`add_hooks` for the length of a `with` block, in which no other thread may use the model (see `exclusive`)."""
    with exclusive(model):
        handles = add_hooks(model, hooks)
        try:
            yield
        finally:
            remove_hooks(handles)


@contextmanager
def captured(model: LensModel, names: Iterable[str]) -> Iterator[dict[str, Float[Tensor, "batch seq d_model"]]]:
    """A dict that every forward pass fills with what leaves the named hook points, gradient included, on the device of the batch.

    Hooks that were added before are seen. On the Bridge `run_with_cache` would detach, and `stop_at_layer` at
    the last layer would return logits; this does neither.
    """
    store: dict[str, Tensor] = {}
    device = device_of(model)

    def keep(name: str) -> HookFunction:
        def hook(activation: Tensor, hook: Any) -> None:
            store[name] = activation.to(device)

        return hook

    with hooked(model, [(name, keep(name)) for name in names]):
        yield store


@contextmanager
def frozen(model: LensModel) -> Iterator[None]:
    """Evaluation mode and no parameter that requires grad; both as before on exit. No other thread may use the model inside.

    Raises:
        ValueError: another thread has an edit applied to the model, or fits, measures or attacks it; or hooks of an edit that is
            on were removed.
    """
    check_lens_model(model)
    with exclusive(model):
        check_on(model)
        flags = [
            (parameter, parameter.requires_grad) for parameter in model.parameters() if not parameter.is_inference()
        ]
        modes = [(module, module.training) for module in modules_of(model)]
        try:
            for parameter, _ in flags:
                parameter.requires_grad_(False)
            for module, _ in modes:
                module.training = False
            yield
        finally:
            for parameter, flag in flags:
                parameter.requires_grad_(flag)
            for module, mode in modes:
                module.training = mode


class _Stop(Exception):
    """Ends a forward pass once all that is needed has been computed."""


@dataclass(frozen=True)
class Segment:
    """Consecutive blocks together with the inputs they received, so that they can be run again, and what the last one gave."""

    blocks: dict[int, Any]
    inputs: dict[int, tuple[tuple[Any, ...], dict[str, Any]]]
    output: Any

    def replay(self, weights: Mapping[int, Mapping[str, Tensor]]) -> None:
        """Run the blocks again, gradient on, with `weights[layer]` (block parameter name -> tensor) in place of
        the model's own, which stay as they are. Hooks fire as in a normal pass; read results with `captured`."""
        state: Tensor | None = None
        for layer, block in self.blocks.items():
            (first, *others), kwargs = self.inputs[layer]
            # tie_weights=False: the Bridge lists one module under several paths, and swapping each in turn would
            # "restore" the swapped tensor.
            output = torch.func.functional_call(
                block,
                dict(weights.get(layer, {})),
                (first if state is None else state, *others),
                kwargs,
                tie_weights=False,
            )
            state = output[0] if isinstance(output, tuple) else output


def run_segment(
    model: LensModel,
    tokens: Int[Tensor, "batch seq"],
    attention_mask: Bool[Tensor, "batch seq"],
    *,
    first: int,
    last: int,
) -> Segment:
    """Run the model without gradient up to and including block `last`; keep what blocks `first`..`last` received.

    Works alike on both classes: HookedTransformer's `start_at_layer` has no counterpart on the Bridge.
    """
    inputs: dict[int, tuple[tuple[Any, ...], dict[str, Any]]] = {}

    def record(layer: int) -> Callable[..., None]:
        def pre_hook(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            inputs[layer] = (args, kwargs)

        return pre_hook

    outputs: list[Any] = []

    def stop(_module: Any, _args: Any, output: Any) -> None:
        outputs.append(output)
        raise _Stop

    with ExitStack() as stack:
        for layer in range(first, last + 1):
            handle = model.blocks[layer].register_forward_pre_hook(record(layer), with_kwargs=True)
            stack.callback(handle.remove)
        stack.callback(model.blocks[last].register_forward_hook(stop).remove)
        stack.enter_context(torch.no_grad())
        with suppress(_Stop):
            forward(model, tokens, attention_mask)
    return Segment({layer: model.blocks[layer] for layer in range(first, last + 1)}, inputs, outputs[0])


def read_states(
    model: LensModel,
    batch: TokenBatch,
    hooks: Sequence[str],
    places: Callable[[TokenBatch], Bool[Tensor, "batch seq"]] = attrgetter("content_mask"),
) -> dict[str, Float[Tensor, "tokens d_model"]]:
    """States of a batch's content tokens, or other places, at each hook, without gradient; the pass ends at the last hook's layer.

    A batch for which memory runs out is read in halves.
    """
    last = max(map(layer_of, hooks))

    def read(part: TokenBatch) -> dict[str, Float[Tensor, "tokens d_model"]]:
        with captured(model, hooks) as store:
            run_segment(model, part.tokens, part.attention_mask, first=last, last=last)
        return {name: store[name][places(part)] for name in hooks}

    return in_halves(batch, read)
