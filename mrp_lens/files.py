"""Folders that appear whole or not at all, and are not overwritten by accident."""

import glob
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

PARTIAL = ".partial"

logger = logging.getLogger(__name__)


@contextmanager
def whole_folder(path: str | Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yield a fresh sibling folder to write into; it takes the place of `path` once the block ends well.

    A process killed at any moment leaves the old folder or the new one. Two renames are needed to replace a folder
    that is not empty; killed between them, the old one lies beside as `.NAME.replaced`, and `recover` puts it back.

    Raises:
        FileExistsError: `path` exists, is not empty, and `overwrite` is False; it is left as it is.
    """
    target = Path(path)
    recover(target)
    check_free(target, overwrite=overwrite)
    target.parent.mkdir(parents=True, exist_ok=True)
    fresh, aside = _sibling(target, f"partial-{os.getpid()}"), _sibling(target, "replaced")
    _clear_up(target)
    fresh.mkdir()
    try:
        yield fresh
        if target.exists():
            target.rename(aside)
        fresh.rename(target)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    shutil.rmtree(aside, ignore_errors=True)


def check_free(path: str | Path, *, overwrite: bool = False) -> None:
    """Refuse a target that would be overwritten.

    Raises:
        FileExistsError: it exists and is not empty, and `overwrite` is False.
        NotADirectoryError: it is a file.
    """
    target = Path(path)
    if target.exists() and not target.is_dir():
        raise NotADirectoryError(f"{target} is a file; name a folder")
    if target.is_dir() and any(target.iterdir()) and not overwrite:
        raise FileExistsError(
            f"{target} exists and is not empty; choose another folder, or overwrite it (overwrite=True, --overwrite)"
        )


def make_folder(path: str | Path) -> Path:
    """Make a folder, parents included, and see that files can be written there.

    Raises:
        NotADirectoryError: it is a file, or below one.
        OSError: it cannot be made or written into; says so before hours of work are lost on it.
    """
    target = Path(path)
    blocking = next((place for place in (target, *target.parents) if place.exists() and not place.is_dir()), None)
    if blocking is not None:
        raise NotADirectoryError(f"{target} cannot be a folder: {blocking} is a file; name another one")
    try:
        target.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=target):
            pass
    except OSError as error:
        raise OSError(
            error.errno, f"{target} cannot be written into ({error.strerror}); name another folder"
        ) from error
    return target


def recover(path: str | Path) -> None:
    """Finish what a killed `whole_folder` left: bring the old folder back if neither old nor new is in place."""
    target = Path(path)
    aside = _sibling(target, "replaced")
    if aside.is_dir() and not target.exists():
        logger.warning("an earlier save of %s was interrupted; its former content is back in place", target)
        aside.rename(target)
    elif aside.is_dir():
        shutil.rmtree(aside, ignore_errors=True)


def write_json(path: str | Path, content: Any) -> None:
    """Indented JSON, UTF-8, with a final newline; whole or not at all."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def write_text(path: str | Path, text: str) -> None:
    """UTF-8; a process killed at any moment leaves the old file or the new one, and perhaps a sibling `.NAME.PID.partial`."""
    target = Path(path)
    fresh = _sibling(target, f"{os.getpid()}{PARTIAL}")
    fresh.write_text(text, encoding="utf-8")
    fresh.replace(target)


def write_bytes(path: str | Path, content: bytes | bytearray | memoryview) -> None:
    """Whole or not at all."""
    target = Path(path)
    fresh = _sibling(target, f"{os.getpid()}{PARTIAL}")
    fresh.write_bytes(content)
    fresh.replace(target)


def _clear_up(target: Path) -> None:
    """Remove what killed processes left half-written beside the target."""
    for left in target.absolute().parent.glob(f".{glob.escape(target.absolute().name)}.partial-*"):
        number = left.name.rpartition("-")[2]
        if number.isdigit() and (int(number) == os.getpid() or not psutil.pid_exists(int(number))):
            shutil.rmtree(left, ignore_errors=True)


def _sibling(target: Path, suffix: str) -> Path:
    return target.absolute().parent / f".{target.absolute().name}.{suffix}"
