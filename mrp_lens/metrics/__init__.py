"""Looking at a model: what it answers and what its residual stream does. Each metric returns a tidy frame with its control."""

from mrp_lens.metrics.alignment import alignment
from mrp_lens.metrics.answers import accuracy, choice_scores
from mrp_lens.metrics.confidence import confidence, token_confidence
from mrp_lens.metrics.intervals import bootstrap_interval
from mrp_lens.metrics.text import answer_probability, perplexity

__all__ = [
    "accuracy",
    "alignment",
    "answer_probability",
    "bootstrap_interval",
    "choice_scores",
    "confidence",
    "perplexity",
    "token_confidence",
]
