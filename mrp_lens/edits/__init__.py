"""Edits: what a method learned, as data that can be applied, stacked, saved and taken back."""

from mrp_lens.edits.base import Attached, Edit, edit_on
from mrp_lens.edits.projection import ProjectionEdit, projection_hook
from mrp_lens.edits.serialization import load_edit
from mrp_lens.edits.stack import EditStack
from mrp_lens.edits.steering import SteeringEdit
from mrp_lens.edits.weight import WeightEdit
from mrp_lens.models.attachments import edits_on

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
