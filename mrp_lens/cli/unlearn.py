"""`mrp-lens unlearn`: fit, measure before and after, save, on anybody's model and data."""

from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pandas as pd

from mrp_lens import metrics
from mrp_lens.cli.folder import begun
from mrp_lens.cli.parsing import dtype_named, numbers
from mrp_lens.cli.show import Column, console, percent, show_examples, show_table
from mrp_lens.data.task import TaskConfig, UnlearningTask, beginning
from mrp_lens.methods import METHODS, Distillation, Fit
from mrp_lens.models import LensModel, identity_of, load_model
from mrp_lens.models.generation import continuations
from mrp_lens.runs.record import Run
from mrp_lens.runs.report import write_report
from mrp_lens.runs.report.diagnostics import diagnostics

EXAMPLES = 3


def run_unlearn(
    *,
    model_name: str,
    method: str,
    layers: str | None,
    released: bool,
    hyperparameters: Mapping[str, Any],
    data: TaskConfig,
    out: Path,
    backend: str,
    dtype: str,
    device: str | None,
    seed: int,
    overwrite: bool,
) -> Run:
    """Fit, measure, print, write, as far as that has not been done; returns the record."""
    precision = dtype_named(dtype)
    fitter = make_method(method, layers, hyperparameters, released=released)
    task = data.load()
    arguments = {
        "model": model_name,
        "method": method,
        "layers": layers,
        "released": released,
        **hyperparameters,
        **asdict(data),
        "backend": backend,
        "dtype": dtype,
    }
    about = ", ".join(corpus.name for corpus in task.forget)
    run = Run("unlearn", arguments, seed, title=f"{model_name}: forgetting {about} with {method}")
    settings = {
        "command": "unlearn",
        "method": method,
        "settings": asdict(fitter),
        "data": task.fingerprints(),
        "backend": backend,
        "dtype": dtype,
        "seed": seed,
    }
    with begun(out, settings, overwrite=overwrite) as store:
        console.print(f"Loading {model_name} ...")
        model = load_model(model_name, backend=backend, device=device, dtype=precision)
        store.check_same("model", identity_of(model))
        before = store.once("unedited", lambda: measured(model, task))
        fit = Fit.once(out, lambda kept: fitter.fit(model, task.forget, task.retain, seed=seed, checkpoint=kept))
        console.print(
            f"The edit is in {out / 'edit'}; load it with mrp_lens.load_edit({str(out / 'edit')!r}). Measuring it ..."
        )
        with fit.edit.applied(model):
            after = store.once("edited", lambda: measured(model, task))
        report(run, task, method, fit, before, after)
        run.write_into(out)
        run.frames["training"] = fit.log
        run.frames["accuracies"] = pd.DataFrame([dict(row) for row in run.rows])
        directions = dict(zip([method], fit.directions.values(), strict=False))
        run.frames |= diagnostics(model, task, {"unedited": None, method: fit.edit}, directions, seed=seed, store=store)
        run.write_into(out)
        store.tidy()
        console.print(f"Written to {out}: edit/, log.csv, table.csv, summary.json. The page: {write_report(out)}")
    return run


def report(
    run: Run, task: UnlearningTask, method: str, fit: Fit, before: Mapping[str, Any], after: Mapping[str, Any]
) -> None:
    """Fill the record with what was measured, and print it."""
    base = before["figures"]["text_perplexity"]
    seconds = float(fit.log["seconds"].iloc[-1])
    run.rows = [
        {
            "method": name,
            **found["figures"],
            "text_perplexity_ratio": found["figures"]["text_perplexity"] / base,
            "seconds": spent,
        }
        for name, found, spent in (("unedited", before, 0.0), (method, after, seconds))
    ]
    run.examples = [
        dict(prompt=prompt, unedited=a, **{method: b})
        for prompt, a, b in zip(example_prompts(task), before["examples"], after["examples"], strict=True)
    ]
    about = ", ".join(corpus.name for corpus in task.forget)
    show_table(f"Forgetting {about}", columns(before["figures"]), run.rows, caption=CAPTION)
    show_examples(run.examples)


def measured(model: LensModel, task: UnlearningTask) -> dict[str, Any]:
    """All figures of one row, and what the model writes."""
    return {"figures": measure(model, task), "examples": continuations(model, example_prompts(task))}


CAPTION = (
    "forget text: mean probability per token of the forget documents. Brackets: 95%, bootstrap. text: perplexity of retain documents "
    "that the fit did not see, as a multiple of the unedited model's. Chance is what guessing gives; below it, the answer is suppressed, not gone."
)


def make_method(method: str, layers: str | None, hyperparameters: Mapping[str, Any], *, released: bool = False) -> Any:
    """The method with its hyperparameters; those not given are the library's, or the released code's.

    Raises:
        ValueError: layers that are no numbers, a hyperparameter that the method does not have, or no released recipe.
    """
    kind: Any = METHODS[method]
    chosen = numbers(layers, int, "--layers")
    known = set(kind.__dataclass_fields__)
    foreign = [name for name in hyperparameters if name not in known]
    if foreign:
        raise ValueError(f"{method} has no --{foreign[0].replace('_', '-')}; it has {', '.join(sorted(known))}")
    options = dict(hyperparameters)
    if options.pop("distillation", False):
        options["distillation"] = Distillation()
    if chosen is not None and "layers" in known:
        options["layers"] = list(chosen)
    elif chosen is not None:
        if len(chosen) != 1:
            raise ValueError(f"{method} steers at one layer; got --layers {layers}")
        options["layer"] = chosen[0]
    if not released:
        return kind(**options)
    if not hasattr(kind, "released"):
        raise ValueError(f"--released is for rmu and adaptive-rmu; {method} has no released recipe here")
    return replace(kind.released(), **options)


def measure(model: LensModel, task: UnlearningTask) -> dict[str, float]:
    """All figures of one row."""
    probability = metrics.answer_probability(model, task.forget_texts, progress=True).iloc[0]
    row = {
        f"forget_probability{suffix}": float(probability[name])
        for name, suffix in (("probability", ""), ("low", "_low"), ("high", "_high"))
    }
    row["text_perplexity"] = float(metrics.perplexity(model, task.held_out, progress=True)["perplexity"].iloc[0])
    for side, quiz in task.quiz().items():
        figures = metrics.accuracy(model, quiz, progress=True).iloc[0]
        row |= {f"{side}_{name}": float(figures[name]) for name in ("accuracy", "low", "high", "chance")}
    return row


def columns(figures: Mapping[str, float]) -> list[Column]:
    """The columns that these figures fill."""
    chosen: list[Column] = [
        ("method", lambda row: str(row["method"])),
        (
            "forget text",
            lambda row: (
                f"{percent(row['forget_probability'])} [{percent(row['forget_probability_low'])}, {percent(row['forget_probability_high'])}]"
            ),
        ),
    ]
    for side, heading in (("forget", "forget quiz"), ("retain", "retain quiz")):
        if f"{side}_accuracy" in figures:
            chosen.append((f"{heading} (chance {percent(figures[f'{side}_chance'])})", _quiz_cell(side)))
    return [
        *chosen,
        ("text", lambda row: f"x{row['text_perplexity_ratio']:.3f}"),
        ("fit", lambda row: f"{row['seconds']:.0f} s"),
    ]


def _quiz_cell(side: str) -> Any:
    return lambda row: (
        f"{percent(row[f'{side}_accuracy'])} [{percent(row[f'{side}_low'])}, {percent(row[f'{side}_high'])}]"
    )


def example_prompts(task: UnlearningTask) -> list[str]:
    """How the first documents of each side begin."""
    documents = [corpus.documents[0] for corpus in task.forget][:EXAMPLES] + list(task.retain.documents[:EXAMPLES])
    return [beginning(document) for document in documents]
