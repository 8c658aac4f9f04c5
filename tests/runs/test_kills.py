"""A few kills of each command; `python -m tests.support.kills` does more."""

import signal
from pathlib import Path

import pytest

from tests.support.kills import killed_and_resumed, prepared


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "number"),
    [
        ("unlearn", signal.SIGKILL),
        pytest.param("unlearn", signal.SIGTERM, marks=pytest.mark.long),
        pytest.param("unlearn", signal.SIGINT, marks=pytest.mark.long),
        ("sweep", signal.SIGKILL),
        ("attack", signal.SIGKILL),
        pytest.param("tune", signal.SIGKILL, marks=pytest.mark.long),
        ("tune", signal.SIGINT),
    ],
)
def test_a_command_that_was_killed_ends_as_one_that_was_not(
    command: str, number: signal.Signals, tmp_path: Path
) -> None:
    model, times = prepared(tmp_path), 1 if command == "attack" else 2
    hit = killed_and_resumed(command, model=model, data=tmp_path, work=tmp_path, times=times, number=number, seed=0)
    assert sum(hit.values()) >= times
