"""What an edit does to each token of one text: how far its gates open, how far it moves states, and where they end up."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from mrp_lens.edits import Edit
from mrp_lens.edits.exported_hooks import Prompt
from mrp_lens.edits.wrapped import WrappedEdit
from mrp_lens.metrics.gate import gates_at
from mrp_lens.models import LensModel, device_of
from mrp_lens.models.finite import non_finite
from mrp_lens.models.hooks import HookFunction, captured, frozen, hook_name, layer_of, place_in_block, run_segment
from mrp_lens.utils.torch_state import ordinary_torch

NONE = float("nan")
SHORTEST = 1e-30  # what a state of length 0 is divided by


class Passed(NamedTuple):
    """What one pass with an edit on has shown, by hook.

    Attributes:
        arrived: the states that came to a hook of the edit.
        left: what the edit made of them; of several parts at a hook, the last.
        shares: how far the widest of a hook's gates was open.
    """

    arrived: dict[str, Float[Tensor, "batch seq d_model"]]
    left: dict[str, Float[Tensor, "batch seq d_model"]]
    shares: dict[str, Float[Tensor, "batch seq"]]

    def clear(self) -> None:
        """Forget it, before another pass."""
        for store in self:
            store.clear()


@ordinary_torch(gradients=False)
def token_effects(model: LensModel, edit: Edit, ids: Sequence[int], *, prompt: int | None = None) -> pd.DataFrame:
    """What an edit does to each token of a text: where its gates fire, how far it moves states, where they end up.

    Args:
        model: HookedTransformer or TransformerBridge, without the edit.
        edit: of any kind, also one `at_strength`. Of one that draws noise it is one draw.
        ids: the text's token ids, as the model reads them, BOS included.
        prompt: how many of them are the prompt, in which the positions of steering count. None: all.

    Returns:
        One row a token and hook, BOS left out: `position` (from 0), `token` (its string), `part` ("prompt" or "answer"),
        `hook`, `layer`; `share`, how far the edit's gate is open for the state that comes to the hook (of several requests
        the widest; NaN where there is no gate); `own_displacement`, ||e(h) - h|| / ||h|| of what the edit makes of the state
        h that comes in there (NaN at a hook that is none of the edit's); `displacement`, ||h' - h|| / ||h|| of what leaves
        the hook with the edit on and without it. The hooks are the edit's own and the end of every layer.

    Raises:
        ValueError: no token besides BOS, an edit of another model, or a prompt that is not in the text; NonFiniteError
            where states hold NaN or infinity.

    Example:
        >>> frame = token_effects(model, edit, model.tokenizer("The colour of").input_ids)
    """
    own, read = list(ids), len(ids) if prompt is None else prompt
    skipped = int(own[:1] == [model.tokenizer.bos_token_id])
    if len(own) <= skipped:
        raise ValueError("there is no token besides BOS to look at; give a text")
    if not 1 <= read <= len(own):
        raise ValueError(f"prompt must be from 1 to the {len(own)} tokens of the text, got {prompt}")
    tokens = torch.tensor([own], device=device_of(model))
    ends = [hook_name(layer) for layer in range(model.cfg.n_layers)]
    with frozen(model):
        with _noted(model, edit) as passed, captured(model, ends) as edited, Prompt({}):
            if read < len(own):
                _run(model, tokens[:, :read])  # by which steering knows where the prompt ends
                passed.clear()
            _run(model, tokens)
            _check(model, tokens, edited | passed.left)
        hooks = sorted({*ends, *passed.left}, key=place_in_block)
        with captured(model, hooks) as plain:
            _run(model, tokens)
            _check(model, tokens, plain)
    after = {**edited, **passed.left}
    columns = {
        hook: zip(
            _numbers(passed.shares.get(hook), len(own)),
            _numbers(_moved(passed.arrived.get(hook), passed.left.get(hook)), len(own)),
            _numbers(_moved(plain[hook], after[hook]), len(own)),
            strict=True,
        )
        for hook in hooks
    }
    rows = [
        (
            place - skipped,
            str(model.tokenizer.decode([own[place]])),
            "prompt" if place < read else "answer",
            hook,
            *found,
        )
        for hook in hooks
        for place, found in enumerate(columns[hook])
        if place >= skipped
    ]
    names = ["position", "token", "part", "hook", "share", "own_displacement", "displacement"]
    frame = pd.DataFrame(rows, columns=names)
    frame.insert(4, "layer", frame["hook"].map(layer_of))
    return frame.sort_values("position", kind="stable", ignore_index=True)


@contextmanager
def _noted(model: LensModel, edit: Edit) -> Iterator[Passed]:
    """The edit on, and what each pass shows of it."""
    home = device_of(model)
    passed = Passed({}, {}, {})

    def noting(part: Edit, name: str, change: HookFunction) -> HookFunction:
        gates = gates_at(part, name).values()

        def note(activation: Tensor, hook: Any) -> Tensor | None:
            changed = change(activation, hook)
            passed.arrived.setdefault(name, activation.to(home))
            passed.left[name] = (activation if changed is None else changed).to(home)
            if gates:
                passed.shares[name] = torch.stack([gate(activation) for gate in gates]).amax(dim=0).to(home)
            return changed

        return note

    with WrappedEdit(edit, noting).applied(model):
        yield passed


def _run(model: LensModel, tokens: Int[Tensor, "1 seq"]) -> None:
    last = int(model.cfg.n_layers) - 1
    run_segment(model, tokens, torch.ones_like(tokens, dtype=torch.bool), first=last, last=last)


def _check(
    model: LensModel, tokens: Int[Tensor, "1 seq"], states: Mapping[str, Float[Tensor, "1 seq d_model"]]
) -> None:
    for name, of_hook in states.items():
        if not bool(of_hook.isfinite().all()):
            raise non_finite(model, tokens, torch.ones_like(tokens, dtype=torch.bool), f"states at {name}")


def _moved(
    before: Float[Tensor, "1 seq d_model"] | None, after: Float[Tensor, "1 seq d_model"] | None
) -> Float[Tensor, "1 seq"] | None:
    """How far states went, over how long they were."""
    if before is None or after is None:
        return None
    wide = before.double()
    return (after.double() - wide).norm(dim=-1) / wide.norm(dim=-1).clamp(min=SHORTEST)


def _numbers(values: Float[Tensor, "1 seq"] | None, length: int) -> list[float]:
    return [NONE] * length if values is None else [float(value) for value in values[0].tolist()]
