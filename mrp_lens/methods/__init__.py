"""Methods: each fits an edit that makes a model forget."""

from mrp_lens.methods.base import Fit
from mrp_lens.methods.mrp import MRP
from mrp_lens.methods.rmu import RMU, AdaptiveRMU

__all__ = ["MRP", "RMU", "AdaptiveRMU", "Fit"]
