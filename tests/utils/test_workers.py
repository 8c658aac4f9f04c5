import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from mrp_lens.utils import workers
from mrp_lens.utils.workers import WORKERS, at_work, exclusive, forget_dead, is_at_work

AT_WORK = """
import sys, time
from pathlib import Path
from mrp_lens.utils.workers import at_work
with at_work(Path(sys.argv[1])) as name:
    print(name, flush=True)
    time.sleep(60)
"""
COUNT = """
import sys, time
from pathlib import Path
from mrp_lens.utils.workers import exclusive
file = Path(sys.argv[1]) / "count"
for _ in range(40):
    with exclusive(Path(sys.argv[1])):
        number = int(file.read_text())
        time.sleep(0.001)
        file.write_text(str(number + 1))
"""


def start(code: str, folder: Path) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", code, str(folder)], stdout=subprocess.PIPE, text=True)


@pytest.mark.parametrize("locks", [True, False])
def test_who_is_killed_is_known_to_be_gone(tmp_path: Path, locks: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    process = start(AT_WORK, tmp_path)
    assert process.stdout is not None
    name = process.stdout.readline().strip()
    monkeypatch.setattr(workers, "HAS_LOCKS", locks)  # without them, by its number
    assert is_at_work(tmp_path, name)
    process.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + 20
    while is_at_work(tmp_path, name):  # a zombie until it is waited for, and dead all the same
        assert time.monotonic() < deadline
    process.wait()
    process.stdout.close()
    assert not is_at_work(tmp_path, name)
    with at_work(tmp_path) as mine:
        forget_dead(tmp_path)
        assert [path.name for path in (tmp_path / WORKERS).iterdir()] == [mine]


def test_who_ends_leaves_nothing(tmp_path: Path) -> None:
    with at_work(tmp_path) as name, at_work(tmp_path) as other:
        assert name != other
        assert is_at_work(tmp_path, name)
        assert is_at_work(tmp_path, other)
    assert not is_at_work(tmp_path, name)
    assert not list((tmp_path / WORKERS).iterdir())


def test_a_number_that_another_process_has_now_is_not_the_worker(tmp_path: Path) -> None:
    with at_work(tmp_path) as name:
        text = (tmp_path / WORKERS / name).read_text()
    for wrong in (text.replace('"born": ', '"born": 1'), "", "{", "[]"):
        (tmp_path / WORKERS / name).write_text(wrong)
        assert not is_at_work(tmp_path, name)
    assert str(os.getpid()) in text


def test_processes_take_turns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "count").write_text("0")
    several = [start(COUNT, tmp_path) for _ in range(3)]
    for process in several:
        process.communicate()
    assert (tmp_path / "count").read_text() == "120"


def test_without_locks_nobody_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "HAS_LOCKS", False)
    entered: list[Callable[..., object]] = []
    with exclusive(tmp_path), exclusive(tmp_path):
        entered.append(exclusive)
    assert entered
