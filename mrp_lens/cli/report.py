"""`mrp-lens report`: the page of a run."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from typing_extensions import override

from mrp_lens.cli.command import Command
from mrp_lens.cli.console import console
from mrp_lens.runs.report import report


@dataclass(frozen=True, kw_only=True)
class Report(Command):
    """Make one HTML page of a run: table, controls, figures, answers, settings. It opens without a network.

    Example:

        mrp-lens report runs/demo

    Attributes:
        folder: That a command or a study wrote, such as `runs/demo`.
        out: The page. Default: `report.html` in the folder.
    """

    word: ClassVar[str] = "report"
    positional: ClassVar[str | None] = "folder"

    folder: Path
    out: Path | None = None

    @override
    def execute(self) -> Path:
        page = report(self.folder, self.out)
        console.print(f"Written: {page}")
        return page
