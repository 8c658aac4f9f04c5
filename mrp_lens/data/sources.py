"""Where rows come from: files, folders that `datasets` saved, the Hub, and tables of other libraries."""

import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import pandas as pd

from mrp_lens.data.readers import READERS, dataset_rows, parquet_rows, saved_rows
from mrp_lens.data.rows import Row, Untyped, shown, unique
from mrp_lens.data.schemas import KNOWN, Schema

ENDINGS = {**READERS, ".parquet": parquet_rows}


def file_rows(path: str | Path, split: str | None) -> Iterator[Row]:
    """The rows of a file, or of a folder written by `save_to_disk`, read one after another.

    Raises:
        FileNotFoundError: there is neither.
        ValueError: nothing is in it, its ending is unknown, its content is not what the ending says, or `split` is
            missing or superfluous.
    """
    source = Path(path)
    if source.is_dir():
        rows = saved_rows(source, split)
    elif split is not None:
        raise ValueError(
            f"{source.name} is to be one file, which has no split {split!r}; split= is for a folder written by DatasetDict.save_to_disk"
        )
    else:
        rows = _file(source)
    first = next(rows, None)
    if first is None:
        raise ValueError(f"{source} is empty; it must hold at least one document or question")
    return chain([first], rows)


def hub_rows(path: str, config: str | None, split: str, schema: Schema | None) -> Iterable[Row]:
    """The rows of a data set of the Hub.

    Raises:
        ValueError: the data set has several configurations and none is named, or it cannot be read.
    """
    # Imported here: that takes seconds, which a file should not wait for.
    from datasets import Features, Value, load_dataset
    from datasets.exceptions import DatasetGenerationError

    if schema is not None:
        config = config or schema.config
        if config is None and schema.configs:
            raise ValueError(f"{path} has several configurations; give config= one of {', '.join(schema.configs)}")
    source = KNOWN[path].path if path in KNOWN else path
    try:
        rows = load_dataset(source, config, split=split)
    # A loading script, which `datasets` does not run, a configuration or a split that the data set has not, ...
    except (RuntimeError, ValueError, DatasetGenerationError) as error:
        raise ValueError(f"{source} cannot be read from the Hub: {error}") from error
    if rows.builder_name != "csv":
        return rows
    # As in a file: 007 stays 007, and only an empty cell has no value.
    as_text = Features({name: Value("string") for name in rows.features})
    rows = load_dataset(source, config, split=split, features=as_text, keep_default_na=False, na_values=[""])
    return map(Untyped, dataset_rows(rows))


@contextmanager
def named_in_errors(path: str | Path) -> Iterator[None]:
    """Inside, an error about a row of a file says which file, of those that have the same name."""
    try:
        yield
    except ValueError as error:
        if not str(error).startswith(f"{Path(path).stem}, row "):
            raise
        raise type(error)(f"{error} (in {path}; rows count from 0)") from error


def hub_name(path: str, config: str | None) -> str:
    """What a data set of the Hub is called in logs: two configurations of one are two corpora."""
    return path if config is None else f"{path}:{config}"


def _file(file: Path) -> Iterator[Row]:
    if not file.exists():
        raise FileNotFoundError(f"no file at {file}; for a data set of the Hub use from_hub")
    if not file.is_file():
        raise ValueError(f"{file} is neither a file nor a folder but a pipe, socket or device; name a file")
    ending = file.suffix.lower()
    if ending not in ENDINGS:
        raise ValueError(
            f"{file.name}: unknown ending {file.suffix!r}; known are {', '.join(ENDINGS)}, and folders written by save_to_disk"
        )
    return iter(()) if file.stat().st_size == 0 else ENDINGS[ending](file)


def rows_in(table: Any, name: str) -> Iterator[Row]:
    """The rows of a list of mappings, of a pandas DataFrame or of a Dataset.

    Raises:
        ValueError: it is a DatasetDict, whose splits get listed, or two columns have one name.
        TypeError: it is nothing of the kind, or one of its rows is no mapping from column to value.
    """
    if isinstance(table, pd.DataFrame):
        yield from _frame_rows(table, name)
        return
    datasets = sys.modules.get("datasets")  # without it nobody can have made an object of it
    if datasets is not None and isinstance(table, datasets.DatasetDict | datasets.IterableDatasetDict):
        raise ValueError(
            f"{name}: a {type(table).__name__} is several tables; give one of its splits {', '.join(table)}, as in from_rows(data[split])"
        )
    if datasets is not None and isinstance(table, datasets.Dataset) and table.format["type"] != "custom":
        yield from dataset_rows(table)
        return
    if isinstance(table, str | bytes | Mapping) or not isinstance(table, Iterable):
        raise TypeError(
            f"{name}: rows must be a list of mappings, a DataFrame or a Dataset, got {shown(table)}, of type {type(table).__name__}"
        )
    for number, row in enumerate(table):
        if isinstance(row, Mapping):
            yield row
        elif hasattr(row, "keys") and hasattr(row, "__getitem__"):  # rows of pandas or of a database
            yield {key: row[key] for key in row.keys()}  # noqa: SIM118
        else:
            raise TypeError(
                f"{name}, row {number} is {shown(row)} of type {type(row).__name__}, not a mapping from column to value"
            )


def _frame_rows(frame: pd.DataFrame, name: str) -> Iterator[Row]:
    names = unique(list(frame.columns), name)
    # Of arrays, not of the frame: that would make doubles of its single-precision numbers, with other digits.
    columns = [frame.iloc[:, place].array for place in range(frame.shape[1])]
    for values in zip(*columns, strict=True):
        yield dict(zip(names, values, strict=True))
