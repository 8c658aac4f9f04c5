"""What survives an edit: retraining, probes, bypasses and triggers, each against facts that were never taught."""

from mrp_lens.attacks.bypass import bypass
from mrp_lens.attacks.gcg import jailbreak
from mrp_lens.attacks.gradients import input_gradients
from mrp_lens.attacks.probe import probe
from mrp_lens.attacks.relearn import best, relearn, relearned, with_floor

__all__ = ["best", "bypass", "input_gradients", "jailbreak", "probe", "relearn", "relearned", "with_floor"]
