"""`mrp-lens compare`: the edits of several runs side by side."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pandas as pd
from typing_extensions import override

from mrp_lens.cli.command import Command
from mrp_lens.cli.console import console
from mrp_lens.cli.figures import show_figures
from mrp_lens.cli.run_folder import check_out
from mrp_lens.metrics.controls import CONTROLS, UNEDITED
from mrp_lens.runs.front import on_front
from mrp_lens.runs.record import Run
from mrp_lens.runs.report import report
from mrp_lens.utils.frames import Row, is_number
from mrp_lens.utils.io import read_json

OF_THE_DATA = ("forget_accuracy", "forget_probability", "retain_accuracy", "text_perplexity")
COMPARABLE = ("unlearn", "measure")  # runs that measured the same figures
DIGITS = 1e-3  # by which the unedited model's figures may differ on two machines


@dataclass(frozen=True, kw_only=True)
class Compare(Command):
    """Put the edits of several runs into one table, by the damage that they did.

    The runs are those of `mrp-lens unlearn` or `measure` on the same model and data, with any method and budget: two edits can be
    compared by what they forgot where they did like damage.

    Example:

        mrp-lens compare runs/compare/mrp-0.05 runs/compare/npo-0.05 --out runs/compared

    Attributes:
        folders: Of the runs.
        out: Folder for the page, with forgetting drawn over damage, and the table. Default: nothing is written.
        overwrite: Replace the output folder if it holds a run.
    """

    word: ClassVar[str] = "compare"
    positional: ClassVar[str | None] = "folders"

    folders: tuple[str, ...]
    out: Path | None = None
    overwrite: bool = False

    @classmethod
    @override
    def earlier(cls, filed: dict[str, Any]) -> dict[str, Any]:
        """A run's record has a seed; a comparison draws nothing."""
        return {name: value for name, value in filed.items() if name != "seed"}

    @override
    def execute(self) -> Run:
        if self.out is not None:
            check_out(self.out, overwrite=self.overwrite)
        rows = compared([Path(folder) for folder in self.folders])
        title = f"{len(self.folders)} runs, by damage"
        run = Run("compare", self.arguments(), 0, title=title, rows=rows)
        edited = pd.DataFrame([row for row in rows if row["method"] not in CONTROLS])
        if {"damage", "forget_accuracy"} <= set(edited):
            front = on_front(edited[["forget_accuracy", "damage"]].to_numpy(float))
            shown = edited[["forget_accuracy", "damage"]].assign(edit=edited["method"], on_front=front)
            run.frames["pareto"] = shown.assign(unedited_accuracy=rows[0]["forget_accuracy"])
        show_figures(title, rows)
        if self.out is not None:
            run.write(self.out, overwrite=self.overwrite, extras=[report])
            console.print(f"Written to {self.out}: report.html, table.csv, summary.json.")
        return run


def compared(folders: Sequence[Path]) -> list[Row]:
    """The unedited model, other controls, and the edits by damage; a method has the name of its run where that has no other edit.

    Raises:
        FileNotFoundError: a folder holds no run.
        ValueError: a run is of another command, has no table of figures, or has others of the unedited model: it is of other data or of
            another model.
    """
    controls: dict[str, Row] = {}
    edited: list[Row] = []
    for folder in folders:
        if not (folder / "summary.json").is_file():
            raise FileNotFoundError(f"{folder} holds no finished run; give folders that `mrp-lens unlearn` wrote")
        summary = read_json(folder / "summary.json", "run the command again")
        if summary.get("command", COMPARABLE[0]) not in COMPARABLE:
            raise ValueError(
                f"{folder} is of `mrp-lens {summary.get('command')}`; give runs of `mrp-lens unlearn` or `measure`"
            )
        rows: list[Row] = summary["rows"]
        own = {str(row.get("method")): row for row in rows if "text_perplexity_ratio" in row}  # and not of the harness
        unedited = own.get(UNEDITED)
        if unedited is None:
            raise ValueError(
                f"{folder} has no figures of the unedited model; give runs of `mrp-lens unlearn` or `measure`"
            )
        _refuse_other_data(folder, unedited, folders[0], controls.setdefault(UNEDITED, unedited))
        controls = {**{name: row for name, row in own.items() if name in CONTROLS}, **controls}
        others = [row for name, row in own.items() if name not in CONTROLS]
        edited += [
            {**row, "method": folder.name if len(others) == 1 else f"{row['method']} ({folder.name})"} for row in others
        ]
    if not edited:
        raise ValueError("no edit was measured in these runs; give runs of `mrp-lens unlearn`, or of `measure --edit`")
    name, times = Counter(str(row["method"]) for row in edited).most_common(1)[0]
    if times > 1:
        raise ValueError(f"two of the runs are called {name!r}; rename one of the folders")
    return [
        *controls.values(),
        *sorted(edited, key=lambda row: row["damage"] if is_number(row.get("damage")) else float("inf")),
    ]


def _refuse_other_data(folder: Path, figures: Row, first: Path, of_first: Row) -> None:
    for key in OF_THE_DATA:
        one, other = figures.get(key), of_first.get(key)
        same = one is other if one is None or other is None else abs(one - other) <= DIGITS * abs(other)
        if not same:
            raise ValueError(
                f"{folder} and {first} are of other data or another model: the unedited model's {key} is {one} and {other}; compare "
                "runs with the same --model, --forget, --retain and --questions"
            )
