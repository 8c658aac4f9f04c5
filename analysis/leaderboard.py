"""One table of every method: what it forgets, what that costs, and what comes back when the edited model is retrained.

`python -m analysis.leaderboard --out runs/leaderboard` (`--methods mrp,npo`, `--edits NAME=DIR` for saved edits)

An attacker retrains all weights on the questions about half of the entities (T) and is scored on the others (V), at the
best of three learning rates: with the edit kept, with its hooks stripped, and with its projections written into the
weights, as far as an edit has these forms. Methods, attacks and metrics that a package of yours registers have their rows and
columns too. Every cell of the table has a file in the output folder and is gone on with after an interruption; more methods may
be added later; `--shard 1/2` and `--shard 2/2` divide the methods between two processes.
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import pandas as pd

from analysis.common.arguments import (
    Study,
    add_attacker_options,
    add_resumable_options,
    numbers,
    parser_for,
    saved_edits,
)
from analysis.common.methods import changed, compared_methods, names_in, settings_of
from analysis.common.resumable import Job, ResumableStudy, result_name
from analysis.common.tables import DOES_NOT_COUNT, NONE, figure, markdown, mean_of
from mrp_lens import attacks, metrics
from mrp_lens.attacks import ATTACKS, FactSplit, SuiteConfig, best
from mrp_lens.attacks.finetuning import Attacker, Form, possible_forms
from mrp_lens.cli.sweep import shard_of
from mrp_lens.edits import Edit, edit_on, has_hooks, load_edit, without_hooks
from mrp_lens.edits.provenance import fingerprint
from mrp_lens.edits.serialization import stored_bytes
from mrp_lens.metrics.recovery import FORM_TITLES, NEVER_TAUGHT, UNEDITED
from mrp_lens.models import describe
from mrp_lens.utils.frames import rows_of
from mrp_lens.utils.result_store import ResultStore

UPDATES = "5,20,100"
RELEARN: dict[str, Form] = {f"relearn-{form}": form for form in get_args(Form)}
ATTACK, METRICS = "attack-", "metrics-"  # parts that others register
HOOKS, WEIGHTS, BOTH = "hooks", "weights", "hooks and weights"
READING = """\
Recovery of V after {updates} updates of all weights on T, at the attacker's best rate; behind the last, and behind accuracies and bits,
{spread}. 0 is as if never taught, 1 as before the edit, below 0 is suppressed. Stripped: the hooks removed; in the weights: the
projections written into the matrices, or, where that is not exact and the edit has matrices too, these alone. New facts: accuracy on
these after {few} updates on them, edit kept: far below the unedited model's, what does not come back need not be gone. Probe: bits
about V's answers that a linear probe reads at its best layer. {mark}: T was not learned to 95%, so this attack does not count. Compare
only methods whose first column is near the never-taught row and whose next two are near the unedited row: what was never forgotten
cannot come back, and a ruined model answers nothing."""

Cells = Mapping[Job, Mapping[str, Mapping[str, Any]]]
"""Of each row, what was found in each stage."""

Cell = dict[str, Any]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the study, print its table and write it."""
    parser = parser_for(__doc__, "leaderboard")
    add_resumable_options(parser)
    add_attacker_options(parser)
    parser.add_argument("--attacks", help="further ones, by name (default: those that other packages register)")
    parser.add_argument("--updates", default=UPDATES, help=f"of an attack, after which to score (default {UPDATES})")
    options = parser.parse_args(arguments)
    shard = shard_of(options.shard)
    study = Study.begin("analysis.leaderboard", "Leaderboard of unlearning methods", options, in_place=True)
    board = Leaderboard(study, options)
    if not board.run(shard):
        return
    cells = board.cells()
    table = rows_of_cells(cells, board.updates)
    text = finding(table, board.updates, further_columns(cells))
    study.end(text, pictures(cells, table, board.updates), table, in_place=True)


class Leaderboard(ResumableStudy):
    """Every cell of the table, each in a file of its own.

    Attributes:
        updates: of an attack, after which it is scored.
    """

    def __init__(self, study: Study, options: argparse.Namespace) -> None:
        self.study, self.options = study, options
        self.saved = saved_edits(options.edits)
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
        Attacker(steps=self.updates[-1])  # refuses a budget of nothing before any work
        self.facts = {seed: FactSplit.of(study.task, limit=options.limit, seed=seed) for seed in self.seeds}
        settings = {
            "model": describe(study.model),
            "data": study.task.fingerprints(),
            "updates": self.updates,
            "lr": self.lr,
            "limit": options.limit,
        }
        earlier = {"data": study.task.legacy_fingerprints()}
        self.store = ResultStore.claim(options.out, "leaderboard", settings, earlier=earlier)

    def _methods(self) -> dict[str, Any]:
        """Name -> what is fitted under it; None for saved edits and for the unedited model, which comes first."""
        known = compared_methods(self.study.model)
        chosen = names_in(self.options.methods, known, default=[] if self.saved else list(known))
        taken = sorted({*chosen, UNEDITED, NEVER_TAUGHT} & set(self.saved))
        if taken:
            raise ValueError(f"--edits {', '.join(taken)}: another row of the table has that name; choose another one")
        return {UNEDITED: None, **{name: known[name] for name in chosen}, **dict.fromkeys(self.saved)}

    @property
    def jobs(self) -> list[Job]:
        """The rows of the table."""
        return [(name, seed) for seed in self.seeds for name in self.methods]

    def parts(self) -> list[tuple[Job, str]]:
        """The cells of the table, column by column."""
        return [(job, stage) for stage in self.stages for job in self.jobs]

    def run(self, shard: tuple[int, int]) -> bool:
        """Compute this shard's cells that have no file yet.

        Raises:
            ValueError: the folder holds a method with other settings.
        """
        for job in self.jobs:
            self.check_same(job)
        return super().run(shard)

    def cells(self) -> dict[Job, dict[str, Cell]]:
        """All of them, once every one is there."""
        return {job: {stage: self.result(job, stage) for stage in self.stages} for job in self.jobs}

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
        stages = {"fit": self.fit, "quiz": self.quiz, "probe": self.probe}
        return stages[stage](job)

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

    def asked(self, job: Job) -> dict[str, Any]:
        """T, V and never-taught questions, as attacks take them."""
        facts = self.facts[job[1]]
        return {"train": facts.train, "held_out": facts.held_out, "untaught": facts.untaught}

    def retrain(self, job: Job, form: Form) -> Cell:
        """The curves of retraining one form of the edit, and new facts learned; empty where there is no such form, or where
        stripping leaves the unedited model, whose curves are known."""
        fit = self.result(job, "fit")
        if form not in fit["forms"] or (form == "stripped" and not fit["weights"]):
            return {"rows": [], "new": None}
        frame = attacks.relearn(
            self.study.model,
            self.edit(job),
            **self.asked(job),
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
        answers = {choice for half in (facts.train, facts.held_out) for q in half.questions for choice in q.choices}
        target: Any = "answer" if len(answers) <= len(facts.train) else "choice"  # recurring answers, or any text
        bits = attacks.probe(self.study.model, self.edit(job), **self.asked(job), target=target, seed=job[1])
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
        back = rows[(rows["method"] == job[0]) & rows["recovery"].notna()] if "recovery" in rows else rows[:0]
        return {"settings": settings_of(attack), "rows": rows_of(back)}

    def measure(self, job: Job) -> Cell:
        """What registered metrics say."""
        model, task, edit = self.study.model, self.study.task, self.edit(job)
        limit = self.options.limit
        measured = metrics.Measured(model=model, task=task, edit=edit, limit=limit, seed=job[1], progress=False)
        return {"row": metrics.rows_for("leaderboard", measured)}

    def folder(self, job: Job) -> Path:
        """Where its edit is."""
        name, seed = job
        return Path(self.saved[name]) if name in self.saved else self.options.out / "edits" / f"{name}-seed{seed}"

    def edit(self, job: Job) -> Edit | None:
        """The edit, fitted or saved before; None: the unedited model."""
        return None if job[0] == UNEDITED else load_edit(self.folder(job))


def few(updates: Sequence[int]) -> int:
    """The number of updates after which new facts are asked."""
    return updates[min(1, len(updates) - 1)]


def rows_of_cells(cells: Cells, updates: Sequence[int]) -> pd.DataFrame:
    """One row a method and seed; behind the unedited model the floor, facts that were never taught.

    Args:
        cells: (method, seed) -> stage -> what was found; the unedited model is one of the methods.
        updates: of an attack, after which it was scored.
    """
    rows: list[dict[str, Any]] = []
    for (name, seed), stages in cells.items():
        unedited = cells[UNEDITED, seed]
        row: dict[str, Any] = {"method": name, "seed": seed, "edit": _kind(stages["fit"])}
        row |= _answers(stages["quiz"], unedited["quiz"])
        for form in FORM_TITLES:
            row |= _attacked(form, stages, unedited, updates)
        row |= _read(stages["probe"]["rows"], "held-out", "probe_bits")
        row |= {"seconds": stages["fit"]["seconds"], "stored_bytes": stages["fit"]["bytes"]}
        row |= _further(stages)
        rows.append(row)
        if name == UNEDITED and "untaught" in stages["quiz"]:
            rows.append({"method": NEVER_TAUGHT, "seed": seed, "edit": "", **_never_taught(stages, updates)})
    return pd.DataFrame(rows)


def further_columns(cells: Cells) -> dict[str, str]:
    """Column that a registered attack or metric adds -> its heading."""
    headings = metrics.headings()
    columns = dict.fromkeys(column for stages in cells.values() for column in _further(stages))
    own = [column for column in columns if not column.endswith(("_low", "_high"))]
    return {column: headings.get(column, column.replace("_", " ")) for column in own}


def _further(stages: Mapping[str, Any]) -> dict[str, Any]:
    """The best of what each further attack brought back, with its interval, and what registered metrics say."""
    row: dict[str, Any] = {}
    for stage, found in stages.items():
        if stage.startswith(METRICS):
            row |= found["row"]
        if stage.startswith(ATTACK) and found["rows"]:
            most = max(found["rows"], key=lambda attacked: float(attacked["recovery"]))
            ends = {end: most.get(f"recovery{end}") for end in ("", "_low", "_high")}
            row |= {f"recovery_{stage.removeprefix(ATTACK)}{end}": value for end, value in ends.items()}
    return row


def _kind(fit: Mapping[str, Any]) -> str:
    """What an edit consists of; nothing for the unedited model."""
    if fit["hooks"]:
        return BOTH if fit["weights"] else HOOKS
    return WEIGHTS if fit["weights"] else ""


def _answers(quiz: Mapping[str, Any], unedited: Mapping[str, Any]) -> dict[str, Any]:
    """Accuracy on the forget quiz and on the worst topic of the retain quiz, and the cost for ordinary text."""
    row = _with_ends("forget", "forget_accuracy", quiz["forget"][0])
    if "retain" in quiz:
        topics = quiz["retain"][1:] or quiz["retain"]
        worst = min(topics, key=lambda topic: float(topic["accuracy"]))
        row |= {"worst_topic_name": worst["group"], **_with_ends("worst_topic", "worst_topic_accuracy", worst)}
    if "untaught" in unedited:
        row["untaught_accuracy"] = unedited["untaught"][0]["accuracy"]
    text = quiz["text"]["perplexity"]
    return row | {"text_perplexity": text, "text_perplexity_ratio": text / unedited["text"]["perplexity"]}


def _with_ends(stem: str, key: str, found: Mapping[str, Any], column: str = "accuracy") -> dict[str, Any]:
    return {key: found[column], f"{stem}_low": found["low"], f"{stem}_high": found["high"]}


def _attacked(
    form: str, stages: Mapping[str, Any], unedited: Mapping[str, Any], updates: Sequence[int]
) -> dict[str, Any]:
    """What retraining brings back in one form; nothing where the edit has no such form."""
    kind, source = _kind(stages["fit"]), stages[f"relearn-{form}"]
    if form == "stripped" and kind == HOOKS:
        source = unedited["relearn-kept"]  # without its hooks it is the unedited model
    if form == "weights" and kind == WEIGHTS:
        source = stages["relearn-kept"]
    if form == "weights" and kind == BOTH and not source["rows"]:
        source = stages["relearn-stripped"]  # what of it can be exported as plain weights
    if not source["rows"]:
        return {}
    curves = pd.DataFrame(source["rows"])
    at_best = best(curves)
    row = _by_updates(at_best, f"recovery_{form}", "", updates)
    rate = at_best.sort_values("step")["lr"].iloc[-1]
    # A rate that is too high takes V from any model: what it leaves the unedited one tells that from forgetting.
    spared = [r["recovery"] for r in unedited["relearn-kept"]["rows"] if (r["lr"], r["step"]) == (rate, updates[-1])]
    row |= {f"lr_{form}": rate, f"unedited_at_lr_{form}": spared[0] if spared else None}
    row |= {f"counts_{form}": bool(curves["counts"].any()), f"train_accuracy_{form}": curves["train_accuracy"].max()}
    if form != "stripped" and source["new"]:
        stem = f"new_accuracy_{few(updates)}_{form}"
        row |= _with_ends(stem, stem, source["new"])
    return row


def _by_updates(at_best: pd.DataFrame, stem: str, prefix: str, updates: Sequence[int]) -> dict[str, Any]:
    """`recovery_kept_5` with `recovery_kept_5_low` and `recovery_kept_5_high`, and so on."""
    by_step = at_best.set_index("step")
    return {
        f"{stem}_{step}{end}": by_step.loc[step, f"{prefix}recovery{end}"]
        for step in updates
        if step in by_step.index
        for end in ("", "_low", "_high")
    }


def _read(bits: Sequence[Mapping[str, Any]], group: str, key: str) -> dict[str, Any]:
    """Bits at the layer where the most are read."""
    of_group = [row for row in bits if row["group"] == group]
    if not of_group:
        return {}
    most = max(of_group, key=lambda row: float(row["bits"]))
    return {**_with_ends(key, key, most, "bits"), f"{key}_layer": most["layer"]}


def _never_taught(stages: Mapping[str, Any], updates: Sequence[int]) -> dict[str, Any]:
    """The floor: never-taught facts asked of the unedited model, one half of them after the attack against the other,
    and what a probe reads about them."""
    row = _with_ends("forget", "forget_accuracy", stages["quiz"]["untaught"][0])
    curves = best(pd.DataFrame(stages["relearn-kept"]["rows"]))
    row |= _by_updates(curves, "recovery_kept", "control_", updates)
    return row | _read(stages["probe"]["rows"], NEVER_TAUGHT, "probe_bits")


def compact(table: pd.DataFrame, updates: Sequence[int], further: Mapping[str, str]) -> pd.DataFrame:
    """The table as text, one row a method: means over the seeds, where there are several.

    Args:
        table: of `rows_of_cells`.
        updates: of an attack, after which it was scored.
        further: column that a registered attack or metric adds -> its heading.
    """
    rows = []
    for method, part in table.groupby("method", sort=False):
        row = {
            "": str(method),
            "asked at once": figure(part, "forget_accuracy", "forget"),
            "worst other topic": figure(part, "worst_topic_accuracy", "worst_topic"),
            "text": mean_of(part, "text_perplexity_ratio", "x{:.3f}"),
        }
        for form, title in FORM_TITLES.items():
            row[f"{title}, {' / '.join(map(str, updates))}"] = _recoveries(part, form, updates)
        row |= {
            f"new facts, {few(updates)}": mean_of(part, f"new_accuracy_{few(updates)}_kept"),
            "probe, bits": figure(part, "probe_bits", "probe_bits"),
            "fit": mean_of(part, "seconds", "{:.0f} s"),
            "stored": mean_of(part, "stored_bytes", "{:,.0f} kB", scale=1e-3),
        }
        row |= {heading: figure(part, column, column) for column, heading in further.items()}
        rows.append(row)
    return pd.DataFrame(rows)


def _recoveries(part: pd.DataFrame, form: str, updates: Sequence[int]) -> str:
    """One cell: recovery after each number of updates."""
    kind, columns = part["edit"].iloc[0], [f"recovery_{form}_{step}" for step in updates]
    if form == "stripped" and kind == HOOKS:
        return "as unedited"
    if form == "weights" and kind == WEIGHTS:
        return "as kept"
    if not set(columns) <= set(part) or part[columns].isna().all(axis=None):
        return NONE
    values = [mean_of(part, column) for column in columns[:-1]]
    counted = part[f"counts_{form}"].isin([False]).sum() == 0
    return " / ".join([*values, figure(part, columns[-1], columns[-1])]) + ("" if counted else f" {DOES_NOT_COUNT}")


def finding(table: pd.DataFrame, updates: Sequence[int], further: Mapping[str, str] | None = None) -> str:
    """The compact table with the headings of further columns, and how to read it."""
    seeds = table["seed"].nunique()
    spread = f"lowest to highest of {seeds} seeds" if seeds > 1 else "its 95% interval"
    steps = " / ".join(map(str, updates))
    reading = READING.format(updates=steps, few=few(updates), spread=spread, mark=DOES_NOT_COUNT)
    return f"{markdown(compact(table, updates, further or {}))}\n\n{reading}"


def pictures(cells: Cells, table: pd.DataFrame, updates: Sequence[int]) -> dict[str, pd.DataFrame]:
    """The frames that the report draws."""
    last = updates[-1]
    back = []
    for form, title in FORM_TITLES.items():
        if (column := f"recovery_{form}_{last}") in table:
            ends = {f"{column}{end}": f"recovery{end}" for end in ("", "_low", "_high")}
            rows = table[["method", "seed", *ends]].rename(columns={"method": "attack", **ends})
            back.append(rows.assign(method=f"{title}, {last} updates"))
    drawn = {"accuracies": table[table["method"] != NEVER_TAUGHT], "recoveries": pd.concat(back, ignore_index=True)}
    for name, stages in {"relearning_curves": [f"relearn-{f}" for f in FORM_TITLES], "probe_bits": ["probe"]}.items():
        drawn[name] = pd.concat(
            [
                pd.DataFrame(found[stage]["rows"]).assign(method=method, seed=seed)
                for (method, seed), found in cells.items()
                for stage in stages
                if found[stage]["rows"]
            ],
            ignore_index=True,
        )
    return drawn


if __name__ == "__main__":
    main()
