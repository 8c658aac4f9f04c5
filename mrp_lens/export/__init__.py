"""Edits leave as files: plain checkpoints, model folders with code of their own, adapters; each proved by reloading."""

from mrp_lens.export.export import ExportReport, export_hf
from mrp_lens.export.hub import push_to_hub
from mrp_lens.export.measurements import Measurements
from mrp_lens.export.verification import ExportMismatchError, Proof

Record = Measurements  # its name in version 0.1

__all__ = ["ExportMismatchError", "ExportReport", "Measurements", "Proof", "Record", "export_hf", "push_to_hub"]
