"""The tiny model as attacks are tested on it: in two precisions, and in both classes at once."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mrp_lens.models import LensModel, available_backends, load_model
from tests.support.states import PRECISIONS, Subject, subject_in


@pytest.fixture(params=PRECISIONS)
def subject(request: pytest.FixtureRequest, model: Any, tiny_folder: Path, backend: str) -> Iterator[Subject]:
    yield from subject_in(request.param, model, tiny_folder, backend)


@pytest.fixture(scope="session")
def both(tiny_folder: Path) -> list[LensModel]:
    """HookedTransformer and Bridge; where there is but one class, what would be compared is skipped."""
    if len(available_backends()) < 2:
        pytest.skip("needs HookedTransformer (TransformerLens 3)")
    return [load_model(str(tiny_folder), backend=backend) for backend in ("hooked", "bridge")]
