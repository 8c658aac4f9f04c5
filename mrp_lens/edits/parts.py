"""Parts of an edit: what it projects, what it writes, and what is left without either. None stands for no edit."""

from mrp_lens.edits.base import Edit, EditStack, stack
from mrp_lens.edits.projection import ProjectionEdit
from mrp_lens.edits.weight import WeightEdit


def projection_in(edit: Edit | None) -> ProjectionEdit | None:
    """The projection that an edit holds, if any."""
    return next((part for part in _parts(edit) if isinstance(part, ProjectionEdit)), None)


def without_projections(edit: Edit | None) -> Edit | None:
    """The edit without the projection that it holds."""
    others = [part for part in _parts(edit) if not isinstance(part, ProjectionEdit)]
    return EditStack(others) if others else None


def has_hooks(edit: Edit | None) -> bool:
    """Whether a part of it is a hook that can be taken off, and no weight."""
    return any(not isinstance(part, WeightEdit) for part in _parts(edit))


def without_hooks(edit: Edit | None) -> Edit | None:
    """What is left of an edit when its hooks are removed: the weights that it writes; None if it writes none."""
    written = [part for part in _parts(edit) if isinstance(part, WeightEdit)]
    return stack(*written) if written else None


def _parts(edit: Edit | None) -> tuple[Edit, ...]:
    return () if edit is None else edit.parts
