"""How the topics of the world are scored."""

import pytest

from mrp_lens.data.world import World
from mrp_lens.runs.world_scores import score


def test_a_score_needs_topics_on_both_sides(world: World) -> None:
    for forgotten in ((), world.topics):
        with pytest.raises(ValueError, match="forgotten must be some of the topics potions"):
            score(None, world, forgotten)  # type: ignore[arg-type]
