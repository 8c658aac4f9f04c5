"""A few kills of each command; `python -m tests.kills` does more."""

import signal
from pathlib import Path

import pytest

from tests.kills import killed_and_resumed, prepared


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("command", ["unlearn", "sweep", "attack"])
def test_a_command_that_was_killed_ends_as_one_that_was_not(
    command: str, number: signal.Signals, tmp_path: Path
) -> None:
    model = prepared(tmp_path)
    hit = killed_and_resumed(command, model=model, data=tmp_path, work=tmp_path, times=2, number=number, seed=0)
    assert sum(hit.values()) >= 2
