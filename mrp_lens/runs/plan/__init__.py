"""Planning: what fits of a model will need, from its configuration alone."""

from mrp_lens.runs.plan.memory import Phase, Setup
from mrp_lens.runs.plan.needs import Needs, NotPlannedError, needs
from mrp_lens.runs.plan.table import Plan, PlanConfig, plan

__all__ = ["Needs", "NotPlannedError", "Phase", "Plan", "PlanConfig", "Setup", "needs", "plan"]
