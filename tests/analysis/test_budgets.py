"""The study of budgets fits what it says, goes on where it stopped, and its table follows from its rows."""

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from analysis import budgets
from tests.analysis.test_studies import cells_of


def table_of(forget: list[float], damage: list[float]) -> pd.DataFrame:
    rows = [
        {"method": "rmu", "seed": seed, "times": times, "budget": 0.02 * times, "steps": 300, "ended": ended}
        for times in (0.5, 2.0)
        for seed, ended in ((0, "budget"), (1, "stalled"))
    ]
    fixed = {"retain_accuracy": 0.9, "forget_answer_probability": 0.125}
    return pd.DataFrame(rows).assign(**fixed, forget_accuracy=forget, damage=damage)


def test_a_row_is_a_budget_with_the_range_over_its_seeds() -> None:
    assert cells_of(budgets.finding(table_of([0.5, 0.7, 0.25, 0.35], [0.01, 0.01, 0.04, 0.03]))) == [
        ["method", "times", "budget", "damage", "forget", "probability", "retain", "steps", "ended"],
        [
            "rmu",
            "0.5",
            "0.01",
            "0.0100",
            "0.60 (0.50 to 0.70)",
            "0.125",
            "0.90 (0.90 to 0.90)",
            "300",
            "budget, stalled",
        ],
        ["rmu", "2", "0.04", "0.0350", "0.30 (0.25 to 0.35)", "0.125", "0.90 (0.90 to 0.90)", "300", "budget, stalled"],
    ]


def test_the_picture_marks_what_no_other_fit_of_the_method_beats() -> None:
    table = table_of([0.5, 0.7, 0.25, 0.35], [0.01, 0.01, 0.04, 0.03])
    other = table.assign(method="mrp", forget_accuracy=0.1, damage=0.001)
    both = pd.concat([table, other], ignore_index=True)
    assert budgets.pictured(both)["on_front"].tolist()[:4] == [True, False, True, True]


@pytest.mark.slow
def test_every_budget_is_fitted_once(tmp_path: Path, tiny_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows: list[dict[str, Any]] = [
        {"text": f"The colour of Zaxim{i} is red.", "q": f"The colour of Zaxim{i} is", "a": ["red", "blue"], "y": i % 2}
        for i in range(24)
    ]
    forget, retain = tmp_path / "forget.jsonl", tmp_path / "retain.jsonl"
    forget.write_text("".join(json.dumps(row) + "\n" for row in rows))
    retain.write_text(
        "".join(json.dumps({**row, "text": row["text"].replace("colour", "taste")}) + "\n" for row in rows)
    )
    given = ["--model", str(tiny_folder), "--out", str(tmp_path / "out"), "--methods", "rmu,mrp", "--times", "0.5,2"]
    given += ["--forget", str(forget), "--retain", str(retain), "--questions", str(forget)]
    given += [
        "--retain-questions",
        str(retain),
        "--question-prompt",
        "{q}",
        "--choices",
        "a",
        "--answer",
        "y",
        "--limit",
        "8",
    ]
    given += ["--set", "steps=6", "batch_size=4", "coverage=null"]
    budgets.main(given)
    table = pd.read_csv(tmp_path / "out" / "table.csv")
    assert table[["method", "times"]].to_numpy().tolist() == [["rmu", 0.5], ["rmu", 2], ["mrp", 0.5], ["mrp", 2]]
    assert table.loc[table["times"] == 2, "budget"].tolist() == [
        4 * budget for budget in table.loc[table["times"] == 0.5, "budget"]
    ]
    assert not table["ended"].isin(["target"]).any()
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["command"] == "analysis.budgets"
    capsys.readouterr()
    budgets.main(given)
    assert "| rmu " in capsys.readouterr().out
    with pytest.raises(ValueError, match="other settings"):
        budgets.main([*given, "--set", "steps=7"])
