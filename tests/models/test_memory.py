"""Metrics on a device whose memory holds few texts a pass: the same figures, from smaller passes."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pandas as pd
import pytest
import torch

from mrp_lens import metrics
from mrp_lens.data import Corpus, Questions
from mrp_lens.data.world import World
from mrp_lens.methods import RMU
from mrp_lens.models import LensModel
from mrp_lens.training.loop import TooLittleMemoryError
from tests.conftest import D_MODEL
from tests.support.edits import projection

ROWS = 3
Measure = Callable[[LensModel, Corpus, Questions], pd.DataFrame]
MEASURES: dict[str, Measure] = {
    "perplexity": lambda model, corpus, quiz: metrics.perplexity(model, corpus, progress=False),
    "alignment": lambda model, corpus, quiz: metrics.alignment(model, corpus, torch.ones(D_MODEL), progress=False),
    "accuracy": lambda model, corpus, quiz: metrics.accuracy(model, quiz, progress=False),
    "depth": lambda model, corpus, quiz: metrics.depth(
        model, projection(1), corpus, reference=model, batch_size=8, progress=False
    ),
    "depth of states": lambda model, corpus, quiz: metrics.depth(
        model, projection(1), corpus, reference=model, into="unedited", positions="answer", batch_size=8, progress=False
    ),
}


@contextmanager
def small(model: Any, rows: int, error: str = "CUDA out of memory. Tried to allocate 2.00 GiB.") -> Iterator[list[int]]:
    """Inside, a pass over more rows than these fails as torch says it does; what each pass was asked to read."""
    asked: list[int] = []

    def refuse(module: Any, arguments: tuple[Any, ...]) -> None:
        asked.append(len(arguments[0]))
        if len(arguments[0]) > rows:
            raise torch.OutOfMemoryError(error)

    handle = model.blocks[0].register_forward_pre_hook(refuse)
    try:
        yield asked
    finally:
        handle.remove()


@pytest.fixture
def quiz() -> Questions:
    return World().questions("potions").spread(12)


@pytest.mark.parametrize("name", MEASURES)
def test_a_batch_that_does_not_fit_is_read_in_halves(
    name: str, model: LensModel, texts: tuple[Corpus, Corpus], quiz: Questions, untouched: None
) -> None:
    expected = MEASURES[name](model, texts[0], quiz)
    with small(model, ROWS) as asked:
        found = MEASURES[name](model, texts[0], quiz)
    assert max(asked) > ROWS >= min(asked)
    pd.testing.assert_frame_equal(found, expected, rtol=1e-4)


def test_what_does_not_fit_at_all_is_torchs_own_error(model: LensModel, texts: tuple[Corpus, Corpus]) -> None:
    with small(model, 0), pytest.raises(torch.OutOfMemoryError, match="out of memory"):
        metrics.perplexity(model, texts[0], progress=False)


def test_other_errors_are_not_taken_for_a_lack_of_memory(model: LensModel, texts: tuple[Corpus, Corpus]) -> None:
    with small(model, 0, "the cat sat on the card") as asked, pytest.raises(torch.OutOfMemoryError, match="the cat"):
        metrics.perplexity(model, texts[0], progress=False)
    assert len(asked) == 1


def test_a_fit_says_what_needs_less(model: LensModel, texts: tuple[Corpus, Corpus], untouched: None) -> None:
    settings: dict[str, Any] = {"steps": 1, "layer": 1, "steering_coeff": 5.0, "coverage": None, "budget": None}
    with (
        small(model, 2),
        pytest.raises(TooLittleMemoryError, match=r"memory ran out in update 1\. Give a smaller micro_batch"),
    ):
        RMU(**settings).fit(model, *texts, progress=False)
