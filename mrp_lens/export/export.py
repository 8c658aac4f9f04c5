"""`export_hf`: an edited model as files that plain transformers loads, proved by loading them."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mrp_lens.data import Corpus
from mrp_lens.edits import Edit, load_edit
from mrp_lens.edits.provenance import without_paths
from mrp_lens.edits.serialization import write_edit
from mrp_lens.export.base import base_of, check_unedited, write_tokenizer
from mrp_lens.export.checkpoint import LEFT_BEHIND, HFCheckpoint, architecture_in, round_to
from mrp_lens.export.formats import AnyExportForm, Changes, ExportForm, Plan, changes_to, plan_for
from mrp_lens.export.hub import push_to_hub
from mrp_lens.export.measurements import Measurements, check_record
from mrp_lens.export.model_card import front_matter_of, model_card
from mrp_lens.export.remote_code import write_module
from mrp_lens.export.verification import TEXTS, Proof, prove
from mrp_lens.models import LensModel, dtype_named, dtype_of
from mrp_lens.utils.io import check_apart, check_free, whole_folder, write_json, write_text
from mrp_lens.utils.progress import progress_bar
from mrp_lens.utils.validation import check_one_of

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
    form: ExportForm
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
    form: AnyExportForm = "auto",
    *,
    verify: bool = True,
    base: str | Path | None = None,
    dtype: str | torch.dtype | None = None,
    texts: Corpus | Sequence[str] | None = None,
    record: Measurements | None = None,
    overwrite: bool = False,
    progress: bool = True,
) -> ExportReport:
    """Write an edited model for Hugging Face's transformers, reload it in a fresh process and compare.

    Args:
        model: what the edit was made on (HookedTransformer or TransformerBridge, from `load_model`), without the edit.
        edit: what to write, or where it was saved: a folder, or a name on the Hub (`load_edit`).
        out_dir: the new folder. It appears whole and proved, or not at all; the base model's files stay as they are.
        form: "folded": a plain checkpoint of the same architecture, where that is exact. "module": a folder with a small
            modelling file and its own model type, loaded with `trust_remote_code=True` and refusing to load without.
            "adapter": the edit alone, for `mrp_lens.hf.attach`. "auto": folded where that is exact, else module.
        verify: compare; costs a load of the base and of the exported model.
        base: folder or Hub name of the checkpoint. None: where `model` was loaded from.
        dtype: of the written tensors ("bfloat16" or torch.bfloat16, for example); None: that of the base checkpoint, whose
            untouched tensors then stay byte for byte.
        texts: what to compare on (the first 64 tokens of each); None: a few sentences.
        record: what was measured, for the model card (`Measurements.read(run, attacks)`).
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
        >>> report = export_hf(model, fit.edit, "edited")
        >>> report.form, report.max_logit_diff < 1e-4
        ('module', True)
    """
    started, target = time.perf_counter(), Path(out_dir)
    check_one_of(AnyExportForm, form=form)
    check_free(target, overwrite=overwrite)
    edit = edit if isinstance(edit, Edit) else load_edit(edit)
    saved_as = None if dtype is None else _dtype_to_save(dtype)
    checkpoint = base_of(model, base)
    check_apart(target, checkpoint.folder, "the base checkpoint")
    plan = plan_for(edit, form, checkpoint.layout)
    if plan.form == "adapter" and dtype is not None:
        raise ValueError(f"an adapter holds none of the model's tensors, so dtype={dtype} means nothing; leave it out")
    if record is not None:
        check_record(edit, record)
    check_unedited(model, edit, checkpoint)
    changes = changes_to(checkpoint, edit, plan, dtype_of(model))
    if plan.form != "adapter":
        checkpoint.check_room(target, added=changes.added.values(), dtype=saved_as)
    stored = saved_as or checkpoint.dtype
    with whole_folder(target, overwrite=overwrite) as folder:
        tokenizer, proof = None, None
        with progress_bar(total=checkpoint.size, desc="writing", unit="B", unit_scale=True, progress=progress) as bar:
            if plan.form == "adapter":
                own = without_paths(edit)
                write_edit(folder, own.kind, own.provenance, *own.to_parts())
            else:
                _write_model(folder, plan, checkpoint, changes, saved_as, bar.update)
                tokenizer = write_tokenizer(folder, model, checkpoint, name_class=plan.form == "module")
        if verify:
            with progress_bar(total=1, desc="reloading in a fresh process", progress=progress) as bar:
                proof = prove(
                    model,
                    edit,
                    folder=folder,
                    base=checkpoint.folder,
                    form=plan.form,
                    texts=_texts(texts),
                    dtype=_lower(stored, dtype_of(model)),
                    tokenizer=tokenizer,
                )
                bar.update()
        card = model_card(
            edit,
            base=str(model.cfg.model_name if base is None else base),
            form=plan.form,
            checks=[] if proof is None else [str(proof)],
            record=record,
            base_front_matter=front_matter_of(checkpoint.folder / "README.md"),
        )
        write_text(folder / "README.md", card)
    return ExportReport(target, plan.form, plan.reason, stored, proof, time.perf_counter() - started)


def _dtype_to_save(dtype: str | torch.dtype) -> torch.dtype:
    try:
        found = dtype_named(dtype)
    except ValueError:
        found = None
    if found not in DTYPES:
        raise ValueError(f"unknown dtype {dtype}; choose one of {', '.join(map(str, DTYPES))}, or None for the base's")
    return found


def _write_model(
    folder: Path,
    plan: Plan,
    base: HFCheckpoint,
    changes: Changes,
    dtype: torch.dtype | None,
    progress: Callable[[int], object],
) -> None:
    """Write configuration, weights and what else belongs to a checkpoint."""
    config = {key: value for key, value in base.config.items() if key not in LEFT_BEHIND}
    config["architectures"] = [architecture_in(config)]
    is_module, added = plan.form == "module", changes.added
    if dtype is not None or (is_module and config.get("dtype") is None and config.get("torch_dtype") is None):
        # Else transformers would take the precision of the first tensor that it meets, which may be the edit's.
        config.pop("torch_dtype", None)
        config["dtype"] = str(dtype or base.dtype).removeprefix("torch.")
    if changes.untied or (base.says_tied and not base.tied):
        config["tie_word_embeddings"] = False
    if is_module:
        write_module(folder, base, plan.steps, config)
    else:  # of a module the added ones are the edit's own, in float32 whatever the model's precision
        write_json(folder / "config.json", config)
        added = {name: round_to(dtype or base.dtype, values, name) for name, values in added.items()}
    base.copy_companions(folder)
    base.write_weights(folder, changed=changes.changed, added=added, dtype=dtype, progress=progress)


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
