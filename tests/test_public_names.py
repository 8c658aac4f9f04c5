"""Every public name, in a small program that a strict type checker accepts from outside the package."""

import ast
import shutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import mrp_lens as ml

PROGRAM = Path(__file__).parent / "support" / "public_program.py"
FOLDERS = ("attacks", "data", "edits", "evals", "export", "hf", "methods", "metrics", "plots", "training")
CONFIGURATION = "[mypy]\nstrict = true\nignore_missing_imports = true\n"


def test_the_program_uses_every_public_name() -> None:
    used = {node.attr for node in ast.walk(ast.parse(PROGRAM.read_text())) if isinstance(node, ast.Attribute)}
    public = {*ml.__all__, *(name for folder in FOLDERS for name in import_module(f"mrp_lens.{folder}").__all__)}
    assert not public - used


def test_public_names_are_documented() -> None:
    silent = [name for name in ml.__all__ if not (getattr(ml, name).__doc__ or "").strip()]
    assert not silent


@pytest.mark.slow
def test_a_strict_type_checker_accepts_it_outside_the_package(tmp_path: Path) -> None:
    shutil.copy(PROGRAM, tmp_path / "program.py")
    (tmp_path / "mypy.ini").write_text(CONFIGURATION)
    line = [sys.executable, "-m", "mypy", "--strict", "--config-file", "mypy.ini", "program.py"]
    ended = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
