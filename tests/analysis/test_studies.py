"""The studies' tables follow from their numbers, and they run on a model and data of one's own."""

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from analysis import alignment, confidence, layers
from analysis.common.arguments import parser_for
from analysis.common.tables import markdown
from mrp_lens.data.task import TaskConfig, task_for


def cells_of(finding: str) -> list[list[str]]:
    """The cells of a finding's tables, headings first, without the rules."""
    lines = [line for line in finding.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [line for line in cells if set(line[0]) != {"-"}]


def test_a_table_in_markdown_is_aligned() -> None:
    lines = markdown(pd.DataFrame({"method": ["mrp", "adaptive-rmu"], "x": ["1", "2.50"]})).splitlines()
    assert lines == [
        "| method       | x    |",
        "| ------------ | ---- |",
        "| mrp          | 1    |",
        "| adaptive-rmu | 2.50 |",
    ]


def test_alignment_shows_each_cosine_beside_unrelated_directions() -> None:
    fixed = {"low": 0.0, "high": 1.0, "null_mean": 0.2, "null_low": 0.1, "null_high": 0.3, "norm": 7.0}
    rows = [
        {"method": "rmu", "group": "forget", "relative_coefficient": 0.5, "cosine": 0.12, **fixed},
        {"method": "mrp", "group": "forget", "relative_coefficient": float("nan"), "cosine": 0.2, **fixed},
    ]
    found = alignment.finding(pd.DataFrame(rows), 2, 7.0)
    assert cells_of(found) == [
        ["method", "c / norm", "group", "cosine", "null mean", "norm"],
        ["rmu", "0.5", "forget", "0.12 [0, 1]", "0.2 [0.1, 0.3]", "7"],
        ["mrp", "", "forget", "0.2 [0, 1]", "0.2 [0.1, 0.3]", "7"],
    ]
    assert "at layer 2, where unedited forget states have a mean norm of 7;" in found


def test_confidence_shows_what_was_measured_and_both_checks_of_the_theory() -> None:
    keys = {"method": "rmu", "group": "forget", "mode": "forced"}
    values = {"mean": 10.0, "low": 9.0, "high": 11.0, "std": 1.0}
    table = pd.DataFrame([{**keys, "measure": measure, **values} for measure in ("max_logit", "entropy")])
    theory = pd.DataFrame(
        [
            {"noise": noise, "statistic": "mean", "error": sign * 10 * noise, "inside": noise < 0.01}
            for noise in (0.001, 0.1)
            for sign in (1, -1)
        ]
    )
    growth = pd.DataFrame({"coefficient": [1.0, 1.0, 4.0], "measured": [1.0, 3.0, 3.0], "norm": 2.0})
    assert cells_of(confidence.finding(table, theory, growth, 10.0)) == [
        ["method", "group", "mode", "measure", "mean", "std"],
        ["rmu", "forget", "forced", "max_logit", "10 [9, 11]", "1"],
        ["statistic", "noise", "mean error", "inside", "prompts"],
        ["mean", "0.001", "0.01", "2", "2"],
        ["mean", "0.1", "1", "0", "2"],
        ["c / norm", "variance of the logits"],
        ["0.5", "2"],
        ["2", "3"],
    ]


NO_THEORY = pd.DataFrame(columns="group layer coefficient low high norm working_coefficient".split())


def sweep_table(*, above: float, below: float, adaptive: tuple[float, ...]) -> pd.DataFrame:
    rows: list[dict[str, Any]] = [{"method": "unedited", "retain_accuracy": 1.0, "forget_accuracy": 1.0}]
    for layer, beta in enumerate(adaptive):
        for share, forget in ((2.0, above), (0.5, below)):
            row = {"method": "rmu", "coefficient": 10 * share, "relative_coefficient": share, "forget_accuracy": forget}
            rows.append({**row, "layer": layer, "retain_accuracy": 0.99})
        row = {"method": "adaptive-rmu", "coefficient": 5.0, "relative_coefficient": 5.0, "forget_accuracy": beta}
        rows.append({**row, "layer": layer, "retain_accuracy": 0.99})
    table = pd.DataFrame(rows).assign(untaught_accuracy=0.25, seed=0)
    return table.assign(suppressed=layers.suppressed(table), works=layers.works(table))


def test_a_fit_that_loses_what_must_stay_does_not_work() -> None:
    table = sweep_table(above=0.27, below=0.27, adaptive=(0.26,))
    assert table["works"].tolist() == [False, True, True, True]
    table.loc[1, "retain_accuracy"] = 0.9
    assert layers.works(table).tolist() == [False, False, True, True]
    assert layers.smallest_working(table.assign(works=layers.works(table))).to_dict() == {0: 5.0}


def test_a_fit_that_pushes_answers_below_the_never_taught_level_does_not_work() -> None:
    table = sweep_table(above=0.05, below=0.21, adaptive=(0.19,))
    assert table["suppressed"].tolist() == [False, True, False, True]
    assert table["works"].tolist() == [False, False, True, False]
    line = cells_of(layers.finding(table, pd.DataFrame(columns=["group", "layer", "sensitivity"]), NO_THEORY, None))[1]
    assert line[-2:] == ["1", "0"]


def test_layers_shows_the_share_of_fits_that_worked_and_the_c_that_theory_predicts() -> None:
    table = sweep_table(above=0.27, below=0.9, adaptive=(0.26, 0.9))
    predicted = pd.DataFrame(
        {"group": "forget", "layer": [0, 1], "coefficient": 5.0, "low": 4.0, "high": 6.0, "norm": 8.0}
    ).assign(working_coefficient=[10.0, float("nan")])
    sensitivity = pd.DataFrame({"group": "forget", "layer": [0, 1], "sensitivity": [3.0, 2.0]})
    cells = cells_of(layers.finding(table, sensitivity, predicted, None))
    fits = {tuple(line[:3]): line[-1] for line in cells[1:7]}
    assert fits == {
        **{("rmu", str(layer), share): works for layer in (0, 1) for share, works in (("2", "1"), ("0.5", "0"))},
        ("adaptive-rmu", "0", "5"): "1",
        ("adaptive-rmu", "1", "5"): "0",
    }
    assert cells[8:] == [
        ["forget", "0", "3", "5 [4, 6]", "8", "10"],
        ["forget", "1", "2", "5 [4, 6]", "8", ""],
    ]


def test_a_study_of_ones_own_model_needs_data() -> None:
    with pytest.raises(ValueError, match=r"give forget=\.\.\. and retain="):
        task_for("mine", TaskConfig.from_options(vars(parser_for("", "x").parse_args(["--model", "mine"]))))


def test_layers_leaves_what_another_study_wrote(tmp_path: Path) -> None:
    (tmp_path / "summary.json").write_text("{}")
    with pytest.raises(FileExistsError, match="holds something other than this study"):
        layers.main(["--out", str(tmp_path)])


@pytest.mark.parametrize("study", [alignment, confidence])
def test_a_study_of_one_direction_refuses_several_forget_corpora(study: Any, tiny_folder: Path, tmp_path: Path) -> None:
    files = []
    for name in ("one", "two", "kept"):
        files.append(str(tmp_path / f"{name}.txt"))
        Path(files[-1]).write_text("\n".join(f"The colour of {name}{i} is red." for i in range(4)))
    data = ["--model", str(tiny_folder), "--forget", *files[:2], "--retain", files[2]]
    with pytest.raises(ValueError, match="2 files of --forget: RMU steers each to a direction of its own"):
        study.main([*data, "--out", str(tmp_path / "out")])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("study", "options"),
    [
        (alignment, ["--set", "steps=3"]),
        (confidence, ["--set", "steps=3"]),
        (layers, []),
        (layers, ["--methods", "adaptive-rmu"]),
    ],
    ids=["alignment", "confidence", "layers", "layers of one method"],
)
def test_studies_run_on_a_model_and_data_of_ones_own(
    study: Any, options: list[str], tiny_folder: Path, tmp_path: Path
) -> None:
    rows = [
        {"text": f"The colour of Zaxim{i} is red.", "q": f"The colour of Zaxim{i} is", "a": ["red", "blue"], "y": i % 2}
        for i in range(12)
    ]
    quiz = tmp_path / "forget.jsonl"
    quiz.write_text("\n".join(json.dumps(row) for row in rows))
    (tmp_path / "retain.txt").write_text("\n".join(f"The old man walked near the house {i}." for i in range(20)))
    study.main(
        [
            *("--model", str(tiny_folder), "--forget", str(quiz), "--retain", str(tmp_path / "retain.txt")),
            *("--questions", str(quiz), "--retain-questions", str(quiz), "--question-prompt", "{q}"),
            *("--choices", "a", "--answer", "y", "--out", str(tmp_path / "out"), *options),
        ]
    )
    assert {"finding.md", "report.html", "summary.json", "table.csv"} <= {p.name for p in (tmp_path / "out").iterdir()}
    assert (tmp_path / "out" / "finding.md").read_text().strip()
