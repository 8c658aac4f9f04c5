"""What is built of the package holds all of it, and the versions that its parts name agree."""

import os
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.support.documents import ROOT

PACKAGE = ROOT / "mrp_lens"
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PROJECT = PYPROJECT["project"]
EXTRAS = {name: set(map(str, map(Requirement, texts))) for name, texts in PROJECT["optional-dependencies"].items()}
CONSTRAINTS = sorted((ROOT / "constraints").glob("*.txt"))
BUILT_ON_TRIAL = "9.8.7"
BUILD = "from hatchling import build; build.build_wheel({out!r}); build.build_sdist({out!r})"
LOAD = """
import mrp_lens as ml
from mrp_lens.cli.app import run

run(["--version"])
print(ml.__file__)
model = ml.load_model("demo")
print(float(ml.metrics.accuracy(model, ml.World().questions("potions").spread(24), progress=False)["accuracy"].iloc[0]))
"""


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a wheel and a source distribution, built as pip does but with what is installed."""
    pytest.importorskip("hatchling", reason="needs hatchling: make install")
    pytest.importorskip("hatch_vcs", reason="needs hatch-vcs: make install")
    out = tmp_path_factory.mktemp("dist")
    environment = {**os.environ, "SETUPTOOLS_SCM_PRETEND_VERSION": BUILT_ON_TRIAL}
    subprocess.run([sys.executable, "-c", BUILD.format(out=str(out))], cwd=ROOT, env=environment, check=True)
    return out


def files_of_the_package() -> set[str]:
    """Every file under mrp_lens that Python did not put there itself."""
    return {
        path.relative_to(ROOT).as_posix()
        for path in PACKAGE.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


def test_the_wheel_is_the_whole_package_and_nothing_else(built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    assert wheel.name == f"mrp_lens-{BUILT_ON_TRIAL}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    assert "mrp_lens/data/world/model/model.safetensors" in names
    assert {name for name in names if ".dist-info/" not in name} == files_of_the_package()


def test_the_source_distribution_has_the_package_and_what_tests_it(built: Path) -> None:
    (source,) = built.glob("*.tar.gz")
    with tarfile.open(source) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert files_of_the_package() <= names
    assert {"pyproject.toml", "CHANGELOG.md", "LICENSE", "tests/test_packaging.py"} <= names
    assert not any(".venv" in name or "__pycache__" in name for name in names)


@pytest.mark.slow
def test_the_demo_model_of_the_wheel_loads_where_nothing_else_of_the_project_is(built: Path, tmp_path: Path) -> None:
    (wheel,) = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "installed")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "installed")}
    said = subprocess.run(
        [sys.executable, "-c", LOAD], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    version, place, accuracy = said.stdout.splitlines()
    assert version == BUILT_ON_TRIAL
    assert Path(place).is_relative_to(tmp_path)
    assert float(accuracy) > 0.9


def test_the_version_without_a_tag_is_what_the_changelog_works_towards() -> None:
    newest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert newest
    assert PYPROJECT["tool"]["hatch"]["version"]["fallback-version"] == f"{newest[1]}.dev0"


def requirements() -> Iterator[Requirement]:
    """Of the package and of all its extras."""
    for text in [*PROJECT["dependencies"], *(text for texts in EXTRAS.values() for text in texts)]:
        if (requirement := Requirement(text)).name != PROJECT["name"]:
            yield requirement


@pytest.mark.parametrize("path", CONSTRAINTS, ids=lambda path: path.stem)
def test_the_versions_of_the_constraints_are_within_the_bounds(path: Path) -> None:
    pairs = [line.split("==") for line in path.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    pinned = {canonicalize_name(name): version for name, version in pairs}
    for requirement in requirements():
        version = pinned.get(canonicalize_name(requirement.name))
        assert version is None or requirement.specifier.contains(version, prereleases=True), f"{requirement}: {version}"


def test_every_dependency_has_a_lower_bound() -> None:
    for requirement in requirements():
        assert any(bound.operator == ">=" for bound in requirement.specifier), str(requirement)


def test_the_constraints_pin_everything_that_make_installs() -> None:
    installed = [*PROJECT["dependencies"], *(text for name in ("dev", "docs", "notebooks") for text in EXTRAS[name])]
    for path in CONSTRAINTS:
        pinned = {canonicalize_name(line.partition("==")[0]) for line in path.read_text(encoding="utf-8").splitlines()}
        assert {canonicalize_name(Requirement(text).name) for text in installed} <= pinned, path.name
