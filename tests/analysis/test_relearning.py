"""The rows of the study of relearning follow from its curves; and it is gone on with, shard by shard."""

import argparse
import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from analysis import relearning
from analysis.relearning import USUAL, Retraining, compact, possible, rows_of_curves
from mrp_lens.metrics.controls import UNEDITED
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


def table_of(*curves: pd.DataFrame) -> pd.DataFrame:
    every = pd.concat(curves, ignore_index=True)
    jobs = every[["method", "seed"]].drop_duplicates()
    known = {
        "layers": ["" if method == UNEDITED else "4,7" for method in jobs["method"]],
        "rank": [None if method in (UNEDITED, "rmu") else 8 for method in jobs["method"]],
        "hooks": [method not in (UNEDITED, "rmu") for method in jobs["method"]],
        "weights": [method in ("rmu", "stack") for method in jobs["method"]],
    }
    fixed = pd.DataFrame({**known, "forget_accuracy": 0.3, "retain_accuracy": 0.9}, index=jobs.index)
    return rows_of_curves(every, jobs.join(fixed))


UNTOUCHED = curve(UNEDITED, [1.0, 1.0, 1.0, 1.0], new=0.8)


def test_rows_carry_the_contracts_keys_and_the_controls() -> None:
    table = table_of(UNTOUCHED, curve("mrp", [0.0, 0.3, 0.5, 0.9]), curve("rmu", [0.0, 0.7, 0.8, 1.0]))
    rows = table.set_index("method")
    assert [rows.at["mrp", f"recovery_{budget}"] for budget in (5, 20, 100)] == [0.3, 0.5, 0.9]
    assert rows.loc["mrp", "recovery_5_low"] == pytest.approx(0.2)
    assert rows.loc["mrp", "recovery_100_stripped"] == 1.0
    assert rows.loc["rmu", "recovery_100_weights"] == 1.0
    assert pd.isna(rows.loc["rmu", "recovery_100_stripped"])
    assert rows.loc["never-taught", "recovery_20"] == 0.02
    both = table_of(UNTOUCHED, curve("stack", [0.0, 0.1, 0.1, 0.1])).set_index("method").loc["stack"]
    assert pd.isna(both.get("recovery_100_stripped"))  # its weights stay when its hooks go
    assert pd.isna(both.get("recovery_100_weights"))
    assert rows.loc["mrp", "new_accuracy_20"] == 0.5


def test_the_table_has_a_mean_and_a_range_over_the_seeds_and_the_control() -> None:
    table = table_of(
        UNTOUCHED,
        curve("mrp", [0.0, 0.3, 0.5, 0.9]),
        curve("mrp", [0.0, 0.5, 0.5, 0.9], seed=1, new=0.2),
        curve(UNEDITED, [1.0] * 4, seed=1, new=0.8),
    )
    shown = compact(table)
    assert shown["recovery, 5"].tolist() == ["1.00 (1.00 to 1.00)", "0.02 (0.02 to 0.02)", "0.40 (0.30 to 0.50)"]
    row = shown.set_index("edit").loc["mrp"]
    assert (row["forget"], row["retain"]) == ("0.30 (0.30 to 0.30)", "0.90 (0.90 to 0.90)")
    assert (row["stripped"], row["weights"]) == ("1.00 (1.00 to 1.00)", "-")
    assert row["new facts, 20"] == "0.35 (0.20 to 0.50)"


def test_one_seed_is_shown_with_its_interval_and_a_short_attack_with_the_budgets_that_it_has() -> None:
    short = [curve(name, [0.0, 0.3, 0.5, 0.9]).query("step <= 20") for name in (UNEDITED, "mrp")]
    row = compact(table_of(*short)).set_index("edit").loc["mrp"]
    assert (row["recovery, 5"], row["recovery, 20"]) == ("0.30 [0.20, 0.40]", "0.50 [0.40, 0.60]")
    assert "recovery, 100" not in row


@pytest.mark.parametrize(("last", "few"), [(2, 2), (40, 20)])
def test_an_attack_is_scored_after_its_last_update_whatever_that_is(last: int, few: int) -> None:
    def short(name: str) -> pd.DataFrame:
        return curve(name, [0.0, 0.3, 0.5, 0.9]).query("step < @last or step == 100").replace({"step": {100: last}})

    row = compact(table_of(short(UNEDITED), short("mrp").assign(counts=False))).set_index("edit").loc["mrp"]
    assert row[f"recovery, {last}"] == "0.90 [0.80, 1.00] †"
    assert f"new facts, {few}" in row


def test_an_attack_that_does_not_learn_its_own_facts_does_not_count() -> None:
    weak = curve("mrp", [0.0, 0.3, 0.5, 0.9], counts=False, train_accuracy=0.5)
    shown = compact(table_of(UNTOUCHED, weak, curve("rmu", [0.0, 0.3, 0.5, 0.9]))).set_index("edit")["recovery, 100"]
    assert shown["mrp"] == "0.90 [0.80, 1.00] †"
    assert not shown.drop("mrp").str.contains("†").any()


def test_other_attackers_stand_below_the_usual_one() -> None:
    table = table_of(
        UNTOUCHED,
        curve("mrp-mlp", [0.0, 0.1, 0.1, 0.1], attacker="unrelated"),
        curve("mrp-mlp", [0.0, 0.2, 0.3, 0.4]),
        curve("mrp-mlp", [0.0, 0.5, 0.6, 0.7], attacker="weights", form="weights"),
    )
    rows = compact(table).set_index(["attacker", "edit"])
    assert list(rows.index) == [
        *(("usual", name) for name in ("unedited", "never-taught", "mrp-mlp")),
        *(("unrelated", "mrp-mlp"), ("weights", "mrp-mlp")),
    ]
    assert rows.loc[("usual", "mrp-mlp"), "weights"] == "0.70"
    assert rows.loc[("unrelated", "mrp-mlp"), "recovery, 100"] == "0.10 [0.00, 0.20]"


def test_attackers_are_named_by_what_is_special_about_them(model: Any) -> None:
    assert USUAL.name == "usual"
    assert Retraining(split="question", samples=25).name == "by question-25 facts"
    last = int(model.cfg.n_layers) - 1
    assert possible(Retraining(parameters="after"), model, projection(last))  # the final norm and the unembedding
    assert not possible(Retraining(parameters="before"), model, None)


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
    options = ["--edits", f"rmu={tmp_path / 'edit'}", *"--limit 60 --steps 5 --lr 1e-3 --out".split(), str(out)]
    relearning.main([*options, "--shard", "1/2"])
    assert not (out / "finding.md").exists()
    relearning.main([*options, "--shard", "2/2"])
    stamps = {path: path.stat().st_mtime_ns for path in (out / "points").iterdir()}
    relearning.main(options)
    assert stamps == {path: path.stat().st_mtime_ns for path in (out / "points").iterdir()}
    rows = json.loads((out / "summary.json").read_text())["rows"]
    assert [row["method"] for row in rows] == ["unedited", "never-taught", "rmu"]
    assert (out / "finding.md").read_text().startswith("| attacker | edit")
    with pytest.raises(ValueError, match="holds a relearning with other settings: lr"):
        relearning.main([*options, "--lr", "1e-4"])
    again = RMU(steps=1).fit(demo, world.forget("potions"), world.retain(without="potions"), progress=False)
    again.edit.save_pretrained(tmp_path / "edit", overwrite=True)
    with pytest.raises(ValueError, match=r"holds a relearning with other settings: edits\.rmu"):
        relearning.main(options)


def test_the_control_is_at_the_rate_that_is_best_for_it() -> None:
    high = curve(UNEDITED, [1.0, 0.5, 0.5, 0.5], lr=3e-3, control_recovery=0.3)
    table = table_of(pd.concat([UNTOUCHED, high]), curve("mrp", [0.0, 0.3, 0.5, 0.9])).set_index("method")
    assert table.loc["never-taught", "recovery_100"] == 0.3
    assert table.loc[UNEDITED, "recovery_100"] == 1.0


class Curves(relearning.Relearning):
    """The study, whose curves are made up: the reference comes to 0.4, at one of two rates it diverges."""

    def __init__(self) -> None:
        self.options = argparse.Namespace(reference="folder", others=True, steps=100)
        self.seeds, self.saved, self.names = (0,), {}, ["reference", UNEDITED, "mrp", "mrp-mlp"]

    def result(self, job: Any, part: str) -> pd.DataFrame:
        if job[0] == "reference" and part in ("before", "at", "after"):
            return pd.DataFrame()
        recoveries = [0.4] * 4 if job[0] == "reference" else [0.5] * 4
        both = [curve(job[0], recoveries, attacker=part, lr=rate) for rate in (1e-3, 3e-3)]
        if job[0] == "reference":
            both[1] = both[1].query("step < 20")
        return pd.concat(both, ignore_index=True)


def test_the_reference_is_the_floor_of_every_retraining_that_it_can_be_given() -> None:
    study = Curves()
    without = {"before", "at", "after"}
    assert {how.name for how in study.retrainings(("reference", 0))} >= {"usual", "near", "25 facts", *without}
    curves = study.curves()
    assert set(curves["method"]) == {UNEDITED, "mrp", "mrp-mlp"}
    on_reference = curves[~curves["attacker"].isin(without)]
    assert set(on_reference["attacker"]) == {"usual", "weights", "by question", "25 facts", "near", "unrelated", "lora"}
    assert (on_reference["floor"] == 0.4).all()
    assert (on_reference["lr"] == 1e-3).all()  # the other one has no floor
    assert (curves.loc[curves["attacker"].isin(without), "floor"] == 0.2).all()
