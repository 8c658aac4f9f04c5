"""How the world's topics are scored, and what a score is called."""

import pytest

from mrp_lens.data.world import World
from mrp_lens.metrics.controls import verdict
from mrp_lens.runs.world_scores import score


def test_a_score_needs_topics_on_both_sides(world: World) -> None:
    for forgotten in ((), world.topics):
        with pytest.raises(ValueError, match="forgotten must be some of the topics potions"):
            score(None, world, forgotten)  # type: ignore[arg-type]


def test_verdicts() -> None:
    assert [verdict(a, 0.25) for a in (0.21, 0.25, 0.29, 0.1, 0.5)] == [
        "absent",
        "absent",
        "absent",
        "suppressed",
        "known",
    ]
