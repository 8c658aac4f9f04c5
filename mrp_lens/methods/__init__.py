"""Methods: each fits an edit that makes a model forget."""

# A module registers its methods when it is imported: this is their order in METHODS.
# isort: off
from mrp_lens.methods.mrp.method import MRP, UnconditionalMRP
from mrp_lens.methods.mrp.distillation import Distillation
from mrp_lens.methods.rmu import RMU, AdaptiveRMU
from mrp_lens.methods.baselines import DirectionAblation, GradientAscent, GradientDifference, NoisyRMU
from mrp_lens.methods.preference import NPO, IdkPreference, SimNPO
from mrp_lens.methods.undial import UNDIAL

# isort: on
from mrp_lens.methods.base import Data, FitContext, FitTemplate, fitting
from mrp_lens.methods.control import control_accuracy
from mrp_lens.methods.coverage import Coverage
from mrp_lens.methods.fit import Fit
from mrp_lens.methods.outcome import Outcome
from mrp_lens.methods.registry import METHODS, Method, Swept, register
from mrp_lens.methods.search_space import Block, Depth, Factor, Options, Range

__all__ = [
    "METHODS",
    "MRP",
    "NPO",
    "RMU",
    "UNDIAL",
    "AdaptiveRMU",
    "Block",
    "Coverage",
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
    "IdkPreference",
    "Method",
    "NoisyRMU",
    "Options",
    "Outcome",
    "Range",
    "SimNPO",
    "Swept",
    "UnconditionalMRP",
    "control_accuracy",
    "fitting",
    "register",
]
