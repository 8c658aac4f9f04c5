"""Rows of tables: reading them from files, from folders that `datasets` saved and from the Hub; columns and templates."""

import hashlib
import json
import string
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from mrp_lens.corpus.schemas import KNOWN, Schema, template_fields

Row = Mapping[str, Any]
Item = TypeVar("Item")

LOADERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".tsv": "csv", ".txt": "text", ".parquet": "parquet"}


def file_rows(path: str | Path, split: str | None) -> Iterable[Row]:
    """The rows of a file, or of a folder written by `save_to_disk`.

    Raises:
        FileNotFoundError: there is neither.
        ValueError: nothing is in it, its ending is unknown, its content is not what the ending says, or `split` is
            missing or superfluous.
    """
    source = Path(path)
    if source.is_dir():
        rows = _saved(source, split)
    elif split is not None:
        raise ValueError(
            f"{source.name} is to be one file, which has no split {split!r}; split= is for a folder written by DatasetDict.save_to_disk"
        )
    else:
        rows = _file(source)
    if not len(rows):
        raise ValueError(f"{source} is empty; it must hold at least one document or question")
    return rows


def hub_rows(path: str, config: str | None, split: str, schema: Schema | None) -> Iterable[Row]:
    """The rows of a data set of the Hub.

    Raises:
        ValueError: the data set has several configurations and none is named.
    """
    from datasets import load_dataset

    if schema is not None:
        config = config or schema.config
        if config is None and schema.configs:
            raise ValueError(f"{path} has several configurations; give config= one of {', '.join(schema.configs)}")
    source = KNOWN[path].path if path in KNOWN else path
    return _undecoded(load_dataset(source, config, split=split))


def hub_name(path: str, config: str | None) -> str:
    """What a data set of the Hub is called in logs: two configurations of one are two corpora."""
    return path if config is None else f"{path}:{config}"


def column(row: Row, field: str, number: int, name: str) -> Any:
    """The value of a column.

    Raises:
        ValueError: the row has no such column (those that it has get listed).
    """
    if field not in row:
        raise ValueError(f"{name}, row {number}: no field {field!r}; the row has {', '.join(map(repr, row))}")
    return row[field]


def text(row: Row, field: str, number: int, name: str) -> str:
    """The value of a column as text.

    Raises:
        ValueError: as `column`, or the value is missing.
    """
    value = column(row, field, number, name)
    if value is None:
        raise ValueError(f"{name}, row {number}: field {field!r} has no value; leave the row out or fill it in")
    return str(value)


def fill(template: str, row: Row, number: int, name: str) -> str:
    """The template with columns in place of their names.

    Raises:
        ValueError: as `text`, or a brace has no partner.
    """
    values = [text(row, field, number, name) for field in template_fields(template)]
    parts = [
        literal + (values.pop(0) if field is not None else "")
        for literal, field, _, _ in string.Formatter().parse(template)
    ]
    return "".join(parts)


def digest(content: object) -> str:
    """SHA-256 of anything that JSON can hold."""
    return hashlib.sha256(json.dumps(content, ensure_ascii=False).encode()).hexdigest()


def _file(file: Path) -> list[Row]:
    if not file.is_file():
        raise FileNotFoundError(f"no file at {file}; for a data set of the Hub use from_hub")
    if file.suffix not in LOADERS:
        raise ValueError(
            f"{file.name}: unknown ending {file.suffix!r}; known are {', '.join(LOADERS)}, and folders written by save_to_disk"
        )
    if file.stat().st_size == 0:
        return []
    if file.suffix in (".txt", ".jsonl"):
        # Not str.splitlines: it also breaks at characters such as U+2028, which a line of JSON may hold.
        with file.open(encoding="utf-8-sig") as lines:
            filled = [(number, line.rstrip("\r\n")) for number, line in enumerate(lines, 1) if line.strip()]
        if file.suffix == ".txt":
            return [{"text": line} for _, line in filled]
        return [_json_row(line, number, file) for number, line in filled]
    return _loaded(file)


def _json_row(line: str, number: int, file: Path) -> Row:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{file}, line {number} is not JSON ({error}); a .jsonl file holds one object a line"
        ) from error
    if not isinstance(row, dict):
        raise ValueError(f'{file}, line {number} is not an object but {line[:40]!r}; write {{"text": ...}}')
    return row


def _loaded(file: Path) -> list[Row]:
    import tempfile

    from datasets import load_dataset
    from datasets.exceptions import DatasetGenerationError

    options = {"sep": "\t"} if file.suffix == ".tsv" else {}
    with tempfile.TemporaryDirectory() as cache:
        try:
            rows = load_dataset(
                LOADERS[file.suffix],
                data_files=str(file),
                split="train",
                cache_dir=cache,
                keep_in_memory=True,
                **options,
            )
        except DatasetGenerationError as error:
            raise ValueError(f"{file} cannot be read as {file.suffix}: {error.__cause__ or error}") from error
        except ValueError as error:
            if "corresponds to no data" in str(error):  # what `datasets` says of a header without rows
                return []
            raise
        return list(rows)


def _saved(folder: Path, split: str | None) -> Any:
    from datasets import DatasetDict, load_from_disk

    try:
        saved = load_from_disk(str(folder))
    except IndexError:  # what `datasets` raises for a data set saved without rows
        return []
    except FileNotFoundError as error:
        raise ValueError(
            f"{folder} is a folder, but not one that Dataset.save_to_disk or DatasetDict.save_to_disk wrote; name a file in it"
        ) from error
    if not isinstance(saved, DatasetDict):
        if split is not None:
            raise ValueError(f"{folder} holds a single Dataset, which has no split {split!r}; leave split= out")
        return _undecoded(saved)
    if split not in saved:
        asked = "" if split is None else f", not {split!r}"
        raise ValueError(
            f"{folder} holds the splits {', '.join(saved)}{asked}; give split= one of them, or the folder of one: {folder / next(iter(saved), '')}"
        )
    return _undecoded(saved[split])


def _undecoded(rows: Any) -> Any:
    """The data set with pictures left as bytes: nothing here looks at one, and decoding takes time and Pillow."""
    from datasets import Image

    for name, feature in rows.features.items():
        if isinstance(feature, Image):
            rows = rows.cast_column(name, Image(decode=False))
    return rows


def evenly(items: Sequence[Item], limit: int | None) -> list[Item]:
    """At most `limit` of the items, evenly spread over all; None: all.

    Raises:
        ValueError: the limit is below 1.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1, got {limit}; leave it out for all")
    count = len(items) if limit is None else min(limit, len(items))
    return [items[i * len(items) // count] for i in range(count)]
