"""What `mrp-lens export --help` says, and the options it takes."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from mrp_lens.cli import options


class FormName(StrEnum):
    """How an edit leaves."""

    AUTO = "auto"
    FOLDED = "folded"
    MODULE = "module"
    ADAPTER = "adapter"


def export(
    edit: Annotated[Path, typer.Option(help="Folder of the edit, such as `runs/demo/mrp/edit`.")],
    out: Annotated[Path, typer.Option(help="Folder for the edited model.")],
    model: options.Model = "demo",
    form: Annotated[FormName, typer.Option(help="See above.")] = FormName.AUTO,
    base: Annotated[
        str | None,
        typer.Option(help="Checkpoint that is edited, if it is not the one of --model: the same model elsewhere."),
    ] = None,
    save_dtype: Annotated[
        str | None,
        typer.Option(help="Of the written tensors: `float32`, `bfloat16` or `float16`. Default: the base's."),
    ] = None,
    texts: Annotated[
        str | None, typer.Option(help="File of texts that the proof is made on. Default: a few sentences.")
    ] = None,
    run: Annotated[
        Path | None,
        typer.Option(
            help="Run whose figures the model card shows. Default: the one that left the edit, if it is there."
        ),
    ] = None,
    attacks: Annotated[
        Path | None, typer.Option(help="Folder of `mrp-lens attack` whose figures the model card shows.")
    ] = None,
    verify: Annotated[
        bool, typer.Option("--verify/--no-verify", help="Reload in a fresh process and compare with the hooked model.")
    ] = True,
    push_to: Annotated[
        str | None, typer.Option(help="Upload to this repository of the Hub, such as `me/my-model-edited`.")
    ] = None,
    public: Annotated[bool, typer.Option("--public", help="`--push-to`: everybody may see it.")] = False,
    backend: options.BackendOption = options.BackendName.AUTO,
    dtype: options.Dtype = "float32",
    device: options.Device = None,
    overwrite: options.Overwrite = False,
) -> None:
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
    """
    from mrp_lens.cli.export import Wanted, run_export

    run_export(
        model_name=model,
        edit_folder=edit,
        wanted=Wanted(
            form=form.value,
            base=base,
            save_dtype=save_dtype,
            texts=texts,
            run=run,
            attacks=attacks,
            verify=verify,
            push_to=push_to,
            public=public,
        ),
        out=out,
        backend=backend.value,
        dtype=dtype,
        device=device,
        overwrite=overwrite,
    )
