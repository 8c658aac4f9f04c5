"""One function a picture: each takes the frame of a metric and returns a plotly figure, which the library never shows."""

from mrp_lens.plots.alignment import alignment_by_coefficient, alignment_by_layer, norms
from mrp_lens.plots.attacks import (
    input_gradients,
    jailbreak_curve,
    logit_lens,
    probe_bits,
    recoveries,
    relearning_curves,
)
from mrp_lens.plots.budget import budget
from mrp_lens.plots.confidence import confidence_by_method, confidence_distribution
from mrp_lens.plots.depth import depth
from mrp_lens.plots.frames import Frame
from mrp_lens.plots.gate import gate, gate_tokens
from mrp_lens.plots.geometry import (
    displacement,
    effective_rank,
    principal_angles,
    principal_plane,
    propagation,
    removed_energy,
)
from mrp_lens.plots.registry import FIGURES, register
from mrp_lens.plots.results import accuracies, coefficient_effects, layer_effects, training
from mrp_lens.plots.separability import separability
from mrp_lens.plots.theory import noise_sensitivity, predicted_coefficients, theory_check, variance_by_coefficient
from mrp_lens.plots.tuning import pareto

__all__ = [
    "FIGURES",
    "Frame",
    "accuracies",
    "alignment_by_coefficient",
    "alignment_by_layer",
    "budget",
    "coefficient_effects",
    "confidence_by_method",
    "confidence_distribution",
    "depth",
    "displacement",
    "effective_rank",
    "gate",
    "gate_tokens",
    "input_gradients",
    "jailbreak_curve",
    "layer_effects",
    "logit_lens",
    "noise_sensitivity",
    "norms",
    "pareto",
    "predicted_coefficients",
    "principal_angles",
    "principal_plane",
    "probe_bits",
    "propagation",
    "recoveries",
    "register",
    "relearning_curves",
    "removed_energy",
    "separability",
    "theory_check",
    "training",
    "variance_by_coefficient",
]
