"""Edits: what a method learned, as data that can be applied, stacked, saved and taken back."""

from mrp_lens.edit.base import Attached, Edit, edit_on
from mrp_lens.edit.projection import ProjectionEdit, projection_hook
from mrp_lens.edit.stack import EditStack
from mrp_lens.edit.steering import SteeringEdit
from mrp_lens.edit.storage import load_edit
from mrp_lens.edit.weight import WeightEdit
from mrp_lens.model.edits_on import edits_on

__all__ = [
    "Attached",
    "Edit",
    "EditStack",
    "ProjectionEdit",
    "SteeringEdit",
    "WeightEdit",
    "edit_on",
    "edits_on",
    "load_edit",
    "projection_hook",
]
