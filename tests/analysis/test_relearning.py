"""What the study of relearning concludes follows from its curves; and it is gone on with, shard by shard."""

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from analysis import relearning
from analysis.common import resistance
from analysis.common.attackers import RANDOM, UNEDITED, USUAL, WIDEST, Attack, possible
from tests.support.edits import projection

STEPS = (0, 5, 20, 100)


def curve(method: str, recoveries: list[float], *, seed: int = 0, new: float = 0.5, **changes: Any) -> pd.DataFrame:
    """A curve at one rate whose recoveries are given."""
    rows = [
        {
            **{"method": method, "seed": seed, "attacker": "usual", "form": "kept", "parameters": "all", "samples": 50},
            **{"lr": 1e-3, "step": step, "train_accuracy": 1.0, "held_out_accuracy": value, "n": 100, "counts": True},
            **{
                "floor": 0.2,
                "ceiling": 1.0,
                "recovery": value,
                "recovery_low": value - 0.1,
                "recovery_high": value + 0.1,
            },
            **{"control_recovery": 0.02, "control_recovery_low": -0.1, "control_recovery_high": 0.1},
            **{"new_accuracy": new, **changes},
        }
        for step, value in zip(STEPS, recoveries, strict=True)
    ]
    return pd.DataFrame(rows)


def found(*curves: pd.DataFrame) -> tuple[pd.DataFrame, str]:
    every = pd.concat(curves, ignore_index=True)
    jobs = every[["method", "seed"]].drop_duplicates()
    known = {
        "layers": ["" if method == UNEDITED else "4,7" for method in jobs["method"]],
        "rank": [None if method in (UNEDITED, "rmu") else 8 for method in jobs["method"]],
    }
    fixed = pd.DataFrame({**known, "forget_accuracy": 0.3, "retain_accuracy": 0.9}, index=jobs.index)
    quizzes = jobs.join(fixed)
    table = resistance.rows_of_curves(every, quizzes)
    return table, resistance.finding(table)


UNTOUCHED = curve(UNEDITED, [1.0, 1.0, 1.0, 1.0], new=0.8)


def test_rows_carry_the_contracts_keys_and_the_controls() -> None:
    table, _ = found(UNTOUCHED, curve("mrp", [0.0, 0.3, 0.5, 0.9]), curve("rmu", [0.0, 0.7, 0.8, 1.0]))
    rows = table.set_index("method")
    assert [rows.at["mrp", f"recovery_{budget}"] for budget in (5, 20, 100)] == [0.3, 0.5, 0.9]
    assert rows.loc["mrp", "recovery_5_low"] == pytest.approx(0.2)
    assert rows.loc["mrp", "recovery_100_stripped"] == 1.0
    assert rows.loc["rmu", "recovery_100_weights"] == 1.0
    assert pd.isna(rows.loc["rmu", "recovery_100_stripped"])
    assert rows.loc["never-taught", "recovery_20"] == 0.02
    assert rows.loc["mrp", "new_accuracy_20"] == 0.5


def test_the_headline_and_the_control_follow_the_numbers() -> None:
    _, text = found(
        UNTOUCHED,
        curve("mrp", [0.0, 0.3, 0.5, 0.9]),
        curve("mrp", [0.0, 0.5, 0.5, 0.9], seed=1),
        curve(UNEDITED, [1.0] * 4, seed=1),
    )
    assert "mrp 0.40 (0.30 to 0.50) / 0.50 (0.50 to 0.50) / 0.90" in text
    assert "(2 seeds: mean, lowest to highest)" in text
    assert "seems to recover +0.020 on average; in 6 of 6 cases" in text
    leaky = {"control_recovery": 0.3, "control_recovery_low": 0.2}
    _, text = found(curve(UNEDITED, [1.0] * 4, **leaky), curve("mrp", [0.0, 0.3, 0.5, 0.9]))
    assert "seems to recover +0.300 on average; in 0 of 3 cases" in text


def test_one_kind_of_mrp_and_a_short_attack_say_nothing_of_its_resistance() -> None:
    short = [curve(name, [0.0, 0.3, 0.5, 0.9]).query("step <= 20") for name in (UNEDITED, "mrp")]
    assert "resistance" not in found(*short)[1]


def test_an_attack_that_does_not_learn_its_own_facts_does_not_count() -> None:
    assert "Every attack counts" in found(UNTOUCHED, curve("mrp", [0.0, 0.3, 0.5, 0.9]))[1]
    text = found(UNTOUCHED, curve("mrp", [0.0, 0.3, 0.5, 0.9], counts=False, train_accuracy=0.5))[1]
    assert "T was not learned to 0.95 on mrp: these attacks do not count." in text


def test_new_facts_are_compared_with_the_unedited_model() -> None:
    text = found(UNTOUCHED, curve("mrp", [0.0, 0.3, 0.5, 0.9], new=0.2))[1]
    assert "learns with that budget (0.80): mrp 0.25." in text


def test_layers_and_rank_are_told_apart() -> None:
    few, many = curve("mrp", [0.0, 0.6, 0.8, 0.9]), curve("mrp-all", [0.0, 0.2, 0.4, 0.9])
    text = found(UNTOUCHED, few, many, curve(WIDEST, [0.0, 0.1, 0.3, 0.5]))[1]
    assert (
        "All layers instead of the second half: recovery -0.40 after 5 updates, +0.00 after 100 updates (the seeds disagree)."
        in text
    )
    assert "Twice the rank at all layers: recovery -0.10 after 5 updates, -0.40 after 100 updates." in text
    assert "Hooks: with the hooks kept 0.50 to 0.90 comes back after 100 updates; with them removed" in text


def test_resistance_is_told_from_a_model_that_is_hard_to_train() -> None:
    def kinds(slow: list[float]) -> str:
        names = ("mrp", "mrp-all", WIDEST)
        curves = [curve(n, [0.0, r, r, r], new=s) for n, r, s in zip(names, [0.6, 0.4, 0.2], slow, strict=True)]
        return found(UNTOUCHED, *curves, curve(RANDOM, [1.0] * 4, new=0.4))[1]

    assert "rank correlation of +1.00: edits that recover less are also taught new facts more slowly" in kinds(
        [0.6, 0.5, 0.4]
    )
    assert "rank correlation of -1.00: edits that recover less are not those taught" in kinds([0.4, 0.5, 0.6])
    assert f"takes the new facts learned after 5 updates to 0.50 of the unedited model's, {WIDEST} to 0.75" in kinds(
        [0.4, 0.5, 0.6]
    )


def test_weights_and_other_attackers_have_their_sentences() -> None:
    kept = curve("mrp-mlp", [0.0, 0.2, 0.3, 0.4])
    text = found(
        UNTOUCHED,
        kept,
        curve("mrp-mlp", [0.0, 0.5, 0.6, 0.7], attacker="weights", form="weights"),
        curve("mrp-mlp", [0.0, 0.1, 0.1, 0.1], attacker="unrelated"),
    )[1]
    assert "mrp-mlp gives back 0.70 after 100 updates, kept as hooks 0.40" in text
    assert "Other attackers, recovery after 100 updates: unrelated: mrp-mlp 0.10." in text


def test_attackers_are_named_by_what_is_special_about_them(model: Any) -> None:
    assert USUAL.name == "usual"
    assert Attack(split="question", samples=25).name == "by question-25 facts"
    last = int(model.cfg.n_layers) - 1
    assert not possible(Attack(parameters="after"), model, projection(last))
    assert possible(Attack(parameters="after"), model, projection(last - 1))
    assert not possible(Attack(parameters="before"), model, None)


def test_unknown_methods_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"unknown methods \['gradient'\]; choose among mrp, mrp-wide"):
        relearning.main(["--methods", "gradient", "--out", str(tmp_path / "out")])


@pytest.mark.slow
def test_shards_make_one_study_and_saved_edits_are_attacked(tmp_path: Path) -> None:
    from mrp_lens.data.world import World
    from mrp_lens.methods import RMU
    from mrp_lens.models import load_model

    world, demo = World(), load_model("demo")
    fit = RMU(steps=40).fit(demo, world.forget("potions"), world.retain(without="potions"), progress=False)
    fit.edit.save_pretrained(tmp_path / "edit")
    out = tmp_path / "out"
    options = [
        "--edits",
        f"rmu={tmp_path / 'edit'}",
        "--limit",
        "60",
        "--steps",
        "5",
        "--lr",
        "1e-3",
        "--out",
        str(out),
    ]
    relearning.main([*options, "--shard", "1/2"])
    assert not (out / "finding.md").exists()
    relearning.main([*options, "--shard", "2/2"])
    stamps = {path: path.stat().st_mtime_ns for path in (out / "points").iterdir()}
    relearning.main(options)
    assert stamps == {path: path.stat().st_mtime_ns for path in (out / "points").iterdir()}
    rows = json.loads((out / "summary.json").read_text())["rows"]
    assert [row["method"] for row in rows] == ["unedited", "never-taught", "rmu"]
    assert (out / "finding.md").read_text().startswith("Recovered of what the attacker was not taught")
    with pytest.raises(ValueError, match="holds a relearning with other settings: lr"):
        relearning.main([*options, "--lr", "1e-4"])
