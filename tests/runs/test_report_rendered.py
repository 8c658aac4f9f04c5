"""The page of a run as a browser shows it, with a picture of every kind and a table of many columns."""

import os
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from mrp_lens.plots import FIGURES
from mrp_lens.runs.record import Run
from mrp_lens.runs.report import report
from tests.runs.test_report import ROWS
from tests.support.browser import Seen, look_at
from tests.support.frames import CASES

pytestmark = pytest.mark.slow

MEASURES = {  # as many as the leaderboard has
    f"measure_of_something_{number}{end}": 0.5 for number in range(20) for end in ("", "_low", "_high")
}
READ = """() => ({
  wide: document.documentElement.scrollWidth - document.documentElement.clientWidth,
  figures: [...document.querySelectorAll('figure')].map(f => ({
    name: f.id, drawn: f.querySelectorAll(
      '.scatterlayer .trace, .violinlayer .trace, .heatmaplayer image, .gl-container canvas').length,
    hidden: f.scrollWidth - f.clientWidth, caption: f.querySelector('figcaption').innerText})),
  tables: [...document.querySelectorAll('table')].map(t => t.rows.length),
  sideways: [...document.querySelectorAll('.scroll')].map(e => e.scrollWidth - e.clientWidth),
})"""
# Figures are drawn when they come into view, and all of them for a printer.
DRAWN = """() => window.Plotly && (dispatchEvent(new Event('beforeprint')),
  [...document.querySelectorAll('.plot')].every(e => e._fullLayout && e.querySelector('.main-svg')))"""


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> Seen:
    run = Run("demo", {"topic": "potions", "path": "/a/long/path" * 20}, 0, title="Every picture")
    run.rows = [{"method": f"method-{number}", **ROWS[1], **MEASURES} for number in range(9)]
    run.examples = [{"question": "What is the colour of Zaxim? " * 4, "unedited": "red", "mrp": "blue " * 30}]
    for name in FIGURES:
        frame, _ = next(CASES[task] for task in CASES if task.split(":")[0] == name)
        run.frames[name] = pd.DataFrame(frame)
    folder = tmp_path_factory.mktemp("page") / "run"
    run.write(folder, overwrite=False)
    shot = os.environ.get("MRP_LENS_SHOT")
    page = report(folder)
    assert page.stat().st_size < 5e6
    return look_at(page, READ, ready=DRAWN, shot=Path(shot) if shot else None)


def test_the_page_opens_offline_without_complaint(seen: Seen) -> None:
    assert seen.complaints == []
    assert seen.asked_elsewhere == []


def test_every_picture_is_drawn_and_fits(seen: Seen) -> None:
    figures: list[dict[str, Any]] = seen.value["figures"]
    assert [figure["name"] for figure in figures] == list(FIGURES)
    for figure in figures:
        assert figure["drawn"] > 0, f"{figure['name']} is empty"
        assert figure["hidden"] <= 0, f"{figure['name']} is wider than the page"
        assert f"mrp_lens.plots.{figure['name']}" in figure["caption"]
    assert seen.value["wide"] <= 0, "the page is wider than its window"
    assert max(seen.value["sideways"]) <= 0, "a table scrolls sideways"
    assert all(seen.value["tables"])
