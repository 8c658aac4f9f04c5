"""Commands run in this process, and in one of their own."""

import io
import json
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mrp_lens.cli.app import run
from mrp_lens.cli.console import LOGGED, console
from mrp_lens.cli.unlearn import Unlearn

MAIN = "from mrp_lens.cli import main; main()"


@dataclass(frozen=True)
class Result:
    """How a command ended: its code (1: an error came out of it), what it printed, and the error."""

    exit_code: int
    output: str
    exception: Exception | None = None

    @property
    def said(self) -> str:
        """What it printed, in one line."""
        return " ".join(self.output.split())


def invoke(*words: str) -> Result:
    """Run a command line in this process; the error is kept."""
    printed = io.StringIO()
    console.width = LOGGED  # as into a file, whatever the terminal of the tests is
    code, error = 0, None
    with redirect_stdout(printed), redirect_stderr(printed):
        try:
            run(words)
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
        except Exception as raised:
            code, error = 1, raised
    return Result(code, printed.getvalue(), error)


def completed(*words: str) -> Result:
    """The same, of one that must succeed."""
    result = invoke(*words)
    if result.exception is not None:
        raise result.exception
    assert result.exit_code == 0, result.output
    return result


def in_process(*words: str, code: str = MAIN) -> subprocess.CompletedProcess[str]:
    """Run a command line in a process of its own."""
    return subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=False)


def fitter(*words: str) -> Any:
    """The method that `mrp-lens unlearn` makes of such options."""
    command = Unlearn.parsed(["--model", "m", "--forget", "f", "--retain", "r", "--out", "o", *words])
    assert command is not None
    return command.fitter


def data_words(model: Path | str, files: Path, *, out: str | None = "out") -> list[str]:
    """The options of a command that name a model and what `write_data` wrote."""
    return [
        *("--model", str(model), "--forget", str(files / "forget.jsonl"), "--retain", str(files / "retain.txt")),
        *("--questions", str(files / "forget.jsonl"), "--retain-questions", str(files / "kept.jsonl")),
        *("--question-prompt", "{q}", "--choices", "a", "--answer", "y"),
        *(() if out is None else ("--out", str(files / out))),
    ]


def summary_of(out: Path) -> dict[str, Any]:
    """The record of a run."""
    content: dict[str, Any] = json.loads((out / "summary.json").read_text(encoding="utf-8"))
    return content
