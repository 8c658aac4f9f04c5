"""The embedded default: a small invented world, and (under `data/`) the model that knows it."""

from mrp_lens.data.world.facts import Fact, World

__all__ = ["Fact", "World"]
