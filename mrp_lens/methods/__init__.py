"""Methods: each fits an edit that makes a model forget."""

from mrp_lens.methods.base import Fit
from mrp_lens.methods.baselines import NPO, DirectionAblation, GradientAscent, GradientDifference
from mrp_lens.methods.mrp.distillation import Distillation
from mrp_lens.methods.mrp.method import MRP
from mrp_lens.methods.registry import METHODS, Method, Swept, register
from mrp_lens.methods.rmu import RMU, AdaptiveRMU, NoisyRMU

__all__ = [
    "METHODS",
    "MRP",
    "NPO",
    "RMU",
    "AdaptiveRMU",
    "DirectionAblation",
    "Distillation",
    "Fit",
    "GradientAscent",
    "GradientDifference",
    "Method",
    "NoisyRMU",
    "Swept",
    "register",
]
