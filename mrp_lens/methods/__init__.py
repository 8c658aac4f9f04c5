"""Methods: each fits an edit that makes a model forget."""

# A module registers its methods when it is imported: this is their order in METHODS.
# isort: off
from mrp_lens.methods.mrp.method import MRP
from mrp_lens.methods.mrp.distillation import Distillation
from mrp_lens.methods.rmu import RMU, AdaptiveRMU
from mrp_lens.methods.baselines import NPO, DirectionAblation, GradientAscent, GradientDifference, NoisyRMU

# isort: on
from mrp_lens.methods.base import Data, FitContext, FitTemplate, fitting
from mrp_lens.methods.fit import Fit
from mrp_lens.methods.registry import METHODS, Method, Swept, register
from mrp_lens.methods.search_space import Block, Depth, Factor, Options, Range

__all__ = [
    "METHODS",
    "MRP",
    "NPO",
    "RMU",
    "AdaptiveRMU",
    "Block",
    "Data",
    "Depth",
    "DirectionAblation",
    "Distillation",
    "Factor",
    "Fit",
    "FitContext",
    "FitTemplate",
    "GradientAscent",
    "GradientDifference",
    "Method",
    "NoisyRMU",
    "Options",
    "Range",
    "Swept",
    "fitting",
    "register",
]
