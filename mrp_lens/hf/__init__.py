"""Edits on plain Hugging Face models, as hooks: nothing of TransformerLens in between."""

from mrp_lens.edits import Attached
from mrp_lens.hf.attach import attach

__all__ = ["Attached", "attach"]
