"""`export_hf`: an edited model as files that plain transformers loads, proved by loading them."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from tqdm.auto import tqdm

from mrp_lens.data import Corpus
from mrp_lens.edits import Edit, load_edit
from mrp_lens.edits.provenance import without_paths
from mrp_lens.edits.serialization import write_edit
from mrp_lens.export.base import base_of, check_apart, check_bare, check_base, own_tokenizer, stored_tokenizer
from mrp_lens.export.checkpoint import (
    LEFT_BEHIND,
    Checkpoint,
    architecture_in,
    name_class,
    replace_tokenizer,
    rounded,
)
from mrp_lens.export.formats import Changes, Form, chosen_form, folded_into, new_matrices
from mrp_lens.export.hub import push_to_hub
from mrp_lens.export.model_card import Record, check_record, front_matter_of, model_card
from mrp_lens.export.remote_code import module_tensors, write_module
from mrp_lens.export.verification import TEXTS, Proof, prove
from mrp_lens.models import LensModel, dtype_of
from mrp_lens.utils.io import check_free, whole_folder, write_json, write_text
from mrp_lens.utils.validation import one_of

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class ExportReport:
    """What was written, and how it was proved.

    Attributes:
        folder: where it lies.
        form: "folded", "module" or "adapter".
        reason: why this form.
        dtype: of the tensors in the folder (of the base's, for an adapter).
        proof: the comparison with the hooked model; None without verification.
        seconds: that it took.
    """

    folder: Path
    form: Literal["folded", "module", "adapter"]
    reason: str
    dtype: torch.dtype
    proof: Proof | None
    seconds: float

    @property
    def max_logit_diff(self) -> float | None:
        """Largest difference of a log-probability from the hooked model's, in nats; None without verification."""
        return None if self.proof is None else self.proof.edited.largest

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Upload the folder; see `mrp_lens.export.push_to_hub`."""
        return push_to_hub(self.folder, repo_id, **options)

    def __str__(self) -> str:
        proof = "not verified" if self.proof is None else str(self.proof)
        return f"{self.folder}: {self.form} ({self.reason}); {proof}"


def export_hf(
    model: LensModel,
    edit: Edit | str | Path,
    out_dir: str | Path,
    form: Form = "auto",
    *,
    verify: bool = True,
    base: str | Path | None = None,
    dtype: torch.dtype | None = None,
    texts: Corpus | Sequence[str] | None = None,
    record: Record | None = None,
    overwrite: bool = False,
    progress: bool = True,
) -> ExportReport:
    """Write an edited model for Hugging Face's transformers, reload it in a fresh process and compare.

    Args:
        model: what the edit was made on (HookedTransformer or TransformerBridge, from `load_model`), without the edit.
        edit: what to write, or the folder of an edit.
        out_dir: the new folder. It appears whole and proved, or not at all; the base model's files stay as they are.
        form: "folded": a plain checkpoint of the same architecture, where that is exact. "module": a folder with a small
            modelling file and its own model type, loaded with `trust_remote_code=True` and refusing to load without.
            "adapter": the edit alone, for `mrp_lens.hf.attach`. "auto": folded where that is exact, else module.
        verify: compare; costs a load of the base and of the exported model.
        base: folder or Hub name of the checkpoint. None: where `model` was loaded from.
        dtype: of the written tensors; None: that of the base checkpoint, whose untouched tensors then stay byte for byte.
        texts: what to compare on (the first 64 tokens of each); None: a few sentences.
        record: what was measured, for the model card (`Record.read(run, attacks)`).
        overwrite: replace a folder that exists.
        progress: show a progress bar.

    Returns:
        The form, the reason for it, and the differences found: at most 1e-4 nats in float32; in half precision an rms
        difference of at most twice the unedited models'.

    Raises:
        ValueError: folded or centred weights, hooks or another edit on the model, another base model, quantised weights, a
            form that the edit does not have, an edit for another model, an output folder that holds the base model, too
            little disk space, or (ExportMismatchError) a reloaded model that differs.
        FileExistsError: the folder exists and is not empty, and `overwrite` is False.

    Example:
        >>> report = export_hf(model, fit.edit, "edited/")  # doctest: +SKIP
        >>> report.form, report.max_logit_diff  # doctest: +SKIP
        ('folded', 2.1e-06)
    """
    started = time.perf_counter()
    target = Path(out_dir)
    one_of(Form, form=form)
    check_free(target, overwrite=overwrite)
    edit = edit if isinstance(edit, Edit) else load_edit(edit)
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"unknown dtype {dtype}; choose one of {', '.join(map(str, DTYPES))}, or None for the base's")
    checkpoint = base_of(model, base)
    check_apart(target, checkpoint.folder, "the base checkpoint")
    kind, reason = chosen_form(form, edit, checkpoint.layout)
    if kind == "adapter" and dtype is not None:
        raise ValueError(f"an adapter holds none of the model's tensors, so dtype={dtype} means nothing; leave it out")
    if record is not None:
        check_record(edit, record)
    check_bare(model)
    with edit.applied(model):  # refuses an edit of another model before anything is written
        pass
    check_base(model, checkpoint)
    changes = _changes(kind, model, edit, checkpoint)
    if kind != "adapter":
        checkpoint.check_room(target, added=changes.added.values(), dtype=dtype)
    stored = checkpoint.dtype if dtype is None else dtype
    stored_as = None if kind == "adapter" else stored_tokenizer(checkpoint)
    tokenizer = None if kind == "adapter" else own_tokenizer(model, stored_as)
    with whole_folder(target, overwrite=overwrite) as folder:
        with tqdm(total=checkpoint.size, desc="writing", unit="B", unit_scale=True, disable=not progress) as bar:
            if kind == "adapter":
                write_edit(without_paths(edit), folder)
            else:
                _write_model(folder, kind, edit, checkpoint, changes, dtype, bar)
                if tokenizer is not None:
                    replace_tokenizer(folder, tokenizer)
                elif kind == "module":  # whose own model type does not tell transformers which class it is
                    name_class(folder, type(stored_as).__name__)
        proof = None
        if verify:
            with tqdm(total=1, desc="reloading in a fresh process", disable=not progress) as bar:
                compared = _texts(texts)
                lower = _lower(stored, dtype_of(model))
                proof = prove(
                    model,
                    edit,
                    folder=folder,
                    base=checkpoint.folder,
                    form=kind,
                    texts=compared,
                    dtype=lower,
                    tokenizer=tokenizer,
                )
                bar.update()
        checks = [] if proof is None else [str(proof)]
        card = model_card(
            edit,
            base=str(model.cfg.model_name if base is None else base),
            form=kind,
            checks=checks,
            record=record,
            base_front_matter=front_matter_of(checkpoint.folder / "README.md"),
        )
        write_text(folder / "README.md", card)
    return ExportReport(target, kind, reason, stored, proof, time.perf_counter() - started)


def _changes(kind: str, model: LensModel, edit: Edit, base: Checkpoint) -> Changes:
    """What is different in the checkpoint."""
    if kind == "adapter":
        return Changes()
    if kind == "folded":
        return folded_into(edit, base, dtype_of(model))
    return replace(new_matrices(edit, base, dtype_of(model)), added=module_tensors(edit, base))


def _write_model(
    folder: Path,
    kind: str,
    edit: Edit,
    base: Checkpoint,
    changes: Changes,
    dtype: torch.dtype | None,
    bar: Any,
) -> None:
    config = {key: value for key, value in base.config.items() if key not in LEFT_BEHIND}
    config["architectures"] = [architecture_in(config)]
    if dtype is not None or (kind == "module" and config.get("dtype") is None and config.get("torch_dtype") is None):
        # Else transformers would take the precision of the first tensor that it meets, which may be the edit's.
        config.pop("torch_dtype", None)
        config["dtype"] = str(dtype or base.dtype).removeprefix("torch.")
    if changes.untied or (base.says_tied and not base.tied):
        config["tie_word_embeddings"] = False
    if kind == "module":
        write_module(folder, base, edit, config)
    else:
        write_json(folder / "config.json", config)
    base.copy_companions(folder)
    added = changes.added
    if kind == "folded":  # of a module these are the edit's own, in float32 whatever the model's precision
        added = {name: rounded(values, dtype or base.dtype, name) for name, values in added.items()}
    base.write_weights(folder, changed=changes.changed, added=added, dtype=dtype, progress=bar.update)


def _texts(texts: Corpus | Sequence[str] | None) -> Corpus:
    if isinstance(texts, Corpus):
        return texts
    if isinstance(texts, str):
        raise TypeError("texts is one string; give a list of them, or a Corpus")
    chosen = list(TEXTS if texts is None else texts)
    if not chosen:
        raise ValueError("texts is empty: there is nothing to compare on; give at least one, or None")
    return Corpus.from_texts(chosen)


def _lower(stored: torch.dtype, loaded: torch.dtype) -> torch.dtype:
    """The precision in which the two can be compared: that of the files, or that of the model if it is lower."""
    return loaded if loaded in DTYPES and loaded.itemsize < stored.itemsize else stored
