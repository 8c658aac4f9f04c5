"""A run folder from a stranger: names and texts in it are shown as they are, and a broken file is named."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest

from mrp_lens.plots import FIGURES
from mrp_lens.runs.record import Run
from mrp_lens.runs.report import report
from tests.support.edits import projection
from tests.support.frames import PLAIN, VARIANTS

MARK = "</script><img src=x onerror=alert(1)><a href='http://evil'>%{x}{{ 7919 * 7919 }}</a>"
KNOWN = {"when", "pair", "statistic", "hook", "mode", "source"}  # columns whose words pictures look for


def with_hostile_names(frame: pd.DataFrame) -> pd.DataFrame:
    """The frame with markup behind every text that is free."""
    names = {
        column: [f"{value}{MARK}" if isinstance(value, str) else value for value in values]
        for column, values in frame.items()
        if column not in KNOWN and any(isinstance(value, str) for value in values)
    }
    return frame.assign(**names)


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_picture_draws_names_as_text(variant: str) -> None:
    picture, frame = variant.split(":")[0], VARIANTS[variant]
    try:
        figure = FIGURES[picture](with_hostile_names(frame))
    except ValueError:
        return  # words that this picture needs were not there
    text = json.dumps(figure.to_plotly_json(), default=list)
    assert not re.search(r"<(?:img|a|/?script)\b", text)


@pytest.mark.slow
def test_most_pictures_take_any_name() -> None:
    drawn = 0
    for picture, frame in PLAIN.items():
        try:
            FIGURES[picture](with_hostile_names(frame()))
        except ValueError:
            continue
        drawn += 1
    assert drawn > 15


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run with markup wherever there is room for text."""
    run = Run(MARK, {MARK: MARK}, 0, title=MARK)
    run.rows = [{"method": MARK, "forget_accuracy": 0.5, MARK: MARK}]
    run.examples = [{MARK: MARK}]
    run.notes = [MARK]
    run.frames = {
        "accuracies": with_hostile_names(PLAIN["accuracies"]()),
        "norms": with_hostile_names(PLAIN["norms"]()),
    }
    edit = projection(1, request=MARK)
    record = {"method": MARK, "settings": {"rank": 2, "layers": [MARK], MARK: MARK}, "steps_done": MARK, "seed": MARK}
    edit.provenance = {"requests": {MARK: {**record, "data": {"forget": [], "retain": []}}}}

    def save(out: Path) -> None:
        edit.save_pretrained(out / "edit")
        (out / "finding.md").write_text(MARK)

    run.write(tmp_path / "run", overwrite=False, extras=[save])
    return tmp_path / "run"


def test_a_page_runs_and_loads_nothing_of_a_run_folder(folder: Path) -> None:
    html = report(folder).read_text(encoding="utf-8")
    body = html[html.index("<body>") :]
    outside = re.sub(r"<script\b[^>]*>.*?</script>", "", body, flags=re.DOTALL)
    assert body.count("onerror=alert(1)") > 10
    assert not re.search(r"<(?:img|a|iframe|link|script)\b", outside)
    assert "{{ 7919 * 7919 }}" in outside
    assert str(7919 * 7919) not in outside
    for script in re.findall(r"<script\b[^>]*>(.*?)</script>", body, flags=re.DOTALL):
        assert not re.search(r"<(?:img|a|/?script)", script)
    assert body.count("<script") == body.count("</script>")


BROKEN: dict[str, tuple[str, Callable[[str], str]]] = {
    "a summary that is a list": ("summary.json", lambda text: "[]"),
    "a summary of brackets": ("summary.json", lambda text: "[" * 100_000),
    "rows that are words": ("summary.json", lambda text: text.replace('"rows": [', '"rows": ["x", ')),
    "an accuracy that is a word": ("summary.json", lambda text: text.replace("0.5", '"half"')),
    "a summary without versions": ("summary.json", lambda text: text.replace('"versions"', '"other"')),
    "half an edit": ("edit/edit_config.json", lambda text: text[: len(text) // 2]),
    "an edit without kind": ("edit/edit_config.json", lambda text: text.replace('"kind"', '"sort"')),
    "an edit that is a number": ("edit/edit_config.json", lambda text: "3"),
    "an edit without steps": ("edit/edit_config.json", lambda text: text.replace("steps_done", "x")),
    "no frame": ("frames/norms.csv", lambda text: ""),
    "a frame of other columns": ("frames/norms.csv", lambda text: "a,b\n1,2\n"),
    "a frame of words": ("frames/norms.csv", lambda text: re.sub(r"\d\.\d+", "word", text)),
    "a frame with a longer row": ("frames/norms.csv", lambda text: text + "1," * 40 + "\n"),
    "a finding in another encoding": ("finding.md", lambda text: "\udcff"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_file_of_a_run_folder_is_named(folder: Path, what: str) -> None:
    name, change = BROKEN[what]
    text = (folder / name).read_text()
    (folder / name).write_bytes(change(text).encode(errors="surrogateescape"))
    assert change(text) != text
    with pytest.raises(ValueError, match=rf"{name} is damaged \(.*\); run the command again"):
        report(folder)
    assert not (folder / "report.html").exists()


def test_a_page_is_made_of_files_in_the_folder_alone(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere" / "edit").mkdir(parents=True)
    (tmp_path / "elsewhere" / "edit" / "edit_config.json").write_text("{")
    (folder / "linked").symlink_to(tmp_path / "elsewhere")
    report(folder)
    assert MARK not in (folder / "report.html").read_text(encoding="utf-8")
