"""`mrp-lens demo | unlearn | sweep | attack | measure | export | report`."""

import logging
import sys
from pathlib import Path
from typing import Annotated

import typer

from mrp_lens.cli import options
from mrp_lens.cli.attack_command import attack
from mrp_lens.cli.export_command import export
from mrp_lens.cli.measure_command import measure

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


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the table, the edits, the logs and the metrics.")] = Path(
        "runs/demo"
    ),
    topic: Annotated[str, typer.Option(help="What to forget: `potions`, `beasts`, `towns` or `machines`.")] = "potions",
    backend: options.BackendOption = options.BackendName.AUTO,
    seed: options.Seed = 0,
    overwrite: options.Overwrite = False,
) -> None:
    """Forget one topic of the embedded invented world with MRP, RMU and Adaptive RMU, and compare them.

    Takes two to three minutes on two cores. The model knows 2,000 invented facts about potions, beasts, towns and machines.
    Each method gets texts about one topic to forget, texts about half of the rest to keep, and the library's defaults.
    The table shows, next to the unedited model, a random projection of the same rank, and MRP's start before training:

    - **forgotten topic**: accuracy on its questions, in a wording no method saw. *absent*: as low as on facts the model
      was never taught. *suppressed*: lower, so the answer is still known and pushed down. *known*: higher.
    - **back after 20 updates**: how much of half of the topic comes back when the edited model is retrained on the other
      half: 0 as if never taught, 1 all of it. `mrp-lens attack` does more.
    - **worst other topic**: accuracy on entities that no method saw.
    - **text**: perplexity of unseen ordinary sentences, as a multiple of the unedited model's.

    Example:

        mrp-lens demo --out runs/demo
    """
    from mrp_lens.cli.demo import run_demo

    run_demo(out=out, topic=topic, backend=backend.value, seed=seed, overwrite=overwrite)


@app.command()
def unlearn(
    context: typer.Context,
    model: options.Model,
    method: Annotated[options.Method, typer.Option(help="How to forget.")],
    forget: options.ForgetFiles,
    retain: options.RetainFile,
    out: Annotated[Path, typer.Option(help="Folder for the edit, the log and the metrics.")],
    questions: options.QuestionsFile = None,
    retain_questions: options.RetainQuestionsFile = None,
    forget_schema: options.ForgetSchema = None,
    retain_schema: options.RetainSchema = None,
    questions_schema: options.QuestionsSchema = None,
    released: Annotated[
        bool,
        typer.Option("--released", help="`rmu`, `adaptive-rmu`: the released code's settings, where none is given."),
    ] = False,
    layers: Annotated[
        str | None,
        typer.Option(
            help="Layers to project or to train (`mrp`, `npo` and the like: `3,5`), or to steer at (`rmu` and the like: `7`). "
            "Default: from the model's depth."
        ),
    ] = None,
    rank: Annotated[int | None, typer.Option(help="`mrp`: directions removed at each layer.")] = None,
    steering_coeff: Annotated[
        float | None, typer.Option(help="`rmu`: c. Default: from the norm of the forget states.")
    ] = None,
    beta: Annotated[
        float | None,
        typer.Option(
            help="`adaptive-rmu`: c as a multiple of each state's norm. `npo`: how soon its gradient vanishes."
        ),
    ] = None,
    alpha: Annotated[float | None, typer.Option(help="`rmu` and the like: weight of what must stay.")] = None,
    retain_weight: Annotated[float | None, typer.Option(help="Other methods: weight of what must stay.")] = None,
    distillation: Annotated[
        bool,
        typer.Option(
            "--distillation",
            help="`mrp`: reset the layers that look facts up and teach them again, so that retraining finds less (Bridge, slow).",
        ),
    ] = False,
    lr: Annotated[
        float | None, typer.Option(help="Learning rate. Default: from the size of the trained entries.")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Updates.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Documents an update on each side.")] = None,
    max_length: Annotated[
        int | None,
        typer.Option(help="Tokens at which the fit cuts documents. Default: 512, or the context if that is shorter."),
    ] = None,
    field: options.Field = None,
    prompt: options.Prompt = None,
    completion: options.Completion = None,
    question_prompt: options.QuestionPrompt = None,
    choices: options.Choices = None,
    answer: options.Answer = None,
    backend: options.BackendOption = options.BackendName.AUTO,
    dtype: options.Dtype = "float32",
    device: options.Device = None,
    seed: options.Seed = 0,
    overwrite: options.Overwrite = False,
) -> None:
    """Make your own model forget: fit an edit, save it, and measure before and after.

    The model's files are never changed: the result is an *edit*, a small folder that `mrp_lens.load_edit` reads.
    The edit is on disk before anything is measured, and the fit is kept while it runs: run the same command again after
    Ctrl-C, a kill or a crash and it goes on where it stopped, and ends with the same bits.

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
    from mrp_lens.cli.unlearn import run_unlearn
    from mrp_lens.data.task import TaskConfig

    hyperparameters = {
        "rank": rank,
        "steering_coeff": steering_coeff,
        "beta": beta,
        "alpha": alpha,
        "retain_weight": retain_weight,
        "distillation": distillation or None,
        "lr": lr,
        "steps": steps,
        "batch_size": batch_size,
        "max_length": max_length,
    }
    data = TaskConfig.from_options(context.params)
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


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(help="That a command or a study wrote, such as `runs/demo`.")],
    out: Annotated[Path | None, typer.Option(help="The page. Default: `report.html` in the folder.")] = None,
) -> None:
    """Make one HTML page of a run: table, controls, figures, answers, settings. It opens without a network.

    Example:

        mrp-lens report runs/demo
    """
    from mrp_lens.runs.report import write_report

    typer.echo(f"Written: {write_report(folder, out=out)}")


@app.command()
def sweep(
    context: typer.Context,
    out: Annotated[Path, typer.Option(help="Folder of the sweep; one that holds part of it is gone on with.")],
    model: options.Model = "demo",
    forget: options.OwnForgetFiles = None,
    retain: options.OwnRetainFile = None,
    questions: options.QuestionsFile = None,
    retain_questions: options.RetainQuestionsFile = None,
    topic: options.Topic = "potions",
    methods: Annotated[str, typer.Option(help="Separated by commas.")] = "mrp,rmu,adaptive-rmu",
    layers: Annotated[str | None, typer.Option(help="Such as `2,5,7`. Default: four, evenly spread.")] = None,
    coefficients: Annotated[
        str | None,
        typer.Option(
            help="`rmu`: values of c, such as `6.5,20`. Default: twice the forget states' norm at RMU's layer."
        ),
    ] = None,
    betas: Annotated[str | None, typer.Option(help="`adaptive-rmu`: values of beta. Default: 5.")] = None,
    seeds: Annotated[str | None, typer.Option(help="Such as `0,1,2`. Default: 0.")] = None,
    steps: Annotated[int | None, typer.Option(help="Updates of each fit. Default: 75.")] = None,
    questions_limit: Annotated[
        int | None, typer.Option(help="Questions asked on each side at each point. Default: 150.")
    ] = None,
    full: Annotated[
        bool,
        typer.Option(
            "--full",
            help="All layers, seeds 0,1,2, c at a quarter, once and four times its default, 150 steps, all questions.",
        ),
    ] = False,
    shard: Annotated[
        str, typer.Option(help="`i/n`: every n-th point from the i-th on, for several processes.")
    ] = "1/1",
    forget_schema: options.ForgetSchema = None,
    retain_schema: options.RetainSchema = None,
    questions_schema: options.QuestionsSchema = None,
    field: options.Field = None,
    prompt: options.Prompt = None,
    completion: options.Completion = None,
    question_prompt: options.QuestionPrompt = None,
    choices: options.Choices = None,
    answer: options.Answer = None,
    backend: options.BackendOption = options.BackendName.AUTO,
    dtype: options.Dtype = "float32",
    device: options.Device = None,
) -> None:
    """Fit every method at one layer after another and compare what each did.

    One file a point is kept, whole or not at all: run the same command again after Ctrl-C or a crash and it goes on
    where it stopped. Several processes share a folder with `--shard 1/4` to `--shard 4/4`; from several machines, copy
    the files of `points/` together and run the command once more.

    Example:

        mrp-lens sweep --model demo --out runs/sweep
    """
    from mrp_lens.cli.sweep import Grid, run_sweep

    run_sweep(
        options=context.params,
        grid=Grid(methods, layers, coefficients, betas, seeds, steps, questions_limit, full),
        shard=shard,
        out=out,
        backend=backend.value,
        dtype=dtype,
        device=device,
    )


app.command()(attack)
app.command()(measure)
app.command()(export)


def main() -> None:
    """Entry point: bad input ends with its message, not with a traceback."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    try:
        app()
    except (ValueError, TypeError, OSError, FloatingPointError) as error:
        typer.secho(f"mrp-lens: {error}", fg="red", err=True)
        sys.exit(2)
