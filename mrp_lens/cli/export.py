"""`mrp-lens export`: an edit as files that plain transformers loads."""

from dataclasses import dataclass
from pathlib import Path

from mrp_lens.cli.parsing import dtype_named
from mrp_lens.cli.show import console
from mrp_lens.data import Corpus
from mrp_lens.edits import load_edit
from mrp_lens.export import ExportReport, Record, export_hf
from mrp_lens.export.base import check_apart
from mrp_lens.models import load_model
from mrp_lens.utils.io import check_free


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What the command line says of the export.

    Attributes:
        form, base, verify: as in `export_hf`.
        save_dtype: of the written tensors; None: the base's.
        texts: a file whose texts are compared on.
        run, attacks: folders whose figures go into the model card. None: for `run`, where the edit lies.
        push_to: repository on the Hub.
        public: make it public.
    """

    form: str
    base: str | None
    save_dtype: str | None
    texts: str | None
    run: Path | None
    attacks: Path | None
    verify: bool
    push_to: str | None
    public: bool


def run_export(
    *,
    model_name: str,
    edit_folder: Path,
    wanted: Wanted,
    out: Path,
    backend: str,
    dtype: str,
    device: str | None,
    overwrite: bool,
) -> ExportReport:
    """Export, verify, print, and upload if asked."""
    check_free(out, overwrite=overwrite)
    check_apart(out, edit_folder, "the edit")
    edit, precision = load_edit(edit_folder), dtype_named(dtype)
    saved = None if wanted.save_dtype is None else dtype_named(wanted.save_dtype)
    run = run_of(edit_folder) if wanted.run is None else wanted.run
    record = Record.read(run, wanted.attacks)
    texts = None if wanted.texts is None else Corpus.from_file(wanted.texts)
    console.print(f"Loading {model_name} ...")
    model = load_model(model_name, backend=backend, device=device, dtype=precision)
    report = export_hf(
        model,
        edit,
        out,
        wanted.form,  # type: ignore[arg-type]
        verify=wanted.verify,
        base=wanted.base,
        dtype=saved,
        texts=texts,
        record=record,
        overwrite=overwrite,
    )
    console.print(f"Form: {report.form} ({report.reason}).")
    console.print(f"Proof: {report.proof}." if report.proof is not None else "Not verified.")
    console.print(
        f"Figures on the card: {', '.join(record.sources) if record.sources else 'none; see --run, --attacks'}."
    )
    console.print(f"Written to {out}; how to load it is in {out / 'README.md'}.")
    if wanted.push_to is not None:
        console.print(f"Uploaded: {report.push_to_hub(wanted.push_to, private=not wanted.public)}")
    return report


def run_of(edit_folder: Path) -> Path | None:
    """The folder of the run that left an edit: the one that holds it, or, as `mrp-lens demo` has it, the next one up."""
    parents = list(edit_folder.absolute().parents)[:2]
    return next((folder for folder in parents if (folder / "summary.json").is_file()), None)
