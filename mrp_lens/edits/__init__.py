"""Edits: what a method learned, as data that can be applied, stacked, saved and taken back."""

from mrp_lens.edits.base import Attached, Edit, EditStack, edit_on, load_edit
from mrp_lens.edits.conditional import ConditionalProjectionEdit
from mrp_lens.edits.gate import Gate
from mrp_lens.edits.parts import has_hooks, projection_in, without_hooks, without_projections
from mrp_lens.edits.projection import Direction, ProjectionEdit, projection_hook
from mrp_lens.edits.steering import SteeringEdit
from mrp_lens.edits.strength import at_strength, most_strength
from mrp_lens.edits.weight import WeightEdit
from mrp_lens.models.attachments import edits_on

__all__ = [
    "Attached",
    "ConditionalProjectionEdit",
    "Direction",
    "Edit",
    "EditStack",
    "Gate",
    "ProjectionEdit",
    "SteeringEdit",
    "WeightEdit",
    "at_strength",
    "edit_on",
    "edits_on",
    "has_hooks",
    "load_edit",
    "most_strength",
    "projection_hook",
    "projection_in",
    "without_hooks",
    "without_projections",
]
