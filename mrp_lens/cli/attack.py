"""`mrp-lens attack`: what survives an edit, on anybody's model, edit and data."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import pandas as pd
from typing_extensions import override

from mrp_lens.attacks import ATTACKS, Attack, SuiteConfig, notes_of, rows_of_attacks, run_suite, worst_attack
from mrp_lens.attacks.base import HALVED_BY_QUESTION
from mrp_lens.cli.command import OnData
from mrp_lens.cli.console import Column, console, number, show_table, with_interval
from mrp_lens.cli.run_folder import stoppable
from mrp_lens.data.questions import Half
from mrp_lens.edits import load_edit
from mrp_lens.edits.provenance import label_of
from mrp_lens.metrics.controls import CONTROL_METHODS
from mrp_lens.plots import FIGURES
from mrp_lens.runs.record import Run
from mrp_lens.runs.report import report
from mrp_lens.utils.io import make_folder
from mrp_lens.utils.result_store import check_holds

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
class AttackEdit(OnData):
    """See what survives an edit: retrain, probe, bypass and jailbreak it, against what was never taught.

    Half of the quiz on the forget set is the attacker's; what counts is the other half. *Recovery* is 0 where
    the attacked model knows no more of this than of facts that it was never taught, and 1 where it knows as much as
    before the edit.

    - `relearn`: retraining on the attacker's half (arXiv 2410.08827), with the edit on, with its hooks stripped, and
      where possible written into the weights. So is the unedited model, and in the same way new facts are taught.
    - `probe`: what a probe, and the logit lens, read off each layer, before, with the edit, and after retraining.
    - `bypass`: hooks stripped, directions ablated, weights rounded, noise, other contexts: no training.
    - `jailbreak`: a trigger for all prompts, found by gradients; and how steep these are.

    Each result is kept, whole or not at all: run the same command again after Ctrl-C or a crash and it goes on where it
    stopped. All attacks on an edit of the demo take about half an hour on two cores; `--questions-limit 120 --lr 1e-3
    --search-steps 10` a few minutes. On a larger model most of it are the updates of retraining: `--steps 20` is a fifth of them.

    Examples:

        mrp-lens attack --edit runs/demo/mrp/edit --attack relearn --out runs/attack

        mrp-lens attack --model ./my-checkpoint --edit runs/mine/edit --forget forget.jsonl --retain retain.jsonl \\
            --questions quiz.jsonl --untaught-questions never.jsonl --entity person --out runs/mine-attacked

    Attributes:
        edit: Folder of the edit, such as `runs/demo/mrp/edit`.
        out: Folder of the attacks; one that holds part of them is gone on with.
        attack: Which: names separated by commas, or `all`.
        split: How questions are halved: no `entity` in both halves, or no `question`. Default: `entity` where all are known.
        reference: A model that never saw the forget set. Retrained like the edited one, it is the floor of `relearn`.
        questions_limit: Questions of the quiz on the forget set, both halves together. Default: all.
        seed: Of every random choice.
    """

    word: ClassVar[str] = "attack"
    inside: ClassVar[tuple[str, ...]] = ("budgets",)

    budgets: tuple[Attack, ...]
    edit: Path
    out: Path
    attack: tuple[str, ...] = field(default=(ALL,), metadata={"separator": ","})
    split: Half | None = None
    reference: str | None = None
    questions_limit: int | None = None
    seed: int = 0

    @classmethod
    @override
    def parts(cls, given: Mapping[str, Any]) -> dict[str, type]:
        return {**super().parts(given), **ATTACKS}

    @classmethod
    @override
    def gathered(cls, settings: Mapping[str, Any]) -> dict[str, Any]:
        rest = {name: value for name, value in settings.items() if name not in ATTACKS}
        return {**rest, "budgets": tuple(settings[name] for name in ATTACKS)}

    @override
    def scattered(self) -> dict[str, Any]:
        return {"loading": self.loading, "data": self.data, **{budget.name: budget for budget in self.budgets}}

    @classmethod
    @override
    def listed(cls, given: Mapping[str, Any]) -> str:
        return "\n".join(["attacks:", *(f"  {name:<12}{kind.summary} {kind.source}" for name, kind in ATTACKS.items())])

    @property
    def config(self) -> SuiteConfig:
        """What the suite covers."""
        attacks = None if ALL in self.attack else self.attack
        return SuiteConfig(
            attacks=attacks, budgets=self.budgets, split=self.split, questions=self.questions_limit, seed=self.seed
        )

    @override
    def execute(self) -> Run:
        config, out = self.config, self.out
        check_holds(out, "campaign")
        edit = load_edit(self.edit)
        name = label_of(edit)
        known = self.of_edit(self.edit)
        loading, task = known.loading, known.task()
        if task.questions is None:
            raise ValueError("an attack is scored on a quiz on the forget set; give --questions, too")
        make_folder(out)
        run = Run("attack", known.arguments(), self.seed, title=f"{loading.name}: what survives {name} ({self.edit})")
        model = loading.load()
        reference = None if self.reference is None else loading.load(self.reference)
        with stoppable(out):
            frames = run_suite(model, edit, task, config, out, name=name, reference=reference)
            run.rows = rows_of_attacks(frames, name, config)
            run.notes = [*worst_attack(run.rows, name), *notes_of(frames, name, config)]
            if (self.split or task.halved_by) == "question":
                run.notes.append(HALVED_BY_QUESTION)
            run.frames = {key: frame for key, frame in frames.items() if key in FIGURES}
            table = pd.DataFrame([dict(row) for row in run.rows])
            if "recovery" in table and (table["recovery"].notna() & ~table["method"].isin(CONTROL_METHODS)).any():
                unknown = {end: float("nan") for end in ("recovery_low", "recovery_high") if end not in table}
                run.frames["recoveries"] = table.assign(**unknown)
            run.write_into(out)
            show(run, name)
            report(out)
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
    return lambda row: number(row.get(key), "{:.0%}".format)


def _two_digits(key: str) -> Any:
    return lambda row: number(row.get(key), "{:.2f}".format)


def _with_interval(key: str) -> Any:
    return lambda row: with_interval(row.get(key), row.get(f"{key}_low"), row.get(f"{key}_high"), "{:.2f}".format)


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
    ("of", _two_digits("bits_in_all")),
    ("never taught", _two_digits("never_taught_bits")),
]
