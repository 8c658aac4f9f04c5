"""Methods: each fits an edit that makes a model forget."""

from typing import Any

from mrp_lens.methods.base import Fit
from mrp_lens.methods.baselines import NPO, DirectionAblation, GradientAscent, GradientDifference
from mrp_lens.methods.mrp.distillation import Distillation
from mrp_lens.methods.mrp.method import MRP
from mrp_lens.methods.rmu import RMU, AdaptiveRMU, NoisyRMU

METHODS: dict[str, type[MRP] | type[RMU] | type[AdaptiveRMU]] = {kind.name: kind for kind in (MRP, RMU, AdaptiveRMU)}
"""The methods of this library's papers by the names that tables and commands use; studies compare these."""

RIVALS: dict[str, Any] = {
    kind.name: kind for kind in (GradientAscent, GradientDifference, NPO, NoisyRMU, DirectionAblation)
}
"""What they are compared with, likewise."""

__all__ = [
    "METHODS",
    "MRP",
    "NPO",
    "RIVALS",
    "RMU",
    "AdaptiveRMU",
    "DirectionAblation",
    "Distillation",
    "Fit",
    "GradientAscent",
    "GradientDifference",
    "NoisyRMU",
]
