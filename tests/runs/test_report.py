import json
import re
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from mrp_lens import metrics
from mrp_lens.data import Corpus
from mrp_lens.data.task import UnlearningTask
from mrp_lens.methods import METHODS, MRP, RMU
from mrp_lens.models import LensModel
from mrp_lens.plots import FIGURES
from mrp_lens.runs.record import Run
from mrp_lens.runs.report import report
from mrp_lens.runs.report.diagnostics import diagnostics
from mrp_lens.runs.report.page import OTHERWISE, edits_in, frame_in, sentence
from mrp_lens.runs.report.table import Table, table_of
from mrp_lens.utils.frames import csv_of
from tests.conftest import D_MODEL
from tests.support.commands import completed

ROWS = [
    {
        **{"method": "unedited", "forget_accuracy": 1.0, "forget_low": 0.99, "forget_high": 1.0, "seconds": 0.0},
        **{"text_perplexity": 5.0, "text_perplexity_ratio": 1.0, "verdict": "known", "untaught_accuracy": 0.25},
    },
    {
        **{"method": "rmu", "forget_accuracy": 0.2734, "forget_low": 0.2, "forget_high": 0.35, "seconds": 12.4},
        **{"text_perplexity": 5.5, "text_perplexity_ratio": 1.1, "verdict": "absent", "untaught_accuracy": 0.25},
    },
]


FINDING = """\
| method | recovery |
| ------ | -------- |
| mrp    | 0.10     |

## How to read this

It forgot, **all** of <b>it</b> ![x](https://example.org/x.png)."""


@pytest.fixture
def folder(model: LensModel, texts: tuple[Corpus, Corpus], tmp_path: Path) -> Path:
    """A run with a fit, a frame, examples that look like markup, and a finding."""
    fit = RMU(steps=2).fit(model, *texts, progress=False)
    run = Run("unlearn", {"model": "mine & yours", "unset": None}, 3, title="Forgetting <everything>")
    run.rows = list(ROWS)
    run.examples = [{"prompt": "<script>alert(1)</script>", "unedited": "red</s>", "rmu": "blue"}]
    run.notes = ["interrupted after 2 steps"]
    run.frames["alignment_by_layer"] = metrics.alignment(model, {"forget": texts[0]}, torch.ones(D_MODEL))

    def save(out: Path) -> None:
        fit.edit.save_pretrained(out / "edit")
        (out / "finding.md").write_text(FINDING)

    run.write(tmp_path / "run", overwrite=False, extras=[save])
    return tmp_path / "run"


def test_the_page_tells_what_was_done_and_needs_nothing_else(folder: Path) -> None:
    page = report(folder)
    assert page == folder / "report.html"
    html = page.read_text(encoding="utf-8")
    body = html[html.index("<body>") :]
    for expected in (
        "Forgetting &lt;everything&gt;",
        "mine &amp; yours",
        "interrupted after 2 steps",
        "<p>It forgot, <strong>all</strong> of &lt;b&gt;it&lt;/b&gt; ",
        "<td>0.10</td>",
        "<h3>How to read this</h3>",
        '<td>27.3%<span class="interval">[20.0, 35.0]</span></td>',
        "27.3% [20.0, 35.0] of the forget quiz right; 100.0% before; 25.0% on facts never taught",
        "x1.100",
        "12 s",
        "absent: within 5 points",
        "layers 0, 1 and 2 trained to steer forget states of layer 2",
        "2 steps, 16 documents to forget, 16 to keep, seed 0",
        'id="alignment_by_layer"',
        "&lt;script&gt;alert(1)&lt;/script&gt;",
        "red&lt;/s&gt;",
        f"{RMU.summary} {RMU.source}",
        "transformer_lens",
    ):
        assert expected in body, expected
    assert "unset" not in body
    assert '<th>method</th><th class="control">unedited</th><th>rmu</th>' in body
    assert not re.findall(r"<(?:script|link|img|iframe)[^>]+(?:src|href)=[\"']?(?:https?:)?//", html)


def test_pictures_of_an_earlier_run_and_of_frames_without_a_number_are_left_out(folder: Path) -> None:
    page = report(folder).read_text(encoding="utf-8")
    assert 'id="alignment_by_layer"' in page
    later = Run("unlearn", {}, 3, rows=list(ROWS))
    later.frames["accuracies"] = pd.DataFrame({"method": ["rmu"], "forget_accuracy": [None]})
    later.write_into(folder)
    page = report(folder).read_text(encoding="utf-8")
    assert "<figure" not in page


def test_fits_that_differ_in_a_setting_alone_are_told_both(folder: Path) -> None:
    path = folder / "edit" / "edit_config.json"
    config = json.loads(path.read_text())
    rate = config["provenance"]["settings"]["lr"]
    config["provenance"]["settings"]["lr"] = rate / 2
    (folder / "again").mkdir()
    (folder / "again" / "edit_config.json").write_text(json.dumps(config))
    assert len({fit.sentence for fit in edits_in(folder)}) == 1
    assert sorted(fit.settings["lr"] for fit in edits_in(folder)) == [rate / 2, rate]


def test_names_that_look_like_numbers_stay_text(tmp_path: Path) -> None:
    frame = pd.DataFrame({"method": ["01", "1e3"], "token": ["True", "NA"], "step": [1, 2]})
    frame.to_csv(tmp_path / "frame.csv", index=False)
    pd.testing.assert_frame_equal(frame_in(tmp_path / "frame.csv"), frame)


def record_of(method: str, settings: dict[str, Any]) -> dict[str, Any]:
    side = [{"documents": 5}]
    return {
        **{"method": method, "settings": settings, "steps_done": 7, "seed": 1},
        "data": {"forget": side, "retain": side},
    }


@pytest.mark.parametrize("settings", [{"strength": 3}, {"rank": 4}, {}, {"rank": 4, "layers": 2}], ids=str)
@pytest.mark.parametrize("method", ["new", "mrp"])
def test_of_a_fit_that_the_page_does_not_know_it_says_that_something_was_fitted(
    method: str, settings: dict[str, Any]
) -> None:
    known = method == "mrp" and "layers" in settings
    done = "subspaces of rank 4 removed from the residual stream at layers 2" if known else OTHERWISE
    told = sentence(record_of(method, settings), "")
    assert told == f"{method}: {done}; 7 steps, 5 documents to forget, 5 to keep, seed 1"


@pytest.mark.parametrize("name", METHODS)
def test_every_method_tells_what_it_did(name: str) -> None:
    settings = {"layers": [1, 2], "rank": 2, "trained_layers": [0, 1], "layer": 1}
    told = sentence(record_of(name, settings), "")
    assert OTHERWISE not in told
    assert re.search(r"layers? \d", told)


def test_the_page_can_be_put_elsewhere_and_the_command_makes_it(folder: Path, tmp_path: Path) -> None:
    completed("report", str(folder), "--out", str(tmp_path / "page.html"))
    assert (tmp_path / "page.html").is_file()
    assert not (folder / "report.html").exists()


def test_a_folder_without_a_summary_is_refused(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"holds no summary.json; give the folder that a command or study"):
        report(tmp_path / "nowhere")
    (folder / "summary.json").write_text("{")
    with pytest.raises(ValueError, match=r"summary.json is damaged .*; run the command again"):
        report(folder)
    assert not (folder / "report.html").exists()


def test_the_table_leaves_out_what_is_empty_and_joins_intervals_to_their_values() -> None:
    table = table_of(
        [
            {
                "method": "mrp",
                "layer": 2,
                "retain_accuracy": 0.5,
                "chance": None,
                "x": 1.23456,
                "x_low": 1.0,
                "x_high": 2.0,
            }
        ]
    )
    assert table.headings == ["method", "layer", "accuracy on the retain quiz", "x"]
    assert texts_of(table) == [(False, ["mrp", "2", "50.0%", "1.235 [1, 2]"])]
    frame = table_of(
        [
            {
                "group": "a",
                "cosine": 0.5,
                "low": 0.4,
                "high": 0.6,
                "null_mean": 0.1,
                "null_low": 0.0,
                "null_high": 0.2,
                "method": "rmu",
            }
        ]
    )
    assert frame.headings == ["method", "group", "cosine", "null mean"]
    assert texts_of(frame) == [(False, ["rmu", "a", "0.5 [0.4, 0.6]", "0.1 [0, 0.2]"])]
    missing = table_of([{"method": "a", "x": 1.0}, {"method": "b", "x": float("nan")}])
    assert texts_of(missing) == [(False, ["a", "1"]), (False, ["b", ""])]


def test_what_is_not_known_is_an_empty_cell_or_no_column() -> None:
    nan = float("nan")
    rows = [{"method": "a", "x": 1.0, "x_low": nan, "x_high": nan, "y": nan}, {"method": "b", "x": nan, "y": None}]
    table = table_of(rows)
    assert table.headings == ["method", "x"]
    assert texts_of(table) == [(False, ["a", "1"]), (False, ["b", ""])]


def test_a_summary_is_json_whatever_was_measured(tmp_path: Path) -> None:
    run = Run("x", {}, 0, rows=[{"method": "a", "low": float("nan"), "ratio": float("inf"), "n": 3}])
    run.write(tmp_path / "run", overwrite=False)
    text = (tmp_path / "run" / "summary.json").read_text()
    assert json.loads(text)["rows"] == [{"method": "a", "low": None, "ratio": None, "n": 3}]


def test_texts_in_a_frame_are_never_numbers_that_are_missing(tmp_path: Path) -> None:
    tokens = ["null", "NA", "None", "nan", "", "N/A", "-1.#IND"]
    frame = pd.DataFrame({"token": tokens, "share": [0.5, None, 1.0, float("nan"), 2.0, 0.0, 1e-9], "n": range(7)})
    frame = frame.assign(unknown=None)
    frame.to_csv(tmp_path / "frame.csv", index=False)
    read = frame_in(tmp_path / "frame.csv")
    assert read["token"].tolist() == tokens
    assert read["n"].tolist() == list(range(7))
    pd.testing.assert_series_equal(read["share"], frame["share"])
    assert read["unknown"].isna().all()


def test_a_carriage_return_in_a_frame_is_no_end_of_a_row(tmp_path: Path) -> None:
    frame = pd.DataFrame({"document": [0, 0, 1], "token": ["a", "\r", "b,\n"], "open": [0.5, 1.0, 0.0]})
    run = Run("x", {}, 0, rows=[{"method": "\r"}], frames={"gate_tokens": frame})
    run.write_into(tmp_path)
    pd.testing.assert_frame_equal(frame_in(tmp_path / "frames" / "gate_tokens.csv"), frame)
    assert csv_of(frame[:1]) == "document,token,open\n0,a,0.5\n"


def test_only_a_perplexity_is_a_multiple_of_the_unedited_models() -> None:
    row = {"method": "rmu", "forget_truth_ratio": 0.53, "text_perplexity_ratio": 1.02}
    assert texts_of(table_of([row])) == [(False, ["rmu", "0.53", "x1.020"])]


def test_a_share_near_0_is_not_written_as_0() -> None:
    shares = {"forget_probability": 1.104e-5, "forget_probability_low": 0.0, "forget_probability_high": 0.0012}
    assert texts_of(table_of([{"method": "rmu", **shares}])) == [(False, ["rmu", "0.0011% [0.0, 0.1]"])]


def texts_of(table: Table) -> list[tuple[bool, list[str]]]:
    return [(control, list(map(str, cells))) for control, cells in table.rows]


def test_a_table_with_more_columns_than_rows_is_turned() -> None:
    rows = [{"method": name, "x": 1.0, "y": 2.0} for name in ("a", "b", "c")]
    assert not table_of(rows).turned
    assert table_of(rows[:2]).turned
    assert [list(map(str, line)) for line in table_of(rows[:2]).lines] == [["a", "b"], ["1", "1"], ["2", "2"]]


def test_a_run_keeps_its_frames_and_whole_files(tmp_path: Path) -> None:
    run = Run("x", {}, 0, frames={"norms": pd.DataFrame({"layer": [0]})})
    run.write(tmp_path / "run", overwrite=False)
    run.rows = [{"method": "later"}]
    run.write_into(tmp_path / "run")
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["rows"] == [{"method": "later"}]
    assert pd.read_csv(tmp_path / "run" / "frames" / "norms.csv")["layer"].tolist() == [0]
    assert not list(tmp_path.rglob("*.partial"))


def test_a_look_at_the_model_has_every_method_and_its_controls(
    model: LensModel, texts: tuple[Corpus, Corpus], untouched: None
) -> None:
    forget, retain = texts
    fits: dict[str, Any] = {"mrp": MRP(layers=[1, 2], rank=2, steps=2), "rmu": RMU(steps=2)}
    fitted = {name: method.fit(model, forget, retain, progress=False) for name, method in fits.items()}
    edits = {"unedited": None, **{name: fit.edit for name, fit in fitted.items()}}
    direction = fitted["rmu"].direction
    frames = diagnostics(model, UnlearningTask((forget,), retain, retain), edits, {"rmu": direction}, progress=False)
    assert set(frames) <= set(FIGURES)
    for name, frame in frames.items():
        FIGURES[name](frame)
    assert list(frames["alignment_by_layer"]["method"].unique()) == ["unedited", "mrp", "rmu"]
    assert list(frames["displacement"]["method"].unique()) == ["mrp", "rmu"]
    assert list(frames["propagation"]["method"].unique()) == ["mrp"]
    with fitted["rmu"].edit.applied(model):
        own = metrics.alignment(model, {"forget": forget}, direction)
    of_rmu = frames["alignment_by_layer"].query("method == 'rmu' and group == 'forget'")
    assert of_rmu["cosine"].tolist() == pytest.approx(own["cosine"].tolist(), abs=1e-6)
