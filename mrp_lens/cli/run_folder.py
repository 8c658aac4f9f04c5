"""The folder of a run: of a command that goes on where it was stopped, and the one that an edit came from."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mrp_lens.cli.console import console
from mrp_lens.utils.io import check_free
from mrp_lens.utils.result_store import POINTS, ResultStore, check_replaceable, holds_run

KIND = "run"


def check_out(out: Path, *, overwrite: bool) -> None:
    """Refuse a folder that the run of a command cannot be written to in the end, before any work is done.

    Args:
        out: the folder.
        overwrite: replace it where it holds a run.

    Raises:
        FileExistsError: it holds something else, or a run and `overwrite` is False.
        OSError: nothing can be written there, or another process is at work in it.
    """
    check_replaceable(out, KIND)
    check_free(out, overwrite=overwrite)


@contextmanager
def begun(out: Path, settings: Mapping[str, Any], *, overwrite: bool) -> Iterator[ResultStore]:
    """Inside, the folder is this process's own, made or gone on with; Ctrl-C ends the program with what was done kept.

    Args:
        out: the folder.
        settings: everything that the results depend on.
        overwrite: begin anew where the folder holds a run.

    Raises:
        ValueError: it holds a run with other settings.
        FileExistsError: it holds something else.
        OSError: it cannot be made or written into, or another process is at work in it.
    """
    try:
        store = ResultStore.claim(out, KIND, settings, overwrite=overwrite)
    except FileExistsError as error:
        if not holds_run(out, KIND):
            raise
        raise FileExistsError(f"{error}, or replace this one with --overwrite") from error
    with store.lock, stoppable(out, overwrite=overwrite):
        if any((out / POINTS).iterdir()):
            console.print(f"Going on with what {out} holds.")
        yield store


@contextmanager
def stoppable(out: Path, *, overwrite: bool = False) -> Iterator[None]:
    """Inside, Ctrl-C ends the program and says how to go on: without --overwrite, if that was given, which would begin anew."""
    try:
        yield
    except KeyboardInterrupt:
        same = "the same command without --overwrite" if overwrite else "the same command"
        console.print(f"Interrupted. What is done stays in {out}; {same} goes on with the rest.")
        raise SystemExit(130) from None


def run_of(edit: Path) -> Path | None:
    """The folder of the run that left an edit: the one that holds it, or, as `mrp-lens demo` has it, the next one up."""
    parents = list(edit.absolute().parents)[:2]
    return next((folder for folder in parents if (folder / "summary.json").is_file()), None)
