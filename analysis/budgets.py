"""What does a larger budget of damage buy? The same fit with budgets from a quarter to four times the method's own.

`python -m analysis.budgets --model demo --out runs/budgets` (a fit a budget and method; `--times 0.5,1,2` for fewer)

A fit ends at its target, and one that gets there first does not need what is left of its budget. So the target here is out of
reach: every fit goes on until its updates are done or it no longer moves, and only the budget holds it. Damage is measured on
held-out text, which no fit saw. Finished fits lie in the output folder; the same command goes on after an interruption.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pandas as pd

from analysis.common.arguments import Study, add_resumable_options, add_set_option, numbers, parser_for
from analysis.common.methods import OWN, names_in, settings_of, with_settings
from analysis.common.resumable import Job, ResumableStudy, result_name, shard_in
from analysis.common.tables import figure, markdown, mean_of
from mrp_lens.cli.app import as_program
from mrp_lens.methods import METHODS
from mrp_lens.models import identity_of
from mrp_lens.runs.front import figures_of, on_front
from mrp_lens.utils.result_store import ResultStore

TIMES = (0.25, 0.5, 1.0, 2.0, 4.0)
OUT_OF_REACH = 1e-6  # an accuracy that no model has
READING = """\
`times` is the budget over the method's own, `damage` what the fit did to held-out text (nats a token), `ended` what ended it, with
a target out of reach. More budget buys forgetting where `forget` (the quiz) or `probability` (of its right answers) falls down the
rows of a method; where neither does, something other than the budget holds the fit."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the study, print what it found and write it."""
    parser = parser_for(__doc__, "budgets")
    add_resumable_options(parser)
    add_set_option(parser)
    parser.add_argument(
        "--times", default=",".join(map(str, TIMES)), help="factors on the budgets (default %(default)s)"
    )
    options = parser.parse_args(arguments)
    shard = shard_in(options)
    study = Study.begin("analysis.budgets", "What a larger budget buys", options, in_place=True)
    budgets = Budgets(study, options)
    if budgets.run(shard):
        table = budgets.table()
        study.end(finding(table), {"pareto": pictured(table)}, table, in_place=True)


class Budgets(ResumableStudy):
    """A fit for every method, budget and seed."""

    def __init__(self, study: Study, options: Any) -> None:
        self.study, self.limit = study, options.limit
        self.seeds = numbers(options.seeds or str(options.seed), int, "--seeds") or ()
        self.times = numbers(options.times, float, "--times") or ()
        budgeted = {name: kind() for name, kind in METHODS.items() if hasattr(kind(), "budget")}
        names = names_in(options.methods, budgeted, default=list(OWN), noun="methods with a budget")
        self.methods = with_settings({name: budgeted[name] for name in names}, options.set)
        if without := [name for name, method in self.methods.items() if method.budget is None]:
            raise ValueError(
                f"{without[0]} has no budget of its own, of which this takes shares; give it one: --set {without[0]}.budget=0.1"
            )
        settings = {
            "model": identity_of(study.model),
            "data": study.task.fingerprints(),
            "limit": options.limit,
            "methods": {name: settings_of(method) for name, method in self.methods.items()},
        }
        self.store = ResultStore.claim(options.out, "budgets", settings, overwrite=options.overwrite)

    @property
    def jobs(self) -> list[Job]:
        """Every method with every seed."""
        return [(name, seed) for name in self.methods for seed in self.seeds]

    def parts(self) -> list[tuple[Job, str]]:
        """Each at every budget."""
        return [(job, f"times {times:g}") for job in self.jobs for times in self.times]

    def result(self, job: Job, part: str) -> dict[str, Any]:
        """The row of one fit."""
        return self.store.once(result_name(job, part), lambda: self._row(job, part))

    def _row(self, job: Job, part: str) -> dict[str, Any]:
        (name, seed), times = job, float(part.removeprefix("times "))
        method = self.methods[name]
        method = replace(method, budget=times * method.budget, target=OUT_OF_REACH)
        task, model = self.study.task, self.study.model
        fit = self.fitted(result_name(job, part), method, model, task, seed=seed)
        assert fit.outcome is not None
        row = {"method": name, "seed": seed, "times": times, "budget": method.budget}
        row |= figures_of(model, task, fit.edit, seed=seed, limit=self.limit)
        return row | {"steps": fit.outcome.steps, "ended": fit.outcome.ended}

    def table(self) -> pd.DataFrame:
        """A row a fit."""
        return pd.DataFrame([self.result(job, part) for job, part in self.parts()])


def pictured(table: pd.DataFrame) -> pd.DataFrame:
    """The rows with what the picture of forgetting against damage marks."""
    fronts = {
        place: there
        for _, part in table.groupby("method")
        for place, there in zip(part.index, on_front(part[["forget_accuracy", "damage"]].to_numpy(float)), strict=True)
    }
    return table.assign(on_front=pd.Series(fronts))


def finding(table: pd.DataFrame) -> str:
    """A row a method and budget, over the seeds, and how to read it."""
    rows = [
        {
            "method": name,
            "times": f"{times:g}",
            "budget": mean_of(part, "budget", "{:.4g}"),
            "damage": mean_of(part, "damage", "{:.4f}"),
            "forget": figure(part, "forget_accuracy", "forget"),
            "probability": mean_of(part, "forget_answer_probability", "{:.3f}"),
            "retain": figure(part, "retain_accuracy", "retain"),
            "steps": mean_of(part, "steps", "{:.0f}"),
            "ended": ", ".join(part["ended"].unique()),
        }
        for (name, times), part in table.groupby(["method", "times"], sort=False)
    ]
    return f"{markdown(pd.DataFrame(rows))}\n\n{READING}"


if __name__ == "__main__":
    as_program("analysis.budgets", main)
