"""Every picture as a browser draws it at the width of a notebook: nothing fails, nothing overlaps, nothing is cut off."""

import json
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import plotly.io
import pytest

from mrp_lens import plots
from mrp_lens.plots.theme import WIDTH
from tests.support.browser import look_at_each
from tests.support.frames import CASES

pytestmark = pytest.mark.slow

A_PAGE = 20  # figures
TOUCH = 1.0  # pixels that two boxes may share: text does not fill its box

# What a figure shows: the boxes of its texts, of its legend, of its panels, and how many traces were drawn.
READ = """() => [...document.querySelectorAll('.js-plotly-plot')].map(figure => {
  const frame = figure.getBoundingClientRect();
  const box = (element) => { const r = element.getBoundingClientRect();
    return [r.left - frame.left, r.top - frame.top, r.right - frame.left, r.bottom - frame.top]; };
  const texts = '.cartesianlayer text, .infolayer text';  // tick labels; titles, legend, annotations
  const layout = figure._fullLayout;
  return {
    name: figure.closest('[data-name]').dataset.name,
    width: frame.width, height: frame.height,
    texts: [...figure.querySelectorAll(texts)].filter(e => e.textContent && !e.closest('.heatmaplayer')).map(e => [e.textContent, box(e)]),
    legend: [...figure.querySelectorAll('.legend .bg')].map(box)[0],
    panels: Object.values(layout._plots).map(p => [p.xaxis._offset, p.yaxis._offset,
      p.xaxis._offset + p.xaxis._length, p.yaxis._offset + p.yaxis._length]),
    drawn: figure.querySelectorAll('.scatterlayer .trace, .violinlayer .trace, .heatmaplayer .hm').length,
    scenes: [...figure.querySelectorAll('.gl-container canvas')].length,
    paths: [...figure.querySelectorAll('.cartesianlayer path')].filter(e => /NaN/.test(e.getAttribute('d') || '')).length,
  };
})"""


@pytest.fixture(scope="module")
def rendered(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Figure by name as the browser shows it, and what the browser complained about and asked for; so many figures a page that one is
    drawn in a few seconds."""
    folder, names = tmp_path_factory.mktemp("pages"), list(CASES)
    pages = [page_of(names[start : start + A_PAGE], folder / f"{start}.html") for start in range(0, len(names), A_PAGE)]
    seen = look_at_each(pages, READ, ready="window.ready === document.querySelectorAll('[data-name]').length")
    return {"figures": {figure.pop("name"): figure for page in seen for figure in page.value}, "seen": seen}


def page_of(names: Sequence[str], path: Path) -> Path:
    """A page with these figures."""
    parts: list[str] = []
    for name in names:
        frame, options = CASES[name]
        figure = plots.FIGURES[name.split(":")[0]](frame, **options)
        html = plotly.io.to_html(
            figure, full_html=False, include_plotlyjs=not parts, post_script="window.ready = (window.ready || 0) + 1;"
        )
        parts.append(f"<div data-name={json.dumps(name)}>{html}</div>")
    path.write_text(f"<!doctype html><meta charset='utf-8'><body style='margin:0'>{''.join(parts)}", encoding="utf-8")
    return path


def test_the_browser_has_nothing_to_complain_of_and_asks_nobody_for_anything(rendered: dict[str, Any]) -> None:
    assert rendered["figures"].keys() == CASES.keys()
    for page in rendered["seen"]:
        assert page.complaints == []
        assert page.asked_elsewhere == []


def test_everything_is_drawn_within_the_width_of_a_notebook(
    rendered: dict[str, Any], subtests: pytest.Subtests
) -> None:
    for name, (frame, options) in CASES.items():
        with subtests.test(name):
            figure = rendered["figures"][name]
            made = plots.FIGURES[name.split(":")[0]](frame, **options)
            assert figure["width"] == WIDTH
            assert figure["height"] == made.layout.height
            assert figure["paths"] == 0
            if made.data[0].type == "scatter3d":
                assert figure["scenes"] > 0
            else:
                assert figure["drawn"] >= sum(trace.x is None or list(trace.x) != [None] for trace in made.data)
                assert figure["panels"]
            for text, (left, top, right, bottom) in figure["texts"]:
                inside = (left >= 0, top >= 0, right <= WIDTH, bottom <= figure["height"])
                assert inside == (True,) * 4, f"{text!r} is cut off"


def test_no_text_lies_on_another_nor_the_legend_on_a_panel(rendered: dict[str, Any], subtests: pytest.Subtests) -> None:
    for name in CASES:
        with subtests.test(name):
            figure = rendered["figures"][name]
            assert len(figure["texts"]) >= 2  # a title and a note at the least
            for (one, box), (other, other_box) in combinations(figure["texts"], 2):
                assert not overlap(box, other_box), f"{one!r} lies on {other!r}"
            for panel in figure["panels"]:
                assert not overlap(figure["legend"], panel), "the legend lies on a panel"
                for text, box in figure["texts"]:
                    assert not overlap(box, panel), f"{text!r} lies on a panel"


def overlap(one: list[float], other: list[float]) -> bool:
    width, height = (min(one[i + 2], other[i + 2]) - max(one[i], other[i]) for i in (0, 1))
    return width > TOUCH and height > TOUCH
