"""Why is a plain MRP projection not selective, and does the gate mend it? Both fits, taken apart layer by layer.

`python -m analysis.selectivity --model demo --out runs/selectivity` (one seed), `--full` (three)

`UnconditionalMRP` and `MRP` are fitted with the same layers, rank, steps, budget, coverage and seed; then rows and gates are
exchanged, opened, and left alone one hook at a time, which tells *what* is removed (directions) from *where* it is
removed (tokens). Gates are also read on the quizzes, whose form no fit saw, and once more after a fit without the documents
that name a fifth of the forget quiz's entities, where it names any. Last come MRP fits that read less than `Coverage` gives.

Every fit and figure lies in the output folder and is gone on with after an interruption; `--shard 1/2` and `--shard 2/2`
divide the fits between two processes.
"""

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

import pandas as pd

from analysis.common.arguments import Study, add_resumable_options, add_set_option, numbers, parser_for
from analysis.common.methods import settings_of, with_settings
from analysis.common.resumable import Job, ResumableStudy, result_name, shard_in
from analysis.common.selectivity_tables import (
    ASKED,
    BARE,
    EXCHANGED,
    GATED,
    OPEN,
    PLAIN,
    RANDOM_GATED,
    UNBOUNDED,
    UNBOUNDED_GATED,
    WHAT,
    WITHOUT,
    WRITTEN,
    finding,
)
from mrp_lens import metrics
from mrp_lens.cli.app import as_program
from mrp_lens.data import Corpus, Questions, UnlearningTask
from mrp_lens.edits import ConditionalProjectionEdit, Edit, ProjectionEdit, edit_on, projection_in
from mrp_lens.methods import MRP, Fit, UnconditionalMRP
from mrp_lens.methods.coverage import SHORT, Coverage
from mrp_lens.metrics.controls import RANDOM_PROJECTION, UNEDITED
from mrp_lens.models import LensModel, identity_of
from mrp_lens.utils.result_store import ResultStore

FULL_SEEDS = "0,1,2"
DOCUMENTS = 300  # a side, for states and gates
DRAWN, TOLD = 4, 60  # documents a group: in the picture of the gates, and for the tokens they open at
SEEN = 0.8  # of the entities, in the fit that lacks the others

PAIR, ENTITIES = "pair", "entities"  # jobs
COVERAGES: Mapping[str, Coverage | None] = {
    BARE: None,
    ASKED: Coverage(repeats=0, about_names=0, questions=0, free=0),
    WRITTEN: Coverage(question_forms=0, answer_endings=0, repeats=0),
}

Place = tuple[str, int | None]
"""A method, and the layer if only one hook of it is on."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the study, print what it found and write it."""
    parser = parser_for(__doc__, "selectivity")
    add_resumable_options(parser, seeds="--seed, with --full three", methods=False)
    add_set_option(parser)
    parser.add_argument("--full", action="store_true", help=f"seeds {FULL_SEEDS}")
    options = parser.parse_args(arguments)
    shard = shard_in(options)
    study = Study.begin(
        "analysis.selectivity", "Selectivity of a projection, with and without gates", options, in_place=True
    )
    selectivity = Selectivity(study, options)
    if not selectivity.run(shard):
        return
    frames, tokens, table = selectivity.frames(), selectivity.tokens(), selectivity.table()
    alone = table["layer"].notna()
    pictures = {
        **frames,
        "displacement": frames["removed_energy"],
        "gate_tokens": tokens["drawn"],
        "accuracies": table[~alone],
        "layer_effects": table[alone | (table["method"] == UNEDITED)],
    }
    study.end(finding(frames, tokens["told"], table), pictures, table, in_place=True)


def alike(gated: MRP, model: LensModel, task: UnlearningTask) -> UnconditionalMRP:
    """The unconditional fit with the same layers, rank, steps, budget and so on."""
    same = {field.name: getattr(gated, field.name) for field in fields(gated) if field.name != "conditional"}
    resolved = gated.prepared(model, task.forget, task.retain, None, None)[1]
    own = {"layers": resolved.layers, "rank": resolved.rank, "gate_directions": 1}
    return UnconditionalMRP(**same | own)


def exchanges(
    plain: ProjectionEdit, gated: ConditionalProjectionEdit, *, unbounded: ProjectionEdit | None = None, seed: int
) -> dict[Place, Edit | None]:
    """Every combination of rows and gates at all hooks, then each hook of either fit alone.

    Args:
        plain, gated: the two fits.
        unbounded: the plain fit without a budget, if there is one.
        seed: of the random rows.
    """
    (request,) = gated.requests
    gates, rows = gated.gates(request), gated.subspaces()
    whole: dict[Place, Edit | None] = {
        (UNEDITED, None): None,
        (PLAIN, None): plain,
        (GATED, None): gated,
        (OPEN, None): ProjectionEdit(rows),
        (EXCHANGED, None): ConditionalProjectionEdit(plain.subspaces(), gates),
        (RANDOM_PROJECTION, None): plain.random_like(seed=seed),
        (RANDOM_GATED, None): gated.random_like(seed=seed),
    }
    if unbounded is not None:
        whole[UNBOUNDED, None] = unbounded
        whole[UNBOUNDED_GATED, None] = ConditionalProjectionEdit(unbounded.subspaces(), gates)
    for hook, subspace in plain.subspaces().items():
        edit = ProjectionEdit({hook: subspace})
        whole[PLAIN, edit.layers[0]] = edit
        whole[GATED, edit.layers[0]] = ConditionalProjectionEdit({hook: rows[hook]}, {hook: gates[hook]})
    return whole


def statements(task: UnlearningTask) -> Corpus | None:
    """The short retain documents that have a prompt if most of the forget set's have one; None if all or none are."""
    forget = task.forget_texts.documents
    prompted = 2 * sum(bool(document.prompt) for document in forget) > len(forget)
    chosen = tuple(
        document
        for document in task.retain.documents
        if bool(document.prompt) == prompted and len((document.prompt + document.completion).split()) <= SHORT
    )
    return Corpus(chosen, "statements") if 0 < len(chosen) < len(task.retain) else None


def without_entities(task: UnlearningTask, *, seed: int) -> tuple[UnlearningTask, Questions] | None:
    """The task without some of the forget quiz's entities, whose documents no fit reads, and the questions about these; None
    where the quiz does not name two, or no document can be told by the name or would be left."""
    quiz = task.questions
    if quiz is None or len({question.entity for question in quiz.questions} - {""}) < 2:
        return None
    if not all(question.entity for question in quiz.questions):
        return None
    seen, unseen = quiz.parted(SEEN, by="entity", seed=seed)
    names = {question.entity for question in unseen.questions}
    kept = tuple(
        replace(
            corpus, documents=tuple(d for d in corpus.documents if not any(n in d.prompt + d.completion for n in names))
        )
        for corpus in task.forget
    )
    if not all(map(len, kept)) or sum(map(len, kept)) == sum(map(len, task.forget)):
        return None
    return replace(task, forget=kept, questions=seen), unseen


def scores(
    model: LensModel, edit: Edit | None, task: UnlearningTask, *, limit: int | None, seed: int
) -> dict[str, float | None]:
    """What an edit forgets, keeps and costs."""
    row: dict[str, float | None] = {}
    quizzes = task.quiz(limit=limit)
    with edit_on(model, edit):
        for side, quiz in quizzes.items():
            found = metrics.accuracy(model, quiz, seed=seed)
            row |= {f"{side}_{key}": float(found[key].iloc[0]) for key in ("accuracy", "low", "high")}
        row["worst_topic_accuracy"] = float(found["accuracy"].min())  # of the retain quiz, which comes last
        row["text_perplexity"] = float(metrics.perplexity(model, task.held_out)["perplexity"].iloc[0])
    for name, corpus in (("damage", task.held_out), ("answer_damage", quizzes["retain"].right_answers())):
        cost = metrics.damage(model, edit, corpus, seed=seed) if edit is not None else None
        row[name] = 0.0 if cost is None else float(cost["damage"].iloc[0])
        row |= {f"{name}_{end}": None if cost is None else float(cost[end].iloc[0]) for end in ("low", "high")}
    return {key: None if value != value else value for key, value in row.items()}


class Selectivity(ResumableStudy):
    """Every fit, each with what is measured of it in files of their own.

    Raises:
        ValueError: a quiz is missing, or the gates.
    """

    def __init__(self, study: Study, options: argparse.Namespace) -> None:
        if study.task.questions is None or study.task.retain_questions is None:
            raise ValueError(
                "what an edit forgets and keeps is asked by both quizzes; give --questions and --retain-questions"
            )
        self.study, self.options = study, options
        self.seeds = numbers(options.seeds or (FULL_SEEDS if options.full else str(options.seed)), int, "--seeds") or ()
        gated: MRP = with_settings({GATED: MRP()}, options.set)[GATED]
        if not gated.conditional:
            raise ValueError("conditional=false leaves no gate to be looked at; leave it out")
        self.methods: dict[str, MRP] = {PLAIN: alike(gated, study.model, study.task), GATED: gated}
        if gated.budget is not None:
            self.methods[UNBOUNDED] = replace(self.methods[PLAIN], budget=None, target=None)
        self.methods |= {name: replace(gated, coverage=coverage) for name, coverage in COVERAGES.items()}
        self.methods[WITHOUT] = gated
        self.statements = statements(study.task)
        settings = {
            "model": identity_of(study.model),
            "data": study.task.fingerprints(),
            "limit": options.limit,
            "mrp": settings_of(gated),
        }
        self.store = ResultStore.claim(options.out, "selectivity", settings, overwrite=options.overwrite)

    @property
    def jobs(self) -> list[Job]:
        """The two fits that are compared, those with less coverage, and the one without some of the entities."""
        every = [(name, seed) for seed in self.seeds for name in (PAIR, *COVERAGES, ENTITIES)]
        return [
            job for job in every if job[0] != ENTITIES or without_entities(self.study.task, seed=job[1]) is not None
        ]

    def parts(self) -> list[tuple[Job, str]]:
        """What is measured; all fits but the pair are there for their scores alone."""
        of_pair = ("scores", "states", "gates", "tokens")
        return [(job, part) for job in self.jobs for part in (of_pair if job[0] == PAIR else ("scores",))]

    def result(self, job: Job, part: str) -> Any:
        """One of them."""
        compute: Mapping[str, Callable[[Job], Mapping[str, pd.DataFrame]]] = {
            "scores": {PAIR: self._exchanged, ENTITIES: self._unseen}.get(job[0], self._covered),
            "states": self._states,
            "gates": self._gates,
            "tokens": self._tokens,
        }
        return self.store.frames(result_name(job, part), lambda: compute[part](job))

    def fit(self, name: str, seed: int, task: UnlearningTask | None = None) -> Fit:
        """One of the fits."""
        data = task or self.study.task
        return self.fitted(f"{name}-seed{seed}", self.methods[name], self.study.model, data, seed=seed)

    def table(self) -> pd.DataFrame:
        """A row a method, layer (if one hook alone is on) and seed."""
        table = pd.concat(
            [self.result(job, "scores")["rows"].assign(seed=job[1]) for job in self.jobs], ignore_index=True
        )
        before = table[table["method"] == UNEDITED].set_index("seed")["text_perplexity"]
        table["text_perplexity_ratio"] = table["text_perplexity"] / table["seed"].map(before)
        order = {name: number for number, name in enumerate(WHAT)}
        return table.sort_values(
            ["layer", "method", "seed"], key=lambda c: c.map(order) if c.name == "method" else c, na_position="first"
        )

    def frames(self) -> dict[str, pd.DataFrame]:
        """Of all seeds what the states and gates are, by the name of the figure."""
        found: dict[str, list[pd.DataFrame]] = {"removed_energy": [], "propagation": [], "gate": []}
        for job in self.jobs:
            for part in ("states", "gates") if job[0] == PAIR else ("scores",):
                for name, frame in self.result(job, part).items():
                    if name in found:
                        found[name].append(frame.assign(seed=job[1]))
        return {name: pd.concat(parts, ignore_index=True) for name, parts in found.items()}

    def tokens(self) -> dict[str, pd.DataFrame]:
        """Where the gates of the first seed open: some documents to be drawn, and every token's mean to be told."""
        found: dict[str, pd.DataFrame] = self.result((PAIR, self.seeds[0]), "tokens")
        return found

    def _pair(self, seed: int) -> tuple[ProjectionEdit, ConditionalProjectionEdit]:
        plain, gated = (projection_in(self.fit(name, seed).edit) for name in (PLAIN, GATED))
        assert plain is not None
        assert isinstance(gated, ConditionalProjectionEdit)
        return plain, gated

    def _row(
        self, method: str, edit: Edit | None, task: UnlearningTask, seed: int, layer: int | None = None
    ) -> dict[str, Any]:
        part = f"score {method}" if layer is None else f"score {method} layer {layer}"
        found = self.store.once(
            f"{part.replace(' ', '-')}-seed{seed}",
            lambda: scores(self.study.model, edit, task, limit=self.options.limit, seed=seed),
        )
        if method not in self.methods or layer is not None:
            return {"method": method, "layer": layer, **found}
        fit = self.fit(method, seed, task)
        ended = None if fit.outcome is None else fit.outcome.ended  # an outcome is False where it missed its target
        return {"method": method, "layer": layer, **found, "ended": ended, "steps": len(fit.log)}

    def _exchanged(self, job: Job) -> dict[str, pd.DataFrame]:
        task, seed = self.study.task, job[1]
        unbounded = projection_in(self.fit(UNBOUNDED, seed).edit) if UNBOUNDED in self.methods else None
        edits = exchanges(*self._pair(seed), unbounded=unbounded, seed=seed)
        rows = [self._row(method, edit, task, seed, layer) for (method, layer), edit in edits.items()]
        if task.untaught_alike is not None:
            untaught = task.untaught_alike.spread(self.options.limit)
            level = float(metrics.accuracy(self.study.model, untaught, seed=seed)["accuracy"].iloc[0])
            rows = [{**row, "untaught_accuracy": level} for row in rows]
        return {"rows": pd.DataFrame(rows)}

    def _covered(self, job: Job) -> dict[str, pd.DataFrame]:
        name, seed = job
        return {"rows": pd.DataFrame([self._row(name, self.fit(name, seed).edit, self.study.task, seed)])}

    def _unseen(self, job: Job) -> dict[str, pd.DataFrame]:
        """The fit that lacks some entities: its scores on the others, the accuracy on these, and its gates on their prompts."""
        seed, model, limit = job[1], self.study.model, self.options.limit
        split = without_entities(self.study.task, seed=seed)
        assert split is not None  # there would be no such job
        task, unseen = split[0], split[1].spread(limit)
        edit = self.fit(WITHOUT, seed, task).edit
        row = self._row(WITHOUT, edit, task, seed)
        for name, on in (("unseen_accuracy", edit), ("unseen_unedited_accuracy", None)):
            with edit_on(model, on):
                row[name] = float(metrics.accuracy(model, unseen, seed=seed)["accuracy"].iloc[0])
        kept = self.study.task.quiz(limit=limit)["retain"]
        gates = metrics.gate(model, edit, unseen, kept, part="prompt", documents=DOCUMENTS, seed=seed)
        return {"rows": pd.DataFrame([row]), "gate": gates.assign(method="unseen entities")}

    def _states(self, job: Job) -> dict[str, pd.DataFrame]:
        texts = {"forget": self.study.task.forget_texts, "retain": self.study.task.retain}
        if self.statements is not None:
            texts["statements"] = self.statements
        energy, back = [], []
        read: dict[str, Any] = {"site": self.methods[GATED].site, "documents": DOCUMENTS, "seed": job[1]}
        for method, edit in zip((PLAIN, GATED), self._pair(job[1]), strict=True):
            energy.append(metrics.geometry(self.study.model, texts, edit, **read).assign(method=method))
            back.append(metrics.propagation(self.study.model, texts, edit, **read).assign(method=method))
        return {"removed_energy": pd.concat(energy), "propagation": pd.concat(back)}

    def _gates(self, job: Job) -> dict[str, pd.DataFrame]:
        task, (_, gated) = self.study.task, self._pair(job[1])
        quiz = task.quiz(limit=self.options.limit)
        read: dict[str, Any] = {"documents": DOCUMENTS, "seed": job[1]}
        found = [metrics.gate(self.study.model, gated, task.forget_texts, task.retain, **read).assign(method="corpora")]
        if self.statements is not None:
            frame = metrics.gate(self.study.model, gated, task.forget_texts, self.statements, **read)
            found.append(frame.assign(method="retain statements"))
        frame = metrics.gate(self.study.model, gated, quiz["forget"], quiz["retain"], part="prompt", **read)
        return {"gate": pd.concat([*found, frame.assign(method="quiz prompts")])}

    def _tokens(self, job: Job) -> dict[str, pd.DataFrame]:
        task, (_, gated) = self.study.task, self._pair(job[1])
        quizzes = {f"{side} quiz": quiz.right_answers() for side, quiz in task.quiz(limit=self.options.limit).items()}
        texts = {"forget": task.forget_texts, "retain": task.retain, **quizzes}
        few, many = (
            metrics.gate_tokens(self.study.model, gated, texts, limit=limit, seed=job[1]) for limit in (DRAWN, TOLD)
        )
        told = many.groupby(["group", "token"], sort=False).agg(
            share=("share", "mean"), times=("share", lambda shares: len(shares) // len(gated.hook_names))
        )
        return {"drawn": few, "told": told.reset_index()}


if __name__ == "__main__":
    as_program("analysis.selectivity", main)
