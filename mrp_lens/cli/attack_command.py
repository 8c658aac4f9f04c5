"""What `mrp-lens attack --help` says, and the options it takes."""

from pathlib import Path
from typing import Annotated

import typer

from mrp_lens.cli import options


def attack(
    context: typer.Context,
    edit: Annotated[Path, typer.Option(help="Folder of the edit, such as `runs/demo/mrp/edit`.")],
    out: Annotated[Path, typer.Option(help="Folder of the attacks; one that holds part of them is gone on with.")],
    attack: Annotated[options.AttackName, typer.Option(help="Which.")] = options.AttackName.ALL,
    model: options.Model = "demo",
    forget: options.OwnForgetFiles = None,
    retain: options.OwnRetainFile = None,
    questions: options.QuestionsFile = None,
    retain_questions: options.RetainQuestionsFile = None,
    untaught_questions: options.UntaughtQuestionsFile = None,
    entity: options.Entity = None,
    split: Annotated[
        options.Split | None,
        typer.Option(
            help="How questions are halved: no `entity` in both halves, or no `question`. Default: `entity` where all are known."
        ),
    ] = None,
    topic: options.Topic = "potions",
    reference: Annotated[
        str | None,
        typer.Option(help="A model that never saw what was forgotten: the floor of relearning, retrained likewise."),
    ] = None,
    steps: Annotated[int, typer.Option(help="Updates of each retraining.")] = 100,
    lr: Annotated[
        str | None,
        typer.Option(help="Grid of rates, such as `3e-4,1e-3`. Default: three around 0.128 / d_model (`lora`: x 10)."),
    ] = None,
    samples: Annotated[int | None, typer.Option(help="Facts that retraining sees. Default: all of its half.")] = None,
    forms: Annotated[
        str | None,
        typer.Option(help="Of the edit, that are retrained: `kept,stripped,weights`. Default: all that the edit has."),
    ] = None,
    parameters: Annotated[
        str, typer.Option(help="What retraining may change: any of `all,lora,before,at,after` (the edited layers).")
    ] = "all",
    probe_kind: Annotated[str, typer.Option(help="`linear` or `mlp`.")] = "linear",
    search_steps: Annotated[int, typer.Option(help="Steps of each search for a trigger.")] = 50,
    questions_limit: Annotated[
        int | None, typer.Option(help="Questions on what was forgotten, both halves together. Default: all.")
    ] = None,
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
) -> None:
    """See what survives an edit: retrain, probe, bypass and jailbreak it, against what was never taught.

    Half of the questions on what was forgotten are the attacker's; what counts is the other half. *Recovery* is 0 where
    the attacked model knows no more of these than of facts that it was never taught, and 1 where it knows as much as
    before the edit.

    - `relearn`: retraining on the attacker's half (arXiv 2410.08827), with the edit on, with its hooks stripped, and
      where possible written into the weights. The unedited model is retrained as well, and new facts are taught likewise.
    - `probe`: what a probe, and the logit lens, read off each layer, before, with the edit, and after retraining.
    - `bypass`: hooks stripped, directions ablated, weights rounded, noise, other contexts: no training.
    - `jailbreak`: a trigger for all prompts, found by gradients; and how steep these are.

    Each result is kept, whole or not at all: run the same command again after Ctrl-C or a crash and it goes on where it
    stopped. All attacks on an edit of the demo take about half an hour on two cores; `--questions-limit 120 --lr 1e-3
    --search-steps 10` a few minutes.

    Examples:

        mrp-lens attack --edit runs/demo/mrp/edit --attack relearn --out runs/attack

        mrp-lens attack --model ./my-checkpoint --edit runs/mine/edit --forget forget.jsonl --retain retain.jsonl \\
            --questions quiz.jsonl --untaught-questions never.jsonl --entity person --out runs/mine-attacked
    """
    from mrp_lens.cli.attack import Budget, run_attack

    run_attack(
        options=context.params,
        budget=Budget(
            attack=attack.value,
            forms=forms,
            parameters=parameters,
            steps=steps,
            lr=lr,
            samples=samples,
            probe_kind=probe_kind,
            search_steps=search_steps,
            split=None if split is None else split.value,
            questions=questions_limit,
        ),
        edit_folder=edit,
        reference_name=reference,
        out=out,
        backend=backend.value,
        dtype=dtype,
        device=device,
        seed=seed,
    )
