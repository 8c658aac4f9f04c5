"""What every command and study leaves behind: `summary.json`, `table.csv`, and files of its own, whole or not at all."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pandas as pd

from mrp_lens.utils.frames import Row, csv_of, versions
from mrp_lens.utils.io import finite, whole_folder, write_json, write_text

FRAMES = "frames"


@dataclass
class Run:
    """The record of one command or study.

    Attributes:
        command: such as "demo" or "analysis.speed".
        arguments: as given, defaults included.
        seed: of all its random choices.
        title: a line on what it was about, for the report.
        rows: one dict a method, layer, ...; keys as in docs/reference/formats.md.
        examples: generated answers, if any.
        notes: sentences about the run as a whole, such as an interruption.
        frames: what the report draws: name of a function of `mrp_lens.plots` -> the frame that it takes.
    """

    command: str
    arguments: Mapping[str, Any]
    seed: int
    title: str = ""
    rows: list[Row] = field(default_factory=list)
    examples: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    frames: dict[str, pd.DataFrame] = field(default_factory=dict)
    started: float = field(default_factory=time.perf_counter)

    def write(self, out: str | Path, *, overwrite: bool, extras: Sequence[Callable[[Path], object]] = ()) -> None:
        """Write the folder; each of `extras` adds files of its own to it.

        Raises:
            FileExistsError: the folder exists, is not empty, and `overwrite` is False.
        """
        with whole_folder(out, overwrite=overwrite) as folder:
            self.write_into(folder)
            for extra in extras:
                extra(folder)

    def write_into(self, folder: Path) -> None:
        """Write `summary.json`, `table.csv` and `frames/` into a folder that exists, each file whole or not at all; frames of an
        earlier run that this one has not are removed.

        A figure that is not known, or not finite, is null in JSON.
        """
        summary = {
            "command": self.command,
            "title": self.title,
            "arguments": {
                name: str(value) if isinstance(value, Path) else value for name, value in self.arguments.items()
            },
            "versions": versions(),
            "seed": self.seed,
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
            "seconds": round(time.perf_counter() - self.started, 1),
            "notes": self.notes,
            "rows": [dict(row) for row in self.rows],
            "examples": [dict(row) for row in self.examples],
        }
        write_text(folder / "table.csv", csv_of(pd.DataFrame([dict(row) for row in self.rows])))
        for path in (folder / FRAMES).glob("*.csv"):
            if path.stem not in self.frames:
                path.unlink()
        for name, frame in self.frames.items():
            (folder / FRAMES).mkdir(exist_ok=True)
            write_text(folder / FRAMES / f"{name}.csv", csv_of(frame))
        write_json(folder / "summary.json", finite(summary))
