"""`mrp-lens sweep`: per-layer effects of every method, on anybody's model and data."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from typing_extensions import override

from mrp_lens.cli.command import OnData, as_json
from mrp_lens.cli.console import Column, console, number, show_table
from mrp_lens.cli.run_folder import stoppable
from mrp_lens.runs.record import Run
from mrp_lens.runs.report import report
from mrp_lens.runs.sweep import SweepConfig, in_stream_units, sweep
from mrp_lens.utils.frames import percent, rows_of
from mrp_lens.utils.io import make_folder
from mrp_lens.utils.result_store import check_holds


@dataclass(frozen=True, kw_only=True)
class Sweep(OnData):
    """Fit every method at one layer after another and compare what each did.

    One file a point is kept, whole or not at all: run the same command again after Ctrl-C or a crash and it goes on
    where it stopped. Several processes share a folder with `--shard 1/4` to `--shard 4/4`; from several machines, copy
    the files of `points/` together and run the command once more.

    Example:

        mrp-lens sweep --model demo --out runs/sweep

    Attributes:
        out: Folder of the sweep; one that holds part of it is gone on with.
        shard: `i/n`: every n-th point from the i-th on, for several processes.
    """

    word: ClassVar[str] = "sweep"

    config: SweepConfig
    out: Path
    shard: str = "1/1"

    @classmethod
    @override
    def parts(cls, given: Mapping[str, Any]) -> dict[str, type]:
        return {**super().parts(given), "config": SweepConfig}

    @classmethod
    @override
    def titles(cls, given: Mapping[str, Any]) -> dict[str, str]:
        return {**super().titles(given), "config": "sweep"}

    @classmethod
    @override
    def earlier(cls, filed: dict[str, Any]) -> dict[str, Any]:
        """It wrote the number of questions where the place of the quiz had stood."""
        number = filed.get("questions")
        return filed | {"questions": None, "questions_limit": number} if isinstance(number, int) else filed

    @override
    def execute(self) -> Run | None:
        task, parts = self.task(), shard_of(self.shard)
        check_holds(self.out, "sweep")
        make_folder(self.out)
        model = self.loading.load()
        plan = self.config.resolved(model, task)
        derived = {"layers", "coefficients", "seeds", "steps", "documents"}
        arguments = self.arguments() | as_json({name: getattr(plan, name) for name in derived})
        arguments["questions_limit"] = plan.questions
        title = f"{self.loading.name}: effects of each method by layer"
        run = Run("sweep", arguments, plan.seeds[0], title=title)
        with stoppable(self.out):
            frame = sweep(model, task, self.config, self.out, shard=parts)
            if frame is None:
                console.print(f"Shard {self.shard} is done; other points of {self.out} are still missing.")
                return None
            run.rows = rows_of(frame)
            run.frames["layer_effects"] = frame
            run.write_into(self.out)
            report(self.out)
            show_table("Per-layer effects", COLUMNS, run.rows)
            console.print(f"Written to {self.out}: points/, report.html, table.csv, summary.json.")
        return run


def shard_of(text: str) -> tuple[int, int]:
    """ "2/4" -> (2, 4).

    Raises:
        ValueError: it is not two numbers.
    """
    parts = text.split("/")
    if len(parts) != 2 or not all(part.isdigit() for part in parts):
        raise ValueError(f"--shard takes i/n, such as 1/4, got {text!r}")
    return int(parts[0]), int(parts[1])


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(int(value) if form == "d" else value, form)


COLUMNS: list[Column] = [
    ("method", lambda row: str(row["method"])),
    ("layer", lambda row: _number(row["layer"], "d")),
    ("c or beta", lambda row: _number(row["coefficient"], ".4g")),
    ("c / norm", lambda row: _number(row["relative_coefficient"], ".2f") if in_stream_units(row["method"]) else ""),
    ("seed", lambda row: _number(row["seed"], "d")),
    ("forget quiz", lambda row: number(row["forget_accuracy"], percent)),
    ("retain quiz", lambda row: number(row["retain_accuracy"], percent)),
    ("cos(u, forget)", lambda row: _number(row["forget_cosine"], ".2f")),
    ("cos(u, retain)", lambda row: _number(row["retain_cosine"], ".2f")),
    ("text", lambda row: number(row["text_perplexity_ratio"], "x{:.3f}".format)),
]
