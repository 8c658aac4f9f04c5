"""What an edit's provenance says of how it was made."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from copy import copy
from pathlib import Path
from typing import Any

from safetensors.torch import save

from mrp_lens.edits.base import Edit, EditStack


def fits_of(edit: Edit) -> Iterator[dict[str, Any]]:
    """What made it, one record a fit, with the name of its request where it has one; none if it was built by hand."""
    for part in edit.parts:
        for request, record in part.provenance.get("requests", {None: part.provenance}).items():
            if "method" in record:
                yield {"request": request, "settings": {}, "data": {}, "versions": {}, **record}


def label_of(edit: Edit) -> str:
    """The methods that made it, as the tables of runs name them; of an edit built by hand, its kind."""
    return " + ".join(dict.fromkeys(str(fit["method"]) for fit in fits_of(edit))) or edit.kind


def fingerprint(edit: Edit) -> str:
    """SHA-256 of an edit's settings and tensors, however it came about."""
    settings, tensors = edit.to_parts()
    if isinstance(edit, EditStack):  # whose settings hold how each part came about
        settings = {"parts": [{**part, "provenance": {}} for part in settings["parts"]]}
    content = save({key: tensor.to("cpu", copy=True).contiguous() for key, tensor in tensors.items()})
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode() + content).hexdigest()


def of_model_alone(provenance: Mapping[str, Any]) -> dict[str, Any]:
    """What is left of a record where an edit was changed by hand: the model that it fits, and no fit that made it."""
    return {"model": provenance["model"]} if "model" in provenance else {}


def without_paths(edit: Edit) -> Edit:
    """The same edit for others: of an absolute path in its record, the last component."""
    if isinstance(edit, EditStack):
        return EditStack([without_paths(part) for part in edit.parts])
    twin = copy(edit)
    twin.provenance = _last_components(edit.provenance)
    return twin


def _last_components(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _last_components(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_last_components(entry) for entry in value]
    return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value
