"""`mrp-lens measure`: a model, and the same model with an edit on, measured without fitting."""

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd

from mrp_lens.cli.parsing import dtype_named
from mrp_lens.cli.show import Column, console, show_table
from mrp_lens.cli.unlearn import CAPTION, columns
from mrp_lens.cli.unlearn import measure as figures_of
from mrp_lens.data.task import TaskConfig, UnlearningTask, task_for
from mrp_lens.edits import Edit, edit_on, load_edit
from mrp_lens.edits.provenance import label_of
from mrp_lens.evals.lm_eval import Bos, evaluate, load_hf, require_harness, task_manager, task_names
from mrp_lens.hf import attach
from mrp_lens.models import load_model
from mrp_lens.runs.record import Run
from mrp_lens.runs.report import write_report
from mrp_lens.utils.frames import Row, rows_of
from mrp_lens.utils.io import check_free

UNEDITED = "unedited"
TEXTS, QUIZZES = ("forget", "retain"), ("questions", "retain_questions")


@dataclass(frozen=True, kw_only=True)
class HarnessOptions:
    """What the command line says of lm-evaluation-harness; `tasks` are separated by commas."""

    tasks: str
    include_path: Path | None = None
    limit: int | None = None
    num_fewshot: int | None = None
    batch_size: int = 8
    bos: Bos = "metrics"
    trust_remote_code: bool = False


def run_measure(
    *,
    options: Mapping[str, Any],
    edit_folder: Path | None,
    harness_options: HarnessOptions | None,
    out: Path,
    backend: str,
    dtype: str,
    device: str | None,
    seed: int,
    overwrite: bool,
) -> Run:
    """Measure, print, write; returns the record."""
    check_free(out, overwrite=overwrite)
    precision, model_name = dtype_named(dtype), str(options["model"])
    methods: dict[str, Edit | None] = {UNEDITED: None}
    if edit_folder is not None:
        edit = load_edit(edit_folder)
        methods[label_of(edit)] = edit
    task = case_of(model_name, options, harnessed=harness_options is not None)
    about = "" if edit_folder is None else f" with and without {edit_folder}"
    run = Run("measure", options, seed, title=f"{model_name}{about}: measured")
    scored: list[Row] = []
    if harness_options is not None:
        try:
            scored = harness_rows(model_name, methods, harness_options, dtype=dtype, device=device, seed=seed)
        except ImportError as error:  # the command line shows the message of a ValueError, and no traceback
            raise ValueError(f"--harness: {error}") from error
        shown = (
            "all questions" if harness_options.limit is None else f"at most {harness_options.limit} questions a task"
        )
        bos = "mrp_lens.metrics have it" if harness_options.bos == "metrics" else "the tokenizer adds it"
        run.notes.append(f"lm-evaluation-harness {version('lm_eval')}: {shown}; BOS as {bos}")
    if task is not None:
        console.print(f"Loading {model_name} ...")
        run.rows = data_rows(load_model(model_name, backend=backend, device=device, dtype=precision), methods, task)
        if len(run.rows) > 1:  # the picture compares
            run.frames["accuracies"] = pd.DataFrame([dict(row) for row in run.rows])
        shown_columns = [column for column in columns(run.rows[0]) if column[0] != "fit"]
        show_table(f"{model_name}, measured", shown_columns, run.rows, caption=CAPTION)
    if scored:
        show_table("lm-evaluation-harness", HARNESS_COLUMNS, scored)
    for note in run.notes:
        console.print(note)
    run.rows = [*run.rows, *scored]
    run.write(out, overwrite=overwrite)
    console.print(f"Written to {out}: table.csv, summary.json. The page: {write_report(out)}")
    return run


def case_of(model_name: str, options: Mapping[str, Any], *, harnessed: bool) -> UnlearningTask | None:
    """The data to measure on; None where there are none and the harness is to run alone.

    Raises:
        ValueError: nothing to measure on, or questions without texts.
    """
    given = {name for name in (*TEXTS, *QUIZZES, "topic") if options.get(name)}
    if not given and harnessed:
        return None
    if not given and model_name != "demo":
        raise ValueError(
            f"nothing to measure {model_name} on: give --forget and --retain (and --questions), or --harness TASKS"
        )
    if given & set(QUIZZES) and not given & set(TEXTS):
        raise ValueError("--questions and --retain-questions go with --forget and --retain; give these, too")
    return task_for(model_name, TaskConfig.from_options(options), topic=options["topic"])


def data_rows(model: Any, methods: Mapping[str, Edit | None], task: UnlearningTask) -> list[Row]:
    """A row for each method; the unedited model must come first."""
    rows: list[Row] = []
    for method, edit in methods.items():
        with edit_on(model, edit):
            figures = figures_of(model, task)
        base = rows[0] if rows else figures
        ratio = figures["text_perplexity"] / base["text_perplexity"]
        rows.append({"method": method, **figures, "text_perplexity_ratio": ratio})
    return rows


def harness_rows(
    model_name: str,
    methods: Mapping[str, Edit | None],
    asked: HarnessOptions,
    *,
    dtype: str,
    device: str | None,
    seed: int,
) -> list[Row]:
    """A row for each method, task and metric, from the plain Hugging Face model; an edit is attached to it."""
    require_harness()
    task_manager(task_names(asked.tasks), asked.include_path)  # a wrong name should not wait for the model
    console.print(f"Loading {model_name} for lm-evaluation-harness ...")
    hf_model, tokenizer = load_hf(model_name, dtype=dtype, device=device, trust_remote_code=asked.trust_remote_code)
    rows: list[Row] = []
    for method, edit in methods.items():
        with nullcontext() if edit is None else attach(hf_model, edit):
            frame = evaluate(
                hf_model,
                asked.tasks,
                tokenizer=tokenizer,
                include_path=asked.include_path,
                limit=asked.limit,
                num_fewshot=asked.num_fewshot,
                batch_size=asked.batch_size,
                bos=asked.bos,
                seed=seed,
            )
        rows += [{"method": method, **row} for row in rows_of(frame.drop(columns="higher_is_better"))]
    return rows


HARNESS_COLUMNS: list[Column] = [
    ("task", lambda row: str(row["task"])),
    ("method", lambda row: str(row["method"])),
    ("metric", lambda row: str(row["metric"]) if row["filter"] == "none" else f"{row['metric']} ({row['filter']})"),
    ("value", lambda row: f"{row['value']:.4f}"),
    ("standard error", lambda row: "" if row["stderr"] is None else f"{row['stderr']:.4f}"),
    ("questions", lambda row: str(row["n"])),
]
