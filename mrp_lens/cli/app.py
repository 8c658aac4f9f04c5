"""`mrp-lens demo | unlearn`."""

import logging
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    name="mrp-lens",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    add_completion=False,
    pretty_exceptions_enable=False,
    help="""Make a language model forget a topic on its residual stream, and see what was forgotten and what was kept.

Start with `mrp-lens demo`: it needs no data, no network and no GPU. Then run `mrp-lens unlearn` on your own checkpoint.
""",
)


class Method(StrEnum):
    """Methods by the names that tables use."""

    MRP = "mrp"
    RMU = "rmu"
    ADAPTIVE_RMU = "adaptive-rmu"


class BackendName(StrEnum):
    """TransformerLens classes."""

    AUTO = "auto"
    HOOKED = "hooked"
    BRIDGE = "bridge"


Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the output folder if it exists.")]
Seed = Annotated[int, typer.Option(help="Seed of every random choice.")]
BackendOption = Annotated[
    BackendName,
    typer.Option(
        help="HookedTransformer (`hooked`, TransformerLens 3 only), TransformerBridge (`bridge`), or whichever fits (`auto`)."
    ),
]


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the table, the edits, the logs and the metrics.")] = Path(
        "runs/demo"
    ),
    topic: Annotated[str, typer.Option(help="What to forget: `potions`, `beasts`, `towns` or `machines`.")] = "potions",
    backend: BackendOption = BackendName.AUTO,
    seed: Seed = 0,
    overwrite: Overwrite = False,
) -> None:
    """Forget one topic of the embedded invented world with MRP, RMU and Adaptive RMU, and compare them.

    Takes about a minute on two cores. The model knows 2,000 invented facts about potions, beasts, towns and machines.
    Each method gets texts about one topic to forget, texts about half of the rest to keep, and the library's defaults.
    The table shows, next to the unedited model, a random projection of the same rank, and MRP's start before training:

    - **forgotten topic**: accuracy on its questions, in a wording no method saw. *absent*: as low as on facts the model
      was never taught. *suppressed*: lower, so the answer is still known and pushed down. *known*: higher.
    - **worst other topic**: accuracy on entities that no method saw.
    - **text**: perplexity of unseen ordinary sentences, as a multiple of the unedited model's.

    Example:

        mrp-lens demo --out runs/demo
    """
    from mrp_lens.cli.demo import run_demo

    run_demo(out=out, topic=topic, backend=backend.value, seed=seed, overwrite=overwrite)


@app.command()
def unlearn(
    model: Annotated[str, typer.Option(help="`demo`, a local Hugging Face folder, or a name on the Hub.")],
    method: Annotated[Method, typer.Option(help="How to forget.")],
    forget: Annotated[
        list[str],
        typer.Option(
            help="Texts to forget: a .jsonl, .json, .csv, .tsv, .parquet or .txt file, a folder that `save_to_disk` wrote, "
            "or `hub:NAME[:CONFIG[:SPLIT]]`. Repeat for several topics."
        ),
    ],
    retain: Annotated[str, typer.Option(help="Texts to keep, likewise. A tenth is held out to measure perplexity on.")],
    out: Annotated[Path, typer.Option(help="Folder for the edit, the log and the metrics.")],
    questions: Annotated[
        str | None, typer.Option(help="Multiple-choice questions about what must go: a file, a folder or `hub:...`.")
    ] = None,
    retain_questions: Annotated[
        str | None, typer.Option(help="Multiple-choice questions about what must stay, likewise.")
    ] = None,
    forget_schema: Annotated[
        str | None,
        typer.Option(help="Known data set whose columns the files of --forget have, such as `locuslab/TOFU`."),
    ] = None,
    retain_schema: Annotated[str | None, typer.Option(help="Likewise for --retain, such as `wikitext`.")] = None,
    questions_schema: Annotated[
        str | None, typer.Option(help="Likewise for --questions and --retain-questions, such as `cais/wmdp`.")
    ] = None,
    released: Annotated[
        bool,
        typer.Option("--released", help="`rmu`, `adaptive-rmu`: the released code's settings, where none is given."),
    ] = False,
    layers: Annotated[
        str | None,
        typer.Option(
            help="Layers to project (`mrp`: `3,5`) or to steer at (`rmu`, `adaptive-rmu`: `7`). Default: from the model's depth."
        ),
    ] = None,
    rank: Annotated[int | None, typer.Option(help="`mrp`: directions removed at each layer.")] = None,
    steering_coeff: Annotated[
        float | None, typer.Option(help="`rmu`: c. Default: from the norm of the forget states.")
    ] = None,
    beta: Annotated[float | None, typer.Option(help="`adaptive-rmu`: c as a multiple of each state's norm.")] = None,
    alpha: Annotated[float | None, typer.Option(help="`rmu`, `adaptive-rmu`: weight of what must stay.")] = None,
    retain_weight: Annotated[float | None, typer.Option(help="`mrp`: weight of what must stay.")] = None,
    lr: Annotated[
        float | None, typer.Option(help="Learning rate. Default: from the size of the trained entries.")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Updates.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Documents an update on each side.")] = None,
    max_length: Annotated[
        int | None,
        typer.Option(help="Tokens at which the fit cuts documents. Default: 512, or the context if that is shorter."),
    ] = None,
    field: Annotated[
        str | None,
        typer.Option(help="Column of --forget and --retain that holds the text. Default: `text`, or the schema's."),
    ] = None,
    prompt: Annotated[
        str | None,
        typer.Option(help="Template of the context, such as `Question: {question}\\nAnswer:`; instead of --field."),
    ] = None,
    completion: Annotated[
        str | None, typer.Option(help="Template of what follows and counts in the loss, such as ` {answer}`.")
    ] = None,
    question_prompt: Annotated[
        str | None,
        typer.Option(help="Template of the quiz prompt; braces name columns. Default: `{question}`, or the schema's."),
    ] = None,
    choices: Annotated[
        str | None,
        typer.Option(
            help="Column with the list of choices, or several columns: `a,b,c,d`. Default: `choices`, or the schema's."
        ),
    ] = None,
    answer: Annotated[
        str | None,
        typer.Option(
            help="Column with the text, the letter or the index of the right choice. Default: `answer`, or the schema's."
        ),
    ] = None,
    backend: BackendOption = BackendName.AUTO,
    dtype: Annotated[str, typer.Option(help="`float32`, `bfloat16` or `float16`.")] = "float32",
    device: Annotated[str | None, typer.Option(help="Such as `cuda:0`. Default: a GPU if there is one.")] = None,
    seed: Seed = 0,
    overwrite: Overwrite = False,
) -> None:
    """Make your own model forget: fit an edit, save it, and measure before and after.

    The model's files are never changed: the result is an *edit*, a small folder that `mrp_lens.load_edit` reads.
    Ctrl-C ends the fit early; what was learned until then is measured and saved.

    Examples:

        mrp-lens unlearn --model ./my-checkpoint --method mrp --forget forget.jsonl --retain retain.jsonl --out runs/mine

        mrp-lens unlearn --model ./my-checkpoint --method rmu --layers 7 --forget bio.jsonl --forget cyber.jsonl \\
            --retain wikitext.txt --questions quiz.jsonl --question-prompt "Question: {question}\\nAnswer:" --out runs/rmu

    WMDP on Zephyr-7B with the published settings of RMU. The forget corpus about biology is handed out on request only;
    put it into a file. `--released` stands for the values that follow it here, left padding and the
    corpora's own order:

        mrp-lens unlearn --model HuggingFaceH4/zephyr-7b-beta --dtype bfloat16 --method rmu \\
            --released --layers 7 --steering-coeff 6.5 --alpha 1200 --lr 5e-5 --batch-size 4 --steps 150 \\
            --forget bio-forget-corpus.jsonl --forget hub:cais/wmdp-corpora:cyber-forget-corpus --retain hub:wikitext \\
            --max-length 512 --questions hub:cais/wmdp:wmdp-bio --retain-questions hub:cais/mmlu --out runs/zephyr-rmu

    Adaptive RMU, in the paper with beta 5 and 500 steps:

        mrp-lens unlearn --model HuggingFaceH4/zephyr-7b-beta --dtype bfloat16 --method adaptive-rmu \\
            --released --beta 5 --steps 500 \\
            --forget bio-forget-corpus.jsonl --forget hub:cais/wmdp-corpora:cyber-forget-corpus --retain hub:wikitext \\
            --max-length 512 --questions hub:cais/wmdp:wmdp-bio --retain-questions hub:cais/mmlu --out runs/zephyr-adaptive

    Known data sets (`hub:NAME` and the schemas): `cais/wmdp`, `cais/wmdp-corpora`, `cais/mmlu`, `locuslab/TOFU`,
    `derek-thomas/ScienceQA`, `wikitext`.
    """
    from mrp_lens.case import DataOptions
    from mrp_lens.cli.unlearn import run_unlearn

    hyperparameters = {
        "rank": rank,
        "steering_coeff": steering_coeff,
        "beta": beta,
        "alpha": alpha,
        "retain_weight": retain_weight,
        "lr": lr,
        "steps": steps,
        "batch_size": batch_size,
        "max_length": max_length,
    }
    data = DataOptions(
        forget=tuple(forget),
        retain=retain,
        questions=questions,
        retain_questions=retain_questions,
        field=field,
        prompt=_unescaped(prompt),
        completion=_unescaped(completion),
        question_prompt=_unescaped(question_prompt),
        choices=choices,
        answer=answer,
        forget_schema=forget_schema,
        retain_schema=retain_schema,
        questions_schema=questions_schema,
    )
    run_unlearn(
        model_name=model,
        method=method.value,
        layers=layers,
        released=released,
        hyperparameters={name: value for name, value in hyperparameters.items() if value is not None},
        data=data,
        out=out,
        backend=backend.value,
        dtype=dtype,
        device=device,
        seed=seed,
        overwrite=overwrite,
    )


def _unescaped(template: str | None) -> str | None:
    """A shell passes a backslash and an n where a template means a line break."""
    return None if template is None else template.replace("\\n", "\n")


def main() -> None:
    """Entry point: bad input ends with its message, not with a traceback."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    try:
        app()
    except (ValueError, TypeError, OSError, FloatingPointError) as error:
        typer.secho(f"mrp-lens: {error}", fg="red", err=True)
        sys.exit(2)
