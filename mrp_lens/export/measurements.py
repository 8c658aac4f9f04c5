"""What runs measured of an edit, read from the folders that they left, for the model card."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mrp_lens.edits import Edit, load_edit
from mrp_lens.edits.provenance import fingerprint, label_of
from mrp_lens.metrics.controls import CONTROLS
from mrp_lens.utils.frames import Row
from mrp_lens.utils.io import read_json


@dataclass(frozen=True)
class Measurements:
    """What runs measured of an edit.

    Attributes:
        rows: of the summary of `mrp-lens unlearn`, `demo`, `measure` or `tune` (the half that nothing was chosen by): `method`, and
            figures by any name; controls are rows too.
        attacks: rows of the summary of `mrp-lens attack`, with `attack` besides.
        notes: what these runs say must be known to read them.
        sources: a line on each of these runs.
        edits: for each of these runs that says which edits it is about, their fingerprints.
    """

    rows: Sequence[Row] = ()
    attacks: Sequence[Row] = ()
    notes: Sequence[str] = ()
    sources: Sequence[str] = ()
    edits: Sequence[frozenset[str]] = ()

    @classmethod
    def read(cls, run: str | Path | None = None, attacks: str | Path | None = None) -> "Measurements":
        """Read the folders that these commands wrote; generated answers and arguments stay there.

        Raises:
            FileNotFoundError: there is no such folder, or no `summary.json` in it.
            ValueError: the file is damaged, holds no rows, or is of the other kind of run.
        """
        measured = {} if run is None else _summary(Path(run), attacked=False)
        attacked = {} if attacks is None else _summary(Path(attacks), attacked=True)
        known = [frozenset(_edits_of(Path(folder))) for folder in (run, attacks) if folder is not None]
        return cls(
            rows=measured.get("rows", ()),
            attacks=attacked.get("rows", ()),
            notes=[str(note) for summary in (measured, attacked) for note in summary.get("notes", ())],
            sources=[_source(summary) for summary in (measured, attacked) if summary],
            edits=[edits for edits in known if edits],
        )


def check_record(edit: Edit, record: Measurements) -> None:
    """Refuse figures that are another edit's.

    Raises:
        ValueError: says whose they are.
    """
    label = label_of(edit)
    measured = [rows for rows in (record.rows, record.attacks) if rows]
    named = all(any(_is_own(row, label) for row in rows) for rows in measured)
    if not named or any(fingerprint(edit) not in known for known in record.edits):
        methods = dict.fromkeys(str(row["method"]) for rows in measured for row in rows)
        raise ValueError(
            f"the run that was given is about another edit than this one ({label}): it measured {', '.join(methods)}; give the folder of "
            "this edit's run"
        )


def rows_about(rows: Sequence[Row], label: str) -> list[Row]:
    """The rows of the method, and the controls."""
    return [row for row in rows if row["method"] in CONTROLS or _is_own(row, label)]


def _is_own(row: Row, label: str) -> bool:
    return row["method"] == label or str(row["method"]).startswith(f"{label}, ")  # "mrp, relearned"


def _summary(folder: Path, *, attacked: bool) -> dict[str, Any]:
    command = "mrp-lens attack" if attacked else "mrp-lens unlearn, demo or measure"
    path = folder / "summary.json"
    if not path.is_file():
        raise FileNotFoundError(f"{folder} holds no summary.json; give a folder that {command} wrote")
    summary = read_json(path, f"run {command} again")
    rows = summary.get("rows")
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{path} is damaged (its rows are no table); run {command} again")
    if summary.get("command") == "tune":  # what trials were chosen by is not of this edit
        summary["rows"] = rows = [row for row in rows if row.get("split") != "tuning"]
    if not rows or any(("attack" in row) != attacked or "method" not in row for row in rows):
        raise ValueError(f"{path} holds no rows, or not those of {command}; give a folder that it wrote")
    return summary


def _edits_of(folder: Path) -> Iterator[str]:
    """Fingerprints of the edits that a run is about: saved in it, or named by the plan of its attacks."""
    plan = folder / "campaign.json"
    if plan.is_file():
        yield str(json.loads(plan.read_text(encoding="utf-8"))["edit"])
    for config in sorted(folder.glob("**/edit_config.json")):
        yield fingerprint(load_edit(config.parent))


def _source(summary: Mapping[str, Any]) -> str:
    made = ", ".join(f"{name} {number}" for name, number in summary.get("versions", {}).items())
    return f"{summary.get('command')}, seed {summary.get('seed')}, {summary.get('finished')}; {made}"
