"""The recipes of CONTRIBUTING.md, each one file, in a package outside of ours: installed, they are found everywhere."""

import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import pytest

from tests.support.families import save_family
from tests.support.kills import write_data

ROOT = Path(__file__).parents[1]
RUN_ALL = """
import json, sys
from analysis import leaderboard
from mrp_lens.cli.app import run
for command, *words in json.loads(sys.argv[1]):
    print(f"== {command}", flush=True)
    leaderboard.main(words) if command == "leaderboard" else run([command, *words])
"""


@dataclass(frozen=True)
class Site:
    """Where the package is installed, and where it worked."""

    folder: Path
    work: Path

    def run(self, *commands: list[str]) -> str:
        """Command lines, one after the other, in a process that has the package."""
        path = os.pathsep.join([str(self.folder), str(ROOT)])
        line = [sys.executable, "-c", RUN_ALL, json.dumps(commands)]
        environment = {**os.environ, "PYTHONPATH": path, "COLUMNS": "200"}
        ended = subprocess.run(line, cwd=self.work, env=environment, capture_output=True, text=True, check=False)
        assert ended.returncode == 0, ended.stdout[-3000:] + ended.stderr[-3000:]
        return ended.stdout


def recipes() -> dict[str, str]:
    """File name -> code, of CONTRIBUTING.md."""
    blocks = re.findall(r"```python\n# (\w+\.py)\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), re.S)
    return dict(blocks)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Site:
    """The recipes, installed as a package with an entry point; a tiny model and its data."""
    folder, work = tmp_path_factory.mktemp("site"), tmp_path_factory.mktemp("work")
    for name, code in recipes().items():
        (folder / name).write_text(code)
    (folder / "toys.py").write_text("".join(f"import {name.removesuffix('.py')}\n" for name in recipes()))
    described = folder / "toys-1.0.dist-info"
    described.mkdir()
    (described / "METADATA").write_text("Metadata-Version: 2.1\nName: toys\nVersion: 1.0\n")
    (described / "entry_points.txt").write_text("[mrp_lens.plugins]\ntoys = toys\n")
    write_data(work)
    save_family("llama", work / "model")
    return Site(folder, work)


COMMON = [
    *("--model", "model", "--forget", "forget.jsonl", "--retain", "retain.txt", "--questions", "forget.jsonl"),
    *("--retain-questions", "kept.jsonl", "--question-prompt", "{q}", "--choices", "a", "--answer", "y"),
]
UNTAUGHT = ["--untaught-questions", "untaught.jsonl", "--entity", "who"]


@pytest.fixture(scope="module")
def ran(site: Site) -> Site:
    """Every command with the method, the attack and the metric of the package."""
    site.run(
        ["unlearn", *COMMON, "--method", "toy-vector", "--steps", "4", "--out", "fit"],
        ["sweep", *COMMON, "--methods", "toy-vector", "--layers", "1,2", "--steps", "2", "--out", "sweep"],
        ["attack", *COMMON, *UNTAUGHT, "--edit", "fit/edit", "--attack", "toy-hint", "--out", "attack"],
        ["export", "--model", "model", "--edit", "fit/edit", "--out", "exported"],
    )
    return site


def test_four_recipes_are_there() -> None:
    assert {"toy_method.py", "toy_attack.py", "toy_metric.py", "toy_family.py"} <= set(recipes())


@pytest.mark.slow
def test_help_lists_them(site: Site) -> None:
    said = site.run(["unlearn", "--help"], ["unlearn", "--method", "toy-vector", "--help"], ["attack", "--help"])
    assert re.search(r"toy-vector\s.*Adds one learned vector to the stream at a layer\.", said)
    assert re.search(r"--lr.*\n?.*step size of Adam", said)
    assert "toy-hint" in said
    assert "what stands before every question" in said


@pytest.mark.slow
def test_a_sweep_goes_over_the_layers_of_the_method_and_has_the_metric_as_a_column(ran: Site) -> None:
    table = pd.read_csv(ran.work / "sweep" / "table.csv")
    assert list(table["method"]) == ["unedited", "toy-vector", "toy-vector"]
    assert list(table["layer"].dropna()) == [1, 2]
    assert (table["toy_surprise"] > 1).all()
    assert table["toy_surprise"].nunique() == 3


@pytest.mark.slow
def test_the_table_and_the_page_of_a_fit_have_the_metric_its_figure_and_what_the_method_did(ran: Site) -> None:
    table = pd.read_csv(ran.work / "fit" / "table.csv").set_index("method")
    assert table["toy_surprise"]["toy-vector"] > table["toy_surprise"]["unedited"] > 1
    page = (ran.work / "fit" / "report.html").read_text()
    for words in (
        "surprise at the forget set",
        "Perplexity of both sides; an edit that forgets raises that of the forget set alone.",
        "A vector that 4 updates learned is added behind layer 2.",
    ):
        assert words in page, words


@pytest.mark.slow
def test_the_attack_is_a_row_with_its_recovery(ran: Site) -> None:
    table = pd.read_csv(ran.work / "attack" / "table.csv").set_index("attack")
    assert list(table.index) == ["toy hint"]
    assert 0 <= table["accuracy_after"]["toy hint"] <= 1
    assert "toy hint" in (ran.work / "attack" / "report.html").read_text()


@pytest.mark.slow
def test_the_card_of_an_export_names_the_method_and_the_metric(ran: Site) -> None:
    card = (ran.work / "exported" / "README.md").read_text()
    assert "toy-vector" in card
    assert "Adds one learned vector to the stream at a layer." in card
    assert "surprise at the forget set" in card


@pytest.mark.slow
def test_the_leaderboard_has_a_row_for_the_method_and_columns_for_attack_and_metric(site: Site) -> None:
    words = ["--methods", "toy-vector", "--limit", "16", "--updates", "1,2", "--lr", "1e-3", "--out", "board"]
    site.run(["leaderboard", *COMMON, *UNTAUGHT, *words])
    table = pd.read_csv(site.work / "board" / "table.csv").set_index("method")
    assert {"unedited", "toy-vector"} <= set(table.index)
    assert "toy_surprise" in table
    assert any("toy" in column and "hint" in column for column in table.columns)
