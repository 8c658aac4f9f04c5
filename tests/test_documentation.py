"""What README, CONTRIBUTING, notebooks and docstrings say works: examples run, commands parse, names are public."""

import copy
import doctest
import re
import warnings
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import mrp_lens as ml
from mrp_lens.data import Questions
from tests.support.commands import invoke
from tests.support.documents import ROOT, blocks_in, code_of_notebook, commands_in, names_used, write_own_data

README = (ROOT / "README.md").read_text(encoding="utf-8")
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
PACKAGE = ROOT / "mrp_lens"
WITH_EXAMPLES = sorted(path for path in PACKAGE.rglob("*.py") if ">>> " in path.read_text(encoding="utf-8"))
SOURCES = {path.name: code_of_notebook(path) for path in sorted((ROOT / "notebooks").glob("*.ipynb"))} | {
    "README.md": "\n".join(blocks_in(README, "python")),
    "CONTRIBUTING.md": "\n".join(blocks_in(CONTRIBUTING, "python")),
}


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


@pytest.mark.parametrize("source", SOURCES, ids=str)
def test_every_name_of_the_library_that_documents_use_is_public(source: str) -> None:
    found = set(names_used(SOURCES[source]))
    assert found
    for module, name in found:
        place: Any = import_module("mrp_lens")
        for part in module.split(".")[1:]:
            assert part in place.__all__, f"{source}: {module}.{name}"
            place = getattr(place, part)
        if isinstance(place, ModuleType):
            assert name in place.__all__, f"{source}: {module}.{name}"
        else:
            assert hasattr(place, name), f"{source}: {module}.{name}"


@pytest.mark.parametrize("words", commands_in(README), ids=" ".join)
def test_the_commands_of_the_readme_are_commands(words: list[str]) -> None:
    result = invoke(*words, "--print-config")
    assert result.exit_code == 0, result.output


@pytest.fixture(scope="module")
def known(tiny_folder: Path) -> dict[str, Any]:
    """What examples may take for granted: a model, an edit, texts and quizzes."""
    world = ml.World()
    model = ml.load_model(tiny_folder, backend="bridge")
    forget, retain = world.forget("potions").spread(16), world.retain(without="potions").spread(16)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fit = ml.MRP(steps=1, layers=[1], rank=2).fit(model, forget, retain, progress=False)
    plain = AutoModelForCausalLM.from_pretrained(tiny_folder)
    return {
        **{"ml": ml, "torch": torch, "copy": copy, "world": world, "model": model, "forget": forget, "retain": retain},
        **{"fit": fit, "edit": fit.edit, "questions": world.questions("potions").spread(48)},
        **{"untaught": world.questions("potions", taught=False).spread(24), "hf_model": plain},
        **{"inputs": {"input_ids": torch.tensor([[5, 6]]), "attention_mask": torch.ones(1, 2, dtype=torch.long)}},
    }


@pytest.mark.parametrize("path", WITH_EXAMPLES, ids=module_of)
def test_the_examples_of_docstrings_run(
    path: Path, known: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_own_data(tmp_path)
    module = import_module(module_of(path))
    tests = doctest.DocTestFinder().find(module, globs={**vars(module), **known})
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE, verbose=False)
    said: list[str] = []
    for test in tests:
        runner.run(test, out=said.append)
    assert runner.failures == 0, "".join(said)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning")  # so few questions and so short a context are of no use
def test_the_code_of_the_readme_runs(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the first block to the last, on a tiny model, with few questions and steps."""
    monkeypatch.chdir(tmp_path)
    write_own_data(tmp_path)
    few = Questions.spread
    monkeypatch.setattr(ml.World, "questions", lambda *args, _all=ml.World.questions, **kw: few(_all(*args, **kw), 48))
    namespace: dict[str, Any] = {}
    for block in blocks_in(README, "python"):
        exec(compile(shortened(block, tiny_folder), "README.md", "exec"), namespace)


def shortened(code: str, folder: Path) -> str:
    """The code on a tiny checkpoint, with few updates."""
    code = re.sub(r'load_model\("[^"]*"', f'load_model("{folder}", backend="bridge"', code)
    code = re.sub(r"ml\.(MRP|RMU)\(", r"ml.\1(steps=2, ", code)
    code = code.replace("Distillation()", "Distillation(steps=2, texts=8, text_length=16, agreement=100.0)")
    code = re.sub(r"(attacks\.(relearn|jailbreak)\([^#\n]*)\)", r"\1, steps=1)", code)
    return re.sub(r"(attacks\.probe\([^#\n]*)\)", r'\1, layers=[1], target="choice")', code)
