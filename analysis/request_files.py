"""Data cut into requests that come one after another, as the files that `analysis.continual` reads.

`python -m analysis.request_files tofu --data DIR --out runs/requests` cuts `forget.jsonl` (question, answer) into groups of whole authors,
told apart by `forget_quiz.jsonl` (the same questions in the same order; choices, answer, author).

`python -m analysis.request_files facts --data DIR --out runs/requests` makes a request of each relation in the data folder of
`analysis.facts`: the capitals of countries, their currencies, the capitals of states. The continents and ordinary text are kept.

Of either come `NAME.jsonl` and `NAME-quiz.jsonl` for each request, and `retain.jsonl` and `retain-quiz.jsonl`.
"""

import argparse
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from analysis.facts import SHORT, STATEMENTS, rows_of_file, statements
from mrp_lens.cli.app import as_program
from mrp_lens.utils.io import whole_folder, write_text

Rows = Sequence[Mapping[str, Any]]
"""Of a `.jsonl` file."""

KEPT_STATEMENT = "{} is a country in"  # of the continents, which no request names
KEPT_QUESTION = "On which continent"


def of_tofu(data: Path, groups: int) -> dict[str, Rows]:
    """Name of a file -> its rows: `groups` groups of whole authors, the first ones larger where they cannot be equal.

    Raises:
        ValueError: the quiz is not about the documents one by one, or there are fewer authors than groups.
    """
    documents, quiz = rows_of_file(data / "forget.jsonl"), rows_of_file(data / "forget_quiz.jsonl")
    if [row["question"] for row in documents] != [row["question"] for row in quiz]:
        raise ValueError(f"{data}: forget.jsonl and forget_quiz.jsonl must have the same questions in the same order")
    authors = list(dict.fromkeys(row["author"] for row in quiz))
    if not 1 <= groups <= len(authors):
        raise ValueError(f"--groups {groups}: there are {len(authors)} authors; choose from 1 to {len(authors)}")
    smaller, left = divmod(len(authors), groups)
    files: dict[str, Rows] = {}
    for number in range(groups):
        first = number * smaller + min(number, left)
        group = authors[first : first + smaller + (number < left)]
        files[f"authors{number + 1}"] = [
            row for row, asked in zip(documents, quiz, strict=True) if asked["author"] in group
        ]
        files[f"authors{number + 1}-quiz"] = [row for row in quiz if row["author"] in group]
    return files | {
        "retain": rows_of_file(data / "retain.jsonl"),
        "retain-quiz": rows_of_file(data / "retain_quiz.jsonl"),
    }


def of_facts(data: Path) -> dict[str, Rows]:
    """Name of a file -> its rows: a request for each relation."""
    files: dict[str, Rows] = {}
    for topic in STATEMENTS:
        about = rows_of_file(data / f"{topic}.jsonl")
        files[topic] = [{"text": text} for text in statements(topic, about)]
        files[f"{topic}-quiz"] = about
    files["capital"] = rows_of_file(data / "forget.jsonl")
    kept = tuple(KEPT_STATEMENT.format(row["entity"]) for row in rows_of_file(data / "continent.jsonl"))
    retain = [row for row in rows_of_file(data / "retain.jsonl") if is_kept(row["text"], kept)]
    quiz = [row for row in rows_of_file(data / "retain_quiz.jsonl") if row["question"].startswith(KEPT_QUESTION)]
    return files | {"retain": retain, "retain-quiz": quiz}


def is_kept(text: str, kept: tuple[str, ...]) -> bool:
    """Whether a text is prose, or a statement that begins like one of these."""
    return len(text.split()) >= SHORT or text.startswith(kept)


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the files into a folder, whole or not at all."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bed", choices=["tofu", "facts"], help="which data the folder holds")
    parser.add_argument("--data", type=Path, required=True, help="folder of the .jsonl files")
    parser.add_argument("--groups", type=int, default=3, help="of TOFU's authors (default 3)")
    parser.add_argument("--out", type=Path, default=Path("runs/requests"), help="folder for the files")
    parser.add_argument("--overwrite", action="store_true", help="replace the folder")
    options = parser.parse_args(arguments)
    files = of_facts(options.data) if options.bed == "facts" else of_tofu(options.data, options.groups)
    with whole_folder(options.out, overwrite=options.overwrite) as folder:
        for name, rows in files.items():
            write_text(folder / f"{name}.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    for name, rows in files.items():
        print(f"{name}.jsonl: {len(rows)} rows")


if __name__ == "__main__":
    as_program("analysis.request_files", main)
