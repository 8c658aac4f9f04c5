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
from analysis.common.resumable import Job, ResumableStudy, result_name
from analysis.common.tables import RANDOM, UNEDITED, figure, markdown, mean_of
from mrp_lens import metrics
from mrp_lens.cli.sweep import shard_of
from mrp_lens.data import Corpus, Questions, UnlearningTask
from mrp_lens.edits import ConditionalProjectionEdit, Edit, ProjectionEdit, edit_on, projection_in
from mrp_lens.methods import MRP, Fit, UnconditionalMRP
from mrp_lens.methods.coverage import SHORT, Coverage
from mrp_lens.methods.mrp.method import default_layers, default_rank
from mrp_lens.models import LensModel, describe
from mrp_lens.utils.result_store import ResultStore
from mrp_lens.utils.validation import or_default

FULL_SEEDS = "0,1,2"
DOCUMENTS = 300  # a side, for states and gates
DRAWN, TOLD = 4, 60  # documents a group: in the picture of the gates, and for the tokens they open at
FEWEST, NAMED = 3, 6  # a token is told where it occurs so often; so many at either end
SEEN = 0.8  # of the entities, in the fit that lacks the others

PAIR, ENTITIES = "pair", "entities"  # jobs
PLAIN, GATED = "mrp-unconditional", "mrp"
OPEN, EXCHANGED, RANDOM_GATED = "mrp-open", "mrp-unconditional-gated", "random-gated"
WITHOUT = "mrp-without-entities"
COVERAGES: Mapping[str, Coverage | None] = {
    "mrp-coverage-none": None,
    "mrp-coverage-questions": Coverage(repeats=0, about_names=0, questions=0, free=0),
    "mrp-coverage-written": Coverage(question_forms=0, repeats=0),
}
WHAT = {
    UNEDITED: "nothing",
    PLAIN: "rows of the plain fit, every token",
    GATED: "rows and gates of the gated fit",
    OPEN: "rows of the gated fit, every token",
    EXCHANGED: "rows of the plain fit, gates of the gated fit",
    RANDOM: "random rows, every token",
    RANDOM_GATED: "random rows, gates of the gated fit",
    "mrp-coverage-none": "the corpora alone",
    "mrp-coverage-questions": "and question forms",
    "mrp-coverage-written": "and texts that the model writes",
    WITHOUT: "rows and gates of the gated fit",
}
FIGURES = {
    "forget quiz": ("forget_accuracy", "forget"),
    "retain quiz": ("retain_accuracy", "retain"),
    "worst topic": ("worst_topic_accuracy", ""),
    "damage to text": ("damage", "damage"),
    "to retain answers": ("answer_damage", "answer_damage"),
    "text": ("text_perplexity_ratio", ""),
}
READING = """\
**1. What the rows take.** Share of the states' squared norm inside the removed subspace, before the edit (the columns named
after the texts) and with it on (`left`), and how far the states have moved over their norm (`moved`, with all that happened
below). `statements` are the short retain documents in the form of the forget set's; there is no such column where these are
all or none. A plain projection is selective where `forget` stands above `retain` and `statements`; at `random`, rank /
d_model, the rows are no better than a random subspace. Rows of the gated fit may take as much of either side: what it
leaves, `left` and `moved` tell.

**2. What comes back.** The same share, without the edit to with it, one layer above the projection and at the last layer.

**3. Where the gates fire.** On the corpora, on retain statements, and on the quizzes' prompts, a form that no fit saw, before any
answer. Selective gates have a recall near 1, `retain firing` near 0 and a precision far above `at random`; `share` is the
mean of g(h). `unseen entities` is the fit without them, asked about these alone. Below stand the tokens at which the gates
are open widest and least, the mean over layers.

**4. Where or what.** Directions make the difference where {open} (the gated fit's rows at every token) keeps the retain quiz
and {exchanged} (the plain fit's rows behind the gates) does not; tokens do where it is the other way round. Random rows behind
the same gates tell how much of the forgetting is mere disturbance at the right tokens. Damage is KL(unedited || edited) in
nats a token, on text that no fit saw and on the right answers of the retain quiz; `text` is perplexity after over before.
{untaught}A fit that could not forget within its budget says so in `ended`.

**5. What coverage buys.** MRP with less to read; {gated} in the table above has all of it. Documents with a prompt are questions
already and get no question forms. `unseen entities` is the accuracy on the questions about entities that no forget document of
that fit names (without the edit: in brackets)."""

Place = tuple[str, int | None]
"""A method, and the layer if only one hook of it is on."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the study, print what it found and write it."""
    parser = parser_for(__doc__, "selectivity")
    add_resumable_options(parser, seeds="--seed, with --full three", methods=False)
    add_set_option(parser)
    parser.add_argument("--full", action="store_true", help=f"seeds {FULL_SEEDS}")
    options = parser.parse_args(arguments)
    shard = shard_of(options.shard)
    study = Study.begin(
        "analysis.selectivity", "Selectivity of a projection, with and without gates", options, in_place=True
    )
    selectivity = Selectivity(study, options)
    if not selectivity.run(shard):
        return
    frames, tokens, table = selectivity.frames(), selectivity.tokens(), selectivity.table()
    pictures = {name: frame for name, frame in frames.items() if len(frame)}
    pictures["displacement"] = frames["removed_energy"]
    pictures["gate_tokens"] = selectivity.drawn()
    whole = table[table["layer"].isna()]
    pictures["accuracies"] = whole
    pictures["layer_effects"] = pd.concat([whole[whole["method"] == UNEDITED], table[table["layer"].notna()]])
    study.end(finding(frames, tokens, table), pictures, table, in_place=True)


def alike(gated: MRP, model: LensModel) -> UnconditionalMRP:
    """The unconditional fit with the same layers, rank, steps, budget and so on."""
    same = {field.name: getattr(gated, field.name) for field in fields(gated) if field.name != "conditional"}
    same["layers"] = or_default(gated.layers, default_layers(int(model.cfg.n_layers)))
    same["rank"] = or_default(gated.rank, default_rank(model, most=16))
    return UnconditionalMRP(**same)


def exchanges(plain: ProjectionEdit, gated: ConditionalProjectionEdit, *, seed: int) -> dict[Place, Edit | None]:
    """Every combination of rows and gates at all hooks, then each hook of either fit alone."""
    (request,) = gated.requests
    gates, rows = gated.gates(request), gated.subspaces()
    whole: dict[Place, Edit | None] = {
        (UNEDITED, None): None,
        (PLAIN, None): plain,
        (GATED, None): gated,
        (OPEN, None): ProjectionEdit(rows),
        (EXCHANGED, None): ConditionalProjectionEdit(plain.subspaces(), gates),
        (RANDOM, None): plain.random_like(seed=seed),
        (RANDOM_GATED, None): gated.random_like(seed=seed),
    }
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
        self.methods: dict[str, MRP] = {PLAIN: alike(gated, study.model), GATED: gated}
        self.methods |= {name: replace(gated, coverage=coverage) for name, coverage in COVERAGES.items()}
        self.methods[WITHOUT] = gated
        self.statements = statements(study.task)
        settings = {
            "model": describe(study.model),
            "data": study.task.fingerprints(),
            "limit": options.limit,
            "mrp": settings_of(gated),
        }
        self.store = ResultStore.claim(options.out, "selectivity", settings)

    @property
    def jobs(self) -> list[Job]:
        """The two fits that are compared, those with less coverage, and the one without some of the entities."""
        named = [ENTITIES] if without_entities(self.study.task, seed=0) is not None else []
        return [(name, seed) for seed in self.seeds for name in (PAIR, *COVERAGES, *named)]

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
        """One of the fits, saved before anything else is done with it; Ctrl-C ends the study."""
        data = task or self.study.task
        return Fit.once(
            self.options.out / "fits" / f"{name}-seed{seed}",
            lambda checkpoint: self.methods[name].fit(
                self.study.model, data.forget, data.retain, seed=seed, checkpoint=checkpoint
            ),
        )

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

    def tokens(self) -> pd.DataFrame:
        """The tokens at which the gates of the first seed are open the widest and the least."""
        return pd.DataFrame(self.result((PAIR, self.seeds[0]), "tokens")["told"])

    def drawn(self) -> pd.DataFrame:
        """Some documents, token by token, with the gates of the first seed."""
        return pd.DataFrame(self.result((PAIR, self.seeds[0]), "tokens")["drawn"])

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
        fit = self.fit(method, seed, task) if method in self.methods and layer is None else None
        about = {"ended": fit.outcome.ended if fit and fit.outcome else None, "steps": len(fit.log) if fit else None}
        return {"method": method, "layer": layer, **found, **(about if fit else {})}

    def _exchanged(self, job: Job) -> dict[str, pd.DataFrame]:
        task, seed = self.study.task, job[1]
        rows = [
            self._row(method, edit, task, seed, layer)
            for (method, layer), edit in exchanges(*self._pair(seed), seed=seed).items()
        ]
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
        for method, edit in zip((PLAIN, GATED), self._pair(job[1]), strict=True):
            read = {"documents": DOCUMENTS, "seed": job[1]}
            hooks = edit.hook_names
            site = hooks[0].split("hook_")[-1]
            energy.append(metrics.geometry(self.study.model, texts, edit, site=site, **read).assign(method=method))
            back.append(metrics.propagation(self.study.model, texts, edit, site=site, **read).assign(method=method))
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


def finding(frames: Mapping[str, pd.DataFrame], tokens: pd.DataFrame, table: pd.DataFrame) -> str:
    """The tables, and how to read them."""
    whole, alone = table[table["layer"].isna()], table[table["layer"].notna()]
    pair = [name for name in WHAT if name not in (*COVERAGES, WITHOUT)]
    tables = {
        "1. What the rows take": energy_table(frames["removed_energy"]),
        "2. What comes back": propagation_table(frames["propagation"]),
        "3. Where the gates fire": f"{gate_table(frames['gate'])}\n\n{token_table(tokens)}",
        "4. Where or what": f"{score_table(whole, pair)}\n\nOne hook alone:\n\n{layer_table(alone)}",
        "5. What coverage buys": score_table(whole, [*COVERAGES, GATED, WITHOUT]),
    }
    level = mean_of(table, "untaught_accuracy")
    untaught = "" if level == "-" else f"Facts that were never taught are answered {level}. "
    text = READING.format(open=OPEN, exchanged=EXCHANGED, gated=GATED, untaught=untaught)
    return "\n\n".join([*(f"## {title}\n\n{drawn}" for title, drawn in tables.items()), "## How to read this", text])


def energy_table(frame: pd.DataFrame) -> str:
    """A row a method and layer at which it projects."""
    keys = ["method", "layer"]
    frame = frame[frame["removed_rank"] > 0]
    before, after = (frame[frame["when"] == when] for when in ("before", "after"))
    groups = list(dict.fromkeys(frame["group"]))
    inside = _wide(before, keys, "removed_energy", groups)
    inside["random"] = before.groupby(keys, sort=False)["removed_energy_null"].mean()
    for column, heading in (("removed_energy", "left"), ("displacement", "moved")):
        moved = _wide(after, keys, column, groups)
        inside = inside.join(moved.add_suffix(f", {heading}"))
    return _drawn(inside)


def propagation_table(frame: pd.DataFrame) -> str:
    """A row a method and layer at which it projects and which has one above."""
    above = frame[frame["layer"] > frame["source"]]
    if above.empty:
        return "The projection stands at the last layer alone; nothing lies above it."
    means = above.groupby(["method", "source", "layer", "group"], sort=False)[["before", "after", "null"]].mean()
    rows = []
    for (method, source), part in means.groupby(["method", "source"], sort=False):
        row = {"method": method, "removed at": str(source)}
        layers = part.index.get_level_values("layer")
        for place, layer in (("next layer", layers.min()), ("last layer", layers.max())):
            for group, values in part.xs(layer, level="layer").droplevel(["method", "source"]).iterrows():
                row[f"{group}, {place}"] = f"{values['before']:.3f} to {values['after']:.3f}"
        rows.append(row | {"random": f"{part['null'].iloc[0]:.3f}"})
    return markdown(pd.DataFrame(rows).fillna(""))


def gate_table(frame: pd.DataFrame) -> str:
    """A row a kind of text and layer."""
    named = {
        "precision": "precision",
        "precision_null": "at random",
        "recall": "recall",
        "retain_firing": "retain firing",
        "forget_share": "forget share",
        "retain_share": "retain share",
    }
    means = frame.groupby(["method", "layer"], sort=False)[list(named)].mean().rename(columns=named)
    means.index = means.index.rename(["texts", "layer"])
    return _drawn(means)


def token_table(tokens: pd.DataFrame) -> str:
    """A row a kind of text: the tokens at which the gates are open the widest, and the least."""
    rows = []
    for group, part in tokens[tokens["times"] >= FEWEST].groupby("group", sort=False):
        ordered = part.sort_values("share", ascending=False, kind="stable")
        ends = (ordered.head(NAMED), ordered.tail(NAMED).iloc[::-1])
        widest, least = (
            ", ".join(f"{_code(t)} {s:.2f}" for t, s in zip(end["token"], end["share"], strict=True)) for end in ends
        )
        rows.append({"texts": str(group), "widest": widest, "least": least})
    return markdown(pd.DataFrame(rows, columns=["texts", "widest", "least"]))


def score_table(table: pd.DataFrame, methods: Sequence[str]) -> str:
    """A row a method, of several seeds the mean with the lowest and the highest."""
    rows = []
    for name in methods:
        part = table[table["method"] == name]
        if part.empty:
            continue
        row = {"method": name, "what": WHAT[name]}
        row |= {heading: figure(part, column, stem) for heading, (column, stem) in FIGURES.items()}
        row["ended"] = ", ".join(str(ended) for ended in part.get("ended", pd.Series()).dropna().unique())
        if "unseen_accuracy" in part:
            unseen = mean_of(part, "unseen_accuracy")
            row["unseen entities"] = f"{unseen} ({mean_of(part, 'unseen_unedited_accuracy')})" if unseen != "-" else ""
        rows.append(row)
    text = pd.DataFrame(rows)
    return markdown(text.loc[:, (text != "").any()])


def layer_table(table: pd.DataFrame) -> str:
    """A row a layer and fit, its hook there alone."""
    columns = [column for column, _ in FIGURES.values()]
    means = (
        table.groupby(["method", "layer"], sort=False)[columns]
        .mean()
        .rename(columns={column: heading for heading, (column, _) in FIGURES.items()})
    )
    return _drawn(means.rename(index=int, level="layer"))


def _wide(frame: pd.DataFrame, keys: Sequence[str], column: str, groups: Sequence[str]) -> pd.DataFrame:
    """The means over seeds of a column, a column a group."""
    return frame.groupby([*keys, "group"], sort=False)[column].mean().unstack("group")[list(groups)]


def _drawn(means: pd.DataFrame) -> str:
    """Figures to three decimals, what the rows are about in front."""
    text = means.map(lambda value: "" if pd.isna(value) else f"{value:.3f}")
    return markdown(text.reset_index().astype(str))


def _code(token: str) -> str:
    """A token in Markdown, as it is spelled, fit for the cell of a table."""
    return "`" + repr(str(token))[1:-1].replace("|", "/").replace("`", "'") + "`"


if __name__ == "__main__":
    main()
