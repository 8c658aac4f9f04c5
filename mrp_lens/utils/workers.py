"""Processes that work in one folder at the same time: one at a time in what must not be mixed, and known to be alive or not."""

import json
import os
import platform
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

from mrp_lens.utils.io import HAS_LOCKS, lock, make_folder

WORKERS = "workers"
WAIT = 0.01  # seconds between two looks at a lock


@contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Inside, no other process is in such a block for this folder; waits as long as that takes.

    The system gives the lock back when a process ends, however it ends. Where it has no such locks (Windows, some network file
    systems), nobody waits.
    """
    if not HAS_LOCKS:
        yield
        return
    number = os.open(folder, os.O_RDONLY)
    try:
        while not lock(number):
            time.sleep(WAIT)
        yield
    finally:
        os.close(number)


@contextmanager
def at_work(folder: Path) -> Iterator[str]:
    """Inside, this process is known to be at work in a folder, under the name that is yielded."""
    name = f"{platform.node() or 'host'}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
    path = make_folder(folder / WORKERS) / name
    with exclusive(folder / WORKERS):  # nobody finds the file before it is locked
        number = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL)
        lock(number)
        known = {"host": platform.node(), "process": os.getpid(), "born": psutil.Process().create_time()}
        os.write(number, json.dumps(known).encode())
    try:
        yield name
    finally:
        with suppress(OSError):
            path.unlink()
        os.close(number)


def is_at_work(folder: Path, name: str) -> bool:
    """Whether the process that works, or worked, under that name is still at it.

    It is if it holds the lock on its file. Where there are no locks, a process of this host is asked for by its number; one of
    another host is taken for dead.
    """
    path = folder / WORKERS / name
    try:
        number = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        if HAS_LOCKS and not lock(number):
            return True
        text = os.read(number, 10_000).decode()
    finally:
        os.close(number)
    with suppress(ValueError, KeyError, TypeError, psutil.Error):
        known = json.loads(text)
        if known["host"] == platform.node():
            process = psutil.Process(int(known["process"]))
            return process.create_time() == known["born"] and process.status() != psutil.STATUS_ZOMBIE
    return False


def forget_dead(folder: Path) -> None:
    """Remove the files of processes that were killed."""
    with exclusive(folder / WORKERS):
        for path in (folder / WORKERS).glob("*"):
            if not is_at_work(folder, path.name):
                path.unlink(missing_ok=True)
