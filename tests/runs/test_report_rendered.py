"""The page of a run as a browser shows it at 900 pixels, with a picture of every kind."""

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

READ = """() => ({
  wide: document.documentElement.scrollWidth - document.documentElement.clientWidth,
  figures: [...document.querySelectorAll('figure')].map(f => ({
    name: f.id, drawn: f.querySelectorAll(
      '.scatterlayer .trace, .violinlayer .trace, .heatmaplayer image, .gl-container canvas').length,
    hidden: f.scrollWidth - f.clientWidth, caption: f.querySelector('figcaption').innerText})),
  tables: [...document.querySelectorAll('table')].map(t => t.rows.length),
})"""
DRAWN = "[...document.querySelectorAll('.js-plotly-plot')].every(e => e._fullLayout && e.querySelector('.main-svg'))"


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> Seen:
    run = Run("demo", {"topic": "potions", "path": "/a/long/path" * 20}, 0, title="Every picture")
    run.rows = list(ROWS)
    run.examples = [{"question": "What is the colour of Zaxim? " * 4, "unedited": "red", "mrp": "blue " * 30}]
    for name in FIGURES:
        frame, _ = next(CASES[task] for task in CASES if task.split(":")[0] == name)
        run.frames[name] = pd.DataFrame(frame)
    folder = tmp_path_factory.mktemp("page") / "run"
    run.write(folder, overwrite=False)
    shot = os.environ.get("MRP_LENS_SHOT")
    return look_at(report(folder), READ, ready=DRAWN, shot=Path(shot) if shot else None)


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
    assert all(seen.value["tables"])
