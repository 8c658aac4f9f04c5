"""The documentation site that `make docs` builds: each page in a browser, wide and narrow, opened from disk."""

import os
import re
from pathlib import Path

import pytest

from tests.support.browser import look_at, look_at_each
from tests.support.documents import ROOT

SITE = ROOT / "site"
WITH_PICTURES = {
    "explanation/mrp.html": 4,
    "explanation/rmu.html": 5,
    "explanation/projections.html": 3,
    "notebooks/1_forget_a_topic.html": 3,
    "notebooks/3_geometry.html": 8,
}
LOADED = "document.readyState === 'complete'"
TOO_WIDE = "document.documentElement.scrollWidth - window.innerWidth"
SEARCH = """async () => {
    const query = document.querySelector("[data-md-component=search-query]")
    query.focus()
    query.value = "gate"
    for (const kind of ["input", "keyup"]) query.dispatchEvent(new Event(kind, {bubbles: true}))
    for (let tries = 0; tries < 600; tries++) {
        const found = document.querySelectorAll(".md-search-result__item").length
        if (found) return found
        await new Promise((resolve) => setTimeout(resolve, 100))
    }
    return 0
}"""

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def pages() -> list[Path]:
    found = sorted(page for page in SITE.rglob("*.html") if page.name != "404.html")  # which is for servers
    if not found and not os.environ.get("CI"):
        pytest.skip("needs the site: make docs")
    assert len(found) > 30
    return found


@pytest.mark.parametrize("width", [1280, 400])
def test_no_page_complains_asks_elsewhere_or_is_wider_than_the_window(width: int, pages: list[Path]) -> None:
    for page, seen in zip(pages, look_at_each(pages, TOO_WIDE, ready=LOADED, width=width), strict=True):
        assert seen.complaints == [], page
        assert seen.asked_elsewhere == [], page
        assert seen.value <= 0, page


@pytest.mark.usefixtures("pages")
@pytest.mark.parametrize("name", WITH_PICTURES)
def test_pictures_are_drawn(name: str) -> None:
    drawn = "[...document.querySelectorAll('.figure .js-plotly-plot')].filter((plot) => plot.querySelector('.main-svg')).length"
    count = WITH_PICTURES[name]
    assert look_at(SITE / name, drawn, ready=f"{drawn} === {count}").value == count


@pytest.mark.usefixtures("pages")
def test_the_search_finds_pages_that_were_opened_from_disk() -> None:
    seen = look_at(SITE / "index.html", SEARCH, ready=LOADED)
    assert seen.value >= 5
    assert seen.complaints == []
    assert seen.asked_elsewhere == []


def test_the_links_of_llms_txt_lead_to_the_pages_beside_it(pages: list[Path]) -> None:
    linked = {SITE / link for link in re.findall(r"\]\(([^)]+)\)", (SITE / "llms.txt").read_text(encoding="utf-8"))}
    assert SITE / "start.html" in linked
    assert linked <= set(pages)
