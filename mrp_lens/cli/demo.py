"""`mrp-lens demo`: the whole job on the embedded world, with the library's defaults; only the RMUs' updates are bounded lower."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import pandas as pd
from typing_extensions import override

from mrp_lens.attacks.finetuning import Attacker
from mrp_lens.attacks.relearn import relearn
from mrp_lens.cli.command import Command
from mrp_lens.cli.console import Column, console, show_examples, show_table
from mrp_lens.cli.run_folder import begun
from mrp_lens.data import UnlearningTask
from mrp_lens.data.world import World
from mrp_lens.data.world.facts import QUESTION
from mrp_lens.edits import Edit, ProjectionEdit, edit_on
from mrp_lens.methods import MRP, RMU, AdaptiveRMU, Fit
from mrp_lens.methods.budget import LOGGED
from mrp_lens.metrics.controls import RANDOM_PROJECTION, UNEDITED, UNTRAINED_START, verdict
from mrp_lens.models import LensModel, identity_of, load_model
from mrp_lens.models.generation import continuations
from mrp_lens.models.load import Backend
from mrp_lens.runs.record import Run
from mrp_lens.runs.report import report
from mrp_lens.runs.report.diagnostics import diagnostics
from mrp_lens.runs.world_scores import score, untaught_accuracy
from mrp_lens.utils.frames import percent
from mrp_lens.utils.interrupts import complete
from mrp_lens.utils.result_store import ResultStore

ATTACKED = (UNEDITED, "mrp", "rmu", "adaptive-rmu")
RMU_UPDATES = 300  # at most
RELEARNING_MARKS = (0, 5, 20)
RELEARNING_QUESTIONS = 300  # both halves together, and as many never-taught ones

COLUMNS: list[Column] = [
    ("method", lambda row: str(row["method"])),
    (
        "forgotten topic",
        lambda row: f"{percent(row['forget_accuracy'])} [{percent(row['forget_low'])}, {percent(row['forget_high'])}]",
    ),
    ("which is", lambda row: str(row["verdict"])),
    ("back after 20 updates", lambda row: _recovered(row)),
    ("worst other topic", lambda row: percent(row["worst_topic_accuracy"])),
    ("text", lambda row: f"x{row['text_perplexity_ratio']:.3f}"),
    ("end", lambda row: row["outcome"] or ""),
    ("fit", lambda row: f"{row['seconds']:.0f} s"),
]


@dataclass(frozen=True, kw_only=True)
class Demo(Command):
    """Forget one topic of the embedded invented world with MRP, RMU and Adaptive RMU, and compare them.

    Takes two to three minutes on two cores. The model knows 2,000 invented facts about potions, beasts, towns and machines.
    Each method gets texts about one topic to forget, texts about half of the rest to keep, and the library's defaults; the RMUs
    have at most 300 updates instead of 600, to stay within these minutes.
    The table shows, next to the unedited model, a random projection of the same rank, and MRP's start before training:

    - **forgotten topic**: accuracy on its questions, in a wording no method saw. *absent*: as low as on facts the model
      was never taught. *suppressed*: lower, so the answer is still known and pushed down. *known*: higher.
    - **back after 20 updates**: how much of half of the topic comes back when the edited model is retrained on the other
      half: 0 as if never taught, 1 all of it. `mrp-lens attack` does more.
    - **worst other topic**: accuracy on entities that no method saw.
    - **text**: perplexity of unseen ordinary sentences, as a multiple of the unedited model's.

    Example:

        mrp-lens demo --out runs/demo

    Attributes:
        out: Folder for the table, the edits, the logs and the metrics.
        topic: What to forget: `potions`, `beasts`, `towns` or `machines`.
        backend: HookedTransformer (`hooked`, TransformerLens 3 only), TransformerBridge (`bridge`), or whichever fits.
        seed: Of every random choice.
        overwrite: Replace the output folder if it holds a run.
    """

    word: ClassVar[str] = "demo"

    out: Path = Path("runs/demo")
    topic: str = "potions"
    backend: Backend = "auto"
    seed: int = 0
    overwrite: bool = False

    @override
    def execute(self) -> Run:
        world = World()
        task, topic, seed, out = UnlearningTask.from_world(self.topic, world=world), self.topic, self.seed, self.out
        run = Run("demo", self.arguments(), seed, title=f"Forgetting {topic} in a small invented world")
        settings = {"command": "demo", "data": task.fingerprints(), "backend": self.backend, "seed": seed}
        console.print(f"Loading the model that knows {', '.join(world.topics)} ...")
        model = load_model("demo", backend=self.backend)  # before --overwrite removes what the folder holds
        with begun(out, settings, overwrite=self.overwrite) as store:
            store.check_same("model", identity_of(model))
            fits = fit_all(model, task, out, seed=seed)
            edits = with_controls(model, task, fits, seed=seed)
            run.rows = score_edits(model, world, [topic], edits, fits, store)
            run.examples = answers(model, world, topic, edits, store)
            run.frames["relearning_curves"] = relearn_all(model, task, edits, run, store, seed=seed)
            show(run, topic)
            run.write_into(out)
            console.print(f"Written to {out}: table.csv, summary.json, and for each method its edit and log.")
            logs = [fit.log.assign(method=name) for name, fit in fits.items()]
            run.frames["training"] = pd.concat(logs, ignore_index=True)
            if set(LOGGED) <= set(run.frames["training"]):  # not of fits that an earlier version left in the folder
                run.frames["budget"] = run.frames["training"][["method", "step", *LOGGED]]
            run.frames["accuracies"] = pd.DataFrame([dict(row) for row in run.rows])
            directions = {name: fit.direction for name, fit in fits.items() if fit.directions}
            shown = {name: edit for name, edit in edits.items() if name != UNTRAINED_START}
            run.frames |= diagnostics(model, task, shown, directions, seed=seed, store=store)
            run.write_into(out)
            store.tidy()
            console.print(f"The page: {report(out)}")
        return run


def fit_all(model: LensModel, task: UnlearningTask, out: Path, *, seed: int) -> dict[str, Fit]:
    """Each method, kept in a folder of its own as soon as it is done."""

    def fitted(method: MRP | RMU | AdaptiveRMU) -> Fit:
        return Fit.once(
            out / method.name,
            lambda kept: method.fit(model, task.forget, task.retain, seed=seed, checkpoint=kept),
        )

    methods = (MRP(), RMU(steps=RMU_UPDATES), AdaptiveRMU(steps=RMU_UPDATES))
    return {method.name: fitted(method) for method in methods}


def with_controls(
    model: LensModel, task: UnlearningTask, fits: Mapping[str, Fit], *, seed: int
) -> dict[str, Edit | None]:
    """The fitted edits behind their controls: no edit, a random projection, MRP's start."""
    projection = fits["mrp"].edit
    assert isinstance(projection, ProjectionEdit)
    controls = {
        UNEDITED: None,
        RANDOM_PROJECTION: projection.random_like(seed=seed),
        UNTRAINED_START: MRP().start(model, task.forget, task.retain, seed=seed),
    }
    return controls | {name: fit.edit for name, fit in fits.items()}


def relearn_all(
    model: LensModel, task: UnlearningTask, edits: Mapping[str, Edit | None], run: Run, store: ResultStore, *, seed: int
) -> pd.DataFrame:
    """Retrain every edited model, and the unedited one, on half of the forgotten facts; each row of the run gets what
    came back of the other half. A short attack at one rate: `mrp-lens attack` has the whole."""
    taught, asked = task.split(limit=RELEARNING_QUESTIONS, seed=seed)
    untaught = task.untaught_alike
    assert untaught is not None
    rate = Attacker().rates(model, None)[1]
    rows = {str(row["method"]): dict(row) for row in run.rows}
    curves = []
    for name in ATTACKED:

        def retrained(name: str = name) -> pd.DataFrame:
            curve = relearn(
                model,
                edits[name],
                train=taught,
                held_out=asked,
                untaught=untaught.spread(RELEARNING_QUESTIONS),
                steps=RELEARNING_MARKS[-1],
                marks=RELEARNING_MARKS,
                lr=rate,
                seed=seed,
            )
            return complete(curve)

        curve = store.frame(f"relearn-{name}", retrained)
        curves.append(curve.assign(method=name))
        for step, found in curve[curve["step"] > 0].set_index("step").iterrows():
            for end in ("", "_low", "_high"):
                rows[name][f"recovery_{step}{end}"] = float(found[f"recovery{end}"])
    run.rows = list(rows.values())
    return pd.concat(curves, ignore_index=True)


def _recovered(row: Mapping[str, Any]) -> str:
    """Recovery with its interval; nothing for controls, which are not attacked."""
    key = f"recovery_{RELEARNING_MARKS[-1]}"
    return f"{row[key]:.2f} [{row[f'{key}_low']:.2f}, {row[f'{key}_high']:.2f}]" if key in row else ""


def show(run: Run, topic: str) -> None:
    """Print the table, the answers and the notes."""
    untaught = float(run.rows[0]["untaught_accuracy"])
    show_table(
        f"Forgetting {topic}",
        COLUMNS,
        run.rows,
        caption=f"absent: within 5 points of {percent(untaught)}, the unedited model's accuracy on facts it was never taught. "
        "suppressed: lower, so still known. Intervals: 95%, over entities. back: what retraining on half of the forgotten facts "
        "brings back of the other half, between facts that were never taught (0) and the unedited model (1).",
    )
    show_examples(run.examples)
    for note in run.notes:
        console.print(note)


def score_edits(
    model: LensModel,
    world: World,
    forgotten: list[str],
    edits: Mapping[str, Edit | None],
    fits: Mapping[str, Fit],
    store: ResultStore,
) -> list[Mapping[str, Any]]:
    """One row for each edit; None is the unedited model."""
    untaught = float(store.once("untaught", lambda: {"accuracy": untaught_accuracy(model, world)})["accuracy"])

    def scored(edit: Edit | None) -> dict[str, float | str]:
        with edit_on(model, edit):
            return score(model, world, forgotten)

    figures = {name: store.once(f"score-{name}", partial(scored, edit)) for name, edit in edits.items()}
    base = float(figures[UNEDITED]["text_perplexity"])
    return [
        {
            "method": name,
            **found,
            "verdict": verdict(float(found["forget_accuracy"]), untaught),
            "untaught_accuracy": untaught,
            "text_perplexity_ratio": float(found["text_perplexity"]) / base,
            "outcome": fits[name].ended if name in fits else None,
            "seconds": float(fits[name].log["seconds"].iloc[-1]) if name in fits else 0.0,
        }
        for name, found in figures.items()
    ]


def answers(
    model: LensModel, world: World, topic: str, edits: Mapping[str, Edit | None], store: ResultStore
) -> list[Mapping[str, Any]]:
    """Generated answers to two questions on the forgotten topic and one on each other topic."""
    chosen = world.select(topic)[:2] + [world.select(other, half=1)[0] for other in world.topics if other != topic]
    prompts = [fact.prompt(QUESTION) for fact in chosen]
    columns = {"question": prompts, "taught": [fact.value for fact in chosen]}

    def written(edit: Edit | None) -> dict[str, list[str]]:
        with edit_on(model, edit):
            return {"answers": continuations(model, prompts, max_new_tokens=4)}

    for name in ATTACKED:
        columns[name] = store.once(f"answers-{name}", partial(written, edits[name]))["answers"]
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
