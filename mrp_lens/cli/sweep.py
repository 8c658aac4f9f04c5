"""`mrp-lens sweep`: per-layer effects of every method, on anybody's model and data."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mrp_lens.cli.folder import stoppable
from mrp_lens.cli.parsing import dtype_named, numbers, shard_of
from mrp_lens.cli.show import Column, console, percent, show_table
from mrp_lens.data.task import TaskConfig, UnlearningTask, task_for
from mrp_lens.methods.rmu import default_layer
from mrp_lens.models import LensModel, load_model
from mrp_lens.runs.record import Run
from mrp_lens.runs.report import write_report
from mrp_lens.runs.sweep import Plan, default_coefficient, default_layers, sweep
from mrp_lens.utils.frames import rows_of
from mrp_lens.utils.io import make_folder
from mrp_lens.utils.store import check_holds

QUICK_LAYERS, QUICK_STEPS, QUICK_QUESTIONS, QUICK_DOCUMENTS = 4, 75, 150, 100
FULL_SEEDS = (0, 1, 2)
FULL_SHARES = (0.25, 1.0, 4.0)

COLUMNS: list[Column] = [
    ("method", lambda row: str(row["method"])),
    ("layer", lambda row: _number(row["layer"], "d")),
    ("c or beta", lambda row: _number(row["coefficient"], ".4g")),
    ("c / norm", lambda row: _number(row["relative_coefficient"], ".2f") if row["method"] == "rmu" else ""),
    ("seed", lambda row: _number(row["seed"], "d")),
    ("forget quiz", lambda row: percent(row["forget_accuracy"])),
    ("retain quiz", lambda row: percent(row["retain_accuracy"])),
    ("cos(u, forget)", lambda row: _number(row["forget_cosine"], ".2f")),
    ("cos(u, retain)", lambda row: _number(row["retain_cosine"], ".2f")),
    ("text", lambda row: f"x{row['text_perplexity_ratio']:.3f}"),
]


@dataclass(frozen=True)
class Grid:
    """What the command line says of the plan; None: derived from the model."""

    methods: str = "mrp,rmu,adaptive-rmu"
    layers: str | None = None
    coefficients: str | None = None
    betas: str | None = None
    seeds: str | None = None
    steps: int | None = None
    questions: int | None = None
    full: bool = False

    def plan(self, model: LensModel, task: UnlearningTask) -> Plan:
        """The plan for a model."""
        layers = numbers(self.layers, int, "--layers")
        if layers is None:
            layers = tuple(range(model.cfg.n_layers)) if self.full else default_layers(model, QUICK_LAYERS)
        coefficients = numbers(self.coefficients, float, "--coefficients")
        if coefficients is None:
            usual = default_coefficient(model, task, layer=default_layer(model))
            coefficients = tuple(usual * share for share in (FULL_SHARES if self.full else (1.0,)))
        quick = (
            {"steps": QUICK_STEPS, "questions": QUICK_QUESTIONS, "documents": QUICK_DOCUMENTS} if not self.full else {}
        )
        chosen = {"steps": self.steps, "questions": self.questions}
        options = quick | {name: value for name, value in chosen.items() if value is not None}
        betas = numbers(self.betas, float, "--betas")
        if betas is not None:
            options["betas"] = betas  # type: ignore[assignment]
        return Plan(
            methods=tuple(self.methods.split(",")),
            layers=layers,
            coefficients=coefficients,
            seeds=numbers(self.seeds, int, "--seeds") or (FULL_SEEDS if self.full else (0,)),
            **options,  # type: ignore[arg-type]
        )


def run_sweep(
    *,
    options: Mapping[str, Any],
    grid: Grid,
    shard: str,
    out: Path,
    backend: str,
    dtype: str,
    device: str | None,
) -> Run | None:
    """Fit and measure what is not there yet; print and write the table once all points are."""
    model_name = str(options["model"])
    task = task_for(model_name, TaskConfig.from_options(options), topic=options["topic"])
    parts = shard_of(shard)
    check_holds(out, "sweep")
    make_folder(out)
    console.print(f"Loading {model_name} ...")
    model = load_model(model_name, backend=backend, device=device, dtype=dtype_named(dtype))
    plan = grid.plan(model, task)
    run = Run(
        "sweep", {**options, **asdict(plan)}, plan.seeds[0], title=f"{model_name}: effects of each method by layer"
    )
    with stoppable(out):
        frame = sweep(model, task, plan, out, shard=parts)
        if frame is None:
            console.print(f"Shard {shard} is done; other points of {out} are still missing.")
            return None
        run.rows = rows_of(frame)
        run.frames["layer_effects"] = frame
        run.write_into(out)
        write_report(out)
        show_table("Per-layer effects", COLUMNS, run.rows)
        console.print(f"Written to {out}: points/, report.html, table.csv, summary.json.")
    return run


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(int(value) if form == "d" else value, form)
