"""Edits on plain Hugging Face models, as hooks: nothing of TransformerLens in between."""

from mrp_lens.edits import Attached
from mrp_lens.hf.attach import attach
from mrp_lens.models.source import find_folder

__all__ = ["Attached", "attach", "find_folder"]
