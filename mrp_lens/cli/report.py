"""The last part of a command: what the page shows beyond the table. By then the results are on the disk."""

from collections.abc import Callable, Mapping
from pathlib import Path

import pandas as pd

from mrp_lens.cli.show import console
from mrp_lens.report import write_report
from mrp_lens.runs import Run


def add_report(run: Run, out: Path, look: Callable[[], Mapping[str, pd.DataFrame]]) -> None:
    """Add the frames of a look at the model to a run that is written, and make its page. Ctrl-C leaves the look out."""
    run.frames["accuracies"] = pd.DataFrame([dict(row) for row in run.rows])
    try:
        run.frames |= look()
    except KeyboardInterrupt:
        run.notes.append("interrupted while looking at each layer: those pictures are missing")
        console.print(run.notes[-1])
    run.write_into(out)
    console.print(f"The page: {write_report(out)}")
