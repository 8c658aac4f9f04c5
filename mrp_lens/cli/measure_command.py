"""What `mrp-lens measure --help` says, and the options it takes."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from mrp_lens.cli import options


class BosName(StrEnum):
    """Who says whether a text starts with BOS."""

    METRICS = "metrics"
    TOKENIZER = "tokenizer"


def measure(
    context: typer.Context,
    out: Annotated[Path, typer.Option(help="Folder for the table and the page.")],
    model: options.Model = "demo",
    edit: Annotated[
        Path | None, typer.Option(help="Folder of an edit, such as `runs/demo/mrp/edit`: measure with it as well.")
    ] = None,
    forget: options.OwnForgetFiles = None,
    retain: options.OwnRetainFile = None,
    questions: options.QuestionsFile = None,
    retain_questions: options.RetainQuestionsFile = None,
    topic: Annotated[
        str | None,
        typer.Option(
            help="`--model demo`: what was to be forgotten. Default: `potions`, unless only --harness is given."
        ),
    ] = None,
    harness: Annotated[
        str | None,
        typer.Option(
            help="Tasks of lm-evaluation-harness, separated by commas. Needs `pip install 'mrp_lens[harness]'`."
        ),
    ] = None,
    include_path: Annotated[
        Path | None, typer.Option(help="`--harness`: folder with task definitions (YAML) of your own.")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="`--harness`: questions of each task. Default: all.")] = None,
    num_fewshot: Annotated[
        int | None, typer.Option(help="`--harness`: solved examples before each question. Default: as the task says.")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="`--harness`: texts in a pass.")] = 8,
    bos: Annotated[
        BosName,
        typer.Option(
            help="`--harness`: texts start with BOS as in the library's own metrics (`metrics`), or as the tokenizer does by "
            "itself, which is the harness's default (`tokenizer`)."
        ),
    ] = BosName.METRICS,
    trust_remote_code: Annotated[
        bool,
        typer.Option(
            "--trust-remote-code", help="`--harness`: run the code that lies in the folder, such as an exported module."
        ),
    ] = False,
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
    seed: options.Seed = 0,
    overwrite: options.Overwrite = False,
) -> None:
    """Measure a model, and the same model with an edit on, without fitting anything.

    With data, as `unlearn` does: probability of the forget texts, perplexity of the retain texts, accuracy on questions.
    With --harness, by lm-evaluation-harness, on the plain Hugging Face model: one that was exported, or any other; the
    edit is attached to it. Both may be given together. The demo brings its own data.

    Examples:

        mrp-lens measure --edit runs/demo/mrp/edit --out runs/measured

        mrp-lens measure --model ./my-checkpoint --edit runs/mine/edit --forget forget.jsonl --retain retain.txt \\
            --questions quiz.jsonl --out runs/mine-measured

    WMDP and MMLU, before and after an edit:

        mrp-lens measure --model HuggingFaceH4/zephyr-7b-beta --dtype bfloat16 --edit runs/zephyr-rmu/edit \\
            --harness wmdp,mmlu --out runs/zephyr-rmu-harness

    The same of an exported folder; one of the form *module* also needs --trust-remote-code:

        mrp-lens measure --model runs/zephyr-rmu-export --dtype bfloat16 --harness wmdp,mmlu --out runs/export-harness

    A task of your own, defined in tasks/my_task.yaml:

        mrp-lens measure --model ./my-checkpoint --harness my_task --include-path tasks --out runs/my-task
    """
    from mrp_lens.cli.measure import HarnessOptions, run_measure

    run_measure(
        options=context.params,
        edit_folder=edit,
        harness_options=None
        if harness is None
        else HarnessOptions(
            tasks=harness,
            include_path=include_path,
            limit=limit,
            num_fewshot=num_fewshot,
            batch_size=batch_size,
            bos=bos.value,
            trust_remote_code=trust_remote_code,
        ),
        out=out,
        backend=backend.value,
        dtype=dtype,
        device=device,
        seed=seed,
        overwrite=overwrite,
    )
