"""What survives an edit: retraining, probes, bypasses and triggers, each against facts that were never taught."""

from mrp_lens.attacks.relearn import best, relearn, relearned, with_floor

__all__ = ["best", "relearn", "relearned", "with_floor"]
