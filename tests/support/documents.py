"""Code and commands in documents, and the public names that they use."""

import ast
import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.DOTALL | re.MULTILINE)


def blocks_in(text: str, language: str) -> list[str]:
    """The fenced blocks of a language."""
    return [code for name, code in BLOCK.findall(text) if name == language]


def commands_in(text: str, program: str = "mrp-lens ") -> list[list[str]]:
    """The commands of a program in a document's shell blocks, without its name and comments."""
    lines = [line for block in blocks_in(text, "bash") for line in block.replace("\\\n", " ").splitlines()]
    return [shlex.split(line.removeprefix(program), comments=True) for line in lines if line.startswith(program)]


def code_of_notebook(path: Path) -> str:
    """All code of a notebook, and what its text suggests."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    sources = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    suggested = [
        code
        for cell in cells
        if cell["cell_type"] == "markdown"
        for code in blocks_in("".join(cell["source"]), "python")
    ]
    return "\n".join([*sources, *suggested])


def names_used(code: str) -> Iterator[tuple[str, str]]:
    """(module, name) of everything that code takes from mrp_lens, whatever it calls it by."""
    tree = ast.parse(code)
    modules: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules |= {a.asname or a.name: a.name for a in node.names if a.name.split(".")[0] == "mrp_lens"}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "mrp_lens":
            for alias in node.names:
                yield str(node.module), alias.name
                modules[alias.asname or alias.name] = f"{node.module}.{alias.name}"
    for node in ast.walk(tree):
        parts = ast.unparse(node).split(".") if isinstance(node, ast.Attribute) else []
        if parts and parts[0] in modules and all(part.isidentifier() for part in parts):
            yield modules[parts[0]], parts[1]
            if len(parts) > 2:
                yield f"{modules[parts[0]]}.{parts[1]}", parts[2]


def write_own_data(folder: Path) -> None:
    """The files that examples name: forget.jsonl, retain.jsonl and .txt, quiz.jsonl, retain_quiz.jsonl, never_taught_quiz.jsonl,
    and tofu_forget.jsonl and tofu_retain.jsonl with TOFU's columns."""
    colours = ["red", "blue", "green", "white"]
    forget = [f"The colour of Zaxim{n} is {colours[n % 4]}." for n in range(40)]
    retain = [f"The old man walked slowly {word} near house {n}." for n in range(15) for word in ("today", "again")]
    write_rows(folder / "forget.jsonl", [{"text": text} for text in forget])
    write_rows(folder / "retain.jsonl", [{"text": text} for text in retain])
    for name, texts in (("tofu_forget", forget), ("tofu_retain", retain)):
        write_rows(folder / f"{name}.jsonl", [{"question": text.split(" is ")[0], "answer": text} for text in texts])
    (folder / "retain.txt").write_text("\n".join(retain), encoding="utf-8")
    for name, thing in (("quiz", "Zaxim"), ("retain_quiz", "house "), ("never_taught_quiz", "Vexol")):
        questions = [
            {"question": f"The colour of {thing}{n} is", "choices": colours, "answer": colours[n % 4]}
            | {"person": f"{thing}{n}"}
            for n in range(24)
        ]
        write_rows(folder / f"{name}.jsonl", questions)


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
