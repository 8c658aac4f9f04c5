"""`mrp-lens tune`: search a method's settings on anybody's model and data."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import yaml
from typing_extensions import override

from mrp_lens.cli.command import OnData
from mrp_lens.cli.console import Column, console, show_table
from mrp_lens.cli.run_folder import stoppable
from mrp_lens.cli.unlearn import Unlearn
from mrp_lens.data.tuning_split import tuning_split
from mrp_lens.methods import METHODS, Method
from mrp_lens.runs.record import Run
from mrp_lens.runs.report import report
from mrp_lens.runs.tune import BEST, KIND, Tuned, open_space, optuna_trials, tune
from mrp_lens.utils.frames import percent, rows_of
from mrp_lens.utils.io import make_folder, write_text
from mrp_lens.utils.result_store import check_holds

CAPTION = (
    "forget, retain: accuracy on the questions for tuning. damage: KL(unedited || edited), nats a token, on retain text that no fit saw. "
    "The star is the chosen one."
)
NOTHING = (
    "The chosen trial forgot nothing: its accuracy on the forget questions cannot be told from the unedited model's, or is above it (95%). "
    "Run more trials, allow for more damage (--budget), or try another method."
)


@dataclass(frozen=True, kw_only=True)
class Tune(OnData):
    """Search a method's settings: what forgets most for least damage.

    Every trial fits the method and is measured on one half of the questions and of the held-out text; the chosen one is saved, and
    measured on the other half, which nothing was chosen by. Without `--budget` a front is searched of what no trial beats in both.

    Run the same command again after Ctrl-C or a crash and it goes on where it stopped; with more `--trials` it adds to what is
    there, and with `--choose` it takes another trial. Start it several times at once, on several GPUs, and the processes share
    the trials. A setting of the method that is given, such as `--steps 50`, is kept and not searched.

    Needs Optuna: `pip install 'mrp_lens[tune]'`.

    Examples:

        mrp-lens tune --model demo --method rmu --trials 30 --out runs/tune

        mrp-lens tune --model ./my-checkpoint --method mrp --budget 0.05 --forget forget.jsonl --retain retain.jsonl \\
            --questions quiz.jsonl --retain-questions kept.jsonl --out runs/tuned

    The chosen edit again, in another folder, from what the search wrote down:

        mrp-lens unlearn --config runs/tuned/best.yaml

    Attributes:
        method: Whose settings to search.
        out: Folder of the search; one that holds part of it is gone on with.
        trials: How many in all, those that are there already included.
        seed: Of every random choice.
        budget: Nats of damage a token that are allowed: search the least accuracy on the forget questions within it.
        choose: Take this trial. Default: the table says which, and why.
        tuning_share: Share of the questions (of their entities, where all are known) and of the held-out text that trials are measured on.
        prune_above: Nats of damage a token above which a trial is given up before it is measured.
    """

    word: ClassVar[str] = "tune"
    inside: ClassVar[tuple[str, ...]] = ("fitter",)

    fitter: Method
    method: str = "rmu"
    out: Path
    trials: int = 30
    seed: int = 0
    budget: float | None = None
    choose: int | None = None
    tuning_share: float = 0.5
    prune_above: float = 1.0

    @classmethod
    @override
    def parts(cls, given: Mapping[str, Any]) -> dict[str, type]:
        return {**super().parts(given), "fitter": METHODS[given.get("method") or "rmu"]}

    @classmethod
    @override
    def titles(cls, given: Mapping[str, Any]) -> dict[str, str]:
        return {**super().titles(given), "fitter": f"{given.get('method') or 'rmu'}: kept as given"}

    @classmethod
    @override
    def listed(cls, given: Mapping[str, Any]) -> str:
        known = {name: kind.space for name, kind in METHODS.items() if kind.space is not None}
        return "\n".join(["searched:", *(f"  {name:<22}{', '.join(space)}" for name, space in known.items())])

    @override
    def execute(self) -> Run:
        optuna_trials()
        open_space(self.fitter)
        task = self.task()
        tuning_split(task, self.tuning_share, seed=self.seed)
        make_folder(self.out)
        check_holds(self.out, KIND)
        model = self.loading.load()
        title = f"{self.loading.name}: settings of {self.method} searched"
        run = Run("tune", self.arguments(), self.seed, title=title)
        with stoppable(self.out):
            tuned = tune(
                model,
                task,
                self.fitter,
                self.out,
                trials=self.trials,
                seed=self.seed,
                budget=self.budget,
                choose=self.choose,
                tuning_share=self.tuning_share,
                prune_above=self.prune_above,
            )
            again = self._write_best(tuned)
            reported = rows_of(tuned.reported.assign(split="reported"))
            run.rows = [*reported, *rows_of(tuned.trials.assign(method=self.method, split="tuning"))]
            run.notes.append(f"Trial {tuned.best['trial']} was chosen: {tuned.why}.")
            if tuned.forgot_nothing:
                run.notes.append(NOTHING)
            run.frames["pareto"] = tuned.picture.assign(method=self.method)
            run.write_into(self.out)
            report(self.out)
            self._show(tuned)
            console.print(
                f"Written to {self.out}: edit/, best.yaml, pareto.html, report.html, table.csv, summary.json."
            )
            if again:
                console.print(f"The same edit again: {again}", soft_wrap=True)  # to be copied
        return run

    def _write_best(self, tuned: Tuned) -> str:
        """The file for the command that fits the chosen edit again, and this command; "" where its data have no names."""
        if not self.data.names_data:
            return ""
        same = Unlearn(
            loading=self.loading,
            data=self.data,
            fitter=tuned.method,
            method=self.method,
            out=self.out.with_name(f"{self.out.name}-best"),
            seed=self.seed,
        )
        write_text(self.out / BEST, yaml.safe_dump(same.arguments(), sort_keys=False))
        return f"mrp-lens unlearn --config {self.out / BEST}"

    def _show(self, tuned: Tuned) -> None:
        settings = [name for name in tuned.trials if name in type(self.fitter).__dataclass_fields__]
        beaten = not tuned.best["on_front"]
        shown = [*rows_of(tuned.front), *([tuned.best] if beaten else [])]
        title = f"The front of {len(tuned.trials)} trials ({(tuned.trials['state'] == 'pruned').sum()} given up)"
        show_table(title, [*COLUMNS, *((name, _setting(name)) for name in settings)], shown, caption=CAPTION)
        show_table("On the other half, which nothing was chosen by", REPORTED, rows_of(tuned.reported))
        console.print(f"Trial {tuned.best['trial']} is chosen: {tuned.why}. Another one: --choose N")
        if tuned.forgot_nothing:
            console.print(NOTHING)


def _setting(name: str) -> Any:
    return lambda row: f"{row[name]:.4g}" if isinstance(row[name], float) else str(row[name])


FIGURES: list[Column] = [
    ("forget", lambda row: percent(row["forget_accuracy"])),
    ("retain", lambda row: percent(row["retain_accuracy"])),
    ("damage", lambda row: f"{row['damage']:.3g}"),
]
COLUMNS: list[Column] = [("trial", lambda row: f"{row['trial']}{' *' if row['chosen'] else ''}"), *FIGURES]
REPORTED: list[Column] = [("method", lambda row: str(row["method"])), *FIGURES]
