"""Run a recorded study again, on the files that it was run on, and hold what comes out against the record.

`python -m analysis.reproduce reproduce/world.toml --out runs/world`
`python -m analysis.reproduce reproduce/tofu-mini.toml --input full=DIR never_saw=DIR tofu=DIR --out runs/tofu-mini`

A recipe (`.toml`) names a study, its options, and the files and folders that have to be given, each with what it is. Its record
(`.json`, of the same name) holds a hash of every file that was read, versions, and the table. Files are compared with these hashes before
any work; then the study runs, and goes on where it was interrupted; then each figure that has an interval in the record is compared with
that. `--record` writes the record anew from the finished study in `--out`.
"""

import argparse
import hashlib
import importlib
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Template
from typing import Any

import pandas as pd

from analysis.common.arguments import named_paths
from analysis.common.tables import markdown
from mrp_lens.cli.app import as_program
from mrp_lens.utils.io import read_json, write_json

KEYS = {"study", "about", "options", "files", "inputs"}
SUMMARY = "summary.json"  # of a finished study
LOW, HIGH = "_low", "_high"
IDENTITY = (
    "method",
    "seed",
    "request",
    "requests",
    "layer",
    "group",
    "times",
    "budget",
    "attack",
    "attacker",
    "form",
    "step",
)
"""Columns that say what a row of a table is about."""
READING = """\
{inside} of {all} figures lie in the record's 95% interval. That interval is about which questions were asked; digits of a fit differ by
processor and version as well (recorded with {versions}), so that a figure can lie outside without anything being wrong."""


@dataclass(frozen=True)
class Recipe:
    """A study with its options, and what has to be given for it.

    Attributes:
        path: of the `.toml`.
        study: the module, such as "analysis.leaderboard".
        options: of its command, `$name` standing for an input.
        files: those it reads, `$name` likewise; others by their path in the checkout.
        inputs: name -> what has to be given under it.
    """

    path: Path
    study: str
    options: Sequence[str]
    files: Sequence[str]
    inputs: Mapping[str, str]

    @classmethod
    def read(cls, path: Path) -> "Recipe":
        """Of a file.

        Raises:
            FileNotFoundError: there is none.
            ValueError: it is not TOML, or not a recipe.
        """
        if not path.is_file():
            raise FileNotFoundError(f"{path} is not there; the recipes are reproduce/*.toml of a checkout")
        try:
            content = tomllib.loads(path.read_text(encoding="utf-8"))
        except tomllib.TOMLDecodeError as error:
            raise ValueError(f"{path} is not TOML: {error}") from error
        if unknown := sorted(content.keys() - KEYS):
            raise ValueError(f"{path} has {', '.join(unknown)}; a recipe has {', '.join(sorted(KEYS))}")
        study = str(content.get("study", ""))
        if not study.startswith("analysis."):
            raise ValueError(
                f"{path}: study must be a module of this package such as 'analysis.leaderboard', got {study!r}"
            )
        recipe = cls(path, study, content.get("options", []), content.get("files", []), content.get("inputs", {}))
        named = {name for text in (*recipe.options, *recipe.files) for name in Template(text).get_identifiers()}
        if named != set(recipe.inputs):
            raise ValueError(
                f"{path} speaks of {sorted(named)} and says what {sorted(recipe.inputs)} are; these must be the same"
            )
        return recipe

    @property
    def record(self) -> Path:
        """Where its record is."""
        return self.path.with_suffix(".json")

    def check_given(self, given: Mapping[str, str]) -> None:
        """Refuse inputs that are missing or that it has no use for.

        Raises:
            ValueError: says which, and what each of them is.
        """
        for name, what in self.inputs.items():
            if name not in given:
                raise ValueError(f"--input {name}=PATH is missing: {what}")
        if unknown := sorted(given.keys() - self.inputs.keys()):
            known = ", ".join(self.inputs) or "no input"
            raise ValueError(f"--input {unknown[0]}=... is not asked for; this recipe takes {known}")

    def hashes(self, given: Mapping[str, str]) -> dict[str, str]:
        """File, as the recipe names it -> SHA-256 of its content.

        Raises:
            FileNotFoundError: one is not there.
        """
        found = {}
        for name in self.files:
            path = self.path.absolute().parent.parent / Template(name).substitute(given)
            if not path.is_file():
                raise FileNotFoundError(f"{path}, which {self.path} calls {name}, is not there; see --input")
            with path.open("rb") as file:
                found[name] = hashlib.file_digest(file, "sha256").hexdigest()
        return found

    def arguments(self, given: Mapping[str, str], out: Path) -> list[str]:
        """Of the study's command."""
        return [*(Template(text).substitute(given) for text in self.options), "--out", str(out)]


def differing(recorded: Mapping[str, str], found: Mapping[str, str]) -> list[str]:
    """The files whose content is not the record's."""
    return [name for name in found if recorded.get(name) != found[name]]


def compared(recorded: pd.DataFrame, found: pd.DataFrame) -> pd.DataFrame:
    """A row a figure of the record that has an interval: `row`, `figure`, `recorded`, `low`, `high`, `found`, `inside`.

    Args:
        recorded: the record's table.
        found: that of the study now; a row or column that it lacks leaves `found` NaN and `inside` False.

    Raises:
        ValueError: the record has two rows about the same.
    """
    keys = [key for key in IDENTITY if key in recorded]
    named = [_identity(row, keys) for row in recorded.to_dict("records")]
    if twice := [" ".join(name) for name in named if named.count(name) > 1]:
        raise ValueError(
            f"the record has several rows about {twice[0]!r}; no column of {', '.join(IDENTITY)} tells them apart"
        )
    now = {_identity(row, keys): row for row in found.to_dict("records")}
    rows = []
    for row in recorded.to_dict("records"):
        name = _identity(row, keys)
        for figure, low, high in _figures(row):
            value = now.get(name, {}).get(figure, float("nan"))
            value = float("nan") if value is None else float(value)
            recorded_value = float(row[figure])
            inside = min(low, recorded_value) <= value <= max(high, recorded_value)
            rows.append(
                {"row": " ".join(name), "figure": figure, "recorded": recorded_value, "low": low, "high": high}
                | {"found": value, "inside": inside}
            )
    return pd.DataFrame(rows, columns=["row", "figure", "recorded", "low", "high", "found", "inside"])


def _identity(row: Mapping[Any, Any], keys: Sequence[str]) -> tuple[str, ...]:
    """What a row is about, as text: a seed is 0 in one table and 0.0 in another, and one that is not known None or NaN."""
    known = [row[key] for key in keys if key in row and not pd.isna(row[key])]
    return tuple(f"{value:g}" if isinstance(value, int | float) else str(value) for value in known)


def _figures(row: Mapping[Any, Any]) -> Iterator[tuple[str, float, float]]:
    """Column, lower and upper end of every figure that is known and has an interval: `damage` with `damage_low`, or
    `forget_accuracy` with `forget_low`."""
    for column in row:
        if not str(column).endswith(LOW):
            continue
        stem = str(column).removesuffix(LOW)
        figure = stem if stem in row else f"{stem}_accuracy"
        ends = [row.get(name) for name in (figure, column, f"{stem}{HIGH}")]
        if not any(end is None or pd.isna(end) for end in ends):
            yield figure, float(ends[1]), float(ends[2])  # type: ignore[arg-type]


def finding(table: pd.DataFrame, versions: Mapping[str, str]) -> str:
    """The comparison in words: what lies outside, row by row, and how many do not."""
    outside = table[~table["inside"]]
    text = pd.DataFrame(
        {
            "": outside["row"],
            "figure": outside["figure"],
            "recorded": [f"{row.recorded:.3f} [{row.low:.3f}, {row.high:.3f}]" for row in outside.itertuples()],
            "found": [f"{value:.3f}" for value in outside["found"]],
        }
    )
    said = ", ".join(f"{name} {version}" for name, version in versions.items())
    reading = READING.format(inside=int(table["inside"].sum()), all=len(table), versions=said)
    return f"{markdown(text)}\n\n{reading}" if len(text) else reading


def main(arguments: Sequence[str] | None = None) -> None:
    """Check the files, run the study, compare; or write the record of a study that has run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path, help="reproduce/NAME.toml")
    parser.add_argument(
        "--input", nargs="+", action="extend", default=[], metavar="NAME=PATH", help="what the recipe asks for"
    )
    parser.add_argument(
        "--out", type=Path, required=True, help="folder of the study; one that was begun is gone on with"
    )
    parser.add_argument("--other-files", action="store_true", help="go on though files are not the recorded ones")
    parser.add_argument(
        "--record", action="store_true", help="write the record from the study in --out, which has to be finished"
    )
    options = parser.parse_args(arguments)
    recipe = Recipe.read(options.recipe)
    given = {
        name: str(Path(path).expanduser().absolute()) for name, path in named_paths(options.input, "--input").items()
    }
    recipe.check_given(given)
    hashes = recipe.hashes(given)
    record = read_json(recipe.record, "take it from the repository again") if recipe.record.is_file() else None
    if record is None and not options.record:
        raise FileNotFoundError(
            f"{recipe.record} is not there; take it from the repository, or write one with --record"
        )
    other = [] if record is None or options.record else differing(record["sha256"], hashes)
    if other and not options.other_files:
        raise ValueError(
            f"{', '.join(other)}: not the content that was recorded. Give the files of the record, or compare all the same with --other-files"
        )
    importlib.import_module(recipe.study).main(recipe.arguments(given, options.out))
    if not (options.out / SUMMARY).is_file():
        raise ValueError(f"{options.out} holds no {SUMMARY}: the study has not come to its end")
    summary = read_json(options.out / SUMMARY, "run the study again")
    if record is None or options.record:
        kept = {key: summary[key] for key in ("finished", "versions", "rows")}
        own = pd.DataFrame(summary["rows"])
        compared(own, own)  # refuses a table whose rows nothing tells apart
        write_json(recipe.record, {"sha256": hashes, **kept})
        print(f"Written to {recipe.record}.")
        return
    table = compared(pd.DataFrame(record["rows"]), pd.DataFrame(summary["rows"]))
    table.to_csv(options.out / "reproduced.csv", index=False)
    print(finding(table, record["versions"]))


if __name__ == "__main__":
    as_program("analysis.reproduce", main)
