"""Looking at a model: what it answers and what its residual stream does. Each metric returns a tidy frame with its control."""

# A row has the keys of text before those of questions: metrics add theirs in the order in which they are imported.
from mrp_lens.metrics.perplexity import answer_probability, perplexity

# isort: split
from mrp_lens.metrics.alignment import alignment
from mrp_lens.metrics.bootstrap import bootstrap_interval, value
from mrp_lens.metrics.confidence import confidence, token_confidence
from mrp_lens.metrics.damage import damage
from mrp_lens.metrics.depth import depth
from mrp_lens.metrics.fluency import fluency
from mrp_lens.metrics.gate import gate, gate_tokens
from mrp_lens.metrics.geometry import geometry, propagation
from mrp_lens.metrics.logit_lens import logit_lens
from mrp_lens.metrics.membership import membership
from mrp_lens.metrics.memorization import exact_memorization, extraction_strength
from mrp_lens.metrics.multiple_choice import accuracy, choice_scores
from mrp_lens.metrics.open_ended import open_ended
from mrp_lens.metrics.pca import principal_angles, principal_plane
from mrp_lens.metrics.registry import (
    METRICS,
    Measured,
    Metric,
    frames_for,
    headings,
    register,
    rows_and_frames_for,
    rows_for,
)
from mrp_lens.metrics.sensitivity import noise_sensitivity, predicted_coefficient
from mrp_lens.metrics.separability import separability
from mrp_lens.metrics.theory import proposition_1, variance_by_coefficient
from mrp_lens.metrics.token_effects import token_effects
from mrp_lens.metrics.truth_ratio import forget_quality, truth_ratio
from mrp_lens.metrics.utility import model_utility

__all__ = [
    "METRICS",
    "Measured",
    "Metric",
    "accuracy",
    "alignment",
    "answer_probability",
    "bootstrap_interval",
    "choice_scores",
    "confidence",
    "damage",
    "depth",
    "exact_memorization",
    "extraction_strength",
    "fluency",
    "forget_quality",
    "frames_for",
    "gate",
    "gate_tokens",
    "geometry",
    "headings",
    "logit_lens",
    "membership",
    "model_utility",
    "noise_sensitivity",
    "open_ended",
    "perplexity",
    "predicted_coefficient",
    "principal_angles",
    "principal_plane",
    "propagation",
    "proposition_1",
    "register",
    "rows_and_frames_for",
    "rows_for",
    "separability",
    "token_confidence",
    "token_effects",
    "truth_ratio",
    "value",
    "variance_by_coefficient",
]
