"""Files and folders that appear whole or not at all, and are not overwritten by accident."""

import glob
import itertools
import json
import logging
import math
import os
import re
import shutil
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

try:
    import fcntl
except ImportError:  # Windows, where folders have no such locks
    HAS_LOCKS = False
else:
    HAS_LOCKS = True

PARTIAL = ".partial"
ONE_LINE = 300  # characters of an error's message
DEEPEST = 64  # levels of strict JSON
SURROGATE = re.compile("[\ud800-\udfff]")  # half a character
LONGEST_WAIT = 10.0  # seconds for another process's two renames

logger = logging.getLogger(__name__)
_mine = threading.local()  # the folders that this thread is alone in


@contextmanager
def whole_folder(path: str | Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yield a fresh sibling folder to write into; it takes the place of `path` once the block ends well.

    A process killed at any moment, a full disk and a power cut leave the old folder or the new one. Two renames are needed
    to replace a folder that is not empty; killed between them, the old one lies beside as `.NAME.replaced`, and `recover`
    puts it back. Of two processes that write to one path, each replaces the other's folder as a whole, or is refused.

    Raises:
        FileExistsError: `path` exists, is not empty, and `overwrite` is False; it is left as it is. Likewise if another
            process has written it by the end of the block.
    """
    target = _followed(path)
    recover(target)
    check_free(target, overwrite=overwrite)
    target.parent.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        with _alone(target.absolute().parent):
            fresh = _fresh_folder(target)
            stack.callback(shutil.rmtree, fresh, ignore_errors=True)
            stack.enter_context(_alone(fresh))  # which tells others that somebody is writing there
        yield fresh
        _flush_folder(fresh)
        with _alone(target.absolute().parent):
            check_free(target, overwrite=overwrite)
            _take_place(fresh, target)


def _take_place(fresh: Path, target: Path) -> None:
    """Rename the fresh folder to the target; what was there goes, or is back if that fails."""
    aside = _sibling(target, "replaced")
    if target.exists():
        target.rename(aside)
    try:
        fresh.rename(target)
    except BaseException:
        if aside.is_dir() and not target.exists():
            aside.rename(target)
        raise
    _flush_names(target.absolute().parent)
    shutil.rmtree(aside, ignore_errors=True)


def check_free(path: str | Path, *, overwrite: bool = False) -> None:
    """Refuse a target that would be overwritten, or that could not be written in the end.

    Raises:
        FileExistsError: it exists and is not empty, and `overwrite` is False.
        NotADirectoryError: it is a file, or below one.
        OSError: nothing can be written there.
    """
    target = Path(path)
    make_folder(target if target.exists() else target.absolute().parent)
    if target.is_dir() and any(target.iterdir()) and not overwrite:
        raise FileExistsError(
            f"{target} exists and is not empty; choose another folder, or overwrite it (overwrite=True)"
        )


def check_apart(target: str | Path, read: str | Path, what: str) -> None:
    """Refuse an output folder that is, or holds, what is read.

    Args:
        target: the output folder.
        read: the file or folder that is read.
        what: it is, for the error.

    Raises:
        ValueError: replacing one would delete the other.
    """
    place, source = Path(target).resolve(), Path(read).resolve()
    if place == source or place in source.parents:
        raise ValueError(f"{target} is or holds {what} ({read}), which would be deleted; choose another output folder")


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
    target = _followed(path)
    aside = _sibling(target, "replaced")
    if not aside.is_dir():
        return
    with _alone(target.absolute().parent):  # nobody is between the two renames
        if aside.is_dir() and not target.exists():
            logger.warning("an earlier save of %s was interrupted; its former content is back in place", target)
            aside.rename(target)
        elif aside.is_dir():
            shutil.rmtree(aside, ignore_errors=True)


def one_line(error: object) -> str:
    """An error's message in one line of at most 300 characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= ONE_LINE else f"{text[:ONE_LINE]} ..."


def read_json(path: str | Path, remedy: str, *, largest: int | None = None, strict: bool = False) -> dict[str, Any]:
    """The JSON object in a file.

    Args:
        path: of the file.
        remedy: what to do if it holds none.
        largest: bytes that such a file can have.
        strict: refuse also what only a stranger writes: a key twice, half a character, JSON more than 64 levels deep.

    Raises:
        ValueError: it is larger, no JSON, or holds something else.
        FileNotFoundError: there is no such file.
    """
    file = Path(path)
    size = file.stat().st_size
    if largest is not None and size > largest:
        raise ValueError(f"{file} has {size / 2**20:.0f} MiB, and such a file at most {largest / 2**20:.0f}; {remedy}")
    try:
        content = json.loads(file.read_text(encoding="utf-8"), object_pairs_hook=unique_keys if strict else None)
        if strict:
            _check_values(content, DEEPEST)
    except RecursionError as error:
        raise ValueError(f"{file} is damaged: it is nested too deeply for JSON; {remedy}") from error
    except ValueError as error:
        raise ValueError(f"{file} is damaged: it is not JSON ({one_line(error)}); {remedy}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} is damaged: it holds a {type(content).__name__}, not one JSON object; {remedy}")
    return content


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object of these pairs.

    Raises:
        ValueError: a key stands there twice.
    """
    content = dict(pairs)
    if len(content) < len(pairs):
        counts = Counter(key for key, _ in pairs)
        raise ValueError(f"an object has the key {counts.most_common(1)[0][0][:50]!r} twice")
    return content


def _check_values(value: Any, levels: int) -> None:
    """Refuse what is nested deeper than that, or holds half a character."""
    if levels == 0:
        raise RecursionError
    if isinstance(value, str) and (half := SURROGATE.search(value)):
        raise ValueError(f"it holds half a character, {half[0]!r}")
    inner = [*value, *value.values()] if isinstance(value, dict) else value if isinstance(value, list) else ()
    for entry in inner:
        _check_values(entry, levels - 1)


def as_json(value: Any) -> Any:
    """The value as it comes back from JSON: tuples are lists, keys are text."""
    return json.loads(json.dumps(value))


def finite(value: Any) -> Any:
    """The value with None for NaN and the infinities, which JSON does not have, in mappings and lists, too."""
    if isinstance(value, Mapping):
        return {key: finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_json(path: str | Path, content: Any) -> None:
    """Indented JSON, UTF-8, with a final newline; whole or not at all."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def write_text(path: str | Path, text: str) -> None:
    """UTF-8; as `write_bytes`."""
    write_bytes(path, text.encode())


def write_bytes(path: str | Path, content: bytes | bytearray | memoryview) -> None:
    """Write a file whole or not at all, readable for whom any new file is.

    A full disk or a power cut leaves the old file or the new one, and so does a kill, which may leave a sibling
    `.NAME.PID-THREAD.partial` besides.

    Raises:
        OSError: it cannot be written, because the disk is full for example; what was there is as it was.
    """
    target = Path(path)
    fresh = _sibling(target, f"{os.getpid()}-{threading.get_ident()}{PARTIAL}")
    try:
        fresh.unlink(missing_ok=True)  # of a killed process that had this one's numbers
        with fresh.open("xb") as file:
            lock(file.fileno())  # which tells others that somebody is writing it
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        fresh.replace(target)
    except OSError as error:
        kept = "what was there before is still in place" if target.is_file() else "nothing is left of it"
        raise OSError(error.errno, f"{target} could not be written ({error.strerror}); {kept}") from error
    finally:
        with suppress(OSError):
            fresh.unlink()
    _flush_names(target.absolute().parent)


@contextmanager
def sole_process(folder: Path) -> Iterator[None]:
    """Inside, no other process is in such a block for this folder: two of the same run would write the same files.

    Raises:
        BlockingIOError: another one is.
    """
    if not HAS_LOCKS:
        yield
        return
    number = os.open(folder, os.O_RDONLY)
    try:
        if not lock(number):
            raise BlockingIOError(
                f"another process is at work in {folder.parent}; wait for it, or choose another folder"
            )
        yield
    finally:
        os.close(number)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Inside, no other process or thread is in a block of this function for the same folder.

    Not where the system has no such locks, nor after waiting for long: somebody else's lock must not stop a save, and
    renames alone mix no folders. A thread that is in it already, as one that saves a folder inside another, does not wait.
    """
    mine = _mine.__dict__.setdefault("folders", set())
    if not HAS_LOCKS or folder in mine:
        yield
        return
    number = os.open(folder, os.O_RDONLY)
    mine.add(folder)
    try:
        given_up = time.monotonic() + LONGEST_WAIT
        while not lock(number) and time.monotonic() < given_up:
            time.sleep(0.02)
        yield
    finally:
        mine.discard(folder)
        os.close(number)


def remove_partial_files(folder: Path) -> None:
    """Remove what processes left below a folder that were killed in `write_bytes`; those that write there now go on."""
    for left in folder.rglob(f".*{PARTIAL}"):
        numbers = left.name.removesuffix(PARTIAL).rpartition(".")[2].split("-")
        if _is_left(left, numbers):
            left.unlink(missing_ok=True)


def _is_left(path: Path, numbers: Sequence[str]) -> bool:
    """Whether nobody writes there any more, by the numbers in its name, the first of which is a process's.

    A living process holds its file or folder. One may have this process's number, in a container of its own.
    """
    dead = all(number.isdecimal() for number in numbers) and (
        int(numbers[0]) == os.getpid() or not psutil.pid_exists(int(numbers[0]))
    )
    return dead and not _is_held(path)


def _is_held(path: Path) -> bool:
    """Whether somebody is in `_alone(path)`, or writes this file."""
    if not HAS_LOCKS:
        return False
    with suppress(FileNotFoundError):
        number = os.open(path, os.O_RDONLY)
        try:
            return not lock(number)
        finally:
            os.close(number)
    return False


def lock(number: int) -> bool:
    """Lock an open folder or file; False if somebody else has. Some network file systems have no locks: True."""
    with suppress(OSError):
        try:
            fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True


def _fresh_folder(target: Path) -> Path:
    """Make a sibling of the target to write into, and remove what killed processes left half-written beside it."""
    beginning = _sibling(target, "partial-")
    for left in target.absolute().parent.glob(f"{glob.escape(beginning.name)}*"):
        if _is_left(left, left.name.removeprefix(beginning.name).split("-")):
            shutil.rmtree(left, ignore_errors=True)
    for count in itertools.count(1):
        fresh = beginning.with_name(f"{beginning.name}{os.getpid()}{'' if count == 1 else f'-{count}'}")
        with suppress(FileExistsError):
            fresh.mkdir()
            return fresh
    raise AssertionError("unreachable: the numbers have no end")


def _flush_folder(folder: Path) -> None:
    """Bring all files below a folder to the disk, before a rename says that they are there."""
    for place, _, files in os.walk(folder):
        for name in files:
            with open(os.path.join(place, name), "rb") as file:
                os.fsync(file.fileno())
        _flush_names(Path(place))


def _flush_names(folder: Path) -> None:
    """Bring the names in a folder to the disk, where the system lets one."""
    with suppress(OSError):
        number = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)


def _followed(path: str | Path) -> Path:
    """The path, or what it is a link to: the link stays a link, and the folder on the disk that was chosen for it."""
    return Path(path).resolve() if Path(path).is_symlink() else Path(path)


def _sibling(target: Path, suffix: str) -> Path:
    return target.absolute().parent / f".{target.absolute().name}.{suffix}"
