"""A run folder as one HTML page that opens offline."""

from mrp_lens.runs.report.page import write_report

__all__ = ["write_report"]
