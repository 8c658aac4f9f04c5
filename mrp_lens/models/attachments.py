"""Which edits are on a model: one record for each, so that any order of putting on and taking off ends with the original bits."""

import copy
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from mrp_lens.models.weights import EditableWeight

_lock = threading.RLock()  # reentrant: a block that the garbage collector closes may end inside of this one's lines
RECORD = "_mrp_lens_edits"  # an attribute of the model, so that a copy of an edited model knows what it carries


@dataclass
class _Owner:
    thread: threading.Thread
    depth: int = 0


_owners: WeakKeyDictionary[Any, _Owner] = WeakKeyDictionary()


def anchor_of(model: Any) -> Any:
    """The module that holds the weights: of a TransformerBridge the Hugging Face model inside, which several may share."""
    return vars(model).get("original_model", model)


@contextmanager
def exclusive(model: Any) -> Iterator[None]:
    """Inside, no other thread may put an edit on this model, take one off, fit, measure or attack it.

    May be nested within one thread. Plain passes (`model(...)`, `generate`) are not refused: a model with an edit attached
    may serve any number of threads.

    Args:
        model: HookedTransformer, TransformerBridge, or a plain Hugging Face model.

    Raises:
        ValueError: another thread is inside; names both.

    Example:
        >>> with exclusive(model):
        ...     frame = ml.metrics.accuracy(model, questions)
    """
    anchor, here = anchor_of(model), threading.current_thread()
    with _lock:
        owner = _owners.get(anchor)
        if owner is None or not owner.thread.is_alive():
            owner = _owners[anchor] = _Owner(here)
        elif owner.thread is not here:
            raise ValueError(
                f"thread {here.name!r} cannot use this model now: thread {owner.thread.name!r} has an edit applied to it, or fits, measures "
                "or attacks it, and their figures would mix; wait for it, or give each thread a model of its own (copy.deepcopy(model))"
            )
        owner.depth += 1
    try:
        yield
    finally:
        with _lock:
            owner.depth -= 1
            if owner.depth == 0 and _owners.get(anchor) is owner:
                del _owners[anchor]


class Removable(Protocol):
    """A hook that is on."""

    def present(self) -> bool:
        """Whether it still is."""
        ...

    def remove(self) -> bool:
        """Take it off; False if somebody else had done so before."""
        ...


@dataclass(eq=False)
class TorchHook:
    """A hook of torch's own."""

    handle: Any

    def present(self) -> bool:
        """Whether it is still on."""
        hooks = self.handle.hooks_dict_ref()
        return hooks is not None and self.handle.id in hooks

    def remove(self) -> bool:
        """Take it off; False if somebody else had done so before."""
        present = self.present()
        self.handle.remove()
        return present


@dataclass(eq=False)
class Written:
    """New values of one matrix."""

    weight: EditableWeight
    values: Tensor
    dtype: torch.dtype

    def as_written(self) -> Tensor:
        """What the model holds if nobody has changed it since, also if the model was cast or moved."""
        values = self.values.T if self.weight.transposed else self.values
        return values.to(self.weight.parameter.device, self.dtype).to(self.weight.parameter.dtype)


@dataclass(eq=False)
class Original:
    """What a matrix held before the first edit that is on."""

    parameter: torch.nn.Parameter
    values: Tensor


@dataclass(eq=False)
class AppliedEdit:
    """One edit that is on.

    Attributes:
        edit: the edit.
        hooks: what it hooked.
        places: hook points where it projects; a second projection there would multiply instead of join.
        written: what it wrote.
    """

    edit: Any
    hooks: list[Removable] = field(default_factory=list)
    places: list[Any] = field(default_factory=list)
    written: list[Written] = field(default_factory=list)


@dataclass(eq=False)
class _Record:
    compatibility_mode: bool
    on: list[AppliedEdit] = field(default_factory=list)
    originals: list[Original] = field(default_factory=list)

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Record":
        """The record of a copied model: it points at the copy's hooks and parameters, and shares edits and values."""
        shared = [entry.edit for entry in self.on] + [original.values for original in self.originals]
        shared += [written.values for entry in self.on for written in entry.written]
        memo.update({id(thing): thing for thing in shared})
        return _Record(self.compatibility_mode, copy.deepcopy(self.on, memo), copy.deepcopy(self.originals, memo))

    def __reduce_ex__(self, protocol: Any) -> Any:
        if any(not isinstance(hook, TorchHook) for entry in self.on for hook in entry.hooks):
            raise ValueError(
                "a TransformerLens model, or a Hugging Face model that is steered at positions, cannot be pickled with the hooks of an edit "
                "on; take it off (edit.detach(model)) and save the edit by itself: edit.save_pretrained(folder)"
            )
        return super().__reduce_ex__(protocol)

    def writers(self, parameter: torch.nn.Parameter) -> list[Written]:
        """What was written into it, in order."""
        return [w for entry in self.on for w in entry.written if w.weight.parameter is parameter]

    def original(self, parameter: torch.nn.Parameter) -> Original:
        """What it held."""
        return next(original for original in self.originals if original.parameter is parameter)


def edits_on(model: Any) -> tuple[Any, ...]:
    """The edits that are on a model, attached or applied, in the order in which they were put on.

    Args:
        model: HookedTransformer, TransformerBridge, or a plain Hugging Face model.

    Example:
        >>> for edit in edits_on(model):
        ...     edit.detach(model)
    """
    return tuple(entry.edit for entry in entries_on(model))


def entries_on(model: Any) -> tuple[AppliedEdit, ...]:
    """What is noted of the edits that are on."""
    record: _Record | None = vars(anchor_of(model)).get(RECORD)
    return () if record is None else tuple(record.on)


@contextmanager
def putting_on(model: Any, edit: Any) -> Iterator[AppliedEdit]:
    """Inside, an edit is put on; what was put on by then is taken off again if the block raises.

    Yields:
        Where to note what is changed.

    Raises:
        ValueError: the edit, or a part of it, is on already.
    """
    with exclusive(model):
        for known in edits_on(model):
            if any(part == other for part in edit.parts for other in known.parts):
                raise ValueError(
                    "this edit, or a part of it, is attached to this model already or applied, and would act twice; take it off first "
                    f"(edit.detach(model)). On is {known!r}"
                )
        record = _record_of(model)
        entry = AppliedEdit(edit)
        record.on.append(entry)
        try:
            yield entry
        except BaseException:
            take_off(model, entry, discard=True)
            raise
        _compile_anew(entry)


def write(model: Any, entry: AppliedEdit, weight: EditableWeight, values: Tensor) -> None:
    """Overwrite one matrix and note it.

    Args:
        model: whose matrix it is.
        entry: the edit that does.
        weight: where.
        values: in the checkpoint's layout; not copied, so never to be changed in place.
    """
    record, parameter = _record_of(model), weight.parameter
    if not record.writers(parameter):
        record.originals.append(Original(parameter, parameter.detach().clone()))
    entry.written.append(Written(weight, values, parameter.dtype))
    weight.write(values)


def take_off(model: Any, entry: AppliedEdit, *, discard: bool) -> list[str]:
    """Take an edit off: its hooks go, and each of its matrices holds what the edits that stay on have written, or the
    original values.

    Args:
        model: what it is on.
        entry: the edit.
        discard: overwrite matrices that somebody else has changed meanwhile.

    Returns:
        What was not as the edit had left it, in words.

    Raises:
        ValueError: it is not on, or somebody else has changed a matrix and `discard` is False; nothing is changed then.
    """
    with exclusive(model):
        record: _Record | None = vars(anchor_of(model)).get(RECORD)
        if record is None or entry not in record.on:
            raise ValueError("this edit is not attached to this model")
        present = {id(parameter) for parameter in anchor_of(model).parameters()}
        changed, stale, values = [], [], []
        for written in entry.written:
            parameter, writers = written.weight.parameter, record.writers(written.weight.parameter)
            if writers[-1] is not written:
                continue  # a later edit's values stand there, and stay
            original = record.original(parameter).values.to(parameter.device, parameter.dtype)
            others = [writer for writer in writers if writer not in entry.written]
            before = others[-1].as_written() if others else original
            if id(parameter) not in present:
                changed.append(written.weight.name)
            elif torch.equal(parameter.detach(), written.as_written()):
                values.append((parameter, before))
            elif torch.equal(parameter.detach(), before):
                stale.append(written.weight.name)
            else:
                changed.append(written.weight.name)
                values.append((parameter, before))
        if changed and not discard:
            raise ValueError(
                f"{changed[0]} was changed while this edit was on (by training, load_state_dict or a change of precision and back), and "
                "taking the edit off would overwrite that; keep a copy of what is worth it, then edit.detach(model, discard=True)"
            )
        with torch.no_grad():
            for parameter, before in values:
                parameter.copy_(before)
        gone = [hook for hook in entry.hooks if not hook.remove()]
        record.on.remove(entry)
        record.originals = [original for original in record.originals if record.writers(original.parameter)]
        if not record.on:
            del vars(anchor_of(model))[RECORD]
        _compile_anew(entry)
    problems = []
    if gone:
        problems.append(
            "some hooks of this edit had been removed before detach, by reset_hooks(including_permanent=True) perhaps: "
            "what ran in between ran without them"
        )
    if stale:
        problems.append(f"{stale[0]} had its former values before detach: what ran in between ran without the edit's")
    if changed:
        problems.append(f"{changed[0]} was changed while this edit was on; that change is overwritten now")
    return problems


def _compile_anew(entry: AppliedEdit) -> None:
    """Have `torch.compile` see that hooks went on or off: by default it takes a module's hooks for what they were when it first
    saw one of its class, and what it has compiled would go on without an edit's hooks, or with them.

    From then on it looks at hooks before each pass, so that two models of one class, one of them edited, are told apart too.
    """
    dynamo = sys.modules.get("torch._dynamo")
    if dynamo is not None and entry.hooks:
        dynamo.config.skip_nnmodule_hook_guards = False
        dynamo.reset()


def check_on(model: Any) -> None:
    """Refuse a model of which the edits that are said to be on are not, or act on another stream by now.

    Raises:
        ValueError: hooks were removed, or the Bridge's compatibility mode was turned on meanwhile.
    """
    record: _Record | None = vars(anchor_of(model)).get(RECORD)
    if record is None:
        return
    remedy = "take it off (edit.detach(model); mrp_lens.edits.edits_on(model) lists what is on) and put it on again"
    if any(not hook.present() for entry in record.on for hook in entry.hooks):
        raise ValueError(
            "hooks of an edit that is on were removed, by reset_hooks(including_permanent=True) perhaps, and figures would be those of "
            f"another model; {remedy}"
        )
    if _compatibility_mode(model) != record.compatibility_mode:
        raise ValueError(
            "enable_compatibility_mode() rewrote this model while an edit was on, which acts on another stream now; load the model again, "
            "enable it first, and fit the edit there"
        )


def _record_of(model: Any) -> _Record:
    anchor = anchor_of(model)
    record: _Record | None = vars(anchor).get(RECORD)
    if record is None:
        record = _Record(_compatibility_mode(model))
        # In front: pickle comes to it before it comes to hooks, of which TransformerLens's cannot be pickled.
        object.__setattr__(anchor, "__dict__", {RECORD: record, **vars(anchor)})
    return record


def _compatibility_mode(model: Any) -> bool:
    return bool(getattr(model, "compatibility_mode", False))
