"""Scores by other people's harnesses: lm-evaluation-harness on a model with an edit applied."""

from mrp_lens.evals.lm_eval import evaluate

__all__ = ["evaluate"]
