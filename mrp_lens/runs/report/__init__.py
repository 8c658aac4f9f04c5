"""A run folder as one HTML page that opens offline."""

from mrp_lens.runs.report.page import report

__all__ = ["report"]
