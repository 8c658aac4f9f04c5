"""The trials of a folder: every place is finished once, whoever is killed when."""

from pathlib import Path
from typing import Any

import pytest
from optuna.storages.journal import JournalFileBackend

from mrp_lens.methods.search_space import Options, Range
from mrp_lens.runs.trials import JOURNAL, Finished, Trials
from mrp_lens.utils.workers import WORKERS, at_work
from tests.support.kills import Killed

DRAWS = {"x": Range(0.01, 10.0, log=True), "n": Range(1, 6, whole=True), "kind": Options(("a", "b"))}
FIRST = {"x": 7.0, "kind": "b"}


def opened(folder: Path, objectives: int = 2, seed: int = 0) -> Trials:
    (folder / WORKERS).mkdir(parents=True, exist_ok=True)
    return Trials(folder, DRAWS, first=FIRST, objectives=objectives, seed=seed)


def values(drawn: Any, objectives: int) -> list[float]:
    return [abs(drawn["x"] - 1.0) + (drawn["kind"] == "a"), drawn["n"] * drawn["x"]][:objectives]


def run(found: Trials, total: int, objectives: int = 2, worker: str = "gone") -> list[Finished]:
    while (trial := found.take(total, worker)) is not None:
        given_up = trial.drawn["n"] == 6
        found.finish(trial, None if given_up else values(trial.drawn, objectives), {"place": trial.place})
    return found.finished()


@pytest.mark.parametrize("objectives", [1, 2])
def test_a_seed_gives_the_same_trials_in_one_go_and_in_several(tmp_path: Path, objectives: int) -> None:
    whole = run(opened(tmp_path / "whole", objectives), 16, objectives)
    assert [trial.place for trial in whole] == list(range(16))
    assert [FIRST.items() <= trial.drawn.items() for trial in whole] == [True, *[False] * 15]
    assert all(trial.result == {"place": trial.place} for trial in whole)
    assert {trial.pruned for trial in whole if trial.drawn["n"] == 6} <= {True}
    for total in (1, 5, 5, 12, 16):
        parts = run(opened(tmp_path / "parts", objectives), total, objectives)
    assert parts == whole
    assert opened(tmp_path / "parts", objectives).finished(5) == whole[:5]
    assert run(opened(tmp_path / "other", objectives, seed=1), 16, objectives) != whole


def test_the_sampler_learns(tmp_path: Path) -> None:
    found = run(opened(tmp_path, 1), 60, 1)
    first, last = (
        [values(trial.drawn, 1)[0] for trial in part if not trial.pruned] for part in (found[:10], found[30:])
    )
    assert sum(last) / len(last) < 0.5 * sum(first) / len(first)


@pytest.mark.slow
def test_a_process_that_dies_at_any_write_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = run(opened(tmp_path / "whole"), 13)
    real = JournalFileBackend.append_logs
    for left in (*range(1, 11), 61, 95):  # the first trials write by write, then among those of the sampler
        count = [left]

        def append(self: Any, logs: Any, count: list[int] = count) -> None:
            count[0] -= 1
            if count[0] == 0:
                raise Killed
            real(self, logs)

        folder = tmp_path / f"killed-{left}"
        monkeypatch.setattr(JournalFileBackend, "append_logs", append)
        with pytest.raises(Killed):
            run(opened(folder), 13)
        monkeypatch.setattr(JournalFileBackend, "append_logs", real)
        with (folder / JOURNAL).open("ab") as file:  # and the power goes while it writes
            file.write(b'{"op_code": 4, "wor')
        assert run(opened(folder), 13) == whole, left


def test_what_somebody_is_at_is_left_to_them_and_taken_over_once_they_are_gone(tmp_path: Path) -> None:
    found, second = opened(tmp_path), opened(tmp_path)
    with at_work(tmp_path) as worker:
        mine = found.take(2, worker)
        other = second.take(2, "gone")
        assert mine is not None
        assert other is not None
        assert (mine.place, other.place) == (0, 1)
        again = found.take(2, worker)  # of the other one, who is gone
        assert again is not None
        assert (again.place, again.drawn) == (1, other.drawn)
        assert second.take(2, "gone") is None
        assert not second.finish(other, [1.0, 1.0], {})  # too late
        assert found.finish(again, [1.0, 1.0], {"by": "worker"})
    taken_over = second.take(2, "gone")
    assert taken_over is not None
    assert taken_over.drawn == mine.drawn
    assert second.finish(taken_over, [0.0, 0.0], {})
    assert not found.finish(mine, [0.0, 0.0], {})
    assert [trial.place for trial in found.finished()] == [0, 1]
    assert found.finished()[1].result == {"by": "worker"}
