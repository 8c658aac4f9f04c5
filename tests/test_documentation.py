"""What README, documentation, CONTRIBUTING, notebooks and docstrings say works: code runs, commands parse, names are public."""

import argparse
import copy
import doctest
import re
import subprocess
import sys
import warnings
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import mrp_lens as ml
from mrp_lens.cli import app
from mrp_lens.data import Questions
from tests.support.commands import invoke
from tests.support.documents import ROOT, blocks_in, code_of_notebook, commands_in, names_used, write_own_data

README = (ROOT / "README.md").read_text(encoding="utf-8")
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
LLMS = (ROOT / "docs" / "llms.txt").read_text(encoding="utf-8")
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in sorted((ROOT / "docs").rglob("*.md"))
}
WITH_CODE = [name for name, text in PAGES.items() if blocks_in(text, "python")]
IMPORT = "import mrp_lens as ml\n"
PACKAGE = ROOT / "mrp_lens"
WITH_EXAMPLES = sorted(path for path in PACKAGE.rglob("*.py") if ">>> " in path.read_text(encoding="utf-8"))
SOURCES = {path.name: code_of_notebook(path) for path in sorted((ROOT / "notebooks").glob("*.ipynb"))} | {
    "README.md": "\n".join(blocks_in(README, "python")),
    "CONTRIBUTING.md": "\n".join(blocks_in(CONTRIBUTING, "python")),
    "llms.txt": "\n".join(blocks_in(LLMS, "python")),
    **{name: IMPORT + "\n".join(blocks_in(PAGES[name], "python")) for name in WITH_CODE},
}


def said_in_documents(program: str) -> dict[str, list[str]]:
    """Every command of a program that README and documentation show, by itself in one line."""
    texts = (README, LLMS, *PAGES.values())
    return {" ".join(words): words for text in texts for words in commands_in(text, program)}


COMMANDS, STUDIES = said_in_documents("mrp-lens "), said_in_documents("python -m analysis.")


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


@pytest.mark.parametrize("command", COMMANDS)
def test_the_commands_of_documents_are_commands(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    word, *_ = words = COMMANDS[command]
    begun: list[str] = []
    if word in app.COMMANDS:
        kind = getattr(import_module(f"mrp_lens.cli.{word}"), app.COMMANDS[word][0])
        monkeypatch.setattr(kind, "execute", lambda self: begun.append(word))
    result = invoke(*words)
    assert result.exit_code == 0, result.output
    assert bool(begun) is {"--help", "--print-config", "--version"}.isdisjoint(words)


@pytest.mark.parametrize("command", STUDIES)
def test_the_studies_of_documents_are_studies_with_these_options(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name, *words = STUDIES[command]
    parse = argparse.ArgumentParser.parse_args

    def parse_and_stop(parser: argparse.ArgumentParser, *_: Any) -> None:
        parse(parser, words)
        raise KeyboardInterrupt  # nothing is to be run

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)
    with pytest.raises(KeyboardInterrupt):
        import_module(f"analysis.{name}").main()


def test_what_documents_make_can_be_made() -> None:
    said = {words[0] for words in said_in_documents("make ").values()}
    assert {"demo", "test"} <= said
    assert not {name for name in said if f"\n{name}:" not in MAKEFILE}


def test_the_links_of_llms_txt_lead_to_pages() -> None:
    linked = set(re.findall(r"\]\(([^)]+)\)", LLMS))
    assert {f"docs/{page}" for page in linked} <= set(PAGES)
    assert {"start.md", "how-to/own-model.md"} <= linked


def test_every_public_module_has_a_reference_page() -> None:
    modules = [name for name in ml.__all__ if isinstance(getattr(ml, name), ModuleType)]
    assert {"metrics", "evals", "hf"} <= set(modules)
    for name in modules:
        described = [page for page, text in PAGES.items() if f"::: mrp_lens.{name}\n" in text]
        assert f"docs/reference/{name}.md" in PAGES or any(page.startswith("docs/reference/") for page in described), (
            name
        )


def test_the_readme_is_short() -> None:
    assert len(README.splitlines()) <= 120


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


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to work in, with the files that documents name; the world has few questions."""
    monkeypatch.chdir(tmp_path)
    write_own_data(tmp_path)
    few, everything = Questions.spread, ml.World.questions
    monkeypatch.setattr(ml.World, "questions", lambda *args, **options: few(everything(*args, **options), 48))
    return tmp_path


@pytest.mark.parametrize(
    "path",
    [
        pytest.param(path, marks=[pytest.mark.slow] * module_of(path).endswith(".export"), id=module_of(path))
        for path in WITH_EXAMPLES  # an export is reloaded by a process of its own
    ],
)
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
@pytest.mark.parametrize("source", ["README.md", "docs/start.md"])
@pytest.mark.usefixtures("place")
def test_the_code_of_a_first_page_runs_by_itself(source: str, tiny_folder: Path) -> None:
    """From the first block to the last, on a tiny model, with few questions and steps."""
    text = README if source == "README.md" else PAGES[source]
    run_blocks(text, source, tiny_folder, {})


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", [name for name in WITH_CODE if name != "docs/start.md"])
@pytest.mark.usefixtures("place")
def test_the_code_of_a_page_runs(name: str, tiny_folder: Path, known: dict[str, Any]) -> None:
    """Likewise; what pages take for granted is what the five-minute start leaves."""
    tokenizer = copy.copy(known["model"].tokenizer)
    tokenizer.chat_template = "{% for message in messages %}User: {{ message['content'] }}\nAssistant: {% endfor %}"
    quiz, forget, retain = known["questions"], known["forget"], known["retain"]
    task = ml.UnlearningTask((forget,), retain, ml.World().text().spread(16), quiz, quiz, known["untaught"])
    run_blocks(PAGES[name], name, tiny_folder, {**known, "task": task, "quiz": quiz, "tokenizer": tokenizer})


@pytest.mark.slow
@pytest.mark.usefixtures("place")
def test_the_jobs_of_a_cluster_can_be_tried_here(tiny_folder: Path) -> None:
    """The script of docs/how-to/machines.md, by submitit's local executor; two of its four jobs have a point to fit."""
    (block,) = blocks_in(PAGES["docs/how-to/machines.md"], "python")[-1:]
    assert block.startswith("# submit_sweep.py")
    script = shortened(block, tiny_folder).replace("SweepConfig(", "SweepConfig(layers=(1, 2), ")
    Path("submit_sweep.py").write_text(script, encoding="utf-8")
    ended = subprocess.run([sys.executable, "submit_sweep.py", "local"], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    assert len(list(Path("runs/sweep/points").glob("rmu*"))) == 2
    assert list(Path("runs/jobs").glob("*.out"))


def run_blocks(text: str, name: str, folder: Path, namespace: dict[str, Any]) -> None:
    """One after the other, in one namespace."""
    for block in blocks_in(text, "python"):
        exec(compile(shortened(block, folder), name, "exec"), namespace)


def shortened(code: str, folder: Path) -> str:
    """The code on a tiny checkpoint, with few updates, trials and texts."""
    changes = [
        (r'load_model\(\s*"[^"]*"', f'load_model("{folder}", backend="bridge"'),
        (r"\b(steps|trials|about_names)=\d+", r"\1=2"),
        (r'short = \{"steps": \d+', 'short = {"steps": 2'),
        (
            r"\b(ml\.(Unconditional)?MRP|ml\.(Adaptive)?RMU|ml\.NPO|ml\.GradientDifference)\((?!.*(steps=|\*\*))",
            r"\1(steps=2, ",
        ),
        (r"SweepConfig\(", "SweepConfig(steps=2, questions_limit=20, documents=10, "),
        (r"Distillation\(\)", "Distillation(steps=2, texts=8, text_length=16, agreement=100.0)"),
        (r"(attacks\.(relearn|jailbreak)\((?!.*\*\*)[^#\n]*)\)", r"\1, steps=1)"),
        (r"(attacks\.probe\([^#\n]*)\)", r'\1, layers=[1], target="choice")'),
    ]
    for pattern, short in changes:
        code = re.sub(pattern, short, code)
    return code
