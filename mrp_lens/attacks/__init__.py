"""What survives an edit: retraining, probes, bypasses and triggers, each against facts that were never taught.

An attack is one file: a function for notebooks and a registered dataclass of its budgets, which suites run.
"""

# In the order in which suites run them:
# isort: off
from mrp_lens.attacks.relearn import Relearn, relearn, relearned, with_floor
from mrp_lens.attacks.probe import Probe, probe
from mrp_lens.attacks.bypass import Bypass, bypass
from mrp_lens.attacks.gcg import Jailbreak, jailbreak

# isort: on
from mrp_lens.attacks.base import Attack, FactSplit, Setting, labelled
from mrp_lens.attacks.gradients import input_gradients
from mrp_lens.attacks.registry import ATTACKS, register
from mrp_lens.attacks.suite import SuiteConfig, run_suite
from mrp_lens.attacks.summary import notes_of, rows_of_attacks, worst_attack
from mrp_lens.metrics.recovery import best

__all__ = [
    "ATTACKS",
    "Attack",
    "Bypass",
    "FactSplit",
    "Jailbreak",
    "Probe",
    "Relearn",
    "Setting",
    "SuiteConfig",
    "best",
    "bypass",
    "input_gradients",
    "jailbreak",
    "labelled",
    "notes_of",
    "probe",
    "register",
    "relearn",
    "relearned",
    "rows_of_attacks",
    "run_suite",
    "with_floor",
    "worst_attack",
]
