"""Edits: what a method learned, as data that can be applied, stacked, saved and taken back."""

from mrp_lens.edits.base import Attached, Edit, EditStack, edit_on, load_edit
from mrp_lens.edits.conditional import ConditionalProjectionEdit
from mrp_lens.edits.gate import Gate
from mrp_lens.edits.parts import has_hooks, projection_in, without_hooks, without_projections
from mrp_lens.edits.projection import ProjectionEdit, projection_hook
from mrp_lens.edits.steering import SteeringEdit
from mrp_lens.edits.weight import WeightEdit
from mrp_lens.models.attachments import edits_on

__all__ = [
    "Attached",
    "ConditionalProjectionEdit",
    "Edit",
    "EditStack",
    "Gate",
    "ProjectionEdit",
    "SteeringEdit",
    "WeightEdit",
    "edit_on",
    "edits_on",
    "has_hooks",
    "load_edit",
    "projection_hook",
    "projection_in",
    "without_hooks",
    "without_projections",
]
