"""What every edit can do: be applied for the length of a block, attached and detached, stacked, merged, saved and loaded."""

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, Self

import torch
from torch import Tensor
from typing_extensions import override

from mrp_lens.edits.merging import ALLOWED, ALLOWED_COARSE, not_mergeable, probe_logits
from mrp_lens.edits.serialization import check_same, explained, folder_of, read_edit, setting, write_edit
from mrp_lens.models import Layout, LensModel, architecture_of, check_lens_model, check_same_model, dtype_of, restored
from mrp_lens.models.architectures import LAYOUTS
from mrp_lens.models.attachments import AppliedEdit, entries_on, exclusive, putting_on, take_off
from mrp_lens.models.hooks import HookFunction
from mrp_lens.models.weights import joint_description
from mrp_lens.utils.io import whole_folder
from mrp_lens.utils.registry import Registry


class Attached:
    """An edit that is on, until `detach`. Also a context manager, which takes it off at the end of the block."""

    def __init__(self, model: Any, entry: AppliedEdit) -> None:
        self._model, self._entry = model, entry

    def detach(self, *, discard: bool = False) -> None:
        """Take the edit off: the model computes what it did before, bit for bit.

        Args:
            discard: overwrite matrices that somebody else has changed meanwhile.

        Warns:
            UserWarning: the edit was not as it had been left: its hooks were gone, for example.

        Raises:
            ValueError: it was taken off already, or a matrix that it had written was changed by somebody else.
        """
        if not self.on:
            raise ValueError("this edit was detached already")
        _detach(self._model, self._entry, discard=discard)

    @property
    def on(self) -> bool:
        """Whether the edit is still on."""
        return self._entry in entries_on(self._model)

    def __enter__(self) -> "Attached":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.on and error is not None:
            take_off(self._model, self._entry, discard=True)  # a warning or a refusal would hide the error
        elif self.on:
            _detach(self._model, self._entry, discard=True)

    def __repr__(self) -> str:
        return f"Attached({self._entry.edit!r}, on={self.on})"


KINDS: Registry["type[Edit]"] = Registry("kind of edit", "mrp_lens.edits")


class Edit(ABC):
    """Something that was learned or built and changes what a model computes: data, not code.

    A class of edits with a `kind` of its own is known to `load_edit` from then on.

    Attributes:
        kind: what its class is called in files.
        provenance: how it came about (method, settings, model, data hashes, versions); empty if built by hand.
    """

    kind: ClassVar[str]
    provenance: Mapping[str, Any]

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "kind" in vars(cls):
            KINDS.add(cls.kind, cls)

    @property
    @abstractmethod
    def layers(self) -> tuple[int, ...]:
        """The layers whose blocks it hooks or writes into, ascending."""

    @abstractmethod
    def _put_on(self, model: LensModel, entry: AppliedEdit, *, check: bool) -> None:
        """Put the edit on and note each change as it is made; may raise at any point."""

    @abstractmethod
    def to_parts(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Settings (JSON) and tensors, enough to build the edit again."""

    @classmethod
    @abstractmethod
    def from_parts(cls, settings: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> "Edit":
        """The inverse of `to_parts`.

        Raises:
            ValueError: a tensor is missing or has the wrong shape or content.
        """

    @property
    def parts(self) -> tuple["Edit", ...]:
        """The edits that this one is made of, in order: itself, unless it is a stack."""
        return (self,)

    @property
    def made_for(self) -> Mapping[str, Any] | None:
        """What is recorded of the model that it was made for, by which another is refused; None: nothing is."""
        return self.provenance.get("model")

    @property
    def sole_hooks(self) -> tuple[str, ...]:
        """Hooks at which no second such edit may act: the two have to be joined into one."""
        return ()

    def joined_with(self, other: "Edit") -> "Edit | None":
        """One edit that does what both do, whichever comes first; None: they stay two."""
        return None

    def why_not_mergeable(self, layout: Layout | None) -> str | None:
        """Why it cannot be written into an architecture's weights exactly; None if it can (untied, where it changes the
        embeddings), or if that is all that can be said without the architecture's layout."""
        return f"a {self.kind} edit has no such form"

    def merge_targets(self, model: LensModel) -> list[torch.nn.Parameter]:
        """The tensors that `write_over` changes.

        Raises:
            ValueError: there is no such tensor; says why.
        """
        return []

    def write_over(self, model: LensModel) -> None:
        """Write it into the model's tensors, of which no record is kept.

        Raises:
            ValueError: it is no edit that can be written into weights; says why.
        """
        raise not_mergeable(str(self.why_not_mergeable(None)))

    @contextmanager
    def applied(self, model: LensModel, *, check: bool = True) -> Iterator[LensModel]:
        """Apply the edit inside a `with` block; nothing remains on exit, whatever was raised inside.

        Args:
            model: HookedTransformer or TransformerBridge.
            check: refuse a model other than the one the edit was made for, known by its sizes and its embedding: hooks are not
                refused on a fine-tune that left the embedding as it was. A weight edit knows the matrices that it replaces.

        Warns:
            UserWarning: matrices that it had written, or its hooks, were changed inside; that is overwritten.

        Raises:
            ValueError: the model lacks a hook or tensor, has another width, or is not the edit's; the edit or a part of it is
                on already; another thread uses the model.

        Example:
            >>> with edit.applied(model):
            ...     written = model.generate("The colour of", max_new_tokens=2)
        """
        check_lens_model(model)
        with exclusive(model):
            handle = self.attach(model, check=check)
            with handle:
                yield model

    @contextmanager
    def applied_in_weights(self, model: LensModel) -> Iterator[list[torch.nn.Parameter]]:
        """Inside a `with` block, the edit is on with its projections multiplied into the matrices and biases that write to the stream.

        Exact for the sites `mlp_out` and `attn_out` where no norm follows the matrix, and for `resid_pre` of layer 0 (into
        the embeddings) where these are not tied to the unembedding. Compared with the hooks on random tokens first.

        Yields:
            The tensors that were changed.

        Raises:
            ValueError: this edit has no such form (steering, or a projection elsewhere), or the model computes something
                else with it; the model is left as it was.
        """
        layout, dtype = LAYOUTS.get(architecture_of(model)), dtype_of(model)
        reason = self.why_not_mergeable(layout)
        if reason is None and layout is None and dtype not in ALLOWED:
            reason = f"whether that is exact in this architecture cannot be told in {dtype}"
        if reason is not None:
            raise not_mergeable(reason)
        written = list({id(parameter): parameter for parameter in self.merge_targets(model)}.values())
        with restored(written):
            with self.applied(model):
                wanted = probe_logits(model)
            self.write_over(model)
            off = float((probe_logits(model) - wanted).abs().max() / wanted.std())
            if not off <= ALLOWED.get(dtype, ALLOWED_COARSE):
                raise ValueError(
                    f"written into the weights of this model, the edit gives logits that differ by {off:.2g} of their spread: something stands "
                    "between the matrix and the hook, or the embeddings are tied; keep the edit as hooks"
                )
            yield written

    def attach(self, model: LensModel, *, check: bool = True) -> Attached:
        """Apply the edit until `detach`, for notebook cells. Survives `model.reset_hooks()`.

        A `copy.deepcopy` of the model carries the edit too, and `edit.detach(copy)` takes it off there. What `torch.compile`
        made is compiled anew after an edit is put on or taken off.

        Args:
            model: HookedTransformer or TransformerBridge.
            check: as for `applied`; hooks are not refused on a fine-tune that left the embedding as it was.

        Returns:
            The handle: `.detach()` takes the edit off, and so does the end of a `with` block.

        Raises:
            ValueError: as `applied`.

        Example:
            >>> handle = edit.attach(model)
            >>> handle.detach()
        """
        check_lens_model(model)
        with putting_on(model, self) as entry:
            self._check_model(model, check)
            self._put_on(model, entry, check=check)
        return Attached(model, entry)

    def detach(self, model: Any, *, discard: bool = False) -> None:
        """Take the edit off again, whatever else was put on before or since.

        Args:
            model: what it was attached to, a plain Hugging Face model included.
            discard: overwrite matrices that somebody else has changed meanwhile.

        Warns:
            UserWarning: its hooks were gone already (`reset_hooks(including_permanent=True)`).

        Raises:
            ValueError: it is not attached to this model, or a matrix that it had written was changed by somebody else;
                nothing is changed then.
        """
        entry = next((entry for entry in entries_on(model) if entry.edit == self), None)
        if entry is None:
            raise ValueError("this edit is not attached to this model")
        _detach(model, entry, discard=discard)

    def __add__(self, other: "Edit") -> "Edit":
        """Both edits. Projections join (order does not matter); weight edits are applied in the order given.

        Raises:
            ValueError: they were made for different models, or two projections cannot be joined.
        """
        return stack(self, other)

    def merge_(self, model: LensModel) -> None:
        """Write the edit into the loaded model for good: its hooks become weights. Only where that is exact.

        Args:
            model: HookedTransformer or TransformerBridge, without any edit on.

        Raises:
            ValueError: the edit has no such form on this model; says why. The model is left as it was.

        Example:
            >>> fit = ml.RMU(steps=2).fit(model, forget, retain)
            >>> other = copy.deepcopy(model)
            >>> fit.edit.merge_(other)
        """
        if entries_on(model):
            raise ValueError(
                f"an edit is on this model and would be merged or lost with it ({entries_on(model)[0].edit!r}); take it off first: "
                "edit.detach(model)"
            )
        with self.applied_in_weights(model) as written:
            merged = [(parameter, parameter.detach().clone()) for parameter in written]
        with torch.no_grad():
            for parameter, values in merged:
                parameter.copy_(values)

    def save_pretrained(self, path: str | Path, *, overwrite: bool = False) -> None:
        """Write `edit_config.json` and `edit.safetensors` into a folder, whole or not at all.

        To put it on the Hub, export it with its model card: `export_hf(model, edit, path, "adapter").push_to_hub("me/edit")`.

        Raises:
            FileExistsError: the folder exists and is not empty, and `overwrite` is False.
        """
        with whole_folder(path, overwrite=overwrite) as folder:
            write_edit(folder, self.kind, self.provenance, *self.to_parts())

    @classmethod
    def from_pretrained(cls, source: str | Path, *, revision: str | None = None, token: str | None = None) -> Self:
        """Load an edit that `save_pretrained` wrote; tensors come back bit-identical. No code of the folder is ever run.

        Args:
            source: a folder, or the name of a repository on the Hub, "owner/name", of which the edit's two files are
                downloaded. What is a local folder, or a `Path`, is never looked for on the Hub.
            revision: branch, tag or commit on the Hub. None: "main".
            token: of a user who may read there. None: the one of `hf auth login` or HF_TOKEN.

        Raises:
            FileNotFoundError: no such folder or repository, or one of the two files is missing.
            ValueError: a file was truncated or altered, is a link out of the folder, does not fit into memory, or holds
                anything that no edit saves; or a revision of a local folder.
            TypeError: it is an edit of another class than the one that was asked.

        Example:
            >>> fit.edit.save_pretrained("runs/mrp/edit")
            >>> edit = Edit.from_pretrained("runs/mrp/edit")
        """
        stored = read_edit(folder_of(source, revision=revision, token=token))
        if not isinstance(stored.kind, str) or stored.kind not in KINDS:
            raise ValueError(f"unknown kind of edit {stored.kind!r}; this version of mrp_lens knows {', '.join(KINDS)}")
        with explained(stored.folder):
            edit = KINDS[stored.kind].from_parts(stored.settings, stored.tensors)
            check_same(stored, *edit.to_parts())
        if not isinstance(edit, cls):
            raise TypeError(
                f"{source} holds a {type(edit).__name__}, and not a {cls.__name__}; load it with load_edit(...)"
            )
        edit.provenance = stored.provenance
        return edit

    def __eq__(self, other: object) -> bool:
        """Whether both do the same, however they came about."""
        if self is other:
            return True
        if not isinstance(other, Edit) or type(self) is not type(other):
            return NotImplemented
        (settings, tensors), (others, other_tensors) = self.to_parts(), other.to_parts()
        return settings == others and _equal(tensors, other_tensors)

    def __hash__(self) -> int:
        return hash((self.kind, self.layers))

    def _check_model(self, model: LensModel, check: bool) -> None:
        """Before any part is on, since one may write the embedding by which the next would know its model."""
        if check and self.made_for is not None:
            check_same_model(model, self.made_for)


class EditStack(Edit):
    """Edits applied in order; `edit_a + edit_b` makes one, and joins the projections among them.

    Args:
        parts: the edits; of a stack among them, its parts.

    Raises:
        TypeError: a part is not an edit.
        ValueError: no parts, or two projections at one hook, which would have to be joined.
    """

    kind = "stack"

    def __init__(self, parts: Sequence[Edit]) -> None:
        for part in parts:
            if not isinstance(part, Edit):
                raise TypeError(f"a stack is made of edits, got {type(part).__name__}")
        self._parts = tuple(own for part in parts for own in part.parts)
        if not self._parts or len(set(self.sole_hooks)) < len(self.sole_hooks):
            raise ValueError(
                "a stack needs an edit at least, and at each hook one projection at most; join them: edit_a + edit_b"
            )
        self.provenance = {}

    @property
    @override
    def parts(self) -> tuple[Edit, ...]:
        return self._parts

    @property
    @override
    def layers(self) -> tuple[int, ...]:
        return tuple(sorted({layer for part in self.parts for layer in part.layers}))

    @property
    @override
    def sole_hooks(self) -> tuple[str, ...]:
        return tuple(hook for part in self.parts for hook in part.sole_hooks)

    @override
    def _check_model(self, model: LensModel, check: bool) -> None:
        for part in self.parts:
            part._check_model(model, check)

    @override
    def _put_on(self, model: LensModel, entry: AppliedEdit, *, check: bool) -> None:
        for part in self.parts:
            part._put_on(model, entry, check=check)

    @override
    def why_not_mergeable(self, layout: Layout | None) -> str | None:
        return next((reason for part in self.parts if (reason := part.why_not_mergeable(layout)) is not None), None)

    @override
    def merge_targets(self, model: LensModel) -> list[torch.nn.Parameter]:
        return [parameter for part in self.parts for parameter in part.merge_targets(model)]

    @override
    def write_over(self, model: LensModel) -> None:
        # New matrices first: a hook projects what they write, wherever it stands in the stack.
        for part in sorted(self.parts, key=lambda part: bool(part.sole_hooks)):
            part.write_over(model)

    @override
    def to_parts(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        described = []
        tensors: dict[str, Tensor] = {}
        for number, part in enumerate(self.parts):
            settings, owned = part.to_parts()
            described.append({"kind": part.kind, "settings": settings, "provenance": dict(part.provenance)})
            tensors |= {f"{number}/{name}": tensor for name, tensor in owned.items()}
        return {"parts": described}, tensors

    @classmethod
    @override
    def from_parts(cls, settings: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> "EditStack":
        described = setting(settings, "parts", list)
        owned: dict[str, dict[str, Tensor]] = {str(number): {} for number in range(len(described))}
        for name, tensor in tensors.items():
            number, _, own = name.partition("/")
            if number not in owned:
                raise ValueError(f"the tensor {name!r} belongs to no part of the stack")
            owned[number][own] = tensor
        parts = []
        for entry, mine in zip(described, owned.values(), strict=True):
            kind, provenance = setting(entry, "kind", str), setting(entry, "provenance", dict)
            if kind not in KINDS or kind == cls.kind:
                raise ValueError(f"a part of the stack is of the kind {kind!r}, which none can be")
            part = KINDS[kind].from_parts(setting(entry, "settings", dict), mine)
            part.provenance = provenance
            parts.append(part)
        return cls(parts)

    @override
    def __eq__(self, other: object) -> bool:
        return self.parts == other.parts if isinstance(other, EditStack) else NotImplemented

    @override
    def __hash__(self) -> int:
        return super().__hash__()

    def __repr__(self) -> str:
        return f"EditStack({list(self.parts)})"


def stack(*edits: Edit) -> Edit:
    """One edit out of several; projections join at the place of the first.

    Raises:
        ValueError: they were made for different models, or two projections cannot be joined.
    """
    parts: list[Edit] = []
    for new in (part for edit in edits for part in edit.parts):
        for known in parts:
            joint_description(known.made_for, new.made_for)
        for place, known in enumerate(parts):
            if (joined := known.joined_with(new)) is not None:
                parts[place] = joined
                break
        else:
            parts.append(new)
    return parts[0] if len(parts) == 1 else EditStack(parts)


def load_edit(source: str | Path, *, revision: str | None = None, token: str | None = None) -> Edit:
    """Load an edit of any kind from a folder or from the Hub: `Edit.from_pretrained`."""
    return Edit.from_pretrained(source, revision=revision, token=token)


Wrapper = Callable[[Edit, str, HookFunction], HookFunction]
"""From an edit, the name of one of its hooks and what it does there, to what is to be done there instead."""


def as_it_is(edit: Edit, hook: str, function: HookFunction) -> HookFunction:
    """What an edit does, unchanged."""
    return function


def edit_on(model: LensModel, edit: Edit | None) -> AbstractContextManager[Any]:
    """`edit.applied(model)`, or nothing where the edit is None: the unedited model."""
    return nullcontext(model) if edit is None else edit.applied(model)


def _detach(model: Any, entry: AppliedEdit, *, discard: bool) -> None:
    for problem in take_off(model, entry, discard=discard):
        warnings.warn(problem, UserWarning, stacklevel=3)


def _equal(tensors: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> bool:
    return tensors.keys() == others.keys() and all(
        tensor.dtype == others[name].dtype and torch.equal(tensor.cpu(), others[name].cpu())
        for name, tensor in tensors.items()
    )


def check_width(model: LensModel, d_model: int, what: str) -> None:
    """Refuse tensors of another stream's width."""
    if model.cfg.d_model != d_model:
        raise ValueError(
            f"{what} has d_model {d_model}, the model {model.cfg.d_model}: this edit was made for another model"
        )
