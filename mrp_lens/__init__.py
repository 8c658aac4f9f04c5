"""mrp_lens: study unlearning inside a language model, on the residual stream, with TransformerLens."""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mrp_lens import attacks, hf, metrics, plots
    from mrp_lens.data import Corpus, Questions
    from mrp_lens.data.world import World
    from mrp_lens.edits import Edit, EditStack, ProjectionEdit, SteeringEdit, WeightEdit, load_edit
    from mrp_lens.edits.subspace import Subspace
    from mrp_lens.export import ExportReport, Record, export_hf
    from mrp_lens.methods import (
        MRP,
        NPO,
        RMU,
        AdaptiveRMU,
        DirectionAblation,
        Distillation,
        Fit,
        GradientAscent,
        GradientDifference,
        NoisyRMU,
    )
    from mrp_lens.models import load_model

# Where each name lives. They are imported on first use: importing torch takes seconds, and --help needs none of it.
_HOMES = {
    "AdaptiveRMU": "mrp_lens.methods",
    "Corpus": "mrp_lens.data",
    "DirectionAblation": "mrp_lens.methods",
    "Distillation": "mrp_lens.methods",
    "Edit": "mrp_lens.edits",
    "EditStack": "mrp_lens.edits",
    "ExportReport": "mrp_lens.export",
    "Fit": "mrp_lens.methods",
    "GradientAscent": "mrp_lens.methods",
    "GradientDifference": "mrp_lens.methods",
    "MRP": "mrp_lens.methods",
    "NPO": "mrp_lens.methods",
    "NoisyRMU": "mrp_lens.methods",
    "ProjectionEdit": "mrp_lens.edits",
    "Questions": "mrp_lens.data",
    "RMU": "mrp_lens.methods",
    "Record": "mrp_lens.export",
    "SteeringEdit": "mrp_lens.edits",
    "Subspace": "mrp_lens.edits.subspace",
    "WeightEdit": "mrp_lens.edits",
    "World": "mrp_lens.data.world",
    "attacks": "mrp_lens",
    "export_hf": "mrp_lens.export",
    "hf": "mrp_lens",
    "load_edit": "mrp_lens.edits",
    "load_model": "mrp_lens.models",
    "metrics": "mrp_lens",
    "plots": "mrp_lens",
}

__version__ = version("mrp_lens")
__all__ = [
    "MRP",
    "NPO",
    "RMU",
    "AdaptiveRMU",
    "Corpus",
    "DirectionAblation",
    "Distillation",
    "Edit",
    "EditStack",
    "ExportReport",
    "Fit",
    "GradientAscent",
    "GradientDifference",
    "NoisyRMU",
    "ProjectionEdit",
    "Questions",
    "Record",
    "SteeringEdit",
    "Subspace",
    "WeightEdit",
    "World",
    "attacks",
    "export_hf",
    "hf",
    "load_edit",
    "load_model",
    "metrics",
    "plots",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = _HOMES[name]
    return import_module(f"mrp_lens.{name}") if home == "mrp_lens" else getattr(import_module(home), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
