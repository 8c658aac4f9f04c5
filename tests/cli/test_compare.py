"""The edits of several runs in one table."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from tests.support.commands import completed, invoke

UNEDITED: Mapping[str, Any] = {
    "method": "unedited",
    "forget_probability": 0.5,
    "forget_probability_low": 0.4,
    "forget_probability_high": 0.6,
    "forget_accuracy": 0.9,
    "forget_low": 0.8,
    "forget_high": 1.0,
    "forget_chance": 0.25,
    "text_perplexity": 20.0,
    "text_perplexity_ratio": 1.0,
}


def edited(**figures: float) -> dict[str, Any]:
    return {**UNEDITED, "method": "mrp", "damage_low": 0.0, "damage_high": 1.0, **figures}


def wrote(folder: Path, *rows: Mapping[str, Any]) -> str:
    folder.mkdir()
    (folder / "summary.json").write_text(json.dumps({"rows": rows}), encoding="utf-8")
    return str(folder)


def test_edits_stand_by_the_damage_they_did_under_the_names_of_their_runs(tmp_path: Path) -> None:
    small = wrote(tmp_path / "small", UNEDITED, edited(damage=0.0, forget_accuracy=0.7))
    large = wrote(tmp_path / "large", UNEDITED, edited(damage=0.05, forget_accuracy=0.3))
    both = wrote(
        tmp_path / "both",
        {**UNEDITED, "forget_accuracy": 0.9001},  # another machine's last digits
        edited(damage=0.02, forget_accuracy=0.8),
        {**edited(damage=0.04, forget_accuracy=0.3), "method": "rmu"},
    )
    result = invoke("compare", large, small, both, "--out", str(tmp_path / "out"))
    assert result.exit_code == 0, result.output
    table = pd.read_csv(tmp_path / "out" / "table.csv")
    assert table["method"].tolist() == ["unedited", "small", "mrp (both)", "rmu (both)", "large"]
    front = pd.read_csv(tmp_path / "out" / "frames" / "pareto.csv").set_index("edit")["on_front"]
    assert front.to_dict() == {"small": True, "mrp (both)": False, "rmu (both)": True, "large": False}
    assert "0.050 [0.000, 1.000]" in result.output
    assert (tmp_path / "out" / "report.html").is_file()
    assert "is not empty" in str(invoke("compare", small, "--out", str(tmp_path / "out")).exception)


def test_edits_whose_damage_is_not_known_have_no_picture(tmp_path: Path) -> None:
    runs = [wrote(tmp_path / name, UNEDITED, edited()) for name in ("one", "two")]
    completed("compare", *runs, "--out", str(tmp_path / "out"))
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "two" in page
    assert 'id="pareto"' not in page


def test_a_run_of_another_command_is_refused_and_a_comparison_can_be_repeated(tmp_path: Path) -> None:
    demo = Path(wrote(tmp_path / "demo", UNEDITED))
    (demo / "summary.json").write_text(json.dumps({"command": "demo", "rows": [UNEDITED]}))
    assert "is of `mrp-lens demo`; give runs of" in str(invoke("compare", str(demo)).exception)
    run, out = wrote(tmp_path / "run", UNEDITED, edited(damage=0.01)), tmp_path / "out"
    completed("compare", run, "--out", str(out))
    again = completed("compare", "--config", str(out / "summary.json"), "--out", str(tmp_path / "again"))
    assert "0.010 [0.000, 1.000]" in again.output


def test_runs_of_other_data_and_folders_without_an_edit_are_refused(tmp_path: Path) -> None:
    run = wrote(tmp_path / "run", UNEDITED, edited(damage=0.01))
    other = wrote(tmp_path / "other", {**UNEDITED, "forget_accuracy": 0.8}, edited(damage=0.01))
    bare = wrote(tmp_path / "bare", UNEDITED)
    study = wrote(tmp_path / "study", {"layer": 3})
    for folders, said in (
        ((run, other), "the unedited model's forget_accuracy is 0.8 and 0.9; compare"),
        ((bare,), "no edit was measured"),
        ((run, study), "study has no figures of the unedited model"),
        ((str(tmp_path / "nowhere"),), "nowhere holds no finished run"),
        ((run, run), "two of the runs are called 'run'"),
    ):
        assert said in str(invoke("compare", *folders).exception)


def test_runs_of_unlearn_and_of_measure_stand_side_by_side(tmp_path: Path) -> None:
    fitted = {**edited(damage=0.01), "outcome": "target", "seconds": 3.2}
    run = wrote(tmp_path / "run", {**UNEDITED, "outcome": None, "seconds": 0.0}, fitted)
    of_the_harness = {"task": "wmdp", "metric": "acc", "filter": "none", "value": 0.3, "stderr": None, "n": 3}
    measured = wrote(
        tmp_path / "measured",
        *(UNEDITED, edited(damage=0.02)),
        *({"method": name, **of_the_harness} for name in ("unedited", "mrp")),
    )
    for folders in ((run, measured), (measured, run)):
        said = completed("compare", *folders).output
        assert said.count(" 3 s ") == 1
        assert re.search(r"measured .* 0\.020 \[0\.000, 1\.000\] │ +│", said)
    assert "has no figures of the unedited model" in str(
        invoke("compare", wrote(tmp_path / "harness", {"method": "unedited", **of_the_harness})).exception
    )


def test_names_are_shown_as_they_are_and_what_is_not_known_is_an_empty_cell(tmp_path: Path) -> None:
    unknown = {"forget_low": float("nan"), "forget_high": None, "text_perplexity_ratio": float("nan"), "damage": None}
    names = ("mrp [small]", "rmu :x: [bold]", "[red]")
    for number, name in enumerate(names):
        wrote(tmp_path / name, {**UNEDITED, "forget_low": None}, {**edited(), **(unknown if number == 0 else {})})
    said = completed("compare", *(str(tmp_path / name) for name in names)).output
    for name in names:
        assert f" {name} " in said
    assert re.search(r"mrp \[small\] +│ 50\.0% \[40\.0%, 60\.0%\] │ +90\.0% │ +│ +│", said)
    assert "nan" not in said


def test_what_is_no_run_is_not_overwritten(tmp_path: Path) -> None:
    run = wrote(tmp_path / "run", UNEDITED, edited(damage=0.01))
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    for extra in ([], ["--overwrite"]):
        assert "out exists and holds no run" in str(invoke("compare", run, "--out", str(out), *extra).exception)
        assert [path.name for path in out.iterdir()] == ["mine.txt"]
    (out / "mine.txt").unlink()
    completed("compare", run, "--out", str(out))
    assert "overwrite it" in str(invoke("compare", run, "--out", str(out)).exception)
    completed("compare", run, "--out", str(out), "--overwrite")
