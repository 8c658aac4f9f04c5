"""Tables written by other libraries, in every form that is read."""

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset

FILES = (".jsonl", ".json", ".csv", ".tsv", ".parquet")


def written(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def write_table(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    """As the ending says: of .txt the column `text`; without an ending, a folder of `save_to_disk`."""
    if path.suffix in (".csv", ".tsv"):
        with path.open("w", encoding="utf-8", newline="") as file:
            table = csv.DictWriter(file, list(rows[0]), delimiter="," if path.suffix == ".csv" else "\t")
            table.writeheader()
            table.writerows(rows)
    elif path.suffix in (".json", ".jsonl"):
        lines = [json.dumps(row, ensure_ascii=False) for row in rows]
        written(path, f"[{', '.join(lines)}]" if path.suffix == ".json" else "\n".join(lines) + "\n")
    elif path.suffix == ".txt":
        written(path, "\n".join(str(row["text"]) for row in rows) + "\n")
    elif path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(list(rows)), path)
    else:
        Dataset.from_list(list(rows)).save_to_disk(path)
    return path
