"""The chat's page in a browser: what its switches change, whom it asks, and what it looks like on a narrow screen."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

import mrp_lens as ml
from mrp_lens.edits import SteeringEdit
from mrp_lens.runs.chat import Chat
from mrp_lens.runs.chat_page import tokens_html
from tests.conftest import D_MODEL
from tests.support.browser import open_page
from tests.support.commands import MAIN
from tests.support.edits import conditional

QUESTION = "The colour of Zaxim is"
NEW = 6
EDIT = conditional(1, 2, rank=24)

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def model(tiny_folder: Path) -> Any:
    return ml.load_model(tiny_folder, backend="bridge")


@pytest.fixture(scope="module")
def address(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Of a page that is served while the module's tests run."""
    with served(tiny_folder, EDIT, tmp_path_factory.mktemp("page")) as where:
        yield where


@contextmanager
def served(model: Path, edit: ml.Edit, folder: Path, *extra: str) -> Iterator[str]:
    """The address of the command's page, which a process of its own serves. In CI gradio is never missing."""
    if find_spec("gradio") is None and not os.environ.get("CI"):
        pytest.skip("needs gradio: pip install 'mrp_lens[chat]'")
    edit.save_pretrained(folder / "edit")
    words = ["chat", "--model", str(model), "--backend", "bridge", "--edit", str(folder / "edit"), "--web"]
    line = [sys.executable, "-u", "-c", MAIN, *words, "--max-new-tokens", str(NEW), *extra]
    with (folder / "said").open("w") as said:
        server = subprocess.Popen(line, stdout=said, stderr=said, env={**os.environ, "COLUMNS": "300"})
    try:
        found = None
        while found is None:
            text = (folder / "said").read_text()
            assert server.poll() is None, text
            time.sleep(0.2)
            found = re.search(r"Open (http://127\.0\.0\.1:\d+/)", text)
        yield found[1]
        server.send_signal(signal.SIGINT)
        server.wait(timeout=60)
        assert "Traceback" not in (folder / "said").read_text()
    finally:
        server.kill()
        server.wait()


def shown(page: Any, box: str) -> str:
    return str(page.input_value(f"#{box} textarea"))


def wait_for(page: Any, box: str, text: str) -> None:
    page.wait_for_function(
        "([box, text]) => document.querySelector(`#${box} textarea`).value === text", arg=[box, text]
    )


def ask(page: Any, address: str) -> None:
    page.goto(address)
    page.fill("#question textarea", QUESTION)
    page.click("#ask")
    page.wait_for_selector("#tokens .tokens span")


def test_the_switches_change_the_answer_as_applied_does(model: Any, address: str) -> None:
    def written() -> str:
        return ml.continuations(model, [QUESTION], max_new_tokens=NEW)[0]

    before, edit = written(), EDIT
    with edit.applied(model):
        after = written()
    alone = edit.with_directions([edit.directions[0]])
    with alone.applied(model):
        of_one = written()
    assert before != after
    with open_page() as seen:
        page = seen.page
        ask(page, address)
        wait_for(page, "after", after)
        assert shown(page, "before") == before
        page.uncheck("#on input")
        wait_for(page, "after", before)
        page.wait_for_selector("#tokens :text('The edit is off')")
        page.check("#on input")
        wait_for(page, "after", after)
        page.fill("#strength input[type=number]", "0")
        page.press("#strength input[type=number]", "Tab")
        wait_for(page, "after", before)
        page.fill("#strength input[type=number]", "1")
        page.press("#strength input[type=number]", "Tab")
        wait_for(page, "after", after)
        page.click("#which label:has-text('only')")
        wait_for(page, "after", of_one)
        assert shown(page, "before") == before
        seen.assert_quiet(address)


def test_tokens_are_coloured_by_what_is_chosen(model: Any, address: str) -> None:
    frame = Chat(model, EDIT, max_new_tokens=NEW).ask(QUESTION).tokens
    assert frame is not None
    with open_page() as seen:
        page = seen.page
        ask(page, address)
        assert page.locator("#tokens .tokens span").count() == frame["position"].nunique()
        assert (
            page.locator("#tokens span.answer").count()
            == (frame[frame["hook"] == frame["hook"][0]]["part"] == "answer").sum()
        )
        page.click("#measure label:has-text('displacement')")
        page.wait_for_selector("#tokens :text('displacement: how far')")
        page.click("#hook input")
        page.click("ul[role=listbox] :text('layer 3, resid_post')")
        title = f"displacement {float(frame[frame['layer'] == 3]['displacement'].iloc[0]):.3f}"
        page.wait_for_selector(f"#tokens span[title*='{title}']")
        seen.assert_quiet(address)


@pytest.mark.parametrize("width", [1280, 400])
def test_no_page_is_wider_than_the_window(address: str, width: int) -> None:
    with open_page(width=width) as seen:
        ask(seen.page, address)
        assert seen.page.evaluate("document.documentElement.scrollWidth - window.innerWidth") <= 0
        assert "/edit" in seen.page.locator("h2").inner_text()
        seen.assert_quiet(address)


def test_what_is_wrong_is_said_on_the_page(tiny_folder: Path, tmp_path: Path) -> None:
    steering = SteeringEdit.towards(torch.ones(D_MODEL), layer=1, coefficient=9.0)
    with (
        served(tiny_folder, steering, tmp_path, "--no-apply", "--temperature", "-1") as address,
        open_page() as seen,
    ):
        seen.page.goto(address)
        seen.page.fill("#question textarea", QUESTION)
        assert not seen.page.is_checked("#on input")
        assert not seen.page.is_visible("#which")  # it projects nothing
        seen.page.click("#ask")
        seen.page.wait_for_selector("text=temperature must be a number from 0")


def test_tokens_are_no_markup(model: Any) -> None:
    frame = Chat(model, EDIT, max_new_tokens=2).ask('<script>alert(1)</script> & "x"').tokens
    assert frame is not None
    page = tokens_html(frame, "share", frame[frame["share"].notna()]["hook"].iloc[0])
    assert "<script" not in page
    assert "&lt;" in page
    assert "There is no gate here" in tokens_html(frame, "share", frame[frame["share"].isna()]["hook"].iloc[0])


def test_other_threads_may_ask_after_one_another(model: Any) -> None:
    """A page's questions come in threads of their own."""
    chat, found = Chat(model, EDIT, max_new_tokens=2), []
    for _ in range(2):
        thread = threading.Thread(target=lambda: found.append(chat.ask(QUESTION).after))
        thread.start()
        thread.join()
    assert found[0] == found[1]
