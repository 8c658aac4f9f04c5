"""What each process of a group gets of the work."""

from itertools import chain

import pytest
import torch.distributed as dist

from mrp_lens.utils import processes
from mrp_lens.utils.processes import (
    ENVIRONMENT,
    dealt,
    gathered,
    is_first,
    joined,
    launched,
    portable,
    shares,
    together,
)


@pytest.fixture
def group(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> tuple[int, int]:
    """This process as one of a group that is not there."""
    rank, count = request.param
    monkeypatch.setattr(processes, "_grouped", lambda: True)
    monkeypatch.setattr(dist, "get_rank", lambda: rank)
    monkeypatch.setattr(dist, "get_world_size", lambda: count)
    return rank, count


@pytest.mark.parametrize("size", [None, 1, 2, 3, 50])
@pytest.mark.parametrize("rows", [0, 1, 2, 5, 12])
@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_every_row_is_in_one_part_of_one_process(
    rows: int, size: int | None, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "_grouped", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: count)
    found = []
    for rank in range(count):
        monkeypatch.setattr(dist, "get_rank", lambda rank=rank: rank)
        with together():
            found.append([list(range(rows))[part] for part in shares(rows, size)])
    assert sorted(chain(*chain(*found))) == list(range(rows))
    assert all(part and len(part) <= (size or rows) for parts in found for part in parts)
    each = [sum(map(len, parts)) for parts in found]
    assert max(each) - min(each) <= 1
    if count == 1:
        width = size or max(rows, 1)
        assert found[0] == [list(range(rows))[start : start + width] for start in range(0, rows, width)]


@pytest.mark.parametrize("group", [(1, 3)], indirect=True)
def test_a_process_is_on_its_own_outside_of_what_is_done_together(group: tuple[int, int]) -> None:
    assert list(dealt("abcdefgh")) == list("abcdefgh")
    assert gathered(5) == [5]
    assert not is_first()
    with together():
        assert list(dealt("abcdefgh")) == ["b", "e", "h"]
    assert list(shares(4, None)) == [slice(0, 4, 1)]


def test_nothing_is_joined_where_a_process_was_started_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)
    assert launched() == 1
    with joined():
        assert not dist.is_initialized()
    monkeypatch.setenv("WORLD_SIZE", "4")  # some clusters set it for whatever runs there
    assert launched() == 1
    assert is_first()


def test_an_error_that_cannot_be_sent_is_told_in_words() -> None:
    class Local(Exception):
        """One that no other process knows."""

    told = portable(Local("why"))
    assert type(told) is RuntimeError
    assert str(told) == "Local: why"
    error = ValueError("what")
    assert portable(error) is error
    assert portable(None) is None
