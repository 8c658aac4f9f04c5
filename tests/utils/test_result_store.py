"""A run folder is gone on with by whoever has its settings, and one of version 0.1 by what that wrote."""

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from mrp_lens.utils.result_store import POINTS, RECORD, ResultStore, check_holds, holds_run

MODEL = {"name": "m", "embedding": {"float32": "e"}, "weights": "w"}
OLD_MODEL = {key: value for key, value in MODEL.items() if key != "weights"}  # what 0.1 knew of a model
DATA, OLD_DATA = {"forget": "new", "retain": "r"}, {"forget": "old", "retain": "r"}


def folder_of(tmp_path: Path, settings: dict[str, Any]) -> Path:
    ResultStore.claim(tmp_path / "run", "sweep", settings).keep("point", {"row": 1})
    return tmp_path / "run"


@pytest.mark.parametrize(
    ("model", "data", "known"),
    [
        (OLD_MODEL, OLD_DATA, True),
        (OLD_MODEL, DATA, True),
        (OLD_MODEL, {"forget": "other", "retain": "r"}, False),
        (OLD_MODEL, {**OLD_DATA, "retain": "other"}, False),
        (MODEL, OLD_DATA, False),  # this version wrote it: the same texts under another hash are other data
        (MODEL, DATA, True),
    ],
)
def test_a_folder_of_version_0_1_is_known_by_the_hashes_that_it_wrote(
    model: dict[str, Any], data: dict[str, str], known: bool, tmp_path: Path
) -> None:
    out = folder_of(tmp_path, {"model": model, "data": data, "steps": 3})
    before = (out / "sweep.json").read_bytes()
    now = {"model": MODEL, "data": DATA, "steps": 3}
    if known:
        store = ResultStore.claim(out, "sweep", now, earlier={"data": OLD_DATA})
        assert store.stored("point") == {"row": 1}
    else:
        with pytest.raises(ValueError, match="other settings: data"):
            ResultStore.claim(out, "sweep", now, earlier={"data": OLD_DATA})
    assert (out / "sweep.json").read_bytes() == before
    with pytest.raises(ValueError, match=r"steps \(3 there, 4 now\)"):
        ResultStore.claim(out, "sweep", {**now, "steps": 4}, earlier={"data": OLD_DATA})


def test_a_setting_that_is_left_out_the_second_time_is_another_one(tmp_path: Path) -> None:
    out = folder_of(tmp_path, {"steps": 3, "max_length": 8, "limit": None})
    with pytest.raises(ValueError, match=r"other settings: max_length \(8 there, null now\)"):
        ResultStore.claim(out, "sweep", {"steps": 3})
    ResultStore.claim(out, "sweep", {"steps": 3, "max_length": 8})


def test_nothing_is_accepted_that_nobody_offered(tmp_path: Path) -> None:
    out = folder_of(tmp_path, {"model": OLD_MODEL, "data": OLD_DATA})
    with pytest.raises(ValueError, match="other settings: data"):
        ResultStore.claim(out, "sweep", {"model": MODEL, "data": DATA})
    assert json.loads((out / "sweep.json").read_text())["data"] == OLD_DATA


def test_several_may_begin_a_run_at_the_same_moment(tmp_path: Path) -> None:
    together, wanted = threading.Barrier(6, timeout=20), {"steps": 3}

    def begin(_: int) -> list[Path]:
        begun = []
        for number in range(60):
            together.wait()
            check_holds(tmp_path / f"run-{number}", "sweep")
            begun.append(ResultStore.claim(tmp_path / f"run-{number}", "sweep", wanted).folder)
        return begun

    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(begin, range(6)))
    assert found == [[tmp_path / f"run-{number}" for number in range(60)]] * 6
    for folder in found[0]:
        assert json.loads((folder / "sweep.json").read_text()) == wanted


def test_what_holds_something_else_is_left_as_it_is(tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "mine.txt").write_text("mine")
    for target in (other, other / "mine.txt"):
        with pytest.raises(FileExistsError, match="holds no sweep"):
            ResultStore.claim(target, "sweep", {})
    assert [path.name for path in other.iterdir()] == ["mine.txt"]
    check_holds(tmp_path / "new", "sweep")
    assert not (tmp_path / "new").exists()


def files_in(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


def test_a_run_is_begun_anew_in_the_place_of_one_and_of_an_empty_folder(tmp_path: Path) -> None:
    out = folder_of(tmp_path, {"steps": 3})
    (out / "edit").mkdir()
    (out / "edit" / "edit.safetensors").write_text("fitted")
    store = ResultStore.claim(out, "sweep", {"steps": 4}, overwrite=True)
    assert list(files_in(out)) == ["sweep.json"]
    assert store.stored("point") is None
    (tmp_path / "empty" / POINTS).mkdir(parents=True)  # as a process that was killed at its start left it
    for name in ("empty", "new"):
        ResultStore.claim(tmp_path / name, "sweep", {"steps": 4}, overwrite=True)
    finished = tmp_path / "finished"
    finished.mkdir()
    (finished / RECORD).write_text(json.dumps({"command": "measure", "versions": {}, "rows": []}))
    assert holds_run(finished, "sweep")
    ResultStore.claim(finished, "sweep", {"steps": 4}, overwrite=True)
    assert list(files_in(finished)) == ["sweep.json"]


@pytest.mark.parametrize(
    "content",
    [
        {"config.json": "{}", "model.safetensors": "weights"},
        {"sweep.json": "{}", "mine.txt": "mine"},
        {"points/cloud.json": "{}", "mine.txt": "mine"},
        {RECORD: '{"rows": []}', "mine.txt": "mine"},
        {RECORD: "[", "mine.txt": "mine"},
    ],
    ids=lambda content: " ".join(content),
)
def test_what_is_no_run_is_never_overwritten(content: dict[str, str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    for name, text in content.items():
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text(text)
    with pytest.raises(FileExistsError, match="out exists and holds no run, so nothing replaces it"):
        ResultStore.claim(out, "sweep", {}, overwrite=True)
    assert files_in(out) == content
    (tmp_path / "link").mkdir()
    (tmp_path / "link" / "data").symlink_to(out)
    assert not holds_run(tmp_path / "link", "sweep")
    assert not holds_run(out / next(iter(content)), "sweep")


def test_a_run_that_a_process_is_at_work_on_is_not_overwritten(tmp_path: Path) -> None:
    out = folder_of(tmp_path, {"steps": 3})
    before = files_in(out)
    with ResultStore(out).lock:
        for settings in ({"steps": 3}, {"steps": 4}):
            with pytest.raises(BlockingIOError, match=r"another process is at work in .*run; wait for it"):
                ResultStore.claim(out, "sweep", settings, overwrite=True)
            assert files_in(out) == before
    assert ResultStore.claim(out, "sweep", {"steps": 4}, overwrite=True).stored("point") is None
