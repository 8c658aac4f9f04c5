"""One table of every method: what it forgets, what that costs, and what comes back when the edited model is retrained.

`python -m analysis.leaderboard --out runs/leaderboard` (`--methods mrp,npo`, `--edits NAME=DIR` for saved edits)

An attacker retrains all weights on the questions about half of the entities (T) and is scored on the others (V), at the
best of three learning rates: with the edit kept, with its hooks stripped, and with its projections written into the
weights, as far as an edit has these forms. Every cell of the table has a file in the output folder and is gone on with after an
interruption; more methods may be added later; `--shard 1/2` and `--shard 2/2` divide the methods between two processes.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from tqdm.auto import tqdm

from analysis.common.arguments import Study, parser_for
from analysis.common.attackers import NEVER_TAUGHT, UNEDITED
from analysis.common.contenders import changed, contenders, names_in, settings_of
from analysis.common.standings import compact, few, markdown, pictures, rows_of_cells
from analysis.common.verdicts import finding
from analysis.relearning import Job, piece_of
from mrp_lens import attacks, metrics
from mrp_lens.attacks.base import FactSplit
from mrp_lens.attacks.finetuning import Attacker, Form, possible_forms
from mrp_lens.cli.parsing import numbers, shard_of
from mrp_lens.edits import Edit, edit_on, has_hooks, load_edit, without_hooks
from mrp_lens.edits.provenance import fingerprint
from mrp_lens.edits.serialization import stored_bytes
from mrp_lens.models import describe
from mrp_lens.utils.frames import rows_of
from mrp_lens.utils.io import write_text
from mrp_lens.utils.store import ResultStore

UPDATES = "5,20,100"
RELEARN: dict[str, Form] = {f"relearn-{form}": form for form in get_args(Form)}
STAGES = ("fit", "quiz", *RELEARN, "probe")

Cell = dict[str, Any]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the study, print its table and what it found, and write it."""
    parser = parser_for(__doc__, "leaderboard")
    parser.add_argument("--methods", help="separated by commas (default: all; with --edits none)")
    parser.add_argument("--seeds", help="such as 0,1,2 (default: --seed)")
    parser.add_argument("--edits", nargs="+", default=[], metavar="NAME=DIR", help="saved edits, unfitted")
    parser.add_argument(
        "--untaught-questions", help="questions that no model here was taught: the floor, and new facts"
    )
    parser.add_argument("--entity", help="column of --questions that says whom they are about")
    parser.add_argument("--limit", type=int, help="at most this many questions of each kind")
    parser.add_argument("--updates", default=UPDATES, help=f"of an attack, after which to score (default {UPDATES})")
    parser.add_argument("--lr", help="the attacker's grid, such as 3e-4,1e-3 (default: three around one by width)")
    parser.add_argument("--shard", default="1/1", help="i/n: this process's part of the methods (default 1/1)")
    options = parser.parse_args(arguments)
    parts = shard_of(options.shard)
    study = Study.begin("analysis.leaderboard", "Leaderboard of unlearning methods", options, in_place=True)
    board = Leaderboard(study, options)
    cells = board.run(parts)
    if cells is None:
        print(f"Shard {options.shard} is done; other cells of {options.out} are still missing.")
        return
    table = rows_of_cells(cells, board.updates)
    text = markdown(compact(table, board.updates), table, board.updates)
    print(text)
    study.end(finding(table, board.updates), pictures(cells, table, board.updates), table, in_place=True)
    write_text(options.out / "table.md", text)


class Leaderboard:
    """Every cell of the table, each in a file of its own.

    Attributes:
        updates: of an attack, after which it is scored.
    """

    def __init__(self, study: Study, options: argparse.Namespace) -> None:
        self.study, self.options = study, options
        self.saved: dict[str, str] = dict(text.split("=", 1) for text in options.edits)
        self.seeds = numbers(options.seeds or str(options.seed), int, "--seeds") or ()
        self.updates = tuple(sorted(set(numbers(options.updates, int, "--updates") or ())))
        self.lr = numbers(options.lr, float, "--lr")
        self.methods = self._methods()
        Attacker(steps=self.updates[-1])  # refuses a budget of nothing before any work
        self.facts = {seed: FactSplit.of(study.task, limit=options.limit, seed=seed) for seed in self.seeds}
        settings = {
            "model": describe(study.model),
            "data": study.task.fingerprints(),
            "updates": self.updates,
            "lr": self.lr,
            "limit": options.limit,
        }
        self.store = ResultStore.claim(options.out, "leaderboard", settings)

    def _methods(self) -> dict[str, Any]:
        """Name -> what is fitted under it; None for saved edits and for the unedited model, which comes first."""
        known = contenders(self.study.model)
        chosen = names_in(self.options.methods, known, default=[] if self.saved else list(known))
        taken = sorted({*chosen, UNEDITED, NEVER_TAUGHT} & set(self.saved))
        if taken:
            raise ValueError(f"--edits {', '.join(taken)}: another row of the table has that name; choose another one")
        return {UNEDITED: None, **{name: known[name] for name in chosen}, **dict.fromkeys(self.saved)}

    @property
    def jobs(self) -> list[Job]:
        """The rows of the table."""
        return [(name, seed) for seed in self.seeds for name in self.methods]

    def run(self, shard: tuple[int, int]) -> dict[Job, dict[str, Cell]] | None:
        """Compute this shard's cells that have no file yet; all cells by row and stage, once every one is there.

        Raises:
            ValueError: the folder holds a method with other settings.
        """
        number, count = shard
        mine = self.jobs[number - 1 :: count]
        for job in self.jobs:
            self.check_same(job)
        with tqdm([(stage, job) for stage in STAGES for job in mine], desc="cells") as bar:
            for stage, job in bar:
                bar.set_postfix_str(piece_of(job, stage))
                self.cell(job, stage)
        if any(self.store.stored(piece_of(job, stage)) is None for job in self.jobs for stage in STAGES):
            return None
        self.store.tidy()
        return {job: {stage: self.cell(job, stage) for stage in STAGES} for job in self.jobs}

    def check_same(self, job: Job) -> None:
        """Refuse cells of a method whose settings have changed, or of another saved edit; an option that the method has
        gained since, and that is left at its default, changes nothing."""
        stored, name = self.store.stored(piece_of(job, "fit")), job[0]
        if stored is None:
            return
        method = self.methods[name]
        if method is not None:
            differing = changed(stored["settings"], method)
        else:
            same = stored["settings"] == self.settings(name)
            differing = [] if same else [f"edit {stored['settings'].get('edit')}"]
        if differing:
            raise ValueError(
                f"{self.options.out} holds {name} with other settings: {'; '.join(differing)}. Give it another name, or remove "
                f"{self.store.folder / 'points' / piece_of(job, '*')}"
            )

    def settings(self, name: str) -> dict[str, str]:
        """What the cells of a method depend on besides the study's settings; a fitted one is a dataclass."""
        if name in self.saved:
            return {"edit": fingerprint(load_edit(self.saved[name]))}
        return {} if self.methods[name] is None else settings_of(self.methods[name])

    def cell(self, job: Job, stage: str) -> Cell:
        """One cell, computed unless it is there already."""
        others = {"fit": self.fit, "quiz": self.quiz, "probe": self.probe}
        return self.store.once(
            piece_of(job, stage),
            lambda: self.retrain(job, RELEARN[stage]) if stage in RELEARN else others[stage](job),
        )

    def fit(self, job: Job) -> Cell:
        """Fit and save the edit; what it takes, and which forms of it are there to be attacked."""
        name, seed = job
        seconds: float | None = None
        if self.methods[name] is not None:
            fit = self.study.fit(self.methods[name], seed=seed)
            fit.edit.save_pretrained(self.folder(job), overwrite=True)
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
        task, limit = self.study.task, self.options.limit
        sides = task.quiz(limit=limit)
        if task.untaught_alike is not None:
            sides["untaught"] = task.untaught_alike.spread(limit)
        with edit_on(self.study.model, self.edit(job)):
            found = {side: rows_of(metrics.accuracy(self.study.model, asked)) for side, asked in sides.items()}
            return {**found, "text": rows_of(metrics.perplexity(self.study.model, task.held_out))[0]}

    def retrain(self, job: Job, form: Form) -> Cell:
        """The curves of retraining one form of the edit, and new facts learned; empty where there is no such form, or where
        stripping leaves the unedited model, whose curves are known."""
        fit = self.cell(job, "fit")
        if form not in fit["forms"] or (form == "stripped" and not fit["weights"]):
            return {"rows": [], "new": None}
        facts, edit = self.facts[job[1]], self.edit(job)
        frame = attacks.relearn(
            self.study.model,
            edit,
            train=facts.train,
            held_out=facts.held_out,
            untaught=facts.untaught,
            steps=self.updates[-1],
            lr=self.lr,
            form=form,
            marks=(0, *self.updates),
            seed=job[1],
        )
        if frame.attrs["interrupted"]:
            raise KeyboardInterrupt
        return {"rows": rows_of(frame), "new": self.taught_new(job, form)}

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
        facts = self.facts[job[1]]
        answers = {choice for q in (*facts.train.questions, *facts.held_out.questions) for choice in q.choices}
        bits = attacks.probe(
            self.study.model,
            self.edit(job),
            train=facts.train,
            held_out=facts.held_out,
            untaught=facts.untaught,
            target="answer" if len(answers) <= len(facts.train) else "choice",  # recurring answers, or any text
            seed=job[1],
        )
        return {"rows": rows_of(bits)}

    def folder(self, job: Job) -> Path:
        """Where its edit is."""
        name, seed = job
        return Path(self.saved[name]) if name in self.saved else self.options.out / "edits" / f"{name}-seed{seed}"

    def edit(self, job: Job) -> Edit | None:
        """The edit, fitted or saved before; None: the unedited model."""
        return None if job[0] == UNEDITED else load_edit(self.folder(job))


if __name__ == "__main__":
    main()
