"""`mrp-lens plan`: what a fit will need, before any weights are loaded."""

import json
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from typing_extensions import override

from mrp_lens.cli.command import Command, ModelOptions
from mrp_lens.cli.console import Column, console, show_table
from mrp_lens.cli.run_folder import check_out
from mrp_lens.runs.plan import Plan, PlanConfig, plan
from mrp_lens.runs.record import Run
from mrp_lens.utils.frames import Row, rows_of
from mrp_lens.utils.io import finite


@dataclass(frozen=True, kw_only=True)
class PlanFits(Command):
    """Say what a fit will need, before any weights are loaded: memory, time, batch, devices.

    Of the model nothing but its configuration is read; of a name on the Hub, `config.json` alone is downloaded. For each method, and
    for each class of TransformerLens, the table says what the part of the fit that holds most holds: weights, caches, activations,
    logits, optimizer. HookedTransformer (`hooked`) is filled from Hugging Face's model, so that loading takes both for a moment.

    Examples:

        mrp-lens plan --model meta-llama/Llama-3.1-8B --dtype bfloat16 --device-memory 80GB --tflops 300

        mrp-lens plan --model ./my-checkpoint --methods mrp,rmu --max-length 256 --out runs/plan

    Attributes:
        methods: Names of methods, separated by commas. Default: all.
        out: Folder for table.csv and summary.json. Default: the plan is only shown.
        json: Print the plan as JSON instead of tables.
        overwrite: Replace the output folder if it holds a run.
    """

    word: ClassVar[str] = "plan"

    loading: ModelOptions
    settings: PlanConfig
    methods: tuple[str, ...] = field(default=(), metadata={"separator": ","})
    out: Path | None = None
    json: bool = False
    overwrite: bool = False

    @classmethod
    @override
    def parts(cls, given: Mapping[str, Any]) -> dict[str, type]:
        return {"loading": ModelOptions, "settings": PlanConfig}

    @classmethod
    @override
    def titles(cls, given: Mapping[str, Any]) -> dict[str, str]:
        return {"loading": "model", "settings": "plan"}

    @classmethod
    @override
    def earlier(cls, filed: dict[str, Any]) -> dict[str, Any]:
        """A run's record has a seed; a plan draws nothing."""
        return {name: value for name, value in filed.items() if name != "seed"}

    @override
    def execute(self) -> Run:
        if self.out is not None:
            check_out(self.out, overwrite=self.overwrite)
        options = self.loading
        planned = plan(
            options.name,
            self.methods,
            backend=options.backend,
            dtype=options.precision,
            device=options.device,
            **asdict(self.settings),
        )
        run = Run("plan", self.arguments(), 0, title=f"{options.name}: what a fit will need")
        run.rows, run.notes = rows_of(planned.frame), list(planned.notes)
        if self.json:
            said = {"model": asdict(planned.sizes), "rows": run.rows, "notes": run.notes}
            sys.stdout.write(json.dumps(finite(said)) + "\n")
        else:
            show(planned, run.rows)
        if self.out is not None:
            run.write(self.out, overwrite=self.overwrite)
            if not self.json:
                console.print(f"Written to {self.out}: table.csv, summary.json.")
        return run


def show(planned: Plan, rows: list[Row]) -> None:
    """Print the plan."""
    sizes = planned.sizes
    active = f", of which a token meets {_count(sizes.active_parameters)}" if sizes.is_mixture else ""
    console.print(f"{sizes.name}: {_count(sizes.n_parameters)} parameters{active}, {sizes.n_layers} layers.")
    known = [row for row in rows if row.get("why_not") is None]
    show_table("Memory at the peak, in GiB", MEMORY, known, caption=MEMORY_CAPTION)
    show_table("Time, batch and devices", TIME, known, caption=TIME_CAPTION)
    for reason in dict.fromkeys(str(row["why_not"]) for row in rows if row.get("why_not") is not None):
        console.print(f"Not planned: {reason}.")
    for note in planned.notes:
        console.print(f"{note}.")


def _count(number: float) -> str:
    return f"{number / 1e9:.3g} billion" if number >= 1e9 else f"{number / 1e6:.3g} million"


def _gib(name: str) -> Column:
    return name, lambda row: f"{row[name]:.{0 if row[name] >= 100 else 1 if row[name] >= 10 else 2}f}"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 90 * 60 else f"{seconds / 3600:.1f} h"


def _fit(row: Row) -> str:
    return "" if row["largest"] is None else f"{row['largest']:.0f}"


NAME: list[Column] = [("method", lambda row: str(row["method"])), ("form", lambda row: str(row["form"]))]
PARTS = ("weights", "caches", "activations", "logits", "optimizer", "peak", "loading")
MEMORY = [*NAME, *map(_gib, PARTS)]
MEMORY_CAPTION = "peak: of all parts at once. loading: while the model is loaded."
TIME: list[Column] = [
    *NAME,
    ("tokens", lambda row: f"{row['length']:.0f}"),
    ("texts", lambda row: "" if row["batch_size"] is None else f"{row['batch_size']:.0f}"),
    ("time", lambda row: _duration(row["seconds"])),
    ("fits", lambda row: "yes" if row["fits"] else "no"),
    ("largest pass", _fit),
    ("devices", lambda row: str(row["devices"])),
]
TIME_CAPTION = (
    "tokens: of a text, at which it is cut. texts: an update on each side, or a pass. time: of the arithmetic alone, if every text is as "
    "long and every update is done (most fits end sooner). fits: on this device, as planned. largest pass: texts that a pass can have "
    "there (--micro-batch). devices: of each size, blocks spread over them."
)
