"""`mrp-lens demo`: the whole job on the embedded world, with the library's defaults and nothing else."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from mrp_lens.case import Case
from mrp_lens.cli.report import add_report
from mrp_lens.cli.show import Column, console, percent, show_examples, show_table
from mrp_lens.edit import Edit, ProjectionEdit
from mrp_lens.files import check_free
from mrp_lens.generation import continuations
from mrp_lens.looks import looks
from mrp_lens.methods import MRP, RMU, AdaptiveRMU, Fit
from mrp_lens.model import LensModel, load_model
from mrp_lens.runs import Run
from mrp_lens.world import World
from mrp_lens.world.facts import QUESTION
from mrp_lens.world.scoring import score, untaught_accuracy, verdict

COLUMNS: list[Column] = [
    ("method", lambda row: str(row["method"])),
    (
        "forgotten topic",
        lambda row: f"{percent(row['forget_accuracy'])} [{percent(row['forget_low'])}, {percent(row['forget_high'])}]",
    ),
    ("which is", lambda row: str(row["verdict"])),
    ("worst other topic", lambda row: percent(row["worst_topic_accuracy"])),
    ("text", lambda row: f"x{row['text_perplexity_ratio']:.3f}"),
    ("fit", lambda row: f"{row['seconds']:.0f} s"),
]


def run_demo(*, out: Path, topic: str, backend: str, seed: int, overwrite: bool) -> Run:
    """Fit, measure, look, print, write; returns the record."""
    world = World()
    case = Case.of_world(topic, world=world)
    check_free(out, overwrite=overwrite)
    arguments = {"topic": topic, "backend": backend, "out": out}
    run = Run("demo", arguments, seed, title=f"Forgetting {topic} in a small invented world")
    console.print(f"Loading the model that knows {', '.join(world.topics)} ...")
    model = load_model("demo", backend=backend)
    fits = fit_all(model, case, run, seed=seed)
    edits = with_controls(model, case, fits, seed=seed)
    run.rows = score_edits(model, world, [topic], edits, fits)
    run.examples = answers(model, world, topic, edits)
    show(run, topic)

    def save_fits(folder: Path) -> None:
        for name, fit in fits.items():
            (folder / name).mkdir()
            fit.edit.save_pretrained(folder / name / "edit")
            fit.log.to_csv(folder / name / "log.csv", index=False)

    run.write(out, overwrite=overwrite, extras=[save_fits])
    console.print(f"Written to {out}: table.csv, summary.json, and for each method its edit and log.")
    run.frames["training"] = pd.concat([fit.log.assign(method=name) for name, fit in fits.items()], ignore_index=True)
    directions = {name: fit.direction for name, fit in fits.items() if fit.directions}
    looked = {name: edit for name, edit in edits.items() if name != "untrained-start"}
    add_report(run, out, lambda: looks(model, case, looked, directions, seed=seed))
    return run


def fit_all(model: LensModel, case: Case, run: Run, *, seed: int) -> dict[str, Fit]:
    """Each method with its defaults; Ctrl-C ends the fit at hand, keeps it, and skips those to come."""
    fits: dict[str, Fit] = {}
    for method in (MRP(), RMU(), AdaptiveRMU()):
        fits[method.name] = method.fit(model, case.forget, case.retain, seed=seed)
        if fits[method.name].interrupted:
            run.notes.append(
                f"interrupted during {method.name}: it holds what was learned until then, later methods are missing"
            )
            break
    return fits


def with_controls(model: LensModel, case: Case, fits: Mapping[str, Fit], *, seed: int) -> dict[str, Edit | None]:
    """The fitted edits behind their controls: no edit, a random projection, MRP's start."""
    projection = fits["mrp"].edit
    assert isinstance(projection, ProjectionEdit)
    controls = {
        "unedited": None,
        "random-projection": projection.random_like(seed=seed),
        "untrained-start": MRP().start(model, case.forget, case.retain, seed=seed),
    }
    return controls | {name: fit.edit for name, fit in fits.items()}


def show(run: Run, topic: str) -> None:
    """Print the table, the answers and the notes."""
    untaught = float(run.rows[0]["untaught_accuracy"])
    show_table(
        f"Forgetting {topic}",
        COLUMNS,
        run.rows,
        caption=f"absent: within 5 points of {percent(untaught)}, the unedited model's accuracy on facts it was never taught. "
        "suppressed: lower, so still known. Intervals: 95%, bootstrap over questions.",
    )
    show_examples(run.examples)
    for note in run.notes:
        console.print(note)


def score_edits(
    model: LensModel, world: World, forgotten: list[str], edits: Mapping[str, Edit | None], fits: Mapping[str, Fit]
) -> list[Mapping[str, Any]]:
    """One row for each edit; None is the unedited model, which must come first."""
    rows: list[Mapping[str, Any]] = []
    for name, edit in edits.items():
        if edit is None:
            figures = score(model, world, forgotten)
        else:
            with edit.applied(model):
                figures = score(model, world, forgotten)
        untaught = float(rows[0]["untaught_accuracy"]) if rows else untaught_accuracy(model, world)
        first = rows[0] if rows else figures
        rows.append(
            {
                "method": name,
                **figures,
                "verdict": verdict(float(figures["forget_accuracy"]), untaught),
                "untaught_accuracy": untaught,
                "text_perplexity_ratio": float(figures["text_perplexity"]) / float(first["text_perplexity"]),
                "seconds": float(fits[name].log["seconds"].iloc[-1]) if name in fits else 0.0,
            }
        )
    return rows


def answers(model: LensModel, world: World, topic: str, edits: Mapping[str, Edit | None]) -> list[Mapping[str, Any]]:
    """Generated answers to two questions on the forgotten topic and one on each other topic."""
    chosen = world.select(topic)[:2] + [world.select(other, half=1)[0] for other in world.topics if other != topic]
    prompts = [fact.prompt(QUESTION) for fact in chosen]
    columns = {"question": prompts, "taught": [fact.value for fact in chosen]}
    for name in ("unedited", "mrp", "rmu", "adaptive-rmu"):
        edit = edits.get(name)
        if edit is not None:
            with edit.applied(model):
                columns[name] = continuations(model, prompts, max_new_tokens=4)
        elif name in edits:
            columns[name] = continuations(model, prompts, max_new_tokens=4)
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
