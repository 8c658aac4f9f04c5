"""What comes back when an edited model is retrained on half of what it lost, and where MRP's resistance comes from.

`python -m analysis.relearning --model demo --out runs/relearning` (quick: three edits), `--full` (every edit, three seeds),
`--others` (other attackers too, on saved edits or those of the quick run, with the first seed: facts split by question,
few facts, near facts, unrelated text, low-rank updates, weights before, at and after the edit)

Each edit is retrained on the questions about half of the entities (T) and asked about the others (V): RTT, arXiv
2410.08827. Floor: never-taught facts after the same attack, or, with `--reference`, a model that never saw what was
forgotten, after the same attack; not of weights before, at and after the edit, which that model has none of, nor where its
loss becomes infinite at every rate (at some: these are left out). Each edited model is also taught new facts with the
same budget. `--edits NAME=DIR` attacks saved edits instead of fitting. Curves lie in the output folder and are gone on
with after an interruption; `--shard 1/2` and `--shard 2/2` divide them between two processes.
"""

import argparse
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import pandas as pd

from analysis.common.arguments import (
    Study,
    add_attacker_options,
    add_resumable_options,
    named_paths,
    numbers,
    parser_for,
)
from analysis.common.methods import names_in
from analysis.common.resumable import Job, ResumableStudy, result_name, shard_in
from analysis.common.tables import DOES_NOT_COUNT, figure, markdown
from mrp_lens import Subspace, attacks, metrics
from mrp_lens.attacks.finetuning import Form, Parameters
from mrp_lens.cli.app import as_program
from mrp_lens.data import Corpus, Questions, TaskConfig
from mrp_lens.data.questions import Half
from mrp_lens.edits import Edit, ProjectionEdit, edit_on, has_hooks, load_edit, projection_in, without_hooks
from mrp_lens.edits.provenance import fingerprint
from mrp_lens.methods import MRP, RMU, AdaptiveRMU, UnconditionalMRP
from mrp_lens.methods.mrp.method import default_rank
from mrp_lens.metrics.controls import NEVER_TAUGHT, RANDOM_PROJECTION, UNEDITED
from mrp_lens.models import LensModel, identity_of, is_bridge
from mrp_lens.models.hooks import hook_name
from mrp_lens.utils.result_store import ResultStore

QUICK_METHODS, FULL_SEEDS, QUICK_QUESTIONS = "mrp,mrp-all-wide,rmu", "0,1,2", 200
BUDGETS = (5, 20, 100)  # updates of an attack after which it is scored, up to its last
FEW, MANY = BUDGETS[1], BUDGETS[-1]
INTERVAL = ("recovery", "recovery_low", "recovery_high")
REFERENCE = "reference"
WIDEST = "mrp-all-wide"  # whose ranks and layers the random projection has
FEW_FACTS = 25
READING = f"""\
Accuracy on forget and retain questions before the attack; then the share of V that is back after so many updates on T at
the attacker's best rate, chosen on V (hence an upper bound), with the edit kept: 0 is as if never taught, 1 as before the edit,
below 0 is suppressed. After the last also with the hooks stripped (which leaves the unedited model) and in the weights. Behind a
figure: lowest to highest of the seeds, or the 95% interval. `{NEVER_TAUGHT}` is the control, one half of the never-taught facts
against the other, at the rate that is best for these; it should be near 0. {DOES_NOT_COUNT}: T was not learned to 95%, so that this
attack does not count. `new facts` is accuracy on facts that no model here knew, after as many updates on them: an edited model that
learns them as the unedited one does can be trained, so that what does not come back is hidden better and not merely slow. MRP's rows
tell layers from rank: {WIDEST} differs from mrp-all by rank alone, mrp-all from mrp by layers alone, and {RANDOM_PROJECTION} has the ranks and
layers of {WIDEST}. Other attackers stand below the usual one."""


def variants(model: LensModel) -> dict[str, Any]:
    """The methods that are compared: MRP at several sets of layers and ranks, RMU, Adaptive RMU."""
    depth, rank = int(model.cfg.n_layers), default_rank(model)
    every, first_half = range(depth), range(depth // 2)
    return {
        "mrp": MRP(),
        "mrp-wide": MRP(rank=2 * rank),
        "mrp-early": MRP(layers=first_half),
        "mrp-all": MRP(layers=every),
        WIDEST: MRP(layers=every, rank=2 * rank),
        "mrp-mlp": UnconditionalMRP(layers=every, site="mlp_out"),
        "rmu": RMU(),
        "adaptive-rmu": AdaptiveRMU(),
    }


@dataclass(frozen=True)
class Retraining:
    """One way to retrain.

    Attributes:
        data: what on: "half" of the forgotten facts, "near" facts that the edit was to keep, or "unrelated" text.
        split: how that half is drawn.
        samples: at most so many documents of it.
        form, parameters: as in `attacks.relearn`.
    """

    data: Literal["half", "near", "unrelated"] = "half"
    split: Half = "entity"
    samples: int | None = None
    form: Form = "kept"
    parameters: Parameters = "all"

    @property
    def name(self) -> str:
        """In words, as far as it differs from the usual way."""
        words = {
            "data": self.data,
            "split": f"by {self.split}",
            "samples": f"{self.samples} facts",
            "form": self.form,
            "parameters": self.parameters,
        }
        usual = Retraining()
        return "-".join(word for key, word in words.items() if getattr(self, key) != getattr(usual, key)) or "usual"


USUAL, WEIGHTS = Retraining(), Retraining(form="weights")
OTHERS = (
    Retraining(split="question"),
    Retraining(samples=FEW_FACTS),
    Retraining(data="near"),
    Retraining(data="unrelated"),
    Retraining(parameters="lora"),
    Retraining(parameters="before"),
    Retraining(parameters="at"),
    Retraining(parameters="after"),
)


def budgets_of(steps: int) -> tuple[int, ...]:
    """Numbers of updates, up to the last, after which an attack is scored."""
    return (*(budget for budget in BUDGETS if budget < steps), steps)


def possible(how: Retraining, model: LensModel, edit: Edit | None) -> bool:
    """Whether there is something to retrain in this way."""
    if how.parameters == "lora":
        return is_bridge(model)
    if how.parameters in ("before", "at", "after"):
        return edit is not None  # the final norm and the unembedding are behind every edit
    return True


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the study, print what it found and write it."""
    parser = parser_for(__doc__, "relearning")
    add_resumable_options(parser, seeds="--seed, with --full three")
    add_attacker_options(parser)
    parser.set_defaults(methods=None)
    parser.add_argument("--full", action="store_true", help="every edit, seeds 0, 1 and 2, all questions")
    parser.add_argument("--others", action="store_true", help="other attackers as well, with the first seed")
    parser.add_argument("--reference", help="a model that never saw what was forgotten: the floor")
    parser.add_argument("--new", help="questions on facts that no model here knows, with the columns of --questions")
    parser.add_argument("--steps", type=int, default=MANY, help=f"updates of an attack (default {MANY})")
    options = parser.parse_args(arguments)
    shard = shard_in(options)
    study = Study.begin("analysis.relearning", "What retraining brings back", options, in_place=True)
    relearning = Relearning(study, options)
    if not relearning.run(shard):
        return
    curves = relearning.curves()
    table = rows_of_curves(curves, relearning.quizzes())
    frames = {"relearning_curves": curves[curves["attacker"] == USUAL.name]}
    study.end(f"{markdown(compact(table))}\n\n{READING}", frames, table, in_place=True)


class Relearning(ResumableStudy):
    """Every curve of the study, each in a file of its own.

    Attributes:
        reference: the model that never saw what was forgotten, where one was given.
    """

    def __init__(self, study: Study, options: argparse.Namespace) -> None:
        self.study, self.options = study, options
        self.saved = named_paths(options.edits, "--edits")
        self.seeds = numbers(options.seeds or (FULL_SEEDS if options.full else str(options.seed)), int, "--seeds") or ()
        self.lr = numbers(options.lr, float, "--lr")
        self.limit = options.limit or (None if options.full else QUICK_QUESTIONS)
        self.new = TaskConfig.from_options(vars(options)).quiz(options.new)
        self.names = self._names()
        new = {"new": self.new.fingerprint} if self.new else {}
        self.reference = study.another(options.reference)
        settings = {
            "model": identity_of(study.model),
            "data": study.task.fingerprints() | new,
            "steps": options.steps,
            "lr": self.lr,
            "limit": self.limit,
            "edits": {name: fingerprint(load_edit(path)) for name, path in self.saved.items()},
            "reference": None if self.reference is None else identity_of(self.reference),
        }
        self.store = ResultStore.claim(
            options.out,
            "relearning",
            settings,
            earlier={"data": study.task.legacy_fingerprints() | new},
            overwrite=options.overwrite,
        )
        for name, method in variants(study.model).items():
            if name in self.names and name not in self.saved:
                self.check_settings(name, method)

    def _names(self) -> list[str]:
        """The reference and the controls first, then the edits."""
        known = variants(self.study.model)
        asked = self.options.methods or (",".join(known) if self.options.full else QUICK_METHODS)
        chosen = list(self.saved) or names_in(asked, known, default=[])
        reference = [REFERENCE] if self.options.reference else []
        return [*reference, UNEDITED, *([RANDOM_PROJECTION] if WIDEST in chosen and not self.saved else []), *chosen]

    @property
    def jobs(self) -> list[Job]:
        """All that is retrained."""
        return [(name, seed) for seed in self.seeds for name in self.names]

    def retrainings(self, job: Job) -> list[Retraining]:
        """What is done to it."""
        name, seed = job
        chosen = name in QUICK_METHODS.split(",") or name in self.saved or name == REFERENCE  # the floor of each
        others = OTHERS if self.options.others and seed == self.seeds[0] and chosen else ()
        return [USUAL, *([WEIGHTS] if name == "mrp-mlp" else []), *others]

    def parts(self) -> list[tuple[Job, str]]:
        """Of each job the quiz and its curves, the headline's first."""
        curves = [(job, how) for job in self.jobs for how in self.retrainings(job)]
        curves.sort(key=lambda curve: curve[1] in OTHERS)
        every = [(job, part) for job, how in curves for part in ("quiz", how.name)]
        return list(dict.fromkeys(every))

    def result(self, job: Job, part: str) -> Any:
        """The quiz of a job, or one of its curves."""
        if part == "quiz":
            return self.store.once(result_name(job, part), lambda: self.quiz(job))
        how = next(how for how in self.retrainings(job) if how.name == part)
        return self.store.frame(result_name(job, part), lambda: self.curve(job, how))

    def curves(self) -> pd.DataFrame:
        """All curves, once every one is there."""
        frames = []
        for job in self.jobs:
            for how in self.retrainings(job) if job[0] != REFERENCE else ():  # it is the floor of the others
                frame = self.result(job, how.name)
                if self.options.reference and len(frame):
                    unedited = replace(how, form=USUAL.form)  # a model without an edit has nothing to fold
                    floor = self.result((REFERENCE, job[1]), unedited.name)
                    if len(floor):  # none where what is retrained is told apart by the edited layers
                        frame = attacks.with_floor(frame, floor, steps=self.options.steps, seed=job[1])
                frames.append(frame.assign(method=job[0], seed=job[1]))
        return pd.concat([frame for frame in frames if len(frame)], ignore_index=True)

    def curve(self, job: Job, how: Retraining) -> pd.DataFrame:
        """One edit retrained in one way, at every rate; no rows where there is nothing to retrain so. Ctrl-C ends the study.

        Raises:
            ValueError: the data lack the questions that this needs, or these do not say whom they are about.
        """
        name, seed = job
        model, edit, task = self.model_of(name), self.edit(job), self.study.task
        if not possible(how, model, edit):
            return pd.DataFrame()
        split = how.split if how.split != USUAL.split else None  # by entity where the questions know it
        facts = attacks.FactSplit.of(task, by=split, limit=self.limit, seed=seed)
        new = facts.new if self.new is None else self.new
        sources = {"half": facts.train, "near": task.retain_questions, "unrelated": task.held_out}
        train: Questions | Corpus | None = sources[how.data]
        if train is None:
            raise ValueError("near data are the retain quiz; give --retain-questions")
        frame = attacks.relearn(
            model,
            edit,
            train=train,
            held_out=facts.held_out,
            untaught=facts.untaught,
            new=new if how in (USUAL, WEIGHTS) else None,
            steps=self.options.steps,
            lr=self.lr,
            samples=how.samples,
            form=how.form,
            parameters=how.parameters,
            marks=(0, *budgets_of(self.options.steps)),
            seed=seed,
        )
        if frame.attrs["interrupted"]:
            raise KeyboardInterrupt
        return frame.assign(attacker=how.name)

    def quiz(self, job: Job) -> dict[str, Any]:
        """Accuracy on the forget quiz and on the retain quiz, before any attack."""
        model, edit = self.model_of(job[0]), self.edit(job)
        row: dict[str, Any] = {"method": job[0], "seed": job[1]}
        row |= {"layers": ",".join(map(str, edit.layers)) if edit else "", "rank": rank_of(edit)}
        for side, questions in self.study.task.quiz(limit=self.limit).items():
            with edit_on(model, edit):
                row[f"{side}_accuracy"] = float(metrics.accuracy(model, questions)["accuracy"].iloc[0])
        return row

    def quizzes(self) -> pd.DataFrame:
        """The quizzes of all jobs, and of what each edit consists."""
        return pd.DataFrame(
            [
                {**self.result(job, "quiz"), "hooks": has_hooks(edit), "weights": without_hooks(edit) is not None}
                for job in self.jobs
                for edit in [self.edit(job)]
            ]
        )

    def model_of(self, name: str) -> LensModel:
        """The model that is attacked under this name."""
        return self.reference if name == REFERENCE and self.reference is not None else self.study.model

    def edit(self, job: Job) -> Edit | None:
        """The edit of a job: saved before, or fitted now and saved."""
        name, seed = job
        if name in (UNEDITED, REFERENCE):
            return None
        if name in self.saved:
            return load_edit(self.saved[name])
        if name == RANDOM_PROJECTION:
            return random_projection(self.study.model, rank=variants(self.study.model)[WIDEST].rank, seed=seed)
        fit = f"{name}-seed{seed}"
        if not self.edit_folder(fit).is_dir():
            self.fitted(fit, variants(self.study.model)[name], self.study.model, self.study.task, seed=seed)
        return load_edit(self.edit_folder(fit))


def random_projection(model: LensModel, *, rank: int, seed: int) -> ProjectionEdit:
    """The control: as many directions as the widest edit removes, at all layers, drawn at random."""
    width, depth = int(model.cfg.d_model), int(model.cfg.n_layers)
    return ProjectionEdit(
        {hook_name(layer): Subspace.random(rank, width, seed=seed * depth + layer) for layer in range(depth)},
        request="random",
    )


def rank_of(edit: Edit | None) -> int | None:
    """The largest rank that a projection removes at a hook; None for an edit without one."""
    projection = projection_in(edit)
    return max(subspace.rank for subspace in projection.subspaces().values()) if projection is not None else None


def rows_of_curves(curves: pd.DataFrame, quizzes: pd.DataFrame) -> pd.DataFrame:
    """One row an edit, seed and attacker: recovery after a few updates and after all at the attacker's best rate, with what the
    edit had done before. The control "never-taught" is the other half of the never-taught facts, at the best rate for these."""
    rows: list[dict[str, Any]] = []
    budgets = budgets_of(int(curves["step"].max()))
    known: dict[Any, dict[str, Any]] = {
        (row["method"], row["seed"]): {str(key): value for key, value in row.items()}
        for row in quizzes.to_dict("records")
    }
    for (method, seed, attacker), part in curves.groupby(["method", "seed", "attacker"], sort=False):
        at_best = attacks.best(part).sort_values("step").set_index("step")
        row: dict[str, Any] = {**known[method, seed], "attacker": attacker}
        last = at_best.iloc[-1]
        row |= {name: last[name] for name in ("floor", "ceiling", "train_accuracy", "counts", "n")}
        learned = part.groupby("step")[["new_accuracy"]].max()  # at the best rate for these
        row |= _by_budget(at_best, INTERVAL, budgets) | _by_budget(learned, ["new_accuracy"], budgets)
        rows.append(row)
        if method == UNEDITED and attacker == USUAL.name and part["control_recovery"].notna().any():
            at_best = attacks.best(part, by="control_recovery").sort_values("step").set_index("step")
            control = at_best.drop(columns=list(INTERVAL)).rename(columns=lambda name: name.removeprefix("control_"))
            rows.append(
                {"method": NEVER_TAUGHT, "seed": seed, "attacker": attacker, **_by_budget(control, INTERVAL, budgets)}
            )
    return _with_forms(pd.DataFrame(rows), budgets[-1])


def _by_budget(at_best: pd.DataFrame, columns: Sequence[str], budgets: Sequence[int]) -> dict[str, Any]:
    """`recovery_low` after 5 updates as `recovery_5_low`."""
    named = {}
    for budget in (budget for budget in budgets if budget in at_best.index):
        for column in columns:
            stem, _, end = column.partition("_") if column.startswith("recovery") else (column, "", "")
            named[f"{stem}_{budget}{'_' + end if end else ''}"] = at_best.loc[budget, column]
    return named


def _with_forms(table: pd.DataFrame, last: int) -> pd.DataFrame:
    """Beside the recovery with the edit kept, that without its hooks (the unedited model) and in the weights."""
    usual = table[table["attacker"] == USUAL.name].set_index(["method", "seed"])
    headline = f"recovery_{last}"
    if headline not in table:
        return table
    for place, row in table[table["attacker"] == USUAL.name].iterrows():
        weights = table[
            (table["attacker"] == WEIGHTS.name) & (table["method"] == row["method"]) & (table["seed"] == row["seed"])
        ]
        if row["hooks"] and not row["weights"]:
            table.loc[place, f"{headline}_stripped"] = usual.loc[(UNEDITED, row["seed"]), headline]
        if row["weights"] and not row["hooks"]:
            table.loc[place, f"{headline}_weights"] = row[headline]
        if len(weights):
            table.loc[place, f"{headline}_weights"] = weights[headline].iloc[0]
    return table


def compact(table: pd.DataFrame) -> pd.DataFrame:
    """As text, one row an edit and attacker, the usual attacker's first: means over the seeds."""
    budgets = sorted(int(found[1]) for name in table if (found := re.fullmatch(r"recovery_(\d+)", str(name))))
    few = min(budgets, key=lambda budget: abs(budget - FEW))
    ordered = table.sort_values("attacker", key=lambda names: names != USUAL.name, kind="stable")
    rows = []
    for (attacker, method), part in ordered.groupby(["attacker", "method"], sort=False):
        row = {"attacker": str(attacker), "edit": str(method)}
        row |= {title: figure(part, f"{title}_accuracy") for title in ("forget", "retain")}
        row |= {f"recovery, {budget}": figure(part, f"recovery_{budget}", f"recovery_{budget}") for budget in budgets}
        row |= {form: figure(part, f"recovery_{budgets[-1]}_{form}") for form in ("stripped", "weights")}
        row[f"new facts, {few}"] = figure(part, f"new_accuracy_{few}")
        if part["counts"].isin([False]).any():
            row[f"recovery, {budgets[-1]}"] += f" {DOES_NOT_COUNT}"
        rows.append(row)
    return pd.DataFrame(rows)


if __name__ == "__main__":
    as_program("analysis.relearning", main)
