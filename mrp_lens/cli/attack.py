"""`mrp-lens attack`: what survives an edit, on anybody's model, edit and data."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from mrp_lens.attacks.registry import ATTACKS
from mrp_lens.attacks.suite import SuiteConfig, run_suite
from mrp_lens.attacks.summary import notes_of, rows_of_attacks
from mrp_lens.cli.folder import stoppable
from mrp_lens.cli.parsing import dtype_named, numbers
from mrp_lens.cli.show import Column, console, show_table
from mrp_lens.data.task import TaskConfig, task_for
from mrp_lens.edits import load_edit
from mrp_lens.edits.provenance import label_of
from mrp_lens.metrics.recovery import CONTROL_METHODS
from mrp_lens.models import load_model
from mrp_lens.plots import FIGURES
from mrp_lens.runs.record import Run
from mrp_lens.runs.report import write_report
from mrp_lens.utils.io import make_folder
from mrp_lens.utils.store import check_holds

ALL = "all"
CAPTION = (
    "Accuracy on held-out questions about what was forgotten: before the edit, with it, and after the attack. floor: facts that were never "
    "taught (without such questions, guessing), after the same attack; ceiling: the unedited model. recovery: (after - floor) / "
    "(ceiling - floor), with its 95% interval."
)
PROBE_CAPTION = (
    "Best layer. Bits about the right answer, of those there are; never taught: what a probe of such facts reads there."
)


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What the command line says of the plan; lists are separated by commas."""

    attack: str = ALL
    forms: str | None = None
    parameters: str = "all"
    steps: int = 100
    lr: str | None = None
    samples: int | None = None
    probe_kind: str = "linear"
    search_steps: int = 50
    split: str | None = None
    questions: int | None = None

    def plan(self, seed: int) -> SuiteConfig:
        """The plan.

        Raises:
            ValueError: something unknown, or a budget that is not above 0.
        """
        return SuiteConfig.flat(
            attacks=tuple(ATTACKS) if self.attack == ALL else (self.attack,),
            forms=None if self.forms is None else tuple(self.forms.split(",")),
            parameters=tuple(self.parameters.split(",")),
            steps=self.steps,
            lr=numbers(self.lr, float, "--lr"),
            samples=self.samples,
            probe_kind=self.probe_kind,
            search_steps=self.search_steps,
            split=self.split,  # type: ignore[arg-type]
            questions=self.questions,
            seed=seed,
        )


def run_attack(
    *,
    options: Mapping[str, Any],
    budget: Budget,
    edit_folder: Path,
    reference_name: str | None,
    out: Path,
    backend: str,
    dtype: str,
    device: str | None,
    seed: int,
) -> Run:
    """Attack as far as that has not been done; print and write the table."""
    plan, precision = budget.plan(seed), dtype_named(dtype)
    check_holds(out, "campaign")
    edit = load_edit(edit_folder)
    model_name, name = str(options["model"]), label_of(edit)
    task = task_for(model_name, TaskConfig.from_options(options), topic=options["topic"])
    make_folder(out)
    run = Run("attack", options, seed, title=f"{model_name}: what survives {name} ({edit_folder})")

    def loaded(which: str) -> Any:
        console.print(f"Loading {which} ...")
        return load_model(which, backend=backend, device=device, dtype=precision)

    model = loaded(model_name)
    reference = loaded(reference_name) if reference_name is not None else None
    with stoppable(out):
        frames = run_suite(model, edit, task, plan, out, name=name, reference=reference)
        run.rows = rows_of_attacks(frames, name, plan)
        run.notes = notes_of(frames, name, plan)
        run.frames = {key: frame for key, frame in frames.items() if key in FIGURES}
        table = pd.DataFrame([dict(row) for row in run.rows])
        if "recovery" in table and table["recovery"].notna().any():
            run.frames["recoveries"] = table
        run.write_into(out)
        show(run, name)
        write_report(out)
        console.print(f"Written to {out}: points/, report.html, table.csv, summary.json.")
    return run


def show(run: Run, name: str) -> None:
    """Print the table, the probes as one of their own, and the notes."""
    attacks = [row for row in run.rows if row.get("bits") is None]
    probes = [row for row in run.rows if row.get("bits") is not None]
    if attacks:
        show_table(f"What survives {name}", COLUMNS, attacks, caption=CAPTION)
    if probes:
        show_table("What a probe reads off the states", PROBE_COLUMNS, probes, caption=PROBE_CAPTION)
    for note in run.notes:
        console.print(note)


def _attack(row: Mapping[str, Any]) -> str:
    control = row["method"] in CONTROL_METHODS
    return f"{row['method']}: {row['attack']}" if control else str(row["attack"])


def _share(key: str) -> Any:
    return lambda row: f"{row[key]:.0%}" if row.get(key) is not None else ""


def _with_interval(key: str) -> Any:
    def cell(row: Mapping[str, Any]) -> str:
        value, low, high = (row.get(name) for name in (key, f"{key}_low", f"{key}_high"))
        if value is None:
            return ""
        return f"{value:.2f}" if low is None or high is None else f"{value:.2f} [{low:.2f}, {high:.2f}]"

    return cell


COLUMNS: list[Column] = [
    ("attack", _attack),
    ("before", _share("accuracy_before")),
    ("edited", _share("accuracy_edited")),
    ("after", _share("accuracy_after")),
    ("floor", _share("floor")),
    ("ceiling", _share("ceiling")),
    ("recovery", _with_interval("recovery")),
]
PROBE_COLUMNS: list[Column] = [
    ("model", lambda row: str(row["method"])),
    ("probe", lambda row: str(row["attack"]).removeprefix("probe, ")),
    ("layer", lambda row: f"{row['layer']:.0f}"),
    ("bits", _with_interval("bits")),
    ("of", lambda row: f"{row['bits_in_all']:.2f}"),
    ("never taught", lambda row: "" if row["never_taught_bits"] is None else f"{row['never_taught_bits']:.2f}"),
]
