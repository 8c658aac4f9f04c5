"""Files and folders that appear whole or not at all: full disks, kills between two renames, several writers at once."""

import errno
import os
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from mrp_lens.utils import io
from mrp_lens.utils.io import check_apart, finite, recover, whole_folder, write_bytes, write_json, write_text


@contextmanager
def files_end_at(size: int) -> Iterator[None]:
    """Inside, the system refuses to write a file beyond this size, as a full disk would."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("size", [0, 1, 4095, 4096, 9999])
def test_a_disk_that_is_full_at_any_byte_leaves_the_old_file(size: int, tmp_path: Path) -> None:
    target = tmp_path / "file"
    for before, said in ((None, "nothing is left of it"), (b"old", "what was there before is still in place")):
        if before is not None:
            target.write_bytes(before)
        with files_end_at(size), pytest.raises(OSError, match=rf"file could not be written \(.*\); {said}"):
            write_bytes(target, b"x" * 10_000)
        assert content(tmp_path) == ({} if before is None else {"file": before})
    write_bytes(target, b"x" * 10_000)
    assert content(tmp_path) == {"file": b"x" * 10_000}


def test_a_disk_that_turns_out_full_only_when_the_bytes_reach_it_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(number: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    write_text(tmp_path / "file", "old")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left on device") as caught:
        write_json(tmp_path / "file", {"new": 1})
    assert caught.value.errno == errno.ENOSPC
    with pytest.raises(OSError, match="No space left on device"), whole_folder(tmp_path / "folder") as folder:
        (folder / "file").write_text("new")
    assert content(tmp_path) == {"file": b"old"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file"]


def test_text_that_has_no_utf8_leaves_the_old_file(tmp_path: Path) -> None:
    write_text(tmp_path / "file", "old")
    with pytest.raises(UnicodeEncodeError):
        write_text(tmp_path / "file", "\ud800")
    assert content(tmp_path) == {"file": b"old"}


def test_others_may_read_a_file_and_a_folder_as_they_may_any_new_one(tmp_path: Path) -> None:
    mask = os.umask(0o027)
    try:
        write_text(tmp_path / "file", "x")
        with whole_folder(tmp_path / "folder"):
            pass
    finally:
        os.umask(mask)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o640
    assert (tmp_path / "folder").stat().st_mode & 0o777 == 0o750


def test_threads_that_write_one_file_leave_one_of_their_contents(tmp_path: Path) -> None:
    contents = [bytes([65 + number]) * 50_000 for number in range(8)]

    def write(text: bytes) -> None:
        for _ in range(20):
            write_bytes(tmp_path / "f", text)

    threads = [threading.Thread(target=write, args=(text,)) for text in contents]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (tmp_path / "f").read_bytes() in contents
    assert [path.name for path in tmp_path.iterdir()] == ["f"]


@pytest.mark.parametrize("failing", [1, 2])
def test_a_rename_that_fails_leaves_the_old_folder_in_place(
    failing: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with whole_folder(tmp_path / "out") as folder:
        (folder / "file").write_text("old")
    original, calls = Path.rename, []

    def rename(self: Path, target: Path) -> Path:
        calls.append(target)
        if len(calls) == failing:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return original(self, target)

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(OSError, match="Input/output"), whole_folder(tmp_path / "out", overwrite=True) as folder:
        (folder / "file").write_text("new")
    assert content(tmp_path) == {"out/file": b"old"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_folder_that_somebody_else_wrote_meanwhile_is_not_replaced_without_leave(tmp_path: Path) -> None:
    def write_slowly() -> None:
        with whole_folder(tmp_path / "out") as slow:
            (slow / "file").write_text("slow")
            with whole_folder(tmp_path / "out") as fast:  # in the same process: the two are kept apart
                assert fast != slow
                (fast / "file").write_text("fast")
            assert (slow / "file").read_text() == "slow"

    with pytest.raises(FileExistsError, match="exists and is not empty"):
        write_slowly()
    assert content(tmp_path) == {"out/file": b"fast"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_link_to_a_folder_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "disk" / "out").mkdir(parents=True)
    (tmp_path / "out").symlink_to(tmp_path / "disk" / "out")
    for text in ("one", "two"):
        with whole_folder(tmp_path / "out", overwrite=True) as folder:
            assert folder.parent == tmp_path / "disk"
            (folder / "file").write_text(text)
    assert (tmp_path / "out").is_symlink()
    assert (tmp_path / "disk" / "out" / "file").read_text() == "two"
    assert sorted(path.name for path in (tmp_path / "disk").iterdir()) == ["out"]


def test_a_lock_of_somebody_else_does_not_stop_a_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fcntl = pytest.importorskip("fcntl")
    monkeypatch.setattr("mrp_lens.utils.io.LONGEST_WAIT", 0.1)
    number = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(number, fcntl.LOCK_EX)  # as `flock runs/ mrp-lens ...` would
    try:
        with whole_folder(tmp_path / "out") as folder:
            (folder / "file").write_text("x")
    finally:
        os.close(number)
    assert content(tmp_path) == {"out/file": b"x"}


WRITER = """
import sys
from pathlib import Path
from mrp_lens.utils.io import recover, whole_folder
mark, out = sys.argv[1], Path(sys.argv[2])
done = refused = 0
print("ready", flush=True)
sys.stdin.readline()
for _ in range(50):
    try:
        with whole_folder(out, overwrite=True) as folder:
            for name in "abcd":
                (folder / name).write_text(mark * 100)
        done += 1
    except OSError:
        refused += 1
    recover(out)
print(done, refused)
"""


def test_processes_that_write_one_folder_at_once_never_mix(tmp_path: Path) -> None:
    out = tmp_path / "out"
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", WRITER, mark, str(out)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for mark in "xy"
    ]
    for writer in writers:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "ready\n"
    finished = [writer.communicate("go\n")[0].split() for writer in writers]
    assert [writer.returncode for writer in writers] == [0, 0]
    assert sum(int(done) for done, _ in finished) >= 80, finished
    found = content(tmp_path)
    assert set(found) == {f"out/{name}" for name in "abcd"}
    assert len(set(found.values())) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_old_folder_comes_back_after_a_kill_between_two_renames(tmp_path: Path) -> None:
    (tmp_path / ".out.replaced").mkdir()
    (tmp_path / ".out.replaced" / "file").write_text("old")
    recover(tmp_path / "out")
    assert content(tmp_path) == {"out/file": b"old"}


def test_a_folder_inside_one_that_is_being_written_is_saved_without_waiting(tmp_path: Path) -> None:
    begun = time.monotonic()
    with whole_folder(tmp_path / "outer") as outer:
        with whole_folder(outer / "inner") as inner:
            write_text(inner / "file", "x")
        write_text(outer / "file", "y")
    assert time.monotonic() - begun < 5.0
    assert content(tmp_path / "outer") == {"inner/file": b"x", "file": b"y"}


@pytest.mark.skipif(not io.HAS_LOCKS, reason="the system has no such locks")
def test_a_file_that_another_process_writes_is_not_taken_for_one_that_a_killed_process_left(tmp_path: Path) -> None:
    running = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    try:
        writing, own, left, mine = (
            tmp_path / f".report.html.{numbers}.partial"
            for numbers in (f"{running.pid}-7", f"{os.getpid()}-7", f"{ended.pid}-7", f"{os.getpid()}-8")
        )
        other = tmp_path / ".of somebody.partial"
        for path in (writing, own, left, mine, other):
            path.write_bytes(b"half")
        with own.open("rb") as file:  # as a process of another container, which has this one's number
            assert io.lock(file.fileno())
            io.remove_partial_files(tmp_path)
        assert sorted(tmp_path.iterdir()) == sorted([writing, own, other])
    finally:
        running.kill()
        running.wait()
    io.remove_partial_files(tmp_path)
    assert list(tmp_path.iterdir()) == [other]


def test_a_file_is_whole_however_often_another_process_tidies_meanwhile(tmp_path: Path) -> None:
    tidying = subprocess.Popen(
        [
            sys.executable,
            "-c",
            f"import pathlib; from mrp_lens.utils.io import remove_partial_files\n"
            f"print('at it', flush=True)\nwhile True: remove_partial_files(pathlib.Path({str(tmp_path)!r}))",
        ],
        stdout=subprocess.PIPE,
    )
    try:
        assert tidying.stdout is not None
        assert tidying.stdout.readline() == b"at it\n"
        for number in range(200):
            io.write_text(tmp_path / "report.html", str(number))
    finally:
        tidying.kill()
        tidying.communicate()
    assert (tmp_path / "report.html").read_text() == "199"


@pytest.mark.parametrize(
    ("target", "read", "apart"),
    [
        ("run", "run", False),
        ("run", "run/edit", False),
        (".", "texts.jsonl", False),
        ("run/../run", "link", False),
        ("run/edit/more", "run/edit", True),
        ("run/other", "run/edit", True),
        ("running", "run", True),
        ("new", "texts.jsonl", True),
    ],
)
def test_results_replace_nothing_that_is_read(target: str, read: str, apart: bool, tmp_path: Path) -> None:
    (tmp_path / "run" / "edit").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "run")
    (tmp_path / "texts.jsonl").write_text("{}")
    if apart:
        check_apart(tmp_path / target, tmp_path / read, "the edit")
        return
    with pytest.raises(
        ValueError, match=r"is or holds the edit \(.*\), which would be deleted; choose another output folder"
    ):
        check_apart(tmp_path / target, tmp_path / read, "the edit")


def test_json_has_no_nan_and_no_infinities() -> None:
    inf, nan = float("inf"), float("nan")
    content = {"rows": [{"a": nan, "b": 1.5, "c": "NaN"}, {"a": (inf, -inf, 2)}], "n": 3, "none": None, "yes": True}
    known = {"rows": [{"a": None, "b": 1.5, "c": "NaN"}, {"a": [None, None, 2]}], "n": 3, "none": None, "yes": True}
    assert finite(content) == known
