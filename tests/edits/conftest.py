from pathlib import Path
from typing import Any

import pytest

from mrp_lens.models import load_model


@pytest.fixture
def own(backend: str, tiny_folder: Path) -> Any:
    """A model that a test may spoil."""
    return load_model(tiny_folder, backend=backend)  # type: ignore[arg-type]
