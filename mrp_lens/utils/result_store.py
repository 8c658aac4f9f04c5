"""A folder of results computed one by one, each whole or not at all, so that a killed run goes on where it stopped."""

import json
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from mrp_lens.utils.frames import frame_of, rows_of
from mrp_lens.utils.io import make_folder, read_json, remove_partial_files, sole_process, whole_folder, write_json
from mrp_lens.utils.workers import exclusive

POINTS = "points"
RECORD = "summary.json"  # of a finished run, with these keys and others
RECORDED = {"command", "versions", "rows"}
REMEDY = "remove it, and run the command again"


@dataclass(frozen=True)
class ResultStore:
    """The folder of a run whose settings are fixed: `<kind>.json` holds these, `points/` one file a result."""

    folder: Path

    @classmethod
    def claim(
        cls,
        folder: str | Path,
        kind: str,
        settings: Mapping[str, Any],
        *,
        earlier: Mapping[str, Any] | None = None,
        overwrite: bool = False,
    ) -> "ResultStore":
        """Make the folder, or go on in one of the same settings.

        Args:
            folder: of the run.
            kind: what it is called in errors, such as "sweep".
            settings: everything that the results depend on; JSON.
            earlier: those of the settings that version 0.1 wrote otherwise, as it did; they are as good in a folder whose
                record shows that 0.1 wrote it.
            overwrite: begin anew where the folder holds a run.

        Raises:
            ValueError: the folder holds such a run with other settings (which differ is said), or its settings are damaged.
            FileExistsError: it holds something else.
            OSError: it cannot be made or written into, or is to be overwritten and another process is at work in it.
        """
        target = Path(folder)
        if overwrite:
            _remove_run(target, kind)
        check_holds(target, kind)
        with exclusive(make_folder(target)):  # several processes may begin it at once
            make_folder(target / POINTS)
            path = target / f"{kind}.json"
            wanted: dict[str, Any] = json.loads(json.dumps(settings))
            known = read_json(path, REMEDY) if path.is_file() else None
            if known is not None and earlier is not None and _of_0_1(known, wanted):
                wanted |= {
                    key: known.get(key)
                    for key, value in earlier.items()
                    if known.get(key) == json.loads(json.dumps(value))
                }
            differing = [] if known is None else _differing(known, wanted)
            begun = any(entry != path for entry in target.rglob("*") if not entry.is_dir())
            if differing and begun:
                raise ValueError(
                    f"{target} holds a {kind} with other settings: {'; '.join(differing)}. Choose another folder, give the same settings to "
                    "go on with it, or replace it with overwrite=True"
                )
            if known is None or differing:
                write_json(path, wanted)
        return cls(target)

    @property
    def lock(self) -> AbstractContextManager[None]:
        """For a run that is not split into shards: refuses a second process in the same folder."""
        return sole_process(self.folder / POINTS)

    def stored(self, name: str) -> dict[str, Any] | None:
        """The result of that name, if it is there.

        Raises:
            ValueError: its file is damaged.
        """
        path = self.folder / POINTS / f"{name}.json"
        return read_json(path, REMEDY) if path.is_file() else None

    def keep(self, name: str, content: Mapping[str, Any]) -> dict[str, Any]:
        """Write a result; returns it as it will be read."""
        (self.folder / POINTS).mkdir(exist_ok=True)
        write_json(self.folder / POINTS / f"{name}.json", content)
        kept: dict[str, Any] = json.loads(json.dumps(content))
        return kept

    def once(self, name: str, compute: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
        """The result of that name, computed and written unless it is there already."""
        known = self.stored(name)
        return self.keep(name, compute()) if known is None else known

    def frame(self, name: str, compute: Callable[[], pd.DataFrame]) -> pd.DataFrame:
        """The frame of that name, computed and written unless it is there already."""
        return frame_of(self.once(name, lambda: {"rows": rows_of(compute())})["rows"])

    def frames(self, name: str, compute: Callable[[], Mapping[str, pd.DataFrame]]) -> dict[str, pd.DataFrame]:
        """Several frames that are computed together, kept as one result of that name."""
        stored = self.once(name, lambda: {key: rows_of(frame) for key, frame in compute().items()})
        return {key: frame_of(rows) for key, rows in stored.items()}

    def check_same(self, name: str, value: Mapping[str, Any]) -> None:
        """Note what the run began with, and refuse to go on with something else.

        Raises:
            ValueError: says what differs.
        """
        differing = _differing(self.once(name, lambda: value), json.loads(json.dumps(value)))
        if differing:
            raise ValueError(
                f"{self.folder} was begun with another {name}: {'; '.join(differing)}. Choose another folder, or the same {name}"
            )

    def tidy(self) -> None:
        """Remove what processes left that were killed while they wrote; other ones may be writing."""
        remove_partial_files(self.folder)


def check_holds(folder: str | Path, kind: str) -> None:
    """Refuse a folder that holds something other than a run of this kind, before any work is done.

    Raises:
        FileExistsError: it is not empty and holds no such run.
    """
    target = Path(folder)
    if target.is_dir():
        with exclusive(target):  # another process may be beginning such a run
            held = (target / f"{kind}.json").is_file() or not any(target.iterdir())
    else:
        held = not target.exists() or target.is_dir()  # which another process has made since
    if not held:
        raise FileExistsError(f"{target} exists and holds no {kind}; choose another folder")


def holds_run(folder: str | Path, kind: str) -> bool:
    """Whether a folder holds a finished run, or one of this kind that was begun, or no file at all: nothing but results."""
    target = Path(folder)
    if (target / f"{kind}.json").is_file() and (target / POINTS).is_dir():
        return True
    with suppress(ValueError, OSError):
        if read_json(target / RECORD, REMEDY).keys() >= RECORDED:
            return True
    return target.is_dir() and not any(entry.is_symlink() or not entry.is_dir() for entry in target.rglob("*"))


def check_replaceable(folder: str | Path, kind: str) -> None:
    """Refuse to replace a folder that holds more than a run, or a run that is under way, before any work is done.

    Raises:
        FileExistsError: it holds files, and no finished run nor one of this kind.
        BlockingIOError: another process is at work in it.
    """
    target = Path(folder)
    if target.is_dir() and not holds_run(target, kind):
        raise FileExistsError(
            f"{target} exists and holds no run, so nothing replaces it; choose another folder, or empty this one yourself"
        )
    with _alone_in(target):
        pass


def _remove_run(folder: Path, kind: str) -> None:
    """Put an empty folder in the place of one that holds a run, or leave it as it is."""
    check_replaceable(folder, kind)
    if folder.is_dir():
        with _alone_in(folder), whole_folder(folder, overwrite=True):
            pass


def _alone_in(folder: Path) -> AbstractContextManager[None]:
    """The lock of a run's folder, where there is one."""
    points = folder / POINTS
    return sole_process(points) if points.is_dir() else nullcontext()


def _of_0_1(known: Mapping[str, Any], wanted: Mapping[str, Any]) -> bool:
    """Whether version 0.1 wrote the settings of a folder: it knew a model by its embedding alone."""
    there, now = known.get("model"), wanted.get("model")
    return isinstance(there, dict) and isinstance(now, dict) and "weights" in now and "weights" not in there


def _differing(known: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """What differs, in words; a setting that is not given is None. Of a model, what an earlier version did not write down is not
    compared."""
    differing = []
    for key in {**wanted, **known}:
        value, there = wanted.get(key), known.get(key)
        if key in ("model", "reference") and isinstance(there, dict) and isinstance(value, dict):
            value = {name: entry for name, entry in value.items() if name in there}
            there = {name: there[name] for name in value}
        differing += _apart(key, there, value)
    return differing


def _apart(key: str, there: Any, now: Any) -> list[str]:
    """What of one setting differs, down to the entries of mappings."""
    if isinstance(there, dict) and isinstance(now, dict) and there.keys() == now.keys():
        return [found for name in now for found in _apart(f"{key}.{name}", there[name], now[name])]
    return [] if there == now else [f"{key} ({_short(there)} there, {_short(now)} now)"]


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
