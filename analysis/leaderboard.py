"""One table of every method: what it forgets, what that costs, and what comes back when the edited model is retrained.

`python -m analysis.leaderboard --out runs/leaderboard` (`--methods mrp,npo`, `--edits NAME=DIR` for saved edits)

An attacker retrains all weights on the questions about half of the entities (T) and is scored on the others (V), at the
best of three learning rates: with the edit kept, with its hooks stripped, and with its projections written into the
weights, as far as an edit has these forms. Methods, attacks and metrics that a package of yours registers have their rows and
columns too. `--set budget=0.05` fits all methods at the same allowed damage. `--benchmark N` takes the field's measures as well, on N
documents and questions a side (exact memorisation, extraction strength, truth ratio, answers in the model's own words, fluency,
utility); with `--reference`, a model that never saw the forget set, also forget quality and depth; its row is the best possible, and what
it answers after the same retraining is the floor of every recovery. Every cell of the table has a file in the output folder and is gone on
with after an interruption, fits at their last checkpoint; more methods may be added later; `--shard 1/2` and `--shard 2/2` divide the
methods between two processes.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import pandas as pd

from analysis.common.arguments import (
    Study,
    add_attacker_options,
    add_resumable_options,
    add_set_option,
    named_paths,
    numbers,
    parser_for,
)
from analysis.common.board import (
    ATTACK,
    BENCHMARK,
    KEPT,
    METRICS,
    RELEARN_STAGE,
    Cells,
    brought_back,
    few,
    finding,
    further_columns,
    pictures,
    rows_of_cells,
    with_reference_floor,
)
from analysis.common.methods import changed, compared_methods, names_in, settings_of, with_settings
from analysis.common.resumable import Job, ResumableStudy, result_name, shard_in
from mrp_lens import attacks, metrics
from mrp_lens.attacks import ATTACKS, FactSplit, SuiteConfig
from mrp_lens.attacks.base import HALVED_BY_QUESTION
from mrp_lens.attacks.finetuning import Attacker, Form, possible_forms
from mrp_lens.cli.app import as_program
from mrp_lens.edits import Edit, edit_on, has_hooks, load_edit, without_hooks
from mrp_lens.edits.provenance import fingerprint
from mrp_lens.edits.serialization import stored_bytes
from mrp_lens.metrics.controls import NEVER_TAUGHT, UNEDITED
from mrp_lens.models import LensModel, identity_of
from mrp_lens.utils.frames import rows_of
from mrp_lens.utils.result_store import ResultStore

UPDATES = "5,20,100"
RELEARN: dict[str, Form] = {f"{RELEARN_STAGE}{form}": form for form in get_args(Form)}
Cell = dict[str, Any]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the study, print its table and write it."""
    parser = parser_for(__doc__, "leaderboard")
    add_resumable_options(parser)
    add_attacker_options(parser)
    add_set_option(parser)
    parser.add_argument("--benchmark", type=int, metavar="N", help="the field's measures, on N documents a side")
    parser.add_argument("--reference", help="a model that never saw the forget set, for these measures")
    parser.add_argument("--attacks", help="further ones, by name (default: those that other packages register)")
    parser.add_argument("--updates", default=UPDATES, help=f"of an attack, after which to score (default {UPDATES})")
    options = parser.parse_args(arguments)
    shard = shard_in(options)
    study = Study.begin("analysis.leaderboard", "Leaderboard of unlearning methods", options, in_place=True)
    board = Leaderboard(study, options)
    if not board.run(shard):
        return
    cells = board.cells()
    table = rows_of_cells(cells, board.updates)
    text = finding(table, board.updates, further_columns(cells))
    if study.task.halved_by == "question":
        text = f"{text}\n\n{HALVED_BY_QUESTION}"
    study.end(text, pictures(cells, table, board.updates), table, in_place=True)


class Leaderboard(ResumableStudy):
    """Every cell of the table, each in a file of its own.

    Attributes:
        updates: of an attack, after which it is scored.
    """

    def __init__(self, study: Study, options: argparse.Namespace) -> None:
        self.study, self.options = study, options
        self.saved = named_paths(options.edits, "--edits")
        self.reference = study.another(options.reference)
        self.seeds = numbers(options.seeds or str(options.seed), int, "--seeds") or ()
        self.updates = tuple(sorted(set(numbers(options.updates, int, "--updates") or ())))
        self.lr = numbers(options.lr, float, "--lr")
        self.methods = self._methods()
        others = [name for name, kind in ATTACKS.items() if not kind.__module__.startswith("mrp_lens.")]
        self.stages = ["fit", "quiz", *RELEARN, "probe"]
        self.stages += [
            f"{ATTACK}{name}" for name in names_in(options.attacks, ATTACKS, default=others, noun="attacks")
        ]
        known = [name for name, metric in metrics.METRICS.items() if metric.row and "leaderboard" in metric.tables]
        self.stages += [METRICS + "-".join(known)] if known else []
        self.stages += [f"{BENCHMARK}-{options.benchmark}"] if options.benchmark else []
        Attacker(steps=self.updates[-1])  # refuses a budget of nothing before any work
        self.facts = {seed: FactSplit.of(study.task, limit=options.limit, seed=seed) for seed in self.seeds}
        for facts in self.facts.values():
            ATTACKS["probe"]().check_facts(facts)  # likewise too few facts; warns where there will be no control
        settings = {
            "model": identity_of(study.model),
            "data": study.task.fingerprints(),
            "updates": self.updates,
            "lr": self.lr,
            "limit": options.limit,
            **({} if self.reference is None else {"reference": identity_of(self.reference)}),
        }
        earlier = {"data": study.task.legacy_fingerprints()}
        self.store = ResultStore.claim(
            options.out, "leaderboard", settings, earlier=earlier, overwrite=options.overwrite
        )

    def _methods(self) -> dict[str, Any]:
        """Name -> what is fitted under it; None for saved edits and for the models without one, which come first."""
        known = compared_methods(self.study.model)
        chosen = names_in(self.options.methods, known, default=[] if self.saved else list(known))
        known = with_settings({name: known[name] for name in chosen}, self.options.set)
        taken = sorted({*chosen, UNEDITED, NEVER_TAUGHT} & set(self.saved))
        if taken:
            raise ValueError(f"--edits {', '.join(taken)}: another row of the table has that name; choose another one")
        models = [UNEDITED] if self.reference is None else [UNEDITED, NEVER_TAUGHT]
        return {**dict.fromkeys(models), **known, **dict.fromkeys(self.saved)}

    @property
    def jobs(self) -> list[Job]:
        """The rows of the table."""
        return [(name, seed) for seed in self.seeds for name in self.methods]

    def parts(self) -> list[tuple[Job, str]]:
        """The cells of the table, column by column."""
        return [(job, stage) for stage in self.stages for job in self.jobs if stage in self.stages_of(job)]

    def stages_of(self, job: Job) -> list[str]:
        """Those of a row; the model that never saw the forget set is measured, and retrained as the floor of the others."""
        own = ("quiz", KEPT, METRICS, BENCHMARK)
        return [stage for stage in self.stages if job[0] != NEVER_TAUGHT or stage.startswith(own)]

    def run(self, shard: tuple[int, int]) -> bool:
        """Compute this shard's cells that have no file yet.

        Raises:
            ValueError: the folder holds a method with other settings.
        """
        for job in self.jobs:
            self.check_same(job)
        return super().run(shard)

    def cells(self) -> Cells:
        """All of them, once every one is there."""
        found = {job: {stage: self.result(job, stage) for stage in self.stages_of(job)} for job in self.jobs}
        return with_reference_floor(found, self.updates[-1])

    def check_same(self, job: Job) -> None:
        """Refuse cells of a method or attack whose settings have changed, or of another saved edit; an option that was gained
        since, and that is left at its default, changes nothing."""
        for stage in ("fit", *(stage for stage in self.stages if stage.startswith(ATTACK))):
            stored = self.store.stored(result_name(job, stage))
            if stored is None:
                continue
            name = job[0] if stage == "fit" else stage.removeprefix(ATTACK)
            settled = self.methods[name] if stage == "fit" else ATTACKS[name]()
            if settled is not None:
                differing = changed(stored["settings"], settled)
            else:
                same = stored["settings"] == self.settings(name)
                differing = [] if same else [f"edit {stored['settings'].get('edit')}"]
            if differing:
                raise ValueError(
                    f"{self.options.out} holds {name} with other settings: {'; '.join(differing)}. Give it another name, or "
                    f"remove {self.store.folder / 'points' / result_name(job, '*' if stage == 'fit' else stage)}"
                )

    def settings(self, name: str) -> dict[str, str]:
        """What the cells of a method depend on besides the study's settings; a fitted one is a dataclass."""
        if name in self.saved:
            return {"edit": fingerprint(load_edit(self.saved[name]))}
        return {} if self.methods[name] is None else settings_of(self.methods[name])

    def result(self, job: Job, part: str) -> Cell:
        """One cell, computed unless it is there already."""
        return self.store.once(result_name(job, part), lambda: self.compute(job, part))

    def compute(self, job: Job, stage: str) -> Cell:
        """What a stage finds."""
        if stage in RELEARN:
            return self.retrain(job, RELEARN[stage])
        if stage.startswith(ATTACK):
            return self.attack(job, stage.removeprefix(ATTACK))
        if stage.startswith(METRICS):
            return self.measure(job)
        if stage.startswith(BENCHMARK):
            return self.measure(job, "benchmark", self.options.benchmark)
        stages = {"fit": self.fit, "quiz": self.quiz, "probe": self.probe}
        return stages[stage](job)

    def fit(self, job: Job) -> Cell:
        """Fit and save the edit; what it takes, and which forms of it are there to be attacked."""
        name, seed = job
        seconds: float | None = None
        if self.methods[name] is not None:
            fit = self.fitted(f"{name}-seed{seed}", self.methods[name], self.study.model, self.study.task, seed=seed)
            seconds = float(fit.log["seconds"].iloc[-1])
        edit = self.edit(job)
        with edit_on(self.study.model, edit):  # refuses another model than its own
            pass
        forms = ("kept",) if edit is None else possible_forms(self.study.model, edit, None)
        return {
            "settings": self.settings(name),
            "seconds": seconds,
            "bytes": 0 if edit is None else stored_bytes(self.folder(job)),
            "layers": [] if edit is None else list(edit.layers),
            "forms": list(forms),
            "hooks": has_hooks(edit),
            "weights": without_hooks(edit) is not None,
        }

    def quiz(self, job: Job) -> Cell:
        """Answers, group by group, and ordinary text, before any attack."""
        task, limit, model = self.study.task, self.options.limit, self.model(job)
        sides = task.quiz(limit=limit)
        if task.untaught_alike is not None:
            sides["untaught"] = task.untaught_alike.spread(limit)
        with edit_on(model, self.edit(job)):
            found = {side: rows_of(metrics.accuracy(model, asked)) for side, asked in sides.items()}
            return {**found, "text": rows_of(metrics.perplexity(model, task.held_out))[0]}

    def asked(self, job: Job) -> dict[str, Any]:
        """T, V and never-taught questions, as attacks take them."""
        facts = self.facts[job[1]]
        return {"train": facts.train, "held_out": facts.held_out, "untaught": facts.untaught}

    def retrain(self, job: Job, form: Form) -> Cell:
        """The curves of retraining one form of the edit, and new facts learned; empty where there is no such form, or where
        stripping leaves the unedited model, whose curves are known. The floor, a model that never saw the forget set, has a curve."""
        floor = job[0] == NEVER_TAUGHT
        fit = self.result(job, "fit") if not floor else {}
        if not floor and (form not in fit["forms"] or (form == "stripped" and not fit["weights"])):
            return {"rows": [], "new": None}
        frame = attacks.relearn(
            self.model(job),
            self.edit(job),
            **self.asked(job),
            steps=self.updates[-1],
            lr=Attacker(form=form).rates(self.study.model, self.lr),
            form=form,
            marks=(0, *self.updates),
            seed=job[1],
        )
        if frame.attrs["interrupted"]:
            raise KeyboardInterrupt
        return {"rows": rows_of(frame), "new": None if floor else self.taught_new(job, form)}

    def taught_new(self, job: Job, form: Form) -> Cell | None:
        """Accuracy on new facts after a few updates on these, at the best rate: whether this model can be trained at all."""
        new, model, edit = self.facts[job[1]].new, self.study.model, self.edit(job)
        if new is None:
            return None
        attacker = Attacker(steps=few(self.updates), form=form, seed=job[1])
        learned = []
        for rate in attacker.rates(model, self.lr):
            with attacker.retrained(model, edit, new.right_answers(), lr=rate) as outcome:
                if outcome == "interrupted":
                    raise KeyboardInterrupt
                if outcome == "finished":
                    learned.append(dict(rows_of(metrics.accuracy(model, new))[0]))
        return max(learned, key=lambda row: float(row["accuracy"]), default=None)

    def probe(self, job: Job) -> Cell:
        """What a linear probe reads of V off each layer."""
        bits = attacks.probe(self.study.model, self.edit(job), **self.asked(job), target=None, seed=job[1])
        return {"rows": rows_of(bits)}

    def attack(self, job: Job, name: str) -> Cell:
        """What a registered attack brings back; nothing of the unedited model, which it is compared with."""
        edit, attack = self.edit(job), ATTACKS[name]()
        if edit is None:
            return {"settings": settings_of(attack), "rows": []}
        config = SuiteConfig(attacks=(name,), questions=self.options.limit, seed=job[1])
        folder, study = self.store.folder / "attacks" / result_name(job, name), self.study
        frames = attacks.run_suite(study.model, edit, study.task, config, folder, name=job[0], progress=False)
        rows = pd.DataFrame(attacks.rows_of_attacks(frames, job[0], config))
        return {"settings": settings_of(attack), "rows": rows_of(brought_back(rows, job[0]))}

    def measure(self, job: Job, table: str = "leaderboard", documents: int | None = None) -> Cell:
        """What registered metrics say, on so many documents a side."""
        measured = metrics.Measured(
            model=self.model(job),
            task=self.study.task,
            edit=self.edit(job),
            limit=documents or self.options.limit,
            documents=documents,
            reference=self.reference,
            judge=self.study.model,
            seed=job[1],
            progress=False,
        )
        return {"row": metrics.rows_for(table, measured)}

    def model(self, job: Job) -> LensModel:
        """The one that a row is about, without an edit."""
        return self.reference if job[0] == NEVER_TAUGHT and self.reference is not None else self.study.model

    def folder(self, job: Job) -> Path:
        """Where its edit is."""
        name, seed = job
        return Path(self.saved[name]) if name in self.saved else self.edit_folder(f"{name}-seed{seed}")

    def edit(self, job: Job) -> Edit | None:
        """The edit, fitted or saved before; None: a model as it is."""
        return None if job[0] in (UNEDITED, NEVER_TAUGHT) else load_edit(self.folder(job))


if __name__ == "__main__":
    as_program("analysis.leaderboard", main)
