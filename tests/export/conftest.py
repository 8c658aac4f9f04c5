"""Exported folders that all tests of this folder read. Whoever changes one copies it first."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mrp_lens.edits import Edit
from mrp_lens.models import load_model
from tests.support.edits import projection
from tests.support.export_cards import tiny_fits
from tests.support.export_edits import content_of, write

EXPORTED = {"folded": projection(1, 2, site="mlp_out"), "module": projection(1, 2), "adapter": projection(1, 2)}


@pytest.fixture(scope="session")
def bridge(tiny_folder: Path) -> Any:
    """The tiny model where the class does not matter."""
    return load_model(tiny_folder, backend="bridge")


@pytest.fixture(scope="session")
def exports(bridge: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Path]]:
    """A folder of each form, of `EXPORTED`; fails where a test has changed one."""
    place = tmp_path_factory.mktemp("exports")
    folders = {form: write(bridge, edit, place / form, form) for form, edit in EXPORTED.items()}
    before = content_of(place)
    yield folders
    assert content_of(place) == before


@pytest.fixture
def copied(exports: dict[str, Path], tmp_path: Path) -> dict[str, Path]:
    """Copies of them, to do harm to."""
    return {form: Path(shutil.copytree(folder, tmp_path / "copies" / form)) for form, folder in exports.items()}


@pytest.fixture(scope="session")
def fits(tiny_folder: Path) -> dict[str, Edit]:
    """Edits of real fits, as small as they get."""
    return tiny_fits(tiny_folder)
