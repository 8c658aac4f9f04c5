"""`mrp-lens export`: an edit as files that plain transformers loads."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from typing_extensions import override

from mrp_lens.cli.command import Command, Dtype, ModelOptions
from mrp_lens.cli.console import console
from mrp_lens.cli.run_folder import run_of
from mrp_lens.data import Corpus
from mrp_lens.edits import load_edit
from mrp_lens.export import ExportReport, Measurements, export_hf
from mrp_lens.export.formats import AnyExportForm
from mrp_lens.export.hub import check_name
from mrp_lens.export.model_card import front_matter_of
from mrp_lens.utils.io import check_free, read_json

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Export(Command):
    """Write an edited model for Hugging Face's transformers, and prove it by reloading.

    - `folded`: a plain checkpoint of the same architecture. Exact for RMU's matrices, and for projections at `mlp_out`,
      `attn_out` and `resid_pre` of layer 0; refused elsewhere.
    - `module`: a folder with a small modelling file and its own model type. `trust_remote_code=True` loads it; without,
      loading fails and never gives the unedited model.
    - `adapter`: the edit alone, for `mrp_lens.hf.attach(hf_model, folder)`.
    - `auto`: `folded` where that is exact, else `module`.

    The folder appears only if the model in it, loaded by plain transformers in a fresh process, computes what the model
    with its hooks computes. Its model card holds the figures of the run.

    Examples:

        mrp-lens export --edit runs/demo/mrp/edit --out runs/export

        mrp-lens export --model ./my-checkpoint --edit runs/mine/edit --attacks runs/mine-attacked --out my-model-edited

    Attributes:
        edit: Folder of the edit, such as `runs/demo/mrp/edit`.
        out: Folder for the edited model.
        form: `folded`, `module`, `adapter`, or whichever fits (`auto`); what each is, is said above.
        base: Checkpoint that is edited, if it is not the one of --model: the same model elsewhere.
        save_dtype: Of the written tensors. Default: the base's.
        texts: File of texts that the proof is made on. Default: a few sentences.
        run: Run whose figures the model card shows. Default: the one that left the edit, if it is there.
        attacks: Folder of `mrp-lens attack` whose figures the model card shows.
        verify: Reload in a fresh process and compare with the hooked model; --no-verify: do not.
        push_to: Upload to this repository of the Hub, such as `me/my-model-edited`.
        public: `--push-to`: everybody may see it.
        overwrite: Replace the output folder if it holds an earlier export.
    """

    word: ClassVar[str] = "export"

    loading: ModelOptions
    edit: Path
    out: Path
    form: AnyExportForm = "auto"
    base: str | None = None
    save_dtype: Dtype | None = None
    texts: str | None = None
    run: Path | None = None
    attacks: Path | None = None
    verify: bool = True
    push_to: str | None = None
    public: bool = False
    overwrite: bool = False

    @classmethod
    @override
    def parts(cls, given: Mapping[str, Any]) -> dict[str, type]:
        return {"loading": ModelOptions}

    @override
    def execute(self) -> ExportReport:
        if self.push_to is not None:
            check_name(self.push_to)
        check_export_or_empty(self.out)
        check_free(self.out, overwrite=self.overwrite)
        edit = load_edit(self.edit)
        record = Measurements.read(run_of(self.edit) if self.run is None else self.run, self.attacks)
        self._tell_other_model()
        texts = None if self.texts is None else Corpus.from_file(self.texts)
        report = export_hf(
            self.loading.of_edit(self.edit).load(),
            edit,
            self.out,
            self.form,
            verify=self.verify,
            base=self.base,
            dtype=self.save_dtype,
            texts=texts,
            record=record,
            overwrite=self.overwrite,
        )
        console.print(f"Form: {report.form} ({report.reason}).")
        console.print(f"Proof: {report.proof}." if report.proof is not None else "Not verified.")
        figures = ", ".join(record.sources) if record.sources else "none; see --run, --attacks"
        console.print(f"Figures on the card: {figures}.")
        console.print(f"Written to {self.out}; how to load it is in {self.out / 'README.md'}.")
        if self.push_to is not None:
            try:
                address = report.push_to_hub(self.push_to, private=not self.public)
            except Exception:
                console.print(
                    f"The export in {self.out} is whole. To upload it later: "
                    f'python -c "from mrp_lens.export import push_to_hub; push_to_hub({str(self.out)!r}, {self.push_to!r})"'
                )
                raise
            console.print(f"Uploaded: {address}")
        return report

    def _tell_other_model(self) -> None:
        """Say so where the figures on the card were measured on a model of another name: whether it is the same cannot be told."""
        folder, asked = run_of(self.edit) if self.run is None else self.run, self.loading.model
        measured = (
            None
            if folder is None
            else read_json(folder / "summary.json", "name another with --run").get("arguments", {}).get("model")
        )
        if asked is not None and measured is not None and Path(asked).absolute() != Path(measured).absolute():
            logger.warning(
                "the figures on the card were measured on %s, and the model that is exported is %s; if that is another one, measure the edit "
                "on it (mrp-lens measure) and give that run with --run",
                measured,
                asked,
            )


def check_export_or_empty(folder: Path) -> None:
    """Refuse to replace a folder that holds something other than an export, before any work is done.

    Raises:
        FileExistsError: it holds files, and no model card of an export.
    """
    tags = front_matter_of(folder / "README.md").get("tags")
    exported = isinstance(tags, list) and "mrp_lens" in tags
    if folder.is_dir() and any(folder.iterdir()) and not exported:
        raise FileExistsError(
            f"{folder} exists and holds no export, so nothing replaces it; choose another folder, or empty this one yourself"
        )
