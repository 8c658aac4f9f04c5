"""Files are read as they are written, and hostile ones are refused."""

import csv
import json
import os
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict

from mrp_lens.data import Corpus, Questions
from mrp_lens.data.sources import file_rows
from tests.support.tables import FILES, write_table, written

AS_WRITTEN = [*"007 0.50 1e3 None NA nan NULL 1.0 1_000 0x1f true 2020-01-01 -0".split(), " x "]


def completions(path: Path, **options: Any) -> list[str]:
    return [document.completion for document in Corpus.from_file(path, **options).documents]


@pytest.mark.parametrize("ending", [*FILES, ".txt", ""])
def test_what_looks_like_a_number_a_date_or_nothing_stays_the_text_of_the_file(tmp_path: Path, ending: str) -> None:
    assert completions(write_table(tmp_path / f"data{ending}", [{"text": text} for text in AS_WRITTEN])) == AS_WRITTEN


@pytest.mark.parametrize(
    ("row", "choices", "answer"),
    [
        ("007,006,008,009,A", "007 006 008 009", 0),
        ("0.50,0.75,1.10,2.00,0.50", "0.50 0.75 1.10 2.00", 0),
        ("1.0,1.00,1,2,D", "1.0 1.00 1 2", 3),
        ("10,1e3,4,7,1e3", "10 1e3 4 7", 1),
        ("All,Some,None,Most,C", "All Some None Most", 2),
        ("NA,EU,AS,AF,NA", "NA EU AS AF", 0),
        ("5,6,7,8,2", "5 6 7 8", 2),
        ("0,1,2,3,1", "0 1 2 3", 1),  # index and text agree
    ],
)
def test_cells_of_a_quiz_are_not_retyped(tmp_path: Path, row: str, choices: str, answer: int) -> None:
    path = written(tmp_path / "quiz.csv", f"question,A,B,C,D,answer\nWhich?,{row}\n")
    (question,) = Questions.from_file(path, choices=["A", "B", "C", "D"]).questions
    assert question.choices == tuple(f" {choice}" for choice in choices.split())
    assert question.answer == answer


@pytest.mark.parametrize("ending", [" ", "\n", "\n\n"])
def test_a_prompt_that_ends_in_white_space_gets_no_second_space_before_a_choice(ending: str) -> None:
    rows = [{"question": "Which?", "choices": ["white", " red"], "answer": 0}]
    (question,) = Questions.from_rows(rows, prompt="{question}\nAnswer:" + ending).questions
    assert question.choices == ("white", " red")
    assert question.prompt + question.choices[0] == f"Which?\nAnswer:{ending}white"
    (usual,) = Questions.from_rows(rows, prompt="{question}\nAnswer:").questions
    assert usual.choices == (" white", " red")


def test_digits_that_are_an_index_and_a_choice_are_refused_where_the_file_does_not_tell(tmp_path: Path) -> None:
    path = written(tmp_path / "quiz.csv", "question,A,B,C,answer\nWhich?,1,2,3,2\n")
    with pytest.raises(ValueError, match="row 0: the answer '2' may be an index or one of the choices"):
        Questions.from_file(path, choices=["A", "B", "C"])


def test_a_csv_cell_may_hold_quotes_line_breaks_and_a_whole_book(tmp_path: Path) -> None:
    book = "word " * 60_000
    path, limit = tmp_path / "data.csv", csv.field_size_limit()
    texts = ['say "hi"', "one\r\ntwo\nthree", "a,b", book, "\u2028 Zoë"]
    with path.open("w", encoding="utf-8-sig", newline="") as file:
        csv.writer(file).writerows([["text"], *([text] for text in texts)])
    assert completions(path) == texts
    assert csv.field_size_limit() == limit


EMPTY = [("a.jsonl", ""), ("a.jsonl", "\n\n"), ("a.txt", "\n \n"), ("a.csv", "text\n")]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "text,b\nx,y\nz\n", r"a\.csv, line 3: 1 cells under 2 columns"),
        ("a.csv", "text,b\nx,y,z\n", r"a\.csv, line 2: 3 cells under 2 columns"),
        ("a.csv", "text,text\nx,y\n", r"line 1: two columns are named 'text'"),
        ("a.csv", 'text\n"x\ny\n', r"a\.csv, line 3: unexpected end of data; is a quotation mark left open"),
        ("a.tsv", 'text\tb\n"x" y\tz\n', r"a\.tsv, line 2: '.*' expected after '\"'"),
        ("a.csv", "text,b\n,y\n", "row 0: field 'text' has no value"),
        ("a.csv", b"text\nx\0y\n", r"a\.csv, line 2 holds a NUL"),
        ("a.csv", "text\nx\n".encode("utf-16"), r"a\.csv, line 1 is not UTF-8: byte 0xff"),
        ("a.txt", "text\nx\n".encode("utf-16-le"), r"a\.txt, line 1 holds a NUL"),
        ("a.txt", "ok\ncafé\n".encode("latin-1"), r"a\.txt, line 2 is not UTF-8: byte 0xe9"),
        ("a.jsonl", b'{"text": "x"}\n{"text": "caf\xe9"}\n', r"a\.jsonl, line 2 is not UTF-8: byte 0xe9"),
        ("a.json", b'[{"text": "x"},\n{"text": "caf\xc3"}]', r"a\.json, line 2 is not UTF-8: byte 0xc3"),
        ("a.jsonl", b'{"text": "bad \\ud83d end"}\n', r"a\.jsonl, line 1 .* half a character"),
        ("a.json", b'[{"text": "bad \\ud83d end"}]', r"a\.json.*line 1: it holds half a character"),
        ("a.jsonl", '{"text": NaN}\n', "row 0: field 'text' has no value"),
        ("a.jsonl", '{"text": 1e999}\n', "row 0: field 'text' is 1e999; a number must be finite"),
        ("a.jsonl", '{"text": true}\n', "row 0: field 'text' is True, of type bool"),
        ("a.jsonl", '{"text": ["a", "b"]}\n', r"row 0: field 'text' is \['a', 'b'\], of type list"),
        ("a.jsonl", '{"text": {"a": 1}}\n', "row 0: field 'text' is {'a': 1}, of type dict"),
        ("a.jsonl", '{"text": "x", "text": "y"}\n', r"line 1 .* key 'text' twice"),
        ("a.jsonl", '{"text": "x"} {"text": "y"}\n', r"line 1 .*more follows the object"),
        ("a.jsonl", "[" * 100_000, r"line 1 .* nested too deeply"),
        ("a.json", '{"text":' * 100_000, r"line 1: it is nested too deeply"),
        ("a.jsonl", '{"text": ' + "9" * 5000 + "}", "line 1 is not JSON"),
        ("a.json", '{"text": ["a", "b"]}', "row 0: field 'text' is .* of type list"),
        ("a.json", '[{"text": "x"}\n{"text": "y"}]', "line 2: a comma or ] is missing"),
        ("a.json", '[{"text": "x"}, 3]', "line 1: row 1 is 3, not an object"),
        ("a.json", '[{"text": "x"},]', "line 1: Expecting value"),
        ("a.json", '[{"text": "x"}', "line 1: a comma or ] is missing"),
        ("a.json", '[{"text": "x"}] x', "line 1: more follows the list"),
        ("a.jsonl", '{"text": "x"}\n{"text": ', "line 2 is not JSON"),
        ("a.jsonl", '["x"]', r"line 1 is not an object but '\[\"x\"\]'"),
        ("a.jsonl", '{"text": null}', "row 0: field 'text' has no value"),
        ("a.json", "{", "cannot be read as .json"),
        *((name, content, "is empty") for name, content in EMPTY),
        ("a.parquet", b"PAR1 no parquet PAR1", r"a\.parquet cannot be read, or is damaged"),
    ],
)
def test_what_cannot_be_read_for_sure_is_refused_with_its_place(
    tmp_path: Path, name: str, content: str | bytes, message: str
) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        Corpus.from_file(written(tmp_path / name, content))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("deep", ["[" * 900 + "]" * 900, '{"a":' * 900 + "1" + "}" * 900, '["' + "x" * 10**6 + '"]'])
def test_a_message_stays_short_whatever_the_value(tmp_path: Path, deep: str) -> None:
    path = written(tmp_path / "a.jsonl", f'{{"text": {deep}, "question": "?", "choices": {deep}, "answer": {deep}}}')
    for read in (Corpus.from_file, Questions.from_file):
        with pytest.raises(ValueError, match="row 0") as caught:
            read(path)
        assert len(str(caught.value)) < 500


def test_numbers_of_json_keep_their_digits(tmp_path: Path) -> None:
    rows = '{"text": 7}\n{"text": 7.0}\n{"text": "7"}\n{"text": 0.50}\n{"text": 1e3}\n{"text": 12345678901234567890}'
    for path in (written(tmp_path / "a.jsonl", rows), written(tmp_path / "a.json", rows)):
        assert completions(path) == ["7", "7.0", "7", "0.50", "1e3", "12345678901234567890"]
    quiz = '{"question": "?", "choices": [0.50, 0.75, 1e3], "answer": 0.750}'
    (question,) = Questions.from_file(written(tmp_path / "quiz.jsonl", quiz)).questions
    assert (question.choices, question.answer) == ((" 0.50", " 0.75", " 1e3"), 1)
    quiz = '{"question": "?", "choices": [2.0, 1.0, 3.0], "answer": 1.0}'
    assert Questions.from_file(written(tmp_path / "quiz.jsonl", quiz)).questions[0].answer == 1
    quiz = '{"question": "?", "choices": [2.0, 3.0, 1.0], "answer": 1.0}'
    with pytest.raises(ValueError, match=r"the answer 1\.0 may be an index or one of the choices"):
        Questions.from_file(written(tmp_path / "quiz.jsonl", quiz))


@pytest.mark.parametrize("ending", [".parquet", "folder", "frame", "dataset"])
def test_numbers_in_single_precision_keep_their_digits(tmp_path: Path, ending: str) -> None:
    table = pa.table(
        {
            "text": pa.array([0.1, 2.5], pa.float32()),
            "question": ["?", "?"],
            "choices": pa.array([[0.1, 0.7], [1.5, 0.3]], pa.list_(pa.float32())),
            "answer": ["B", "A"],
        }
    )
    if ending == "frame":
        frame = pd.DataFrame({"text": np.array([0.1, 2.5], np.float32), "question": "?", "answer": ["B", "A"]})
        frame["choices"] = pd.Series([np.array([0.1, 0.7], np.float32), np.array([1.5, 0.3], np.float32)], dtype=object)
        corpus, quiz = Corpus.from_rows(frame), Questions.from_rows(frame)
    elif ending == "dataset":
        corpus, quiz = Corpus.from_rows(Dataset(table)), Questions.from_rows(Dataset(table))
    else:
        path = tmp_path / f"data{ending.replace('folder', '')}"
        if ending == "folder":
            Dataset(table).save_to_disk(path)
        else:
            pq.write_table(table, path)
        corpus, quiz = Corpus.from_file(path), Questions.from_file(path)
    assert [document.completion for document in corpus.documents] == ["0.1", "2.5"]
    assert [question.choices for question in quiz.questions] == [(" 0.1", " 0.7"), (" 1.5", " 0.3")]


def test_upper_case_endings_are_read(tmp_path: Path) -> None:
    for name, content in {"A.JSONL": '{"text": "x"}', "B.Csv": "text\nx\n", "C.TXT": "x"}.items():
        assert completions(written(tmp_path / name, content)) == ["x"]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # datasets 4 leaves the file open
def test_csv_files_of_the_hub_are_not_retyped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "set").mkdir()
    written(tmp_path / "set" / "test.csv", "question,A,B,answer\nAgent?,007,NA,A\nMany?,1e3,0.50,1\n")
    load = datasets.load_dataset
    monkeypatch.setattr(
        datasets, "load_dataset", lambda *args, **kwargs: load(*args, **kwargs, cache_dir=str(tmp_path / "cache"))
    )
    quiz = Questions.from_hub(str(tmp_path / "set"), choices=["A", "B"])
    assert [(q.choices, q.answer) for q in quiz.questions] == [((" 007", " NA"), 0), ((" 1e3", " 0.50"), 1)]
    (tmp_path / "code").mkdir()
    written(tmp_path / "code" / "code.py", f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(ValueError, match=r"cannot be read from the Hub: Dataset scripts are no longer supported"):
        Corpus.from_hub(str(tmp_path / "code"))
    with pytest.raises(ValueError, match=r"set cannot be read from the Hub: .*dev"):
        Questions.from_hub(str(tmp_path / "set"), split="dev", choices=["A", "B"])
    assert not (tmp_path / "ran").exists()


@pytest.mark.timeout(20)
def test_a_pipe_or_device_is_refused_without_waiting_for_it(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "zero.txt").symlink_to("/dev/zero")
    for name in ("pipe.jsonl", "zero.txt"):
        with pytest.raises(ValueError, match=f"{name} is neither a file nor a folder"):
            Corpus.from_file(tmp_path / name)
    (tmp_path / "folder.jsonl").mkdir()
    with pytest.raises(ValueError, match=r"is a folder, but not one that Dataset\.save_to_disk"):
        Corpus.from_file(tmp_path / "folder.jsonl")
    with pytest.raises(FileNotFoundError, match="no file at"):
        Corpus.from_file(tmp_path / "nul\0.jsonl")


def test_a_file_is_not_held_in_memory_more_than_twice(tmp_path: Path) -> None:
    line = "a word and another " * 50
    files = {
        "data.txt": f"{line}\n" * 4000,
        "data.csv": "text,other\n" + f'"{line}",1\n' * 4000,
        "data.jsonl": (json.dumps({"text": line}) + "\n") * 4000,
        "data.json": json.dumps([{"text": line}] * 4000),
        "one.txt": line * 4000,
    }
    for name, content in files.items():
        path = written(tmp_path / name, content)
        tracemalloc.start()
        corpus = Corpus.from_file(path)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert sum(len(document.completion) for document in corpus.documents) >= len(line) * 4000
        assert peak < 2.2 * path.stat().st_size, name


def test_a_parquet_column_is_not_read_in_one_piece(tmp_path: Path) -> None:
    texts = [f"{i} " + "a word and another " * 500 for i in range(2000)]
    pq.write_table(pa.table({"text": texts}), tmp_path / "data.parquet", compression="none", use_dictionary=False)
    rows = file_rows(tmp_path / "data.parquet", None)
    before = pa.total_allocated_bytes()
    assert [next(rows)["text"], next(rows)["text"]] == texts[:2]
    assert pa.total_allocated_bytes() - before < (tmp_path / "data.parquet").stat().st_size / 2
    assert [row["text"] for row in rows] == texts[2:]


def test_a_quotation_mark_left_open_does_not_fill_the_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mrp_lens.data.readers.LONGEST_CELL", 1000)
    path = written(tmp_path / "data.csv", 'text\n"open\n' + "line\n" * 1000)
    with pytest.raises(ValueError, match=r"field larger than field limit \(1000\); is a quotation mark left open"):
        Corpus.from_file(path)


def stream(path: Path, batches: list[pa.RecordBatch], **options: Any) -> None:
    """A folder as save_to_disk leaves it, with one file of these batches."""
    path.mkdir()
    with pa.ipc.new_stream(path / "data.arrow", batches[0].schema, options=pa.ipc.IpcWriteOptions(**options)) as writer:
        for batch in batches:
            writer.write_batch(batch)
    written(path / "state.json", json.dumps({"_data_files": [{"filename": "data.arrow"}]}))
    written(path / "dataset_info.json", "{}")


def test_what_is_announced_is_checked_before_it_is_read(tmp_path: Path) -> None:
    many = pa.RecordBatch.from_arrays([pa.Array.from_buffers(pa.null(), 2**50, [None])], ["text"])
    stream(tmp_path / "many", [many], allow_64bit=True)
    with pytest.raises(ValueError, match=r"announces 1125899906842624 rows and .* of memory are free"):
        Corpus.from_file(tmp_path / "many", prompt="{{}}", completion="x")
    zeros = pa.RecordBatch.from_pydict({"text": ["\0" * 2**20]})
    stream(tmp_path / "plain", [zeros])
    assert len(Corpus.from_file(tmp_path / "plain")) == 1
    stream(tmp_path / "packed", [zeros], compression="zstd")
    with pytest.raises(ValueError, match=r"data.arrow is compressed, which Dataset.save_to_disk .* never does"):
        Corpus.from_file(tmp_path / "packed")
    coded = pa.RecordBatch.from_arrays([pa.array(["x" * 2**16]).dictionary_encode()], ["text"])
    stream(tmp_path / "coded", [coded])
    assert completions(tmp_path / "coded") == ["x" * 2**16]
    stream(tmp_path / "coded-packed", [coded], compression="lz4")
    with pytest.raises(ValueError, match="is compressed"):
        Corpus.from_file(tmp_path / "coded-packed")


def test_a_parquet_file_that_does_not_fit_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pq.write_table(pa.table({"text": ["x" * 2**22]}), tmp_path / "packed.parquet", compression="zstd")
    assert (tmp_path / "packed.parquet").stat().st_size < 2**14
    assert len(Corpus.from_file(tmp_path / "packed.parquet")) == 1
    monkeypatch.setattr("psutil.virtual_memory", lambda: type("Memory", (), {"available": 2**20}))
    with pytest.raises(
        ValueError, match=r"announces 1 rows and 0\.00\d+ GiB in one piece, and 0\.000977 GiB of memory"
    ):
        Corpus.from_file(tmp_path / "packed.parquet")


def test_a_parquet_file_with_fewer_rows_than_it_announces_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "data.parquet"
    pq.write_table(pa.table({"text": ["x"] * 77}), file)
    content = file.read_bytes()
    known = b"\x16\x9a\x01\x19"  # in the footer: a number, 77, and the list of row groups
    file.write_bytes(content.replace(known, b"\x16\xb4\x01\x19", 1))
    with pytest.raises(ValueError, match="announces 90 rows and holds 77; it is damaged"):
        Corpus.from_file(file)


def test_offsets_of_a_damaged_table_are_not_followed(tmp_path: Path) -> None:
    stream(tmp_path / "saved", [pa.RecordBatch.from_pydict({"text": ["0123456789"]})])
    file = tmp_path / "saved" / "data.arrow"
    content = file.read_bytes()
    place = content.rindex(struct.pack("<ii", 0, 10))  # before the ten characters: where they begin and end
    file.write_bytes(content[:place] + struct.pack("<ii", 0, 2**30) + content[place + 8 :])
    with pytest.raises(ValueError, match="cannot be read, or is damaged"):
        Corpus.from_file(tmp_path / "saved")


def test_a_stream_without_its_end_is_refused(tmp_path: Path) -> None:
    stream(tmp_path / "saved", [pa.RecordBatch.from_pydict({"text": [f"{i}"]}) for i in range(3)])
    file = tmp_path / "saved" / "data.arrow"
    whole = file.read_bytes()
    starts = [place for place in range(len(whole)) if whole.startswith(b"\xff\xff\xff\xff", place)]
    for start in starts[1:]:  # Arrow itself takes each of these for a shorter table
        file.write_bytes(whole[:start])
        assert pa.ipc.open_stream(whole[:start]).read_all().num_rows < 4
        with pytest.raises(ValueError, match=r"data\.arrow is cut off"):
            Corpus.from_file(tmp_path / "saved")


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A DatasetDict on disk, with a split of one file and one of two."""
    rows = [{"text": f"row {i}"} for i in range(4)]
    data = DatasetDict(train=Dataset.from_list(rows[:2]), test=Dataset.from_list(rows))
    data.save_to_disk(tmp_path / "saved", num_shards={"train": 1, "test": 2})
    return tmp_path / "saved"


def test_a_folder_is_read_in_the_order_of_its_files(saved: Path) -> None:
    assert completions(saved, split="test") == [f"row {i}" for i in range(4)]


def without_a_shard(folder: Path) -> None:
    state = json.loads((folder / "test" / "state.json").read_text())
    del state["_data_files"][1]
    (folder / "test" / "state.json").write_text(json.dumps(state))


def with_a_path(name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        outside = folder.parent / "outside.arrow"
        (folder / "train" / "data-00000-of-00001.arrow").rename(outside)
        listed = str(outside) if name == "absolute" else name
        (folder / "test" / "state.json").write_text(json.dumps({"_data_files": [{"filename": listed}]}))

    return change


def with_a_link(name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        target = folder.parent / "outside"
        (folder / name).rename(target)
        (folder / name).symlink_to(target)

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without_a_shard, r"lists \['data-00000-of-00002.arrow'\], which are not all files of one data set"),
        (with_a_path("absolute"), "does not list the files of data"),
        (with_a_path("../../outside.arrow"), "does not list the files of data"),
        (with_a_path(".."), "does not list the files of data"),
        (with_a_link("test"), "is a link out of"),
        (with_a_link("test/state.json"), "is a link out of"),
        (with_a_link("test/data-00001-of-00002.arrow"), "is a link out of"),
        (with_a_link("dataset_dict.json"), "is a link out of"),
        (lambda folder: (folder / "test" / "data-00001-of-00002.arrow").unlink(), "is missing, or no file"),
        (lambda folder: (folder / "test" / "state.json").write_text("[" * 100_000), "nested too deeply"),
        (lambda folder: (folder / "test" / "state.json").write_text("{}"), "does not list the files of data"),
        (lambda folder: (folder / "test" / "state.json").write_text('{"_data_files": 3}'), "does not list the files"),
        (lambda folder: (folder / "test" / "state.json").write_text('{"_data_files": [3]}'), "does not list the files"),
        (lambda folder: (folder / "dataset_dict.json").write_text('{"splits": ["../x"]}'), "does not list the splits"),
        (lambda folder: (folder / "dataset_dict.json").write_text("3"), "it is not one object"),
    ],
)
def test_a_folder_from_a_stranger_is_refused_where_it_leads_elsewhere_or_lacks_a_part(
    saved: Path, change: Callable[[Path], Any], message: str
) -> None:
    change(saved)
    with pytest.raises(ValueError, match=message):
        Corpus.from_file(saved, split="test")


def test_features_that_name_files_or_code_are_not_decoded(tmp_path: Path) -> None:
    stream(
        tmp_path / "saved",
        [pa.RecordBatch.from_pylist([{"text": "x", "sound": {"bytes": None, "path": "/etc/passwd"}}])],
    )
    features = {"text": {"dtype": "string", "_type": "Value"}, "sound": {"_type": "Audio"}}
    written(tmp_path / "saved" / "dataset_info.json", json.dumps({"features": features}))
    assert completions(tmp_path / "saved") == ["x"]
    with pytest.raises(ValueError, match=r"field 'sound' is {'bytes': None, 'path': '/etc/passwd'}, of type dict"):
        Corpus.from_file(tmp_path / "saved", field="sound")
