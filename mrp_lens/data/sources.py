"""Where rows come from: files, folders that `datasets` saved, and the Hub."""

from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path

from mrp_lens.data.readers import READERS, dataset_rows, parquet_rows, saved_rows
from mrp_lens.data.rows import Row, Untyped
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
    from datasets import Features, Value, load_dataset
    from datasets.exceptions import DatasetGenerationError

    if schema is not None:
        config = config or schema.config
        if config is None and schema.configs:
            raise ValueError(f"{path} has several configurations; give config= one of {', '.join(schema.configs)}")
    source = KNOWN[path].path if path in KNOWN else path
    try:
        rows = load_dataset(source, config, split=split)
    except (RuntimeError, DatasetGenerationError) as error:  # such as a loading script, which `datasets` does not run
        raise ValueError(f"{source} cannot be read from the Hub: {error}") from error
    if rows.builder_name != "csv":
        return rows
    # As in a file: 007 stays 007, and only an empty cell has no value.
    as_text = Features({name: Value("string") for name in rows.features})
    rows = load_dataset(source, config, split=split, features=as_text, keep_default_na=False, na_values=[""])
    return map(Untyped, dataset_rows(rows))


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
