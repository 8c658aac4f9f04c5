"""`mrp-lens unlearn`: fit, measure before and after, save, on anybody's model and data."""

import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar, Literal

import pandas as pd
from typing_extensions import override

from mrp_lens.cli.command import Command, ModelOptions
from mrp_lens.cli.console import console, show_examples, silent
from mrp_lens.cli.errors import as_typed
from mrp_lens.cli.figures import show_figures
from mrp_lens.cli.run_folder import KIND, begun, check_out
from mrp_lens.data import TaskConfig, UnlearningTask
from mrp_lens.data.task import beginning
from mrp_lens.edits import Edit, edit_on, load_edit
from mrp_lens.edits.provenance import fingerprint, label_of
from mrp_lens.methods import METHODS, Fit, Method, control_accuracy
from mrp_lens.methods.base import FitTemplate
from mrp_lens.methods.budget import LOGGED
from mrp_lens.methods.fit import CHECKPOINT, FIT
from mrp_lens.metrics import Measured, rows_for
from mrp_lens.metrics.controls import NEVER_TAUGHT, UNEDITED
from mrp_lens.models import LensModel, identity_of
from mrp_lens.models.generation import continuations
from mrp_lens.runs.record import Run
from mrp_lens.runs.report import report
from mrp_lens.runs.report.diagnostics import diagnostics
from mrp_lens.training import LoggerCallback, logger_named
from mrp_lens.training.checkpoints import IDENTITY_FILE
from mrp_lens.utils.frames import is_number
from mrp_lens.utils.io import as_json, finite, make_folder, read_json, sole_process, write_json
from mrp_lens.utils.processes import is_first, leave
from mrp_lens.utils.result_store import POINTS, REMEDY

EXAMPLES = 3
UNEDITED_BY = ("command", "data", "backend", "dtype")  # what the unedited model's figures depend on, besides the model


RMU_OF_0_1 = {"errors": "absolute", "budget": None, "coverage": None, "steps": 150, "retain_length": None}
OF_0_1: Mapping[str, tuple[str, Mapping[str, Any]]] = {  # a method of version 0.1 -> its name now, and its defaults
    "mrp": ("mrp-unconditional", {}),
    "rmu": ("rmu", RMU_OF_0_1),
    "adaptive-rmu": ("adaptive-rmu", {**RMU_OF_0_1, "beta": 5.0}),
}


@dataclass(frozen=True, kw_only=True)
class Unlearn(Command):
    """Make your own model forget: fit an edit, save it, and measure before and after.

    The model's files are never changed: the result is an *edit*, a small folder that `mrp_lens.load_edit` reads.
    The edit is on disk before anything is measured, and the fit is kept while it runs: run the same command again after
    Ctrl-C, a kill or a crash and it goes on where it stopped, and ends with the same bits.

    Each method has its own settings: `mrp-lens unlearn --method rmu --help` shows those of RMU.

    Examples:

        mrp-lens unlearn --model ./my-checkpoint --method mrp --forget forget.jsonl --retain retain.jsonl --out runs/mine

        mrp-lens unlearn --model ./my-checkpoint --method rmu --layer 7 --forget bio.jsonl --forget cyber.jsonl \\
            --retain wikitext.txt --questions quiz.jsonl --question-prompt "Question: {question}\\nAnswer:" --out runs/rmu

    The same again, in another folder, from what the first run wrote down:

        mrp-lens unlearn --config runs/rmu/summary.json --out runs/rmu-again

    WMDP on Zephyr-7B with the published settings of RMU. The forget corpus about biology is handed out on request only;
    put it into a file. `--released` stands for the values that follow it here, left padding and the
    corpora's own order:

        mrp-lens unlearn --model HuggingFaceH4/zephyr-7b-beta --dtype bfloat16 --method rmu \\
            --released --layer 7 --steering-coeff 6.5 --alpha 1200 --lr 5e-5 --batch-size 4 --steps 150 \\
            --forget bio-forget-corpus.jsonl --forget hub:cais/wmdp-corpora:cyber-forget-corpus --retain hub:wikitext \\
            --max-length 512 --questions hub:cais/wmdp:wmdp-bio --retain-questions hub:cais/mmlu --out runs/zephyr-rmu

    Adaptive RMU, in the paper with beta 5 and 500 steps:

        mrp-lens unlearn --model HuggingFaceH4/zephyr-7b-beta --dtype bfloat16 --method adaptive-rmu \\
            --released --beta 5 --steps 500 \\
            --forget bio-forget-corpus.jsonl --forget hub:cais/wmdp-corpora:cyber-forget-corpus --retain hub:wikitext \\
            --max-length 512 --questions hub:cais/wmdp:wmdp-bio --retain-questions hub:cais/mmlu --out runs/zephyr-adaptive

    A second request, on top of the first one's edit, which is then in the new edit, too:

        mrp-lens unlearn --model ./my-checkpoint --method mrp --after runs/mine/edit --request second \\
            --forget second.jsonl --retain retain.jsonl --out runs/both

    One fit on several GPUs, or processes of the CPU, each with its rows of every batch; the first one writes and measures:

        torchrun --nproc-per-node 2 -m mrp_lens unlearn --model ./my-checkpoint --method mrp --forget forget.jsonl \\
            --retain retain.jsonl --out runs/mine

    Known data sets (`hub:NAME` and the schemas): `cais/wmdp`, `cais/wmdp-corpora`, `cais/mmlu`, `locuslab/TOFU`,
    `derek-thomas/ScienceQA`, `wikitext`.

    Attributes:
        method: How to forget.
        released: The settings of the code that the paper of `--method` came with, where none is given; not every method has them.
        out: Folder for the edit, the log and the metrics.
        reference: A model that never saw the forget set: it is measured as well, and what it knows is the target of the fit.
        after: Folder of an earlier edit of the same model, such as the first of several requests: the fit trains with it on, and the new
            edit holds both.
        request: Name of what is forgotten here, by which `edit.without(NAME)` of a projection takes it back. Default: that of the forget set's file.
        seed: Of every random choice.
        logger: Send every update to this tracker, too; log.csv is always written. Each needs
            the extra of its name: `pip install 'mrp_lens[wandb]'`.
        overwrite: Replace the output folder if it holds a run.
    """

    word: ClassVar[str] = "unlearn"
    shared: ClassVar[bool] = True
    required: ClassVar[tuple[str, ...]] = ("model", "method", "forget", "retain")
    inside: ClassVar[tuple[str, ...]] = ("fitter",)

    loading: ModelOptions
    data: TaskConfig
    fitter: Method
    method: str
    released: bool = False
    out: Path
    reference: str | None = None
    after: Path | None = None
    request: str | None = None
    seed: int = 0
    logger: Literal["wandb", "trackio", "tensorboard"] | None = None
    overwrite: bool = False

    @classmethod
    @override
    def parts(cls, given: Mapping[str, Any]) -> dict[str, type]:
        chosen = {"fitter": METHODS[given["method"]]} if given.get("method") else {}
        return {"loading": ModelOptions, "data": TaskConfig, **chosen}

    @classmethod
    @override
    def titles(cls, given: Mapping[str, Any]) -> dict[str, str]:
        return {"loading": "model", "data": "data", "fitter": str(given.get("method"))}

    @classmethod
    @override
    def aliases(cls, given: Mapping[str, Any]) -> dict[str, str]:
        names = METHODS[given["method"]].__dataclass_fields__ if given.get("method") else {}
        return {"layers": "layer"} if "layer" in names and "layers" not in names else {}

    @classmethod
    @override
    def assembled(cls, kind: type, values: Mapping[str, Any], others: Mapping[str, Any]) -> Any:
        if not issubclass(kind, Method) or not others.get("released"):
            return super().assembled(kind, values, others)
        return replace(released(kind), **values)

    @classmethod
    @override
    def listed(cls, given: Mapping[str, Any]) -> str:
        method = METHODS[given["method"]] if given.get("method") else None
        if method is not None:
            return f"{method.name}: {method.summary}" + (f" {method.source}." if method.source else "")
        lines = [f"  {name:<22}{kind.summary} {kind.source}" for name, kind in METHODS.items()]
        return "\n".join(["methods:", *lines])

    @classmethod
    @override
    def earlier(cls, filed: dict[str, Any]) -> dict[str, Any]:
        """The summary of a run names every setting: one without a budget is of version 0.1, whose defaults were others."""
        method = str(filed.get("method"))
        if "released" not in filed or filed["released"] or "budget" in filed or method not in OF_0_1:
            return filed
        name, settings = OF_0_1[method]
        return {**settings, **filed, "method": name}

    @override
    def execute(self) -> Run | None:
        if self.reference is not None and not has_target(self.fitter):
            raise ValueError(
                f"--reference gives a fit its target, and {self.method} has none; leave it out, or give a method that has one its --budget"
            )
        earlier = None if self.after is None else load_edit(self.after)
        if not is_first():
            with silent():
                task = self.data.load()
                reference = self._load_reference()
                self._fit(self.loading.load(), task, reference, earlier)
            return None
        task, method, out = self.data.load(), self.method, self.out
        if isinstance(self.fitter, FitTemplate):
            self.fitter.request_label([corpus.name for corpus in task.forget], earlier, self.request)
        about = ", ".join("the forget set" if corpus.name == "forget" else corpus.name for corpus in task.forget)
        run = Run(
            "unlearn", self.arguments(), self.seed, title=f"{self.loading.name}: forgetting {about} with {method}"
        )
        settings = {
            "command": "unlearn",
            "method": method,
            "settings": asdict(self.fitter),
            "data": task.fingerprints(),
            "backend": self.loading.backend,
            "dtype": self.loading.precision,
            "seed": self.seed,
            **({} if self.reference is None else {"reference": self.reference}),
            **({} if earlier is None else {"after": fingerprint(earlier)}),
            **({} if self.request is None else {"request": self.request}),
        }
        loaded: tuple[LensModel, LensModel | None] | None = None
        if self.overwrite:  # what can be seen to fail must not cost the run that the folder holds
            check_out(out, overwrite=True)
            loaded = self._load_checked()
        else:
            take_over(out, settings)
        with begun(out, settings, overwrite=self.overwrite) as store:
            model, reference = self._load_checked() if loaded is None else loaded
            store.check_same("model", identity_of(model))
            before = store.once(UNEDITED, lambda: measured(model, task, None))
            fit = self._fit(model, task, reference, earlier)
            leave()  # what follows is for one process
            console.print(
                f"The edit is in {out / 'edit'}; load it with mrp_lens.load_edit({str(out / 'edit')!r}). Measuring it ..."
            )
            if fit.outcome is not None:
                run.notes.append(f"{method} {fit.outcome}.")
                console.print(run.notes[-1])
                if fit.outcome.remedy is not None:
                    console.print(f"To get further: {as_typed(fit.outcome.remedy)}.")
            after = store.once("edited", lambda: measured(model, task, fit.edit))
            never = None if reference is None else store.once(NEVER_TAUGHT, lambda: measured(reference, task, None))
            name = method if earlier is None else label_of(fit.edit)  # what was measured is all requests together
            fill(run, task, name, fit, before, after, never)
            run.write_into(out)
            run.frames["training"] = fit.log
            if set(LOGGED) <= set(fit.log):  # a fit without a budget has none of them
                run.frames["budget"] = fit.log[["step", *LOGGED]]
            run.frames["accuracies"] = pd.DataFrame([dict(row) for row in run.rows])
            edits, directions = {UNEDITED: None, name: fit.edit}, fit.directions.values()
            run.frames |= diagnostics(
                model, task, edits, dict(zip([name], directions, strict=False)), seed=self.seed, store=store
            )
            run.write_into(out)
            store.tidy()
            console.print(f"Written to {out}: edit/, log.csv, table.csv, summary.json. The page: {report(out)}")
        return run

    def _load_checked(self) -> tuple[LensModel, LensModel | None]:
        """The model and the reference; the method's settings are checked, before the folder holds what others cannot go on with."""
        model = self.loading.load()
        if isinstance(self.fitter, FitTemplate):
            self.fitter.check_for(model)
        return model, self._load_reference()

    def _load_reference(self) -> LensModel | None:
        return None if self.reference is None else self.loading.load(self.reference)

    def _fit(self, model: LensModel, task: UnlearningTask, reference: LensModel | None, earlier: Edit | None) -> Fit:
        """The fit that the folder holds, or a new one; of several processes each has to come here."""
        asked: dict[str, Any] = {"after": earlier, "request": self.request}
        if self.logger is not None and is_first():
            asked["callbacks"] = [LoggerCallback(logger_named(self.logger, self.out))]
        # Not every plugin's method knows them.
        asked = {name: value for name, value in asked.items() if value is not None}

        def fitted(kept: Path) -> Fit:
            fitter: Any = self.fitter
            if reference is not None and fitter.target is None:
                fitter = replace(fitter, target=control_accuracy(reference, task.forget, seed=self.seed))
            found: Fit = fitter.fit(model, task.forget, task.retain, seed=self.seed, checkpoint=kept, **asked)
            return found

        return Fit.once(self.out, fitted)


def take_over(out: Path, settings: Mapping[str, Any]) -> None:
    """Write other settings of the method into the folder of a run that has learned nothing yet; what the unedited model does stays.

    That a setting and the data do not go together, such as a rank above the directions of the forget states, is seen in the fit.

    Args:
        out: the folder; one that holds no run, more of one, or a run on other data is left as it is.
        settings: of the run as it is asked for now.

    Raises:
        BlockingIOError: another process is at work in the folder.
        ValueError: the file of its settings is damaged.
    """
    path, kept = out / f"{KIND}.json", out / CHECKPOINT
    if not path.is_file():
        return
    with sole_process(make_folder(out / POINTS)):
        known, wanted = read_json(path, REMEDY), as_json(settings)
        trained = any(file.name != IDENTITY_FILE for file in kept.rglob("*") if file.is_file())
        measured = {file.stem for file in (out / POINTS).glob("*.json")} - {"model", UNEDITED}
        same = all(known.get(name) == wanted[name] for name in UNEDITED_BY)
        if known != wanted and same and not (trained or measured or (out / FIT).exists()):
            shutil.rmtree(kept, ignore_errors=True)
            write_json(path, wanted)


def released(kind: type[Method]) -> Method:
    """The settings of the code that a paper came with.

    Raises:
        ValueError: there are none here.
    """
    if not hasattr(kind, "released"):
        known = [name for name, method in METHODS.items() if hasattr(method, "released")]
        raise ValueError(f"--released is for {', '.join(known)}; {kind.name} has no released recipe here")
    recipe: Method = kind.released()
    return recipe


def has_target(method: Method) -> bool:
    """Whether fits of it can be told how far to forget."""
    return (
        isinstance(method, FitTemplate) and "target" in type(method).__dataclass_fields__ and method.budget is not None
    )


def fill(
    run: Run,
    task: UnlearningTask,
    method: str,
    fit: Fit,
    before: Mapping[str, Any],
    after: Mapping[str, Any],
    never: Mapping[str, Any] | None = None,
) -> None:
    """Fill the record with what was measured, and print it."""
    base = before["figures"]["text_perplexity"]
    seconds = float(fit.log["seconds"].iloc[-1])
    run.rows = [
        {
            "method": name,
            **found["figures"],
            "text_perplexity_ratio": _ratio(found["figures"]["text_perplexity"], base),
            "outcome": ended,
            "seconds": spent,
        }
        for name, found, ended, spent in (
            (UNEDITED, before, None, 0.0),
            *(() if never is None else ((NEVER_TAUGHT, never, None, 0.0),)),
            (method, after, fit.ended, seconds),
        )
    ]
    run.examples = [
        dict(prompt=prompt, unedited=a, **{method: b})
        for prompt, a, b in zip(example_prompts(task), before["examples"], after["examples"], strict=True)
    ]
    about = ", ".join(corpus.name for corpus in task.forget)
    show_figures(f"Forgetting {about}", run.rows)
    show_examples(run.examples)


def _ratio(figure: float | None, base: float | None) -> float | None:
    return figure / base if is_number(figure) and is_number(base) else None


def measured(model: LensModel, task: UnlearningTask, edit: Edit | None) -> dict[str, Any]:
    """All figures of one row, None where one is not known, and what the model writes."""
    figures = finite(measure(model, task, edit))
    with edit_on(model, edit):
        return {"figures": figures, "examples": continuations(model, example_prompts(task))}


def measure(model: LensModel, task: UnlearningTask, edit: Edit | None) -> dict[str, float]:
    """All figures of one row."""
    return rows_for("unlearn", Measured(model=model, task=task, edit=edit))


def example_prompts(task: UnlearningTask) -> list[str]:
    """How the first documents of each side begin that are not empty."""
    sides = [*((corpus, 1) for corpus in task.forget[:EXAMPLES]), (task.retain, EXAMPLES)]
    written = [
        islice((document for document in corpus.documents if (document.prompt + document.completion).strip()), count)
        for corpus, count in sides
    ]
    return [beginning(document) for documents in written for document in documents]
