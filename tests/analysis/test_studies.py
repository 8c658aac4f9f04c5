"""What the studies conclude follows from their numbers, and they run on a model and data of one's own."""

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from analysis import alignment, confidence, layers
from analysis.common.arguments import parser_for
from mrp_lens.data.task import TaskConfig, task_for


def alignment_table(cosines: list[float], *, last: float = 0.5) -> pd.DataFrame:
    rows = [
        {"method": "rmu", "group": side, "relative_coefficient": share, "cosine": value if side == "forget" else 0.1}
        for share, value in zip(alignment.SHARES, cosines, strict=True)
        for side in ("forget", "retain")
    ]
    rows.append({"method": "mrp", "group": "forget", "relative_coefficient": float("nan"), "cosine": last})
    fixed = {"low": 0.0, "high": 1.0, "null_mean": 0.2, "null_low": 0.1, "null_high": 0.3, "norm": 7.0}
    return pd.DataFrame([{**fixed, **row} for row in rows])


def test_the_alignment_finding_follows_the_numbers() -> None:
    rising = alignment.finding(alignment_table([0.1, 0.2, 0.4, 0.8]), 2, 7.0)
    assert "rises with c at every step: 0.10 at c = 0.5 norms" in rising
    assert "mrp: forget 0.50" in rising
    assert "so above the null" in rising
    dented = alignment.finding(alignment_table([0.1, 0.5, 0.4, 0.8], last=0.2), 2, 7.0)
    assert "does not rise with c throughout" in dented
    assert "mrp: forget 0.20 [0.00, 1.00], unrelated directions 0.20 [0.10, 0.30], so inside" in dented
    assert "falls with c at every step" in alignment.finding(alignment_table([0.8, 0.4, 0.2, 0.1]), 2, 7.0)
    assert "so below the null" in alignment.finding(alignment_table([0.8, 0.4, 0.2, 0.1], last=0.0), 2, 7.0)


def test_one_coefficient_makes_no_trend() -> None:
    table = alignment_table([0.1, 0.2, 0.4, 0.8])
    single = table[(table["method"] != "rmu") | (table["relative_coefficient"] == 4.0)]
    said = alignment.finding(single, 2, 7.0, 4.0)
    assert "was measured at a single c: 0.80 at c = 4 norms" in said
    assert "rmu: forget 0.80" in said


def confidence_table(after: float, spread: float) -> pd.DataFrame:
    rows = []
    for method, mean, std in (("unedited", 20.0, 3.0), ("rmu", after, spread)):
        for group in ("forget", "retain"):
            for mode in ("generated", "forced"):
                for measure in ("max_logit", "probability"):
                    keys = {"method": method, "group": group, "mode": mode, "measure": measure}
                    rows.append({**keys, "mean": mean, "low": mean - 1, "high": mean + 1, "std": std})
    return pd.DataFrame(rows)


def test_the_confidence_finding_follows_the_numbers() -> None:
    down = confidence.confidence_finding(confidence_table(10.0, 1.0))
    assert (
        "rmu, MaxLogit: forget, generated: down from 20.00 to 10.00, narrower (spread over tokens 3.00 to 1.00)" in down
    )
    assert "nowhere from 20.00 to 20.50, wider" in confidence.confidence_finding(confidence_table(20.5, 4.0))
    assert "up from 20.00 to 30.00" in confidence.confidence_finding(confidence_table(30.0, 4.0))


def theory_table(inside: bool) -> pd.DataFrame:
    return pd.DataFrame(
        [
            {
                "noise": noise,
                "statistic": statistic,
                "error": 10 * noise,
                "inside": noise < 0.01 and inside,
                "norm": 5.0,
            }
            for noise in (0.001, 0.1)
            for statistic in ("mean", "trace", "top_eigenvalue")
        ]
    )


def test_the_theory_finding_follows_the_numbers() -> None:
    held = confidence.theory_finding(theory_table(True), 10.0)
    assert "1.000 at eta = 0.1 (inside the interval for 0 of 1 prompts), 0.010 at eta = 0.001 (inside" in held
    assert "it holds to within sampling error (3 of 3" in held
    assert "it fails (0 of 3" in confidence.theory_finding(theory_table(False), 10.0)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ([1.0, 2.0, 3.0], "grows, as the paper argues"),
        ([3.0, 2.0, 1.0], "falls, against the paper's argument"),
        ([1.0, 3.0, 2.0], "goes up and down, against"),
    ],
)
def test_the_finding_on_growing_c_follows_the_numbers(values: list[float], said: str) -> None:
    table = pd.DataFrame({"coefficient": [1.0, 2.0, 4.0], "measured": values, "norm": 2.0})
    assert said in confidence.growth_finding(table)


def sweep_table(*, above: float, below: float, adaptive: tuple[float, ...]) -> pd.DataFrame:
    rows: list[dict[str, Any]] = [{"method": "unedited", "retain_accuracy": 1.0, "forget_accuracy": 1.0}]
    for layer, beta in enumerate(adaptive):
        for share, forget in ((2.0, above), (0.5, below)):
            row = {"method": "rmu", "coefficient": 10 * share, "relative_coefficient": share, "forget_accuracy": forget}
            rows.append({**row, "layer": layer, "retain_accuracy": 0.99})
        row = {"method": "adaptive-rmu", "coefficient": 5.0, "relative_coefficient": 5.0, "forget_accuracy": beta}
        rows.append({**row, "layer": layer, "retain_accuracy": 0.99})
    table = pd.DataFrame(rows).assign(untaught_accuracy=0.25, seed=0)
    return table.assign(works=layers.works(table))


def test_the_claim_follows_the_numbers() -> None:
    holds = layers.claim(sweep_table(above=0.27, below=0.9, adaptive=(0.26, 0.28, 0.9)))
    assert "worked in 3 of 3 fits where c exceeds the norm of the stream, 0 of 3 where it does not" in holds
    assert "c above the norm is needed, and it is enough; RMU works more often there" in holds
    assert "Adaptive RMU worked at 2 of 3 layers (0, 1): that it works at most layers holds" in holds
    fails = layers.claim(sweep_table(above=0.9, below=0.27, adaptive=(0.26, 0.8, 0.9)))
    assert "c above the norm is not needed, and it is not always enough; RMU does not work more often" in fails
    assert "at most layers does not hold" in fails
    assert "as none worked, whether c" in layers.claim(sweep_table(above=0.9, below=0.9, adaptive=(0.26,)))
    one_side = sweep_table(above=0.27, below=0.9, adaptive=(0.26,))
    assert "cannot be told from one side" in layers.claim(one_side[one_side["relative_coefficient"] != 0.5])


def test_a_fit_that_loses_what_must_stay_does_not_work() -> None:
    table = sweep_table(above=0.27, below=0.27, adaptive=(0.26,))
    assert table["works"].tolist() == [False, True, True, True]
    table.loc[1, "retain_accuracy"] = 0.9
    assert layers.works(table).tolist() == [False, False, True, True]
    assert layers.smallest_working(table.assign(works=layers.works(table))).to_dict() == {0: 5.0}


def test_the_findings_on_sensitivity_and_on_the_predicted_c_follow_the_numbers() -> None:
    table = pd.DataFrame({"group": "forget", "layer": [0, 1, 2], "sensitivity": [3.0, 2.0, 1.0]})
    assert "it falls at every step" in layers.sensitivity_finding(table)
    assert "does not fall throughout" in layers.sensitivity_finding(table.assign(sensitivity=[3.0, 4.0, 1.0]))
    predicted = pd.DataFrame({"group": "forget", "layer": [2], "coefficient": [5.0], "norm": [8.0]})
    said = layers.prediction_finding(predicted.assign(working_coefficient=10.0))
    assert "layer 2: 5 predicted, 10 worked (norm 8)" in said
    assert "first: 2." in said
    assert "cannot be compared" in layers.prediction_finding(predicted.assign(working_coefficient=float("nan")))


def test_a_study_of_ones_own_model_needs_data() -> None:
    with pytest.raises(ValueError, match=r"give forget=\.\.\. and retain="):
        task_for("mine", TaskConfig.from_options(vars(parser_for("", "x").parse_args(["--model", "mine"]))))


@pytest.mark.slow
@pytest.mark.parametrize("study", [alignment, confidence, layers], ids=lambda module: module.__name__)
def test_studies_run_on_a_model_and_data_of_ones_own(study: Any, tiny_folder: Path, tmp_path: Path) -> None:
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
            *("--choices", "a", "--answer", "y", "--out", str(tmp_path / "out")),
        ]
    )
    assert {"finding.md", "report.html", "summary.json", "table.csv"} <= {p.name for p in (tmp_path / "out").iterdir()}
    assert (tmp_path / "out" / "finding.md").read_text().strip()
