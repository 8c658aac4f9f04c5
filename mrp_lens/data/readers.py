"""Rows of files, one after another: of text, of .parquet, and of the folders that `save_to_disk` of `datasets` wrote.

Text is read strictly, each fault with its line. Tables are read by pyarrow alone: `datasets` would follow paths out of the
folder, and decode pictures and sounds.
"""

import csv
import json
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from itertools import islice
from pathlib import Path
from struct import unpack_from
from typing import Any, TypeGuard

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq

from mrp_lens.data.rows import MOST_LISTED, Row, Untyped, shown, unique
from mrp_lens.utils.io import SURROGATE, unique_keys

SPACE = re.compile(r"[ \t\r\n]*")  # between values of JSON
LONGEST_CELL = 2**24  # characters; a quotation mark that is never closed would fill the memory
CSV_ROWS = 100  # read at a time
_limit = threading.Lock()  # of cells, which the csv module has once for the whole process

ARROW_ROWS = 256  # rows that are Python objects at a time
BUFFER = 2**20  # bytes of a .parquet column that are read at a time
ROW = 200  # bytes that a row takes at the least, once it is a document
END = b"\xff\xff\xff\xff\0\0\0\0"  # of a stream that was written to its end
SHARD = re.compile(r"data-([0-9]{1,9})-of-([0-9]{1,9})\.arrow")
SAVED = "Dataset.save_to_disk or DatasetDict.save_to_disk"


class Written(float):
    """A number of a JSON file, which keeps the digits it is written with: 0.50 is not 0.5 once it is text."""

    def __init__(self, digits: str) -> None:
        self.digits = digits

    def __str__(self) -> str:
        return self.digits


_JSON = json.JSONDecoder(object_pairs_hook=unique_keys, parse_float=Written)


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
        with _limit:
            before = csv.field_size_limit(LONGEST_CELL)
            try:
                some = [(reader.line_num, cells) for cells in islice(reader, CSV_ROWS)]
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


def parquet_rows(file: Path) -> Iterator[Row]:
    """The rows of a .parquet file.

    Raises:
        ValueError: it is damaged, two columns have one name, or what it announces does not fit into memory.
    """
    with (
        _foreign(file),
        pa.OSFile(str(file)) as source,
        pq.ParquetFile(source, page_checksum_verification=True, pre_buffer=False, buffer_size=BUFFER) as table,
    ):
        announced = table.metadata
        groups = [announced.row_group(place) for place in range(announced.num_row_groups)]
        _check_fits(max([group.total_byte_size for group in groups], default=0), announced.num_rows, file)
        found = 0
        for batch in table.iter_batches(batch_size=ARROW_ROWS):
            _check_fits(batch.nbytes, 0, file)
            found += batch.num_rows
            yield from batch_rows(batch, file)
        if found != announced.num_rows:
            raise ValueError(f"{file} announces {announced.num_rows} rows and holds {found}; it is damaged")


def saved_rows(folder: Path, split: str | None) -> Iterator[Row]:
    """The rows of a folder that `save_to_disk` wrote; `split` picks one of a DatasetDict.

    Raises:
        ValueError: it is no such folder, it is damaged, a file of it lies elsewhere, or `split` is missing or
            superfluous.
    """
    if (folder / "state.json").exists():
        if split is not None:
            raise ValueError(f"{folder} holds a single Dataset, which has no split {split!r}; leave split= out")
        return _saved(folder, folder)
    if not (folder / "dataset_dict.json").exists():
        raise ValueError(f"{folder} is a folder, but not one that {SAVED} wrote; name a file in it")
    listed = _described(folder, "dataset_dict.json", folder).get("splits")
    if not isinstance(listed, list) or not all(_is_name(name) for name in listed):
        raise ValueError(f"{folder / 'dataset_dict.json'} does not list the splits, as {SAVED} writes them")
    if split is None or split not in listed:
        asked = "" if split is None else f", not {split!r}"
        raise ValueError(
            f"{folder} holds the splits {', '.join(listed[:MOST_LISTED])}{asked}; give split= one of them, or name its folder"
        )
    return _saved(folder / split, folder)


def dataset_rows(dataset: Any) -> Iterator[Row]:
    """The rows of a Dataset, with pictures and sounds as they are stored: nothing here looks at one."""
    for table in dataset.with_format("arrow").iter(batch_size=ARROW_ROWS):
        for batch in table.to_batches():
            yield from batch_rows(batch, dataset.info.dataset_name or "Dataset")


def batch_rows(batch: pa.RecordBatch, where: object) -> Iterator[Row]:
    """The rows of a batch, which is checked first: Arrow follows the offsets of a damaged one anywhere.

    Raises:
        ValueError: two columns have one name, or the batch is damaged.
    """
    with _foreign(where):
        names = unique(batch.schema.names, str(where))
        batch.validate(full=True)
        for start in range(0, batch.num_rows, ARROW_ROWS):
            part = batch.slice(start, ARROW_ROWS)
            columns = [
                [_exact(value, kind) for value in values.to_pylist()] if _loses(kind) else values.to_pylist()
                for values, kind in zip(part.columns, batch.schema.types, strict=True)
            ]
            for values in zip(*columns, strict=True):
                yield dict(zip(names, values, strict=True))


def _loses(kind: pa.DataType) -> bool:
    """Whether Python's own types do not hold these values as they are."""
    return any(part in str(kind) for part in ("float", "json"))


def _exact(value: Any, kind: Any) -> Any:
    """The value with numbers in single or half precision as such: as doubles they have other digits."""
    if value is None:
        return None
    if pa.types.is_dictionary(kind):
        return _exact(value, kind.value_type)
    if isinstance(kind, pa.JsonType):
        return parsed(value)[0]
    if pa.types.is_floating(kind):
        return np.dtype(kind.to_pandas_dtype()).type(value)
    if pa.types.is_struct(kind) and isinstance(value, Mapping):
        return {part.name: _exact(value[part.name], part.type) for part in kind}
    if isinstance(value, list) and hasattr(kind, "value_type"):
        return [_exact(item, kind.value_type) for item in value]
    return value


def _saved(folder: Path, root: Path) -> Iterator[Row]:
    state = _described(folder, "state.json", root)
    listed = state.get("_data_files")
    files = listed if isinstance(listed, list) else [None]
    names = [item["filename"] for item in files if isinstance(item, dict) and _is_name(item.get("filename"))]
    if len(names) < len(files) or state.get("_indices_data_files"):
        raise ValueError(f"{folder / 'state.json'} does not list the files of data, as {SAVED} writes them")
    _check_shards(folder, names)
    for name in names:
        yield from _stream(_inside(folder / name, root))


def _check_shards(folder: Path, names: list[str]) -> None:
    """Refuse a list of files that leaves out some of those that were written together."""
    counted = [(int(match[1]), int(match[2])) for name in names if (match := SHARD.fullmatch(name))]
    whole = counted == [(place, len(names)) for place in range(len(names))]
    if len(set(names)) < len(names) or (counted and not whole):
        raise ValueError(
            f"{folder / 'state.json'} lists {shown(names)}, which are not all files of one data set in their order; save it again"
        )


def _stream(file: Path) -> Iterator[Row]:
    with _foreign(file), pa.memory_map(str(file)) as source:
        size = source.size()
        if size < len(END) or source.read_at(len(END), size - len(END)) != END:
            raise ValueError(f"{file} is cut off, or no file that {SAVED} wrote; save it again")
        if any(_compressed(message) for message in _messages(source)):
            raise ValueError(f"{file} is compressed, which {SAVED} never does; save it again")
        source.seek(0)
        found = 0
        with pa.ipc.open_stream(source) as batches:
            for batch in batches:
                found += batch.num_rows
                _check_fits(0, found, file)
                yield from batch_rows(batch, file)
        if source.tell() != size:
            raise ValueError(f"{file} goes on after its end; it is damaged")


def _messages(source: Any) -> Iterator[pa.Message]:
    source.seek(0)
    reader = pa.ipc.MessageReader.open_stream(source)
    while True:
        try:
            yield reader.read_next_message()
        except StopIteration:
            return


def _compressed(message: pa.Message) -> bool:
    """Whether the body is to be unpacked, to a size that only unpacking shows.

    pyarrow does not say, so this walks the message's flatbuffer: Message.header (2), DictionaryBatch.data (1),
    RecordBatch.compression (3).
    """
    buffer = message.metadata.to_pybytes()

    def slot(table: int, number: int) -> int:
        known = table - unpack_from("<i", buffer, table)[0]
        (size,) = unpack_from("<H", buffer, known)
        place = unpack_from("<H", buffer, known + 4 + 2 * number)[0] if 4 + 2 * number < size else 0
        return table + place if place else 0

    def follow(place: int) -> int:
        return place + int(unpack_from("<I", buffer, place)[0])

    header = slot(follow(0), 2)
    if message.type == "dictionary" and header:
        header = slot(follow(header), 1)
    elif message.type != "record batch":
        return False
    return bool(header and slot(follow(header), 3))


def _check_fits(size: int, rows: int, file: Path) -> None:
    available = psutil.virtual_memory().available
    if size > available or rows * ROW > available:
        raise ValueError(
            f"{file} announces {rows} rows and {size / 2**30:.3g} GiB in one piece, and {available / 2**30:.3g} GiB of memory are free"
        )


@contextmanager
def _foreign(where: object) -> Iterator[None]:
    """Whatever pyarrow raises on the bytes of a stranger, as one error that names the file."""
    try:
        yield
    except Exception as error:
        if isinstance(error, ValueError) and str(where) in str(error):
            raise
        why = (str(error) or type(error).__name__).splitlines()[0][:300]
        raise ValueError(f"{where} cannot be read, or is damaged: {why}") from error


def _described(folder: Path, name: str, root: Path) -> Mapping[str, Any]:
    """A file of JSON in a folder that was saved."""
    file = _inside(folder / name, root)
    with _foreign(file):
        text = file.read_text(encoding="utf-8")
        content, end = parsed(text)
        if not isinstance(content, dict) or text[end:].strip():
            raise ValueError("it is not one object")
    return content


def _inside(file: Path, root: Path) -> Path:
    """The file, which a folder from a stranger may not lay elsewhere by a link."""
    if not file.resolve().is_relative_to(root.resolve()):
        raise ValueError(f"{file} is a link out of {root}; copy what it points to into the folder")
    if not file.is_file():
        raise ValueError(f"{file} is missing, or no file; save the data set again")
    return file


def _is_name(name: object) -> TypeGuard[str]:
    """Whether this is the name of something in a folder, and no path."""
    return (
        isinstance(name, str)
        and 0 < len(name.encode()) < 256
        and name not in (".", "..")
        and not set(name) & set("/\\\0:")
    )
