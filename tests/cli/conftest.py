"""Data for commands, in files."""

from pathlib import Path

import pytest

from tests.support.kills import write_data


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """A folder with a forget set, a retain set and quizzes for the tiny model."""
    write_data(tmp_path)
    return tmp_path
