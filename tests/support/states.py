"""States read one document at a time, without padding: what metrics over batches are checked against."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from mrp_lens.data import Corpus
from mrp_lens.edits import Edit
from mrp_lens.models import LensModel, load_model
from tests.conftest import assert_same_state, state_of
from tests.support.plain import ids_of, states_at

Array = NDArray[np.float64]
PRECISIONS = ["float32", "bfloat16"]
GROUPS = {
    "forget": Corpus.from_rows(
        [
            {"p": f"The {what} of Zaxim{i}", "c": f" is {colour}" + ", they say." * (i % 4)}
            for i, (what, colour) in enumerate(
                zip(["colour", "taste"] * 5, ["red", "blue", "sweet", "sour", "white"] * 2, strict=True)
            )
        ],
        prompt="{p}",
        completion="{c}",
        name="facts",
    ),
    "retain": Corpus.from_texts(
        [
            "The old man walked slowly near the house.",
            "",
            "A baker slept.",
            "The tired sailor ran late behind the tower.",
        ]
        + [
            f"The {who} danced {how} inside the kitchen again and again." for who in ("child", "doctor") for how in "ab"
        ],
        name="sentences",
    ),
}  # of unequal lengths; one document is empty and counts nowhere


@dataclass(frozen=True)
class Subject:
    """A model and how far figures may be off a reading without batches: in float32 some hundred roundings of 2^-24, in
    bfloat16 one of 2^-8 (there most batches round alike)."""

    model: Any
    relative: float

    def close(self, value: Any, *, scale: float = 0.0) -> Any:
        return pytest.approx(value, rel=self.relative, abs=max(self.relative * scale, 1e-9), nan_ok=True)


def subject_in(precision: str, model: Any, folder: Path, backend: str) -> Iterator[Subject]:
    """The tiny model in a precision; fails unless it is left as it was."""
    used = model if precision == "float32" else in_bfloat16(folder, backend)
    before = state_of(used)
    yield Subject(used, 1e-5 if precision == "float32" else 2.0**-8)
    assert_same_state(before, state_of(used))


@cache
def in_bfloat16(folder: Path, backend: str) -> Any:
    return load_model(str(folder), backend=backend, dtype=torch.bfloat16)


States = dict[tuple[int, int], Array]
"""(document, position) -> state, for all tokens but BOS."""


def plain_states(model: LensModel, corpus: Corpus, hooks: Sequence[str], edit: Edit | None = None) -> dict[str, States]:
    """Hook -> states."""
    states: dict[str, States] = {name: {} for name in hooks}
    handle = edit.attach(model) if edit is not None else None
    for number, document in enumerate(corpus.documents):
        ids = ids_of(model, document.prompt + document.completion)
        with torch.no_grad():
            seen = states_at(model, ids, hooks)
        for name in hooks:
            of_document = seen[name][1:].double().numpy()
            states[name] |= {(number, position): state for position, state in enumerate(of_document)}
    if handle is not None:
        handle.detach()
    return states


def plain_passes(model: LensModel, hooks: Sequence[str], edit: Edit | None) -> dict[tuple[str, str], dict[str, States]]:
    """(group, "before" or "after") -> hook -> states of GROUPS."""
    return {
        (group, when): plain_states(model, corpus, hooks, on)
        for group, corpus in GROUPS.items()
        for when, on in (("before", None), ("after", edit))
    }


def matrix(states: States) -> Array:
    """[tokens, d_model]."""
    return np.array([states[key] for key in sorted(states)])
