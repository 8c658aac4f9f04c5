"""The notebooks run from top to bottom, on the demo and, two lines changed, on a checkpoint and files of one's own.

The one on a real model has facts of its own: it runs on a tiny checkpoint here, and on a real one where MRP_LENS_MODEL names it.

That they use public names only is tested with the other documents.
"""

import ast
import base64
import importlib.util
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nbclient
import nbformat
import numpy as np
import plotly.graph_objects as go
import plotly.io
import pytest

from tests.support.documents import blocks_in, write_own_data
from tests.support.families import save_family

FOLDER = Path(__file__).parent.parent / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
REAL_MODEL, NAMED = FOLDER / "6_real_model.ipynb", "MRP_LENS_MODEL"
PLOTLY = "application/vnd.plotly.v1+json"
SECONDS = 280  # for a cell; the suite's own limit is on the whole notebook
DEMO_MODEL, DEMO_TASK = 'ml.load_model("demo")', 'ml.UnlearningTask.from_world("potions")'

each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
each_on_the_demo = pytest.mark.parametrize(
    "path", [path for path in NOTEBOOKS if path != REAL_MODEL], ids=lambda path: path.stem
)
Cell = dict[str, Any]


def cells_of(path: Path, kind: str) -> list[Cell]:
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return [cell for cell in cells if cell["cell_type"] == kind]


def code_cells(path: Path) -> list[Cell]:
    """All but the one that installs."""
    return [cell for cell in cells_of(path, "code") if not installs(source_of(cell))]


def installs(source: str) -> bool:
    """Whether a cell is the one that installs mrp_lens where it is not there yet."""
    return "find_spec(" in source


def source_of(cell: Cell) -> str:
    return "".join(cell["source"])


def examples_in(path: Path) -> list[str]:
    """The code that the last cell suggests."""
    return blocks_in(source_of(cells_of(path, "markdown")[-1]), "python")


def draws(source: str) -> bool:
    """Whether a cell is to end in a figure."""
    last = ast.parse(source).body[-1]
    return isinstance(last, ast.Expr) and ast.unparse(last).startswith("plots.")


def numbers_of(values: Any) -> Any:
    """The finite numbers among a trace's values, which plotly writes as a list or as the bytes of an array."""
    if isinstance(values, dict):
        array = np.frombuffer(base64.b64decode(values["bdata"]), dtype=values["dtype"]).astype(float)
    else:
        array = np.array([np.nan if value is None else value for value in values or []], dtype=float)
    return array[np.isfinite(array)]


def shows_something(output: Cell) -> bool:
    """Whether any trace of a figure has a point."""
    traces = output["data"][PLOTLY]["data"]
    return any(len(numbers_of(trace.get("x"))) and len(numbers_of(trace.get("y"))) for trace in traces)


@pytest.fixture
def run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> Callable[[Path, Callable[[str], str], list[str]], list[Cell]]:
    """Runs a notebook in this interpreter's environment and an empty folder, the cell that names model and data rewritten and
    cells added; returns the code cells with what they put out, and records the seconds."""
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))  # nobody's own start-up files

    def execute(path: Path, rewrite: Callable[[str], str], more: list[str]) -> list[Cell]:
        notebook = nbformat.read(path, as_version=4)
        first = next(cell for cell in notebook.cells if cell.cell_type == "code" and not installs(cell.source))
        first.source = rewrite(first.source)
        notebook.cells += [nbformat.v4.new_code_cell(code) for code in [*more, "import sys; sys.executable"]]
        resources = {"metadata": {"path": str(tmp_path)}}
        started = time.perf_counter()
        nbclient.NotebookClient(notebook, timeout=SECONDS, kernel_name="python3", resources=resources).execute()
        request.node.user_properties.append(("seconds", round(time.perf_counter() - started, 1)))
        cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
        assert cells.pop().outputs[0]["data"]["text/plain"] == repr(sys.executable)
        return cells

    return execute


def assert_every_figure_shows_something(cells: list[Cell]) -> None:
    drawing = [cell for cell in cells if draws(source_of(cell))]
    assert len(drawing) >= 3
    for cell in drawing:
        figures = [output for output in cell["outputs"] if PLOTLY in output.get("data", {})]
        assert len(figures) == 1, f"no figure from:\n{source_of(cell)}"
        assert shows_something(figures[0]), f"an empty figure from:\n{source_of(cell)}"


@each_notebook
def test_a_notebook_is_stored_without_outputs_and_in_one_form(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    notebook = json.loads(text)
    assert text == json.dumps(notebook, indent=1, sort_keys=True, ensure_ascii=False) + "\n"
    assert [cell["id"] for cell in notebook["cells"]] == [f"cell-{n}" for n in range(1, len(notebook["cells"]) + 1)]
    assert all(cell["metadata"] == {} for cell in notebook["cells"])
    assert notebook["metadata"]["kernelspec"] == {"display_name": "Python 3", "language": "python", "name": "python3"}
    for cell in cells_of(path, "code"):
        assert cell["outputs"] == []
        assert cell["execution_count"] is None


@each_notebook
def test_the_first_cell_installs_mrp_lens_where_it_is_not_there_and_nothing_where_it_is(
    path: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """From the clone, and not by name from the index, where anybody could have put a package of that name."""
    first = json.loads(path.read_text(encoding="utf-8"))["cells"][0]
    started: list[list[str]] = []
    monkeypatch.setattr(subprocess, "run", lambda words, **_: started.append(words))
    exec(source_of(first), {})
    assert started == []
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.chdir(path.parent)  # as Jupyter has it
    exec(source_of(first), {})
    assert started == [[sys.executable, "-m", "pip", "install", "--quiet", str(path.parent.parent)]]
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="pip install FOLDER_OF_A_CLONE, or git"):
        exec(source_of(first), {})


@each_on_the_demo
def test_the_cell_after_it_names_model_and_data_in_two_lines_and_no_other_cell_does(path: Path) -> None:
    first, *others = code_cells(path)
    statements = [
        node for node in ast.parse(source_of(first)).body if not isinstance(node, ast.Import | ast.ImportFrom)
    ]
    assert [ast.unparse(node) for node in statements] == [
        f"model = {DEMO_MODEL.replace(chr(34), chr(39))}",
        f"task = {DEMO_TASK.replace(chr(34), chr(39))}",
    ]
    sources = [source_of(cell).replace('load_model("exported/', "") for cell in others]  # what a notebook itself wrote
    for name in ("demo", "potions", "World", "load_model"):
        assert not any(name in source for source in sources), f"{name} after the first code cell"


@each_notebook
def test_no_cell_shows_a_figure_by_itself_and_the_last_one_suggests_code_that_parses(path: Path) -> None:
    for cell in cells_of(path, "code"):
        assert ".show(" not in source_of(cell)
        assert "renderer" not in source_of(cell)
    assert source_of(cells_of(path, "markdown")[-1]).startswith("## What to try next\n")
    assert 3 <= len(examples_in(path)) <= 4
    for code in examples_in(path):
        ast.parse(code)


def test_an_empty_figure_is_told_from_one_that_shows_something() -> None:
    def output(*traces: Any) -> Cell:
        return {"data": {PLOTLY: json.loads(plotly.io.to_json(go.Figure(traces)))}}

    assert not shows_something(output())
    assert not shows_something(output(go.Scatter(x=[None], y=[None])))
    assert not shows_something(output(go.Scatter(x=np.array([1.0]), y=np.array([np.nan]))))
    assert shows_something(output(go.Scatter(x=[None], y=[None]), go.Scatter(x=np.arange(3), y=[None, 2, 3])))
    assert shows_something(output(go.Scatter3d(x=np.ones(2), y=np.ones(2), z=np.ones(2))))
    assert draws("x = 1\nplots.norms(x)")
    assert not draws("figure = plots.norms(x)")


@pytest.mark.long  # `make docs` runs them likewise
@each_on_the_demo
def test_a_notebook_runs_on_the_demo_and_every_figure_shows_something(path: Path, run: Any) -> None:
    assert_every_figure_shows_something(run(path, lambda source: source, []))


@pytest.mark.slow
@each_on_the_demo
def test_a_notebook_and_what_it_suggests_run_on_a_checkpoint_and_files_of_ones_own(
    path: Path, run: Any, tmp_path: Path
) -> None:
    save_family("llama", tmp_path / "checkpoint")
    write_own_data(tmp_path)
    cells = run(path, own_lines, ["from functools import partial", *map(short, examples_in(path))])
    assert_every_figure_shows_something(cells)


def test_the_notebook_on_a_real_model_says_where_it_is_loaded_how_to_name_another() -> None:
    first, *others = code_cells(REAL_MODEL)
    assert f'os.environ.get("{NAMED}", "HuggingFaceTB/SmolLM2-135M")' in source_of(first)
    assert not any("load_model" in source_of(cell) for cell in others)
    assert f"`{NAMED}`" in source_of(cells_of(REAL_MODEL, "markdown")[0])


@pytest.mark.slow
def test_the_notebook_on_a_real_model_and_what_it_suggests_run_on_a_tiny_one(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_family("llama", tmp_path / "checkpoint")
    monkeypatch.setenv(NAMED, "checkpoint")
    more = ["from functools import partial", *map(short, examples_in(REAL_MODEL))]
    assert_every_figure_shows_something(run(REAL_MODEL, lambda source: source, more))


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.skipif(NAMED not in os.environ, reason=f"needs a pretrained model: {NAMED}=/path/to/checkpoint")
def test_the_notebook_on_a_real_model_runs_on_the_one_that_is_named(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    place = Path(os.environ[NAMED])
    monkeypatch.setenv(NAMED, str(place.absolute() if place.exists() else place))
    assert_every_figure_shows_something(run(REAL_MODEL, lambda source: source, []))


def own_lines(source: str) -> str:
    """The cell that names model and data with the two lines changed: the data as its own comment says, one file being a .txt."""
    before, _, comment = source.partition(f"task = {DEMO_TASK}")
    explained, *data = comment.splitlines()
    assert explained.startswith("  # or your own")
    own = before + "\n".join(text.removeprefix("# ") for text in data)
    assert own.count(DEMO_MODEL) == own.count('"retain.jsonl"') == 1
    return own.replace(DEMO_MODEL, 'ml.load_model("checkpoint")').replace("retain.jsonl", "retain.txt")


def short(code: str) -> str:
    """A suggestion with few steps where it leaves their number to the library: what it finds is not the question here."""
    code = re.sub(r"\bsteps=\d+", "steps=2", code)
    return re.sub(r"\b(ml\.MRP|ml\.RMU|ml\.SweepConfig)\((?!.*steps=)", r"partial(\1, steps=2)(", code)
