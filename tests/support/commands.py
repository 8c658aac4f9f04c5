"""Commands run in this process, and in one of their own."""

import io
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass

from mrp_lens.cli.app import run

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
