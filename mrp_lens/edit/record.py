"""What an edit's provenance says of how it was made."""

from collections.abc import Iterator
from typing import Any

from mrp_lens.edit.base import Edit


def fits_of(edit: Edit) -> Iterator[dict[str, Any]]:
    """What made it, one record a fit, with the name of its request where it has one; none if it was built by hand."""
    for part in edit.parts:
        for request, record in part.provenance.get("requests", {None: part.provenance}).items():
            if "method" in record:
                yield {"request": request, "settings": {}, "data": {}, "versions": {}, **record}


def label_of(edit: Edit) -> str:
    """The methods that made it, as the tables of runs name them; of an edit built by hand, its kind."""
    return " + ".join(dict.fromkeys(str(fit["method"]) for fit in fits_of(edit))) or edit.kind
