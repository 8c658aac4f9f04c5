"""A page in headless Chromium, as wide as a notebook: what it shows, what the browser complains of, whom it asks."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from mrp_lens.plots.theme import WIDTH

CHROMIUM = Path("/usr/bin/chromium")
ARGUMENTS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
).split()
HARMLESS = ("GPU stall", "willReadFrequently")  # how software draws three dimensions
LOCAL = ("file://", "data:", "blob:")


@dataclass(frozen=True)
class Seen:
    """The value of a script run in the page, messages of the browser, and addresses that the page asked for."""

    value: Any
    complaints: list[str]
    asked: list[str]

    @property
    def asked_elsewhere(self) -> list[str]:
        assert self.asked, "not even the page was asked for"
        return [url for url in self.asked if not url.startswith(LOCAL)]


def look_at(page_file: Path, script: str, *, ready: str = "true", shot: Path | None = None) -> Seen:
    """Open a local page, wait until `ready` holds, run `script` in it. Skips without a browser, but never in CI."""
    return look_at_each([page_file], script, ready=ready, shot=shot)[0]


def look_at_each(
    page_files: Sequence[Path], script: str, *, ready: str = "true", width: int = WIDTH, shot: Path | None = None
) -> list[Seen]:
    """The same of several pages, one after the other in a window so wide; `shot` is of the last."""
    if not CHROMIUM.exists() and not os.environ.get("CI"):
        pytest.skip(f"needs {CHROMIUM}")
    from playwright.sync_api import sync_playwright

    def look(page: Any, page_file: Path) -> Seen:
        said, asked = heard(page)
        page.goto(page_file.as_uri())
        page.wait_for_function(ready, timeout=240_000)
        value = page.evaluate(script)
        if shot is not None:
            page.screenshot(path=shot, full_page=True)
        page.close()
        return Seen(value, [message for message in said if not any(known in message for known in HARMLESS)], asked)

    with sync_playwright() as browsers:
        browser = browsers.chromium.launch(executable_path=str(CHROMIUM), args=ARGUMENTS)
        seen = [
            look(browser.new_page(viewport={"width": width, "height": 1000}), page_file) for page_file in page_files
        ]
        browser.close()
    return seen


@dataclass(frozen=True)
class Opened:
    """A page that is served, in a browser; and what was said and asked for since it was opened."""

    page: Any
    said: list[str]
    asked: list[str]

    def assert_quiet(self, address: str) -> None:
        """It asked no other machine for anything, and the browser complains of nothing."""
        assert self.asked
        assert not [url for url in self.asked if not url.startswith((address, *LOCAL))]
        assert not [message for message in self.said if message.startswith(("error", "warning"))]


@contextmanager
def open_page(*, width: int = WIDTH) -> Iterator[Opened]:
    """An empty page in a window so wide, to be driven by hand. Skips without a browser, but never in CI."""
    if not CHROMIUM.exists() and not os.environ.get("CI"):
        pytest.skip(f"needs {CHROMIUM}")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as browsers:
        browser = browsers.chromium.launch(executable_path=str(CHROMIUM), args=ARGUMENTS)
        page = browser.new_page(viewport={"width": width, "height": 1000})
        seen = Opened(page, *heard(page))
        yield seen
        browser.close()


def heard(page: Any) -> tuple[list[str], list[str]]:
    """What the browser says of a page and the addresses that the page asks for, from now on."""
    said: list[str] = []
    asked: list[str] = []
    page.on("console", lambda message: said.append(f"{message.type}: {message.text}"))
    page.on("pageerror", lambda error: said.append(f"error: {error}"))
    page.on("request", lambda request: asked.append(request.url))
    return said, asked
