"""Methods: each fits an edit that makes a model forget."""

from mrp_lens.methods.base import Fit
from mrp_lens.methods.mrp import MRP
from mrp_lens.methods.rmu import RMU, AdaptiveRMU

METHODS: dict[str, type[MRP] | type[RMU] | type[AdaptiveRMU]] = {kind.name: kind for kind in (MRP, RMU, AdaptiveRMU)}
"""Methods by the names that tables and commands use."""

__all__ = ["METHODS", "MRP", "RMU", "AdaptiveRMU", "Fit"]
