"""Rows of .txt, .csv, .tsv, .json and .jsonl files as they are written: nothing is guessed, retyped or dropped."""

import csv
import json
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from mrp_lens.corpus.rows import SURROGATE, Row, Untyped, listing, shown, unique

LONGEST_CELL = 2**24  # characters; a quotation mark that is never closed would fill the memory
TOGETHER = 100  # rows

SPACE = re.compile(r"[ \t\r\n]*")

_limit = threading.Lock()


class Written(float):
    """A number of a JSON file, which keeps the digits it is written with: 0.50 is not 0.5 once it is text."""

    def __init__(self, digits: str) -> None:
        self.digits = digits

    def __str__(self) -> str:
        return self.digits


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError(f"an object has one of the keys {listing(found)} twice")
    return found


_JSON = json.JSONDecoder(object_pairs_hook=_object, parse_float=Written)


def parsed(text: str, place: int = 0) -> tuple[Any, int]:
    """The JSON value that starts at `place`, and where it ends.

    Raises:
        ValueError: there is none, it is nested too deeply, or it holds half a character or a key twice.
    """
    try:
        value, end = _JSON.raw_decode(text, place)
        if text.find("\\u", place, end) >= 0 and (found := SURROGATE.search(json.dumps(value, ensure_ascii=False))):
            raise ValueError(f"it holds half a character, {found[0]!r}; write the whole character")
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    return value, end


def _lines(file: Path) -> Iterator[tuple[int, str]]:
    """The lines of a file with their numbers from 1 and their ends."""
    # Bytes that are not UTF-8 become surrogates, which UTF-8 cannot hold, so that their line can be named.
    with file.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as lines:
        for number, line in enumerate(lines, 1):
            _check(line, number, file)
            yield number, line


def _check(text: str, number: int, file: Path) -> None:
    """Refuse bytes that are not UTF-8 in a text that starts at this line."""
    found = None if text.isascii() else SURROGATE.search(text)
    place = found.start() if found else text.find("\0")
    if place < 0:
        return
    line = number + text.count("\n", 0, place)
    if found:
        raise ValueError(
            f"{file}, line {line} is not UTF-8: byte 0x{ord(found[0]) - 0xDC00:02x} begins no character; save the file as UTF-8"
        )
    raise ValueError(f"{file}, line {line} holds a NUL, as UTF-16 and binary files do; save the file as UTF-8")


def _filled(file: Path) -> Iterator[tuple[int, str]]:
    return ((number, line.rstrip("\r\n")) for number, line in _lines(file) if line.strip())


def _txt(file: Path) -> Iterator[Row]:
    return ({"text": line} for _, line in _filled(file))


def _jsonl(file: Path) -> Iterator[Row]:
    for number, line in _filled(file):
        start = _space(line, 0)
        try:
            row, end = parsed(line, start)
            if _space(line, end) < len(line):
                raise ValueError(f"more follows the object: {shown(line[end:])}")
        except ValueError as error:
            raise ValueError(
                f"{file}, line {number} is not JSON ({error}); a .jsonl file holds one object a line"
            ) from error
        if not isinstance(row, dict):
            raise ValueError(f'{file}, line {number} is not an object but {shown(line)}; write {{"text": ...}}')
        yield row


def _json(file: Path) -> Iterator[Row]:
    """The objects of a list, or, without one, objects that follow each other; made one by one."""
    with file.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as opened:
        text = opened.read()
    _check(text, 1, file)
    place = _space(text, 0)
    listed, found = text.startswith("[", place), 0
    place = _space(text, place + listed)
    while not (text.startswith("]", place) if listed else place == len(text)):
        if listed and found:
            if not text.startswith(",", place):
                raise _unreadable(text, place, file, "a comma or ] is missing")
            place = _space(text, place + 1)
        try:
            row, end = parsed(text, place)
        except ValueError as error:
            raise _unreadable(text, getattr(error, "pos", place), file, getattr(error, "msg", str(error))) from error
        if not isinstance(row, dict):
            raise _unreadable(text, place, file, f"row {found} is {shown(row)}, not an object")
        yield row
        found, place = found + 1, _space(text, end)
    if listed and (place := _space(text, place + 1)) < len(text):
        raise _unreadable(text, place, file, "more follows the list")


def _unreadable(text: str, place: int, file: Path, why: str) -> ValueError:
    line = text.count("\n", 0, place) + 1
    return ValueError(f"{file} cannot be read as .json, line {line}: {why}; write a list of objects")


def _space(text: str, place: int) -> int:
    """The end of the white space that begins here."""
    found = SPACE.match(text, place)
    return found.end() if found else place


def _separated(file: Path, *, separator: str) -> Iterator[Row]:
    """The rows under a header; an empty cell has no value."""
    names: list[str] | None = None
    reader = csv.reader((line for _, line in _lines(file)), delimiter=separator, strict=True)
    for number, cells in _records(reader, file):
        if not cells:  # an empty line
            continue
        if names is None:
            names = unique(cells, f"{file}, line {number}")
        elif len(cells) != len(names):
            raise ValueError(
                f"{file}, line {number}: {len(cells)} cells under {len(names)} columns; write a cell that holds {separator!r} in quotation marks"
            )
        else:
            yield Untyped(zip(names, (cell or None for cell in cells), strict=True))


def _records(reader: Any, file: Path) -> Iterator[tuple[int, list[str]]]:
    """The records of a csv reader with the numbers of their last lines."""
    some = [(0, [""])]
    while some:
        with _limit:  # of the whole process
            before = csv.field_size_limit(LONGEST_CELL)
            try:
                some = [(reader.line_num, cells) for cells in islice(reader, TOGETHER)]
            except csv.Error as error:
                raise ValueError(
                    f"{file}, line {reader.line_num}: {error}; is a quotation mark left open, or not doubled?"
                ) from error
            finally:
                csv.field_size_limit(before)
        yield from some


READERS: Mapping[str, Callable[[Path], Iterator[Row]]] = {
    ".jsonl": _jsonl,
    ".json": _json,
    ".csv": partial(_separated, separator=","),
    ".tsv": partial(_separated, separator="\t"),
    ".txt": _txt,
}
