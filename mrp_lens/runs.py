"""What every command and study leaves behind: `summary.json`, `table.csv`, and files of its own, whole or not at all."""

import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd

from mrp_lens.files import whole_folder, write_json

PACKAGES = ("mrp_lens", "torch", "transformer_lens", "transformers")

Row = Mapping[str, Any]


def versions() -> dict[str, str]:
    """Versions of what a figure depends on."""
    return {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}}


@dataclass
class Run:
    """The record of one command or study.

    Attributes:
        command: such as "demo" or "analysis.speed".
        arguments: as given, defaults included.
        seed: of all its random choices.
        rows: one dict a method, layer, ...; keys as in the README.
        examples: generated answers, if any.
        notes: sentences about the run as a whole, such as an interruption.
    """

    command: str
    arguments: Mapping[str, Any]
    seed: int
    rows: list[Row] = field(default_factory=list)
    examples: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    started: float = field(default_factory=time.perf_counter)

    def write(self, out: str | Path, *, overwrite: bool, extras: Sequence[Callable[[Path], None]] = ()) -> None:
        """Write the folder; each of `extras` adds files of its own to it.

        Raises:
            FileExistsError: the folder exists, is not empty, and `overwrite` is False.
        """
        summary = {
            "command": self.command,
            "arguments": {
                name: str(value) if isinstance(value, Path) else value for name, value in self.arguments.items()
            },
            "versions": versions(),
            "seed": self.seed,
            "seconds": round(time.perf_counter() - self.started, 1),
            "notes": self.notes,
            "rows": [dict(row) for row in self.rows],
            "examples": [dict(row) for row in self.examples],
        }
        with whole_folder(out, overwrite=overwrite) as folder:
            write_json(folder / "summary.json", summary)
            pd.DataFrame([dict(row) for row in self.rows]).to_csv(folder / "table.csv", index=False)
            for extra in extras:
                extra(folder)
