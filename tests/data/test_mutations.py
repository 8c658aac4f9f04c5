"""Damaged data files are refused with one line, or read as an independent parser reads them."""

import csv
import io
import json
import random
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset

from mrp_lens.data import Corpus, Questions

ROWS = [
    {"text": f'Zoë said "{i:03d}", then\nleft; 0.50 € — 東京', "a": f"x{i}", "b": f"{i}.50", "answer": "AB"[i % 2]}
    for i in range(12)
]
CHOICES = ["a", "b"]
FORMATS = (".csv", ".tsv", ".json", ".jsonl", ".txt", ".parquet", "folder")
MANY = 1000


def write(kind: str, path: Path, draw: random.Random) -> None:
    if kind in (".csv", ".tsv"):
        with path.open("w", encoding="utf-8", newline="") as file:
            table = csv.DictWriter(file, list(ROWS[0]), delimiter="," if kind == ".csv" else "\t")
            table.writeheader()
            table.writerows(ROWS)
    elif kind == ".json":
        path.write_text(json.dumps(ROWS, ensure_ascii=draw.random() < 0.5, indent=draw.choice([None, 1])))
    elif kind == ".jsonl":
        path.write_text("".join(json.dumps({**row, "n": 0.5}, ensure_ascii=False) + "\n" for row in ROWS))
    elif kind == ".txt":
        path.write_text("\n".join(row["text"].replace("\n", " ") for row in ROWS), encoding="utf-8")
    elif kind == ".parquet":
        packing, repeats = draw.choice(["none", "snappy", "zstd", "gzip"]), draw.random() < 0.5
        pq.write_table(pa.Table.from_pylist(ROWS), path, compression=packing, use_dictionary=repeats, row_group_size=5)
    else:
        Dataset.from_list(ROWS).save_to_disk(path, num_shards=draw.choice([1, 3]))


def flipped(data: bytes, draw: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(draw.randint(1, 4)):
        changed[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    return bytes(changed)


def cut_off(data: bytes, draw: random.Random) -> bytes:
    return data[: draw.randrange(len(data))]


def repeated(data: bytes, draw: random.Random) -> bytes:
    start, length = draw.randrange(len(data)), draw.choice([1, 8, 100])
    return data[:start] + data[start : start + length] + data[start:]


def removed(data: bytes, draw: random.Random) -> bytes:
    start, length = draw.randrange(len(data)), draw.choice([1, 8, 100])
    return data[:start] + data[start + length :]


def with_other_separators(data: bytes, draw: random.Random) -> bytes:
    old, new = draw.choice([(b",", b";"), (b'"', b"'"), (b"{", b"["), (b"\n", b"\r"), (b":", b","), (b"\t", b",")])
    places = [match.start() for match in re.finditer(re.escape(old), data)] or [0]
    place = draw.choice(places)
    return data.replace(old, new) if draw.random() < 0.3 else data[:place] + new + data[place + 1 :]


def with_a_huge_number(data: bytes, draw: random.Random) -> bytes:
    places = [match.span() for match in re.finditer(rb"[0-9]+", data)] or [(0, 0)]
    start, end = draw.choice(places)
    return data[:start] + draw.choice([b"9" * 400, b"9" * 5000, b"1e999", b"-1", b"99999999999"]) + data[end:]


def nested(data: bytes, draw: random.Random) -> bytes:
    place, depth = draw.randrange(len(data)), draw.choice([50, 5000, 20_000])
    opened, closed = draw.choice([(b"[", b"]"), (b'{"a":', b"}"), (b'"', b'"')])
    return data[:place] + opened * depth + (closed * depth if draw.random() < 0.5 else b"") + data[place:]


def in_another_encoding(data: bytes, draw: random.Random) -> bytes:
    return data.decode("utf-8", "replace").encode(
        draw.choice(["utf-16", "utf-16-le", "cp1252", "utf-8-sig"]), "replace"
    )


def with_half_a_character(data: bytes, draw: random.Random) -> bytes:
    places = [place for place, byte in enumerate(data) if byte >= 0x80] or [0]
    place = draw.choice(places)
    return data[:place] + data[place + 1 :]


def with_a_nul(data: bytes, draw: random.Random) -> bytes:
    place = draw.randrange(len(data))
    return data[:place] + draw.choice([b"\0", b"\xff", b"\\ud800", b"\\u0000"]) + data[place:]


MUTATIONS: tuple[Callable[[bytes, random.Random], bytes], ...] = (
    *(flipped, cut_off, repeated, removed, with_other_separators, with_a_huge_number, nested),
    *(in_another_encoding, with_half_a_character, with_a_nul),
)


def strictly_read(kind: str, path: Path) -> list[dict[str, Any]]:
    """What the file holds by a parser that is not the library's; raises where that finds a fault."""
    numbers: dict[str, Any] = {"parse_float": str, "parse_int": lambda digits: str(int(digits))}
    if kind == ".parquet":
        return pq.read_table(io.BytesIO(path.read_bytes())).to_pylist()
    if kind == "folder":
        files = [path / item["filename"] for item in json.loads((path / "state.json").read_text())["_data_files"]]
        assert {file.name for file in files} == {file.name for file in path.glob("*.arrow")}
        return [row for file in files for row in pa.ipc.open_stream(file.read_bytes()).read_all().to_pylist()]
    text = path.read_bytes().decode("utf-8-sig")
    lines = [line for line in re.split("\r\n|\r|\n", text) if line.strip()]
    if kind == ".txt":
        return [{"text": line} for line in lines]
    if kind == ".jsonl":
        return [json.loads(line, **numbers) for line in lines]
    if kind == ".json":
        content = json.loads(text, **numbers)
        return content if isinstance(content, list) else [content]
    table = csv.reader(io.StringIO(text, newline=""), delimiter="," if kind == ".csv" else "\t", strict=True)
    names, *cells = [row for row in table if row]
    return [dict(zip(names, row, strict=True)) for row in cells]


def outcome(seed: int, kind: str, folder: Path) -> list[str]:
    """Damage a fresh file; what became of it as documents, and as questions."""
    draw = random.Random(f"{kind} {seed}")
    path = folder / ("saved" if kind == "folder" else f"data{kind}")
    write(kind, path, draw)
    mutation = draw.choice(MUTATIONS)
    victim = draw.choice(sorted(path.iterdir())) if kind == "folder" else path
    before = victim.read_bytes()
    victim.write_bytes(mutation(before, draw))
    case = f"seed {seed}, {kind}, {mutation.__name__} {victim.name}"
    documents = refused(lambda: [document.completion for document in Corpus.from_file(path).documents], case)
    quiz = refused(
        lambda: [
            (q.prompt, list(q.choices)) for q in Questions.from_file(path, prompt="{text}", choices=CHOICES).questions
        ],
        case,
    )
    if documents is not None or quiz is not None:
        rows = strictly_read(kind, path)
        assert documents is None or documents == [row["text"] for row in rows], case
        assert quiz is None or quiz == [(row["text"], [spaced(row[name]) for name in CHOICES]) for row in rows], case
        ends_visibly = kind == ".parquet" or victim.suffix == ".arrow"
        assert not (ends_visibly and mutation is cut_off), f"{case}: a part was taken for the whole"
    return [f"{kind} refused" if result is None else f"{kind} accepted" for result in (documents, quiz)]


def spaced(choice: str) -> str:
    return choice if choice[0].isspace() else f" {choice}"


def refused(read: Callable[[], Any], case: str) -> Any:
    """What is read, or None where it is refused as it should be."""
    try:
        return read()
    except (ValueError, TypeError, FileNotFoundError) as error:
        message = str(error)
    assert "\n" not in message, case
    assert 0 < len(message) < 2000, case
    return None


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("seed", range(6))
def test_a_damaged_file_is_refused_or_read_whole(seed: int, kind: str, tmp_path: Path) -> None:
    assert len(outcome(seed, kind, tmp_path)) == 2


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_thousand_damaged_files_are_refused_or_read_whole(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, counts = random.randrange(10**9), Counter[str]()
    with capsys.disabled():
        print(f"\nseeds from {first}")  # noqa: T201
    for place in range(MANY):
        folder = tmp_path / str(place)
        folder.mkdir()
        counts.update(outcome(first + place, FORMATS[place % len(FORMATS)], folder))
    with capsys.disabled():
        print(", ".join(f"{what} {count}" for what, count in sorted(counts.items())))  # noqa: T201
    assert counts.total() == 2 * MANY
    for kind in FORMATS:
        assert counts[f"{kind} refused"], kind
        assert counts[f"{kind} accepted"], kind
