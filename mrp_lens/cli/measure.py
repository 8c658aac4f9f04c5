"""`mrp-lens measure`: a model, and the same model with an edit on, measured without fitting."""

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import ClassVar

import pandas as pd
from typing_extensions import override

from mrp_lens.cli.command import OnData
from mrp_lens.cli.console import Column, console, number, show_table
from mrp_lens.cli.figures import show_figures
from mrp_lens.cli.run_folder import check_out
from mrp_lens.data import Corpus, UnlearningTask
from mrp_lens.edits import Edit, load_edit, projection_in
from mrp_lens.edits.provenance import label_of
from mrp_lens.evals import evaluate
from mrp_lens.evals.lm_eval import Bos, load_hf, require_harness, task_manager, task_names
from mrp_lens.metrics import Measured, rows_and_frames_for
from mrp_lens.metrics.controls import NEVER_TAUGHT, UNEDITED
from mrp_lens.runs.record import Run
from mrp_lens.runs.report import report
from mrp_lens.utils.frames import Row, by_figure, rows_of


@dataclass(frozen=True, kw_only=True)
class Measure(OnData):
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

    Attributes:
        out: Folder for the table and the page.
        edit: Folder of an edit, such as `runs/demo/mrp/edit`: measure with it as well.
        reference: A model that never saw the forget set: measured as well, and what the field's measures compare with.
        benchmark: The field's measures, too: extraction strength, truth ratio, model utility, fluency, ... Takes minutes.
        unseen: `--benchmark`: text like the forget set that the model never saw, read as that is, for membership inference.
        documents: At most this many documents and questions a side, evenly spread. Default: all.
        topic: `--model demo`: what was to be forgotten. Default: `potions`, unless only --harness is given.
        harness: Tasks of lm-evaluation-harness, separated by commas. Needs `pip install 'mrp_lens[harness]'`.
        include_path: `--harness`: folder with task definitions (YAML) of your own.
        limit: `--harness`: questions of each task. Default: all.
        num_fewshot: `--harness`: solved examples before each question. Default: as the task says.
        batch_size: `--harness`: texts in a pass.
        bos: `--harness`: texts start with BOS as in the library's own metrics (`metrics`), or as the tokenizer does by
            itself, which is the harness's default (`tokenizer`).
        trust_remote_code: `--harness`: run the code that lies in the folder, such as an exported module.
        seed: Of every random choice.
        overwrite: Replace the output folder if it holds a run.
    """

    word: ClassVar[str] = "measure"

    out: Path
    edit: Path | None = None
    reference: str | None = None
    benchmark: bool = False
    unseen: str | None = None
    documents: int | None = None
    harness: str | None = None
    include_path: Path | None = None
    limit: int | None = None
    num_fewshot: int | None = None
    batch_size: int = 8
    bos: Bos = "metrics"
    trust_remote_code: bool = False
    seed: int = 0
    overwrite: bool = False

    @override
    def execute(self) -> Run:
        if self.edit is not None and (known := self.of_edit(self.edit, with_data=self.harness is None)) != self:
            return known.execute()
        check_out(self.out, overwrite=self.overwrite)
        name = self.loading.name
        methods: dict[str, Edit | None] = {UNEDITED: None}
        if self.edit is not None:
            edit = load_edit(self.edit)
            methods[label_of(edit)] = edit
        task = self.task_if_any()
        if task is None and (self.reference is not None or self.benchmark):
            raise ValueError("--reference and --benchmark measure on data: give --forget and --retain, too")
        if self.unseen is not None and not self.benchmark:
            raise ValueError("--unseen is of --benchmark; give that, too, or leave it out")
        if task is None and self.documents is not None:
            raise ValueError("--documents is of data: give --forget and --retain, too (of --harness it is --limit)")
        self.check_harness()
        unseen = None if self.unseen is None else self.data.corpus(self.unseen, self.data.forget_schema)
        about = "" if self.edit is None else f" with and without {self.edit}"
        run = Run("measure", self.arguments(), self.seed, title=f"{name}{about}: measured")
        if task is not None:
            run.notes += [
                f"{name} holds the requests {', '.join(held.requests)}: what the retain set and its quiz have of any of them was "
                "forgotten, and counts here as damage"
                for name, edit in methods.items()
                if (held := projection_in(edit)) is not None and len(held.requests) > 1
            ]
            run.rows = self.data_rows(methods, task, unseen, run)
            if len(run.rows) > 1:  # the picture compares
                run.frames["accuracies"] = pd.DataFrame([dict(row) for row in run.rows])
            show_figures(f"{name}, measured", run.rows)
        if self.harness is not None:
            if task is not None:  # the harness may take hours
                run.write(self.out, overwrite=self.overwrite)
            scored = self.harness_rows(methods)
            shown = "all questions" if self.limit is None else f"at most {self.limit} questions a task"
            bos = "mrp_lens.metrics have it" if self.bos == "metrics" else "the tokenizer adds it"
            run.notes.append(f"lm-evaluation-harness {version('lm_eval')}: {shown}; BOS as {bos}")
            show_table("lm-evaluation-harness", HARNESS_COLUMNS, scored)
            run.rows = [*run.rows, *scored]
        for note in run.notes:
            console.print(note)
        run.write(self.out, overwrite=self.overwrite or (task is not None and self.harness is not None))
        console.print(f"Written to {self.out}: table.csv, summary.json. The page: {report(self.out)}")
        return run

    def check_harness(self) -> None:
        """Refuse options that would do nothing.

        Raises:
            ValueError: an option of the harness without it, or one for several devices, on which it does not run.
        """
        own = ("include_path", "limit", "num_fewshot", "trust_remote_code")
        given = [name for name in own if getattr(self, name)]
        if self.harness is None and given:
            raise ValueError(f"--{given[0].replace('_', '-')} is of --harness TASKS; give that, too, or leave it out")
        if self.harness is not None and (self.loading.device_map or self.loading.max_memory):
            raise ValueError("--harness loads the model onto one device; leave --device-map and --max-memory out")

    def task_if_any(self) -> UnlearningTask | None:
        """The data to measure on; None where there are none and the harness is to run alone.

        Raises:
            ValueError: nothing to measure on, or questions without texts.
        """
        texts = self.data.forget or self.data.retain
        quizzes = self.data.questions or self.data.retain_questions
        if not (texts or quizzes or self.topic):
            if self.harness is not None:
                return None
            if self.loading.name != "demo":
                raise ValueError(
                    f"nothing to measure {self.loading.name} on: give --forget and --retain (and --questions), or --harness TASKS"
                )
        if quizzes and not texts:
            raise ValueError("--questions and --retain-questions go with --forget and --retain; give these, too")
        return self.task()

    def data_rows(
        self, methods: Mapping[str, Edit | None], task: UnlearningTask, unseen: Corpus | None, run: Run
    ) -> list[Row]:
        """A row for each method, the unedited model first, and one for the model that never saw the forget set."""
        model = self.loading.load()
        reference = None if self.reference is None else self.loading.load(self.reference)
        measured = {name: (model, edit) for name, edit in methods.items()}
        if reference is not None:
            measured[NEVER_TAUGHT] = (reference, None)
        rows: list[Row] = []
        drawn: dict[str, Mapping[str, pd.DataFrame]] = {}
        for name, (of, edit) in measured.items():
            looked = Measured(
                model=of,
                task=task,
                edit=edit,
                reference=reference,
                judge=model,
                unseen=unseen,
                limit=self.documents,
                documents=self.documents,
                seed=self.seed,
            )
            figures, drawn[name] = rows_and_frames_for(
                ("unlearn", "benchmark") if self.benchmark else "unlearn", looked
            )
            base = rows[0] if rows else figures
            ratio = figures["text_perplexity"] / base["text_perplexity"]
            rows.append({"method": name, **figures, "text_perplexity_ratio": ratio})
        run.frames |= by_figure(drawn)
        return rows

    def harness_rows(self, methods: Mapping[str, Edit | None]) -> list[Row]:
        """A row for each method, task and metric, from the plain Hugging Face model; an edit is attached to it."""
        require_harness()
        assert self.harness is not None
        task_manager(task_names(self.harness), self.include_path)  # a wrong name should not wait for the model
        console.print(f"Loading {self.loading.name} for lm-evaluation-harness ...")
        hf_model, tokenizer = load_hf(
            self.loading.name,
            dtype=self.loading.precision,
            device=self.loading.device,
            trust_remote_code=self.trust_remote_code,
        )
        rows: list[Row] = []
        for method, edit in methods.items():
            frame = evaluate(
                hf_model,
                self.harness,
                edit=edit,
                tokenizer=tokenizer,
                include_path=self.include_path,
                limit=self.limit,
                num_fewshot=self.num_fewshot,
                batch_size=self.batch_size,
                bos=self.bos,
                seed=self.seed,
            )
            rows += [{"method": method, **row} for row in rows_of(frame.drop(columns="higher_is_better"))]
        return rows


HARNESS_COLUMNS: list[Column] = [
    ("task", lambda row: str(row["task"])),
    ("method", lambda row: str(row["method"])),
    ("metric", lambda row: str(row["metric"]) if row["filter"] == "none" else f"{row['metric']} ({row['filter']})"),
    ("value", lambda row: number(row["value"], "{:.4f}".format)),
    ("standard error", lambda row: number(row["stderr"], "{:.4f}".format)),
    ("questions", lambda row: str(row["n"])),
]
