"""In which forms an edit can leave, and what each changes in the checkpoint."""

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from mrp_lens.edits import Edit, ProjectionEdit, WeightEdit
from mrp_lens.edits.subspace import Subspace
from mrp_lens.export.checkpoint import HEAD, HFCheckpoint
from mrp_lens.hf.attach import Steps, place_of, steps_of
from mrp_lens.models import Layout, same_tensor

ExportForm = Literal["folded", "module", "adapter"]
AnyExportForm = Literal["auto", "folded", "module", "adapter"]


@dataclass(frozen=True)
class Plan:
    """How an edit leaves.

    Attributes:
        form: of the folder.
        reason: why this one.
        steps: what its hooks do in a Hugging Face model; empty where they are folded.
    """

    form: ExportForm
    reason: str
    steps: Steps = field(default_factory=dict)


@dataclass
class Changes:
    """What an edit does to a checkpoint.

    Attributes:
        changed: name -> new values.
        added: name -> tensors that the checkpoint did not have.
        untied: the unembedding is now a matrix of its own.
    """

    changed: dict[str, Tensor] = field(default_factory=dict)
    added: dict[str, Tensor] = field(default_factory=dict)
    untied: bool = False


def plan_for(edit: Edit, form: AnyExportForm, layout: Layout) -> Plan:
    """The form that an edit leaves in.

    Raises:
        ValueError: it has no such form; says why, and what it has instead.
    """
    unfolded, unattached = edit.why_not_mergeable(layout), None
    steps: Steps = {}
    try:
        steps = steps_of(edit)
    except ValueError as error:
        unattached = str(error)
    weights_alone = "this edit is weights and nothing else: a plain checkpoint holds it (form='folded')"
    unhooked = unattached if unattached is not None or steps else weights_alone
    if form == "auto" and unfolded is None:
        return Plan("folded", "exact in plain weights")
    if form == "auto" and unhooked is None:
        return Plan("module", f"not exact in plain weights: {unfolded}", steps)
    if form == "auto":
        raise ValueError(f"this edit cannot be exported: {unhooked}")
    reason = {"folded": unfolded, "module": unhooked, "adapter": unattached}[form]
    if reason is None:
        return Plan(form, "as asked", steps if form != "folded" else {})
    instead = (
        "form='module' or form='adapter'" if form == "folded" and unhooked is None else "edit.save_pretrained(...)"
    )
    raise ValueError(f"form={form!r} is not possible: {reason}" + ("" if "form=" in reason else f". Use {instead}"))


def changes_to(base: HFCheckpoint, edit: Edit, plan: Plan, dtype: torch.dtype) -> Changes:
    """What is different in the checkpoint, of which the model was loaded in this precision; an adapter changes nothing.

    Raises:
        ValueError: the checkpoint's matrices are not those that the edit replaces.
    """
    if plan.form == "adapter":
        return Changes()
    if plan.form == "folded":
        return folded_into(edit, base, dtype)
    changes = new_matrices(edit, base, dtype)
    changes.added |= {  # the tensors of the hooks under their names in the model, each with a storage of its own
        f"{base.layout.block(layer)}.edit.{site}.{number}.{name}": buffer.to("cpu", copy=True)
        for (layer, site), steps in plan.steps.items()
        for number, step in enumerate(steps)
        for name, buffer in step.named_buffers()
    }
    return changes


def new_matrices(edit: Edit, base: HFCheckpoint, dtype: torch.dtype) -> Changes:
    """What the edit's matrices change in the checkpoint, of which the model was loaded in this precision.

    Raises:
        ValueError: the checkpoint's are not those that the edit replaces.
    """
    changes = Changes()
    for part in edit.parts:
        if not isinstance(part, WeightEdit):
            continue
        for name, tensor in part.tensors.items():
            stored = base.stored_names(name)
            current = changes.changed[stored[0]] if stored[0] in changes.changed else base.read(name)
            if not same_tensor(current.to(dtype), part.replaces[name]):
                raise ValueError(
                    f"{name} in {base.folder} is not the matrix that this edit replaces: it is not the checkpoint of the model that the "
                    "edit was made on; give base=FOLDER of that"
                )
            changes.changed |= dict.fromkeys(stored, tensor)
    return changes


def folded_into(edit: Edit, base: HFCheckpoint, dtype: torch.dtype) -> Changes:
    """The edit in plain weights: new matrices, and projections multiplied into what writes to the stream.

    Where the embeddings are projected and tied to the unembedding, this keeps the original ones as a matrix of its own.
    """
    changes = new_matrices(edit, base, dtype)
    for part in edit.parts:
        if isinstance(part, ProjectionEdit):
            for hook, subspace in part.subspaces().items():
                _fold(changes, base, hook, subspace)
    return changes


def _fold(changes: Changes, base: HFCheckpoint, hook: str, subspace: Subspace) -> None:
    layout = base.layout
    layer, site = place_of(hook)
    if site == "resid_pre":
        if base.tied and not changes.untied:
            _untie(changes, base)
        for name in layout.embeddings:
            _project(changes, base, f"{name}.weight", subspace, transposed=False)
        return
    matrix = layout.matrix(layer, site)
    _project(changes, base, f"{matrix}.weight", subspace, transposed=layout.transposed)
    if f"{matrix}.bias" in base.files:
        _project(changes, base, f"{matrix}.bias", subspace, transposed=False)


def _untie(changes: Changes, base: HFCheckpoint) -> None:
    """Give embedding and unembedding a tensor each, as far as the files do not hold both."""
    changes.untied = True
    embedding, head = f"{base.layout.embeddings[0]}.weight", base.name_in_files(HEAD)
    values = _current(changes, base, embedding)
    for name in (embedding, head):
        (changes.changed if name in base.files else changes.added)[name] = values


def _current(changes: Changes, base: HFCheckpoint, name: str) -> Tensor:
    """The values of a tensor after what is known to change so far."""
    stored = base.name_in_files(name) if name not in changes.added else name
    return next((known[stored] for known in (changes.changed, changes.added) if stored in known), base.read(name))


def _project(changes: Changes, base: HFCheckpoint, name: str, subspace: Subspace, *, transposed: bool) -> None:
    known = changes.added if name in changes.added else changes.changed
    values = _current(changes, base, name).to(torch.float64)
    rows = values.T if transposed else values
    projected = subspace.project_out(rows)
    known[name] = projected.T if transposed else projected
