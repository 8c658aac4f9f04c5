"""What comes back when an edited model is retrained on half of what it lost, and where MRP's resistance comes from.

`python -m analysis.relearning --model demo --out runs/relearning` (quick: three edits), `--full` (every edit, three seeds),
`--others` (other attackers too, on saved edits or those of the quick run, with the first seed: facts split by question,
few facts, near facts, unrelated text, low-rank updates, weights before, at and after the edit)

Each edit is retrained on the questions about half of the entities (T) and asked about the others (V): RTT, arXiv
2410.08827. Floor: never-taught facts after the same attack, or, with `--reference`, a model that never saw what was
forgotten, after the same attack. Each edited model is also taught new facts with the same budget. `--edits NAME=DIR`
attacks saved edits instead of fitting. Curves lie in the output folder and are gone on with after an interruption;
`--shard 1/2` and `--shard 2/2` divide them between two processes.
"""

import argparse
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd
from tqdm.auto import tqdm

from analysis.common.arguments import Study, parser_for
from analysis.common.attackers import (
    OTHERS,
    RANDOM,
    UNEDITED,
    USUAL,
    WEIGHTS,
    WIDEST,
    Attack,
    possible,
    retrain,
    variants,
)
from analysis.common.contenders import names_in
from analysis.common.resistance import BUDGETS, finding, rows_of_curves
from mrp_lens import metrics
from mrp_lens.attacks import with_floor
from mrp_lens.cli.parsing import numbers, shard_of
from mrp_lens.data.task import TaskConfig
from mrp_lens.edits import Edit, ProjectionEdit, edit_on, load_edit
from mrp_lens.edits.subspace import Subspace
from mrp_lens.models import LensModel, describe, load_model
from mrp_lens.models.hooks import hook_name
from mrp_lens.utils.store import ResultStore

QUICK_METHODS, FULL_SEEDS, QUICK_QUESTIONS = "mrp,mrp-all-wide,rmu", "0,1,2", 200
REFERENCE = "reference"

Job = tuple[str, int]
"""Name of an edit, or of a control, and seed."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the study, print what it found and write it."""
    parser = parser_for(__doc__, "relearning")
    parser.add_argument("--full", action="store_true", help="every edit, seeds 0, 1 and 2, all questions")
    parser.add_argument("--others", action="store_true", help="other attackers as well, with the first seed")
    parser.add_argument("--methods", help=f"separated by commas (default {QUICK_METHODS}; with --full all)")
    parser.add_argument("--seeds", help="such as 0,1,2 (default: --seed, with --full three)")
    parser.add_argument("--edits", nargs="+", default=[], metavar="NAME=DIR", help="saved edits to attack, unfitted")
    parser.add_argument("--reference", help="a model that never saw what was forgotten: the floor")
    parser.add_argument("--new", help="questions on facts that no model here knows, with the columns of --questions")
    parser.add_argument("--entity", help="column of --questions that says whom they are about")
    parser.add_argument("--limit", type=int, help="at most this many questions on what was forgotten")
    parser.add_argument("--steps", type=int, default=BUDGETS[-1], help="updates of an attack (default 100)")
    parser.add_argument("--lr", help="the attacker's grid, such as 3e-4,1e-3 (default: three around one by width)")
    parser.add_argument("--shard", default="1/1", help="i/n: this process's part of the curves (default 1/1)")
    options = parser.parse_args(arguments)
    parts = shard_of(options.shard)
    study = Study.begin("analysis.relearning", "What retraining brings back", options, in_place=True)
    campaign = Campaign(study, options)
    curves = campaign.run(parts)
    if curves is None:
        print(f"Shard {options.shard} is done; other curves of {options.out} are still missing.")
        return
    table = rows_of_curves(curves, campaign.quizzes())
    frames = {"relearning_curves": curves[curves["attacker"] == USUAL.name]}
    study.end(finding(table), frames, table, in_place=True)


class Campaign:
    """Every curve of the study, each in a file of its own."""

    def __init__(self, study: Study, options: argparse.Namespace) -> None:
        self.study, self.options = study, options
        self.saved: dict[str, str] = dict(text.split("=", 1) for text in options.edits)
        self.seeds = numbers(options.seeds or (FULL_SEEDS if options.full else str(options.seed)), int, "--seeds") or ()
        self.lr = numbers(options.lr, float, "--lr")
        self.limit = options.limit or (None if options.full else QUICK_QUESTIONS)
        columns = TaskConfig.from_options(vars(options) | {"forget": ()})
        self.new = columns.quiz(options.new) if options.new else None
        self.names = self._names()
        settings = {
            "model": describe(study.model),
            "data": study.task.fingerprints() | ({"new": self.new.fingerprint} if self.new else {}),
            "steps": options.steps,
            "lr": self.lr,
            "limit": self.limit,
            "edits": self.saved,
            "reference": options.reference,
        }
        self.store = ResultStore.claim(options.out, "relearning", settings)

    def _names(self) -> list[str]:
        """The reference and the controls first, then the edits."""
        known = variants(self.study.model)
        asked = self.options.methods or (",".join(known) if self.options.full else QUICK_METHODS)
        chosen = list(self.saved) or names_in(asked, known, default=[])
        reference = [REFERENCE] if self.options.reference else []
        return [*reference, UNEDITED, *([RANDOM] if WIDEST in chosen and not self.saved else []), *chosen]

    @property
    def jobs(self) -> list[Job]:
        """All that is attacked."""
        return [(name, seed) for seed in self.seeds for name in self.names]

    def attacks(self, job: Job) -> list[Attack]:
        """What is done to it."""
        name, seed = job
        chosen = name in QUICK_METHODS.split(",") or name in self.saved
        others = OTHERS if self.options.others and seed == self.seeds[0] and chosen else ()
        weights = [WEIGHTS] if name == "mrp-mlp" else []
        return [USUAL, *weights, *others]

    def run(self, shard: tuple[int, int]) -> pd.DataFrame | None:
        """Compute this shard's curves that have no file yet; all curves, once every one has."""
        number, count = shard
        mine = self.jobs[number - 1 :: count]
        curves = [(job, attack) for job in mine for attack in self.attacks(job)]
        curves.sort(key=lambda curve: curve[1] in OTHERS)  # the headline first
        with tqdm(curves, desc="curves") as bar:
            for job, attack in bar:
                bar.set_postfix_str(piece_of(job, attack.name))
                self.quiz(job)
                self.curve(job, attack)
        wanted = [piece_of(job, attack.name) for job in self.jobs for attack in self.attacks(job)]
        if any(self.store.stored(piece) is None for piece in wanted):
            return None
        self.store.tidy()
        frames = []
        for job in self.jobs:
            for attack in self.attacks(job) if job[0] != REFERENCE else ():  # it is the floor of the others
                frame = self.curve(job, attack)
                if self.options.reference and attack == USUAL and len(frame):
                    frame = with_floor(frame, self.curve((REFERENCE, job[1]), USUAL), seed=job[1])
                frames.append(frame.assign(method=job[0], seed=job[1]))
        return pd.concat([frame for frame in frames if len(frame)], ignore_index=True)

    def curve(self, job: Job, attack: Attack) -> pd.DataFrame:
        """One attack on one edit, at every rate; no rows where there is nothing to retrain in this way."""

        def compute() -> pd.DataFrame:
            name, seed = job
            model, edit = self.model_of(name), self.edit(job)
            if not possible(attack, model, edit):
                return pd.DataFrame()
            return retrain(
                model,
                edit,
                attack,
                self.study.task,
                new=self.new,
                limit=self.limit,
                steps=self.options.steps,
                lr=self.lr,
                marks=(0, *BUDGETS),
                seed=seed,
            )

        return self.store.frame(piece_of(job, attack.name), compute)

    def quiz(self, job: Job) -> dict[str, Any]:
        """Accuracy on what was to go and on what was to stay, before any attack."""
        return self.store.once(piece_of(job, "quiz"), lambda: self.measure(job))

    def measure(self, job: Job) -> dict[str, Any]:
        """The same, computed."""
        model, edit = self.model_of(job[0]), self.edit(job)
        row: dict[str, Any] = {"method": job[0], "seed": job[1]}
        row |= {"layers": ",".join(map(str, edit.layers)) if edit else "", "rank": rank_of(edit)}
        for side, questions in self.study.task.quiz(limit=self.limit).items():
            with edit_on(model, edit):
                row[f"{side}_accuracy"] = float(metrics.accuracy(model, questions)["accuracy"].iloc[0])
        return row

    def quizzes(self) -> pd.DataFrame:
        """The quizzes of all jobs."""
        return pd.DataFrame([self.quiz(job) for job in self.jobs])

    def model_of(self, name: str) -> LensModel:
        """The model that is attacked under this name."""
        return self.reference if name == REFERENCE else self.study.model

    @cached_property
    def reference(self) -> LensModel:
        """The model that never saw what was forgotten."""
        return load_model(self.options.reference, backend=self.options.backend)

    def edit(self, job: Job) -> Edit | None:
        """The edit of a job: saved before, or fitted now and saved."""
        name, seed = job
        if name in (UNEDITED, REFERENCE):
            return None
        if name in self.saved:
            return load_edit(self.saved[name])
        if name == RANDOM:
            return random_projection(self.study.model, rank=variants(self.study.model)[WIDEST].rank, seed=seed)
        folder: Path = self.options.out / "edits" / f"{name}-seed{seed}"
        if not folder.is_dir():
            self.study.fit(variants(self.study.model)[name], seed=seed).edit.save_pretrained(folder)
        return load_edit(folder)


def random_projection(model: LensModel, *, rank: int, seed: int) -> ProjectionEdit:
    """The control: as many directions as the widest edit removes, at all layers, drawn at random."""
    width, depth = int(model.cfg.d_model), int(model.cfg.n_layers)
    return ProjectionEdit(
        {hook_name(layer): Subspace.random(rank, width, seed=seed * depth + layer) for layer in range(depth)},
        request="random",
    )


def piece_of(job: Job, what: str) -> str:
    """The name of a result's file."""
    return f"{job[0]}-seed{job[1]}-{what.replace(' ', '-')}"


def rank_of(edit: Edit | None) -> int | None:
    """The largest rank that a projection removes at a hook; None for other edits."""
    if not isinstance(edit, ProjectionEdit):
        return None
    return max(subspace.rank for subspace in edit.subspaces().values())


if __name__ == "__main__":
    main()
