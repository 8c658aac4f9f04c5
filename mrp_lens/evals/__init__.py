"""Scores by other people's harnesses: lm-evaluation-harness on a model with an edit applied."""
