"""The findings of a suite as one table: what each attack brought back, beside its controls, and what must be known to read it."""

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from mrp_lens.attacks.base import Frames
from mrp_lens.attacks.suite import SuiteConfig
from mrp_lens.utils.frames import Row, is_number, rows_of

ACCURACIES = ("n", "accuracy_before", "accuracy_edited", "accuracy_after", "floor", "ceiling")
RECOVERY = ("recovery", "recovery_low", "recovery_high")
NO_ATTACK = "no attack"


def rows_of_attacks(frames: Frames, name: str, config: SuiteConfig) -> list[Row]:
    """One row an attack, and its controls.

    Args:
        frames: of `run_suite`.
        name: of the edit.
        config: of the suite: the attacks that were run.

    Returns:
        Rows of `method` (the edit's name; "unedited", "never-taught" and "random-trigger" are controls), `attack`, and
        on the held-out questions `n`, `accuracy_before` (unedited), `accuracy_edited`, `accuracy_after` the attack,
        `floor`, `ceiling`, `recovery` with its interval; for probes, which come last, `layer` (their best), `bits` with
        their interval, `never_taught_bits` (at the layer that is best for these) and `bits_in_all`. The first is the edit without attack.
    """
    rows = [dict(row) for attack in config.chosen for row in attack.rows(frames, name)]
    plain = [row for row in rows if row["attack"] == NO_ATTACK]
    rest = sorted((row for row in rows if row["attack"] != NO_ATTACK), key=lambda row: "bits" in row)
    return [row for found in plain[:1] + rest for row in rows_of(pd.DataFrame([found]))]


def notes_of(frames: Frames, name: str, config: SuiteConfig) -> list[str]:
    """What must be known to read the table, such as attacks that do not count; arguments as `rows_of_attacks`."""
    return [note for attack in config.chosen for note in attack.notes(frames, name)]


def worst_attack(rows: Sequence[Row], name: str) -> list[str]:
    """Which attack brought most back, and whether there was anything to bring back, in sentences.

    The worst is that whose recovery is certain to be largest: by the lower end of its interval, so that few questions, or a
    ceiling that the attack itself pulled down, count for little.

    Args:
        rows: of `rows_of_attacks`.
        name: of the edit.
    """
    own = [row for row in rows if row["method"] == name and is_number(row.get("recovery_low"))]
    attacked = [row for row in own if row["attack"] != NO_ATTACK]
    notes = []
    for row in own:
        if row["attack"] == NO_ATTACK and row["recovery_low"] > 0.0:
            notes.append(f"Not all was forgotten to begin with: without an attack {_told(row)}.")
    if attacked:
        worst = max(attacked, key=lambda row: (row["recovery_low"], row["accuracy_after"]))
        notes.append(f"Worst of {len(attacked)} attacks: {worst['attack']}, {_told(worst)}.")
    return notes


def _told(row: Row) -> str:
    low, high = row["recovery_low"], row["recovery_high"]
    return f"recovery {row['recovery']:.2f} [{low:.2f}, {high:.2f}], {row['accuracy_after']:.0%} right"


def columns(row: Mapping[Any, Any], *keys: tuple[str, ...]) -> dict[str, Any]:
    """Those of a frame's row that it has."""
    return {key: row[key] for part in keys for key in part if key in row}


def without_attack(row: Mapping[Any, Any], name: str) -> dict[str, Any]:
    """The edit's row before any attack, from one that has `accuracy_edited`; the first of several attacks' is shown."""
    known = columns(row, ACCURACIES) | {"accuracy_after": row["accuracy_edited"]}
    shown = {"method": name, "attack": NO_ATTACK, **known, **columns(row, RECOVERY)}
    return shown | {"forget_accuracy": row["accuracy_edited"]}
