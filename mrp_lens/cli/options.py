"""Options that commands share, and what `--help` says of them."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer


class Method(StrEnum):
    """Methods by the names that tables use."""

    MRP = "mrp"
    RMU = "rmu"
    ADAPTIVE_RMU = "adaptive-rmu"
    GRADIENT_ASCENT = "gradient-ascent"
    GRADIENT_DIFFERENCE = "gradient-difference"
    NPO = "npo"
    RMU_NOISE = "rmu-noise"
    DIRECTION_ABLATION = "direction-ablation"


class AttackName(StrEnum):
    """What `attack` does."""

    RELEARN = "relearn"
    PROBE = "probe"
    BYPASS = "bypass"
    JAILBREAK = "jailbreak"
    ALL = "all"


class Split(StrEnum):
    """How an attacker's questions are told from those that count."""

    ENTITY = "entity"
    QUESTION = "question"


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
Out = Annotated[Path, typer.Option(help="Folder for what the run leaves.")]
Model = Annotated[str, typer.Option(help="`demo`, a local Hugging Face folder, or a name on the Hub.")]
ForgetFiles = Annotated[
    list[str],
    typer.Option(
        help="Texts to forget: a .jsonl, .json, .csv, .tsv, .parquet or .txt file, a folder that `save_to_disk` wrote, "
        "or `hub:NAME[:CONFIG[:SPLIT]]`. Repeat for several topics."
    ),
]
OwnForgetFiles = Annotated[
    list[str] | None,
    typer.Option(help="Texts to forget, as in `unlearn`. Without it: a topic of the demo's world."),
]
OwnRetainFile = Annotated[str | None, typer.Option(help="Texts to keep, as in `unlearn`.")]
Topic = Annotated[str, typer.Option(help="`--model demo`: what to forget.")]
RetainFile = Annotated[str, typer.Option(help="Texts to keep, likewise. A tenth is held out to measure perplexity on.")]
QuestionsFile = Annotated[
    str | None, typer.Option(help="Multiple-choice questions about what must go: a file, a folder or `hub:...`.")
]
RetainQuestionsFile = Annotated[
    str | None, typer.Option(help="Multiple-choice questions about what must stay, likewise.")
]
UntaughtQuestionsFile = Annotated[
    str | None,
    typer.Option(
        help="Questions like --questions about what the model was never taught, likewise: what absent looks like."
    ),
]
Entity = Annotated[
    str | None,
    typer.Option(help="Column of --questions and --untaught-questions that says whom or what a question is about."),
]
ForgetSchema = Annotated[
    str | None,
    typer.Option(help="Known data set whose columns the files of --forget have, such as `locuslab/TOFU`."),
]
RetainSchema = Annotated[str | None, typer.Option(help="Likewise for --retain, such as `wikitext`.")]
QuestionsSchema = Annotated[
    str | None, typer.Option(help="Likewise for --questions and --retain-questions, such as `cais/wmdp`.")
]
Field = Annotated[
    str | None,
    typer.Option(help="Column of --forget and --retain that holds the text. Default: `text`, or the schema's."),
]
Prompt = Annotated[
    str | None,
    typer.Option(help="Template of the context, such as `Question: {question}\\nAnswer:`; instead of --field."),
]
Completion = Annotated[
    str | None, typer.Option(help="Template of what follows and counts in the loss, such as ` {answer}`.")
]
QuestionPrompt = Annotated[
    str | None,
    typer.Option(help="Template of the quiz prompt; braces name columns. Default: `{question}`, or the schema's."),
]
Choices = Annotated[
    str | None,
    typer.Option(
        help="Column with the list of choices, or several columns: `a,b,c,d`. Default: `choices`, or the schema's."
    ),
]
Answer = Annotated[
    str | None,
    typer.Option(
        help="Column with the text, the letter or the index of the right choice. Default: `answer`, or the schema's."
    ),
]
Dtype = Annotated[str, typer.Option(help="`float32`, `bfloat16` or `float16`.")]
Device = Annotated[str | None, typer.Option(help="Such as `cuda:0`. Default: a GPU if there is one.")]
