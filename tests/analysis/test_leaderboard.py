"""The leaderboard's rows follow from its cells, each of which is computed once, whoever asks for it."""

import json
import math
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest

from analysis import leaderboard
from analysis.common.board import brought_back, compact, finding, further_columns, rows_of_cells, with_reference_floor
from mrp_lens import attacks
from mrp_lens.data import Questions
from mrp_lens.methods import MRP, RMU
from mrp_lens.models import load_model
from tests.support.edits import projection, weight_edit
from tests.support.quizzes import liked, quiz

UPDATES = (5, 20, 100)
NOTHING, HOOKS, WEIGHTS, BOTH = ({"hooks": h, "weights": w} for w in (False, True) for h in (False, True))
GONE: dict[str, Any] = {"rows": [], "new": None}


def scored(group: str, accuracy: float) -> dict[str, Any]:
    return {"group": group, "accuracy": accuracy, "low": accuracy - 0.05, "high": accuracy + 0.05}


def retrained(*recoveries: float, taught: float = 1.0, new: float = 0.8, lr: float = 1e-3) -> dict[str, Any]:
    """A curve at one rate whose recoveries are given."""
    fixed: dict[str, Any] = {"lr": lr, "form": "kept", "train_accuracy": taught, "counts": taught >= 0.95}
    control = {"control_recovery": 0.02, "control_recovery_low": -0.1, "control_recovery_high": 0.1}
    rows = []
    for step, value in zip(UPDATES, recoveries, strict=True):
        found = {"recovery": value, "recovery_low": value - 0.1, "recovery_high": value + 0.1}
        rows.append({**fixed, **control, **found, "step": step, "held_out_accuracy": value})
    return {"rows": rows, "new": scored("all", new)}


def stages(
    kind: dict[str, bool],
    kept: dict[str, Any],
    *,
    forget: float = 0.25,
    worst: float = 0.98,
    bits: float = 0.5,
    **forms: dict[str, Any],
) -> dict[str, Any]:
    """The cells of one method and seed."""
    return {
        "fit": {**kind, "seconds": 40.0, "bytes": 33_000},
        "quiz": {
            "forget": [scored("potions", forget)],
            "retain": [scored("all", 0.99), scored("beasts", 1.0), scored("towns", worst)],
            "untaught": [scored("potions", 0.25)],
            "text": {"perplexity": 10.0 if kind is NOTHING else 11.0},
        },
        "relearn-kept": kept,
        **{f"relearn-{form}": forms.get(form, GONE) for form in ("stripped", "weights")},
        "probe": {
            "rows": [
                {"layer": layer, "group": group, "bits": value, "low": value - 0.1, "high": value + 0.1}
                for group, most in (("held-out", bits), ("never-taught", 0.03))
                for layer, value in enumerate((most / 2, most))
            ]
        },
    }


UNEDITED = stages(NOTHING, retrained(1.0, 0.99, 0.98), forget=1.0, worst=1.0, bits=1.9)
PLAIN = stages(HOOKS, retrained(0.1, 0.2, 0.3))


def table_of(methods: dict[str, dict[str, Any]], seed: int = 0) -> pd.DataFrame:
    cells = {"unedited": UNEDITED, **methods}
    return rows_of_cells({(name, seed): found for name, found in cells.items()}, UPDATES)


def by_method(table: pd.DataFrame) -> dict[Any, dict[str, Any]]:
    return {row["method"]: {str(key): value for key, value in row.items()} for row in table.to_dict("records")}


def test_each_form_of_an_edit_has_its_curve_and_none_is_retrained_twice() -> None:
    hooked = stages(HOOKS, retrained(0.1, 0.2, 0.3), weights=retrained(0.4, 0.5, 0.6))
    written = stages(WEIGHTS, retrained(0.7, 0.8, 0.9))
    both = stages(BOTH, retrained(0.1, 0.1, 0.1), stripped=retrained(0.5, 0.5, 0.55))
    rows = by_method(table_of({"hooked": hooked, "written": written, "both": both}))

    def last(method: str) -> list[float | None]:
        values = [rows[method][f"recovery_{form}_100"] for form in ("kept", "stripped", "weights")]
        return [None if pd.isna(value) else value for value in values]

    assert last("hooked") == [0.3, 0.98, 0.6]  # stripped, it is the unedited model
    assert last("both") == [0.1, 0.55, 0.55]  # its matrices alone can be exported as weights
    assert last("written") == [0.9, None, 0.9]  # its weights are the edit
    assert last("unedited") == [0.98, None, None]
    assert rows["hooked"]["recovery_weights_5_low"] == pytest.approx(0.3)


def test_a_row_has_the_worst_topic_the_ratio_of_perplexities_the_best_layer_and_the_cost() -> None:
    row = by_method(table_of({"hooked": stages(HOOKS, retrained(0.1, 0.2, 0.3), worst=0.9)}))["hooked"]
    assert (row["worst_topic_name"], row["worst_topic_accuracy"]) == ("towns", 0.9)
    assert row["text_perplexity_ratio"] == pytest.approx(1.1)
    assert (row["probe_bits"], row["probe_bits_layer"], row["probe_bits_low"]) == (0.5, 1, 0.4)
    assert (row["seconds"], row["stored_bytes"], row["new_accuracy_20_kept"]) == (40.0, 33_000, 0.8)


def test_the_floor_has_a_row_behind_the_unedited_model() -> None:
    table = table_of({"hooked": PLAIN})
    assert table["method"].tolist() == ["unedited", "never-taught", "hooked"]
    floor = table.iloc[1]
    assert (floor["forget_accuracy"], floor["recovery_kept_100"], floor["probe_bits"]) == (0.25, 0.02, 0.03)


def test_the_compact_table_says_where_an_attack_does_not_count_and_where_there_is_nothing_to_attack() -> None:
    hooked = stages(HOOKS, retrained(0.1, 0.2, 0.3, taught=0.5))
    table = table_of({"hooked": hooked, "written": stages(WEIGHTS, retrained(0.7, 0.8, 0.9))})
    text = compact(table, UPDATES, {})
    rows = text.set_index("").T
    assert rows["hooked"].tolist() == [
        *("0.25 [0.20, 0.30]", "0.98 [0.93, 1.03]", "x1.100", "-", "0.10 / 0.20 / 0.30 [0.20, 0.40] †", "as unedited"),
        *("-", "0.98 [0.88, 1.08]", "0.80", "0.50 [0.40, 0.60]", "40 s", "33 kB"),
    ]
    assert rows.loc["in the weights, 5 / 20 / 100", "written"] == "as kept"
    assert "†" not in str(rows.loc["edit kept, 5 / 20 / 100", "written"])
    lines = finding(table, UPDATES).splitlines()
    assert len({len(line) for line in lines[:6]}) == 1  # aligned


def test_the_worst_attack_is_that_which_certainly_brings_back_most_and_counts() -> None:
    uncertain = {"recovery": 0.9, "recovery_low": 0.1, "recovery_high": 1.7}
    cases = {
        "hooked": stages(HOOKS, retrained(0.1, 0.2, 0.3)),  # stripped, it is the unedited model
        "written": {**stages(WEIGHTS, retrained(0.7, 0.8, 0.6)), "attack-toy": {"rows": [uncertain]}},
        "too weak": {**stages(WEIGHTS, retrained(0.7, 0.8, 0.9, taught=0.5)), "attack-toy": {"rows": [uncertain]}},
    }
    rows = by_method(table_of(cases))
    assert (rows["hooked"]["worst_attack"], rows["hooked"]["worst"]) == ("hooks stripped", 0.98)
    assert (rows["written"]["worst_attack"], rows["written"]["worst"]) == ("edit kept", 0.6)
    assert (rows["too weak"]["worst_attack"], rows["too weak"]["worst_low"]) == ("toy", 0.1)
    assert pd.isna(rows["unedited"]["worst"])


def test_a_model_that_never_saw_the_forget_set_is_the_floor_and_the_measures_have_a_table_of_their_own() -> None:
    unedited = dict(UNEDITED)
    unedited["quiz"] = {side: rows for side, rows in UNEDITED["quiz"].items() if side != "untaught"}
    measured = {"forget_extraction_strength": 0.02, "forget_accuracy": 0.5, "unshown": 1.0}
    floor = {"quiz": {**unedited["quiz"], "forget": [scored("potions", 0.24)]}, "benchmark-9": {"row": measured}}
    cells = {
        ("unedited", 0): unedited,
        ("never-taught", 0): floor,
        ("plain", 0): PLAIN | {"benchmark-9": {"row": measured}},
    }
    table = rows_of_cells(cells, UPDATES)
    assert table["method"].tolist() == ["unedited", "never-taught", "plain"]
    rows = by_method(table)
    assert [rows[name]["forget_accuracy"] for name in rows] == [
        1.0,
        0.24,
        0.25,
    ]  # the board's own, not of fewer questions
    assert (rows["plain"]["unshown"], rows["never-taught"]["forget_extraction_strength"]) == (1.0, 0.02)
    assert further_columns(cells) == {}
    shown = [line for line in finding(table, UPDATES).splitlines() if "extraction strength" in line]
    assert len(shown) == 1
    assert "extraction strength" not in finding(table_of({"plain": PLAIN}), UPDATES)


def test_recovery_is_between_a_retrained_model_that_never_saw_the_forget_set_and_the_unedited_one() -> None:
    def curve(*accuracies: float, lr: float = 1e-3) -> dict[str, Any]:
        found = retrained(*accuracies, lr=lr)
        for row in found["rows"]:
            row |= {"n": 1000, "ceiling": 0.9}
        return found

    def with_curve(found: dict[str, Any], kept: dict[str, Any]) -> dict[str, Any]:
        return {**found, "relearn-kept": kept}

    ruinous = curve(0.2, 0.2, 0.2, lr=1e-1)
    spoiled = {"rows": ruinous["rows"][:1]}  # at that rate the floor's loss became infinite
    edited = curve(0.3, 0.5, 0.7)
    floor = curve(0.3, 0.3, 0.5)
    cells = {
        ("unedited", 0): with_curve(UNEDITED, curve(0.9, 0.9, 0.9)),
        ("never-taught", 0): {"quiz": UNEDITED["quiz"], "relearn-kept": {"rows": floor["rows"] + spoiled["rows"]}},
        ("plain", 0): with_curve(PLAIN, {"rows": edited["rows"] + ruinous["rows"], "new": edited["new"]}),
    }
    found = with_reference_floor(cells, UPDATES[-1])
    rows = by_method(rows_of_cells(found, UPDATES))
    recoveries = [rows["plain"][f"recovery_kept_{step}"] for step in UPDATES]
    assert recoveries == pytest.approx([0.0, 1 / 3, 0.5])
    assert [rows["unedited"][f"recovery_kept_{step}"] for step in UPDATES] == pytest.approx([1.0, 1.0, 1.0])
    assert {row["lr"] for row in found["plain", 0]["relearn-kept"]["rows"]} == {1e-3}
    assert rows["plain"]["new_accuracy_20_kept"] == 0.8
    alone = {job: stages for job, stages in cells.items() if job[0] != "never-taught"}
    assert with_reference_floor(alone, UPDATES[-1]) == alone


def test_several_seeds_are_a_mean_and_a_range() -> None:
    first = table_of({"hooked": stages(HOOKS, retrained(0.1, 0.2, 0.3), forget=0.2)})
    second = table_of({"hooked": stages(HOOKS, retrained(0.3, 0.4, 0.7), forget=0.3)}, seed=1)
    table = pd.concat([first, second], ignore_index=True)
    row = compact(table, UPDATES, {}).set_index("").loc["hooked"]
    assert row["asked at once"] == "0.25 (0.20 to 0.30)"
    assert row["edit kept, 5 / 20 / 100"] == "0.20 / 0.30 / 0.50 (0.30 to 0.70)"
    assert "lowest to highest of 2 seeds" in finding(table, UPDATES)


def test_the_attackers_best_rate_is_that_of_the_last_score() -> None:
    slow, fast = (retrained(*values, lr=lr) for values, lr in (([0.1, 0.2, 0.9], 1e-3), ([0.3, 0.8, 0.1], 3e-3)))
    both = {"rows": slow["rows"] + fast["rows"], "new": slow["new"]}
    row = by_method(table_of({"mixed": stages(HOOKS, both)}))["mixed"]
    assert [row[f"recovery_kept_{step}"] for step in UPDATES] == [0.3, 0.8, 0.9]
    assert row["lr_kept"] == 1e-3


def test_several_seeds_without_retain_questions_have_a_table() -> None:
    cells = {}
    for seed in (0, 1):
        for name, found in {"unedited": UNEDITED, "plain": PLAIN}.items():
            quiz = {side: rows for side, rows in found["quiz"].items() if side != "retain"}
            cells[name, seed] = {**found, "quiz": quiz}
    shown = compact(rows_of_cells(cells, UPDATES), UPDATES, {})
    assert list(shown["worst other topic"]) == ["-"] * 3


def test_what_the_attackers_rate_leaves_the_unedited_model_stands_beside_what_comes_back() -> None:
    high = retrained(0.9, 0.5, 0.25, lr=3e-3)
    unedited = {**UNEDITED, "relearn-kept": {**high, "rows": UNEDITED["relearn-kept"]["rows"] + high["rows"]}}
    hooked = stages(HOOKS, retrained(0.1, 0.2, 0.2, lr=3e-3))
    row = by_method(table_of({"unedited": unedited, "hooked": hooked}))["hooked"]
    assert (row["lr_kept"], row["unedited_at_lr_kept"]) == (3e-3, 0.25)
    assert by_method(table_of({"plain": PLAIN}))["plain"]["unedited_at_lr_kept"] == 0.98


def test_the_best_of_a_registered_attack_and_the_values_of_registered_metrics_have_columns() -> None:
    back = [{"recovery": value, "recovery_low": value - 0.1, "recovery_high": value + 0.1} for value in (0.1, 0.6)]
    back.append({"recovery": 0.9, "recovery_low": -0.5, "recovery_high": 2.0})  # which may be nothing
    found = {"attack-toy": {"rows": back}, "metrics-mine": {"row": {"mine": 0.25}}}
    nothing = {"attack-toy": {"rows": []}, "metrics-mine": {"row": {"mine": 1.0}}}
    cells = {("unedited", 0): UNEDITED | nothing, ("plain", 0): PLAIN | found}
    table = rows_of_cells(cells, UPDATES)
    row = by_method(table)["plain"]
    assert (row["recovery_toy"], row["recovery_toy_low"], row["mine"]) == (0.6, 0.5, 0.25)
    further = further_columns(cells)
    assert further == {"recovery_toy": "recovery toy", "mine": "mine"}
    shown = compact(table, UPDATES, further).set_index("")
    assert dict(shown.loc["plain"])["recovery toy"] == "0.60 [0.50, 0.70]"
    assert [dict(shown.loc[name])["mine"] for name in ("unedited", "plain")] == ["1.00", "0.25"]


def test_what_is_answered_without_an_attack_is_not_what_an_attack_brought_back() -> None:
    rows = [("no attack", 0.47), ("search", 0.07), ("not scored", math.nan)]
    found = pd.DataFrame(
        [{"method": name, "attack": attack, "recovery": value} for name in ("plain", "other") for attack, value in rows]
    )
    assert brought_back(found, "plain")[["method", "attack"]].values.tolist() == [["plain", "search"]]
    assert brought_back(found.drop(columns="recovery"), "plain").empty


def write(path: Path, questions: Questions) -> str:
    rows = [
        {"q": q.prompt, "a": list(q.choices), "y": q.answer, "text": q.prompt + q.choices[q.answer]}
        for q in questions.questions
    ]
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return str(path)


@pytest.fixture
def own(tiny_folder: Path, tmp_path: Path) -> list[str]:
    """Options for a tiny model, about what it answers anyway, and what it does not."""
    model = load_model(str(tiny_folder), backend="bridge")
    known, other = liked(model, quiz(0, 48)), liked(model, quiz(100, 40, wording="Gomix{} is"))
    untaught = quiz(200, 40, wording="Rulex{} is")
    (tmp_path / "retain.txt").write_text("\n".join(f"The old man walked near the house {i}." for i in range(20)))
    weights = weight_edit(model, 1)
    (projection(0, 2, site="mlp_out") + weights).save_pretrained(tmp_path / "both")
    return [
        *("--model", str(tiny_folder), "--backend", "bridge", "--updates", "1,2", "--lr", "1e-3"),
        *("--forget", write(tmp_path / "forget.jsonl", known), "--retain", str(tmp_path / "retain.txt")),
        *("--questions", str(tmp_path / "forget.jsonl"), "--question-prompt", "{q}", "--choices", "a", "--answer", "y"),
        *("--retain-questions", write(tmp_path / "other.jsonl", other), "--entity", "q"),
        *("--untaught-questions", write(tmp_path / "untaught.jsonl", untaught), "--out", str(tmp_path / "out")),
    ]


@pytest.mark.slow
def test_cells_are_shared_out_kept_and_added_to_but_never_mixed(
    own: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    methods: dict[str, Any] = {"rmu": RMU(steps=2), "hooked": MRP(steps=2, layers=[0], rank=2, site="mlp_out")}
    monkeypatch.setattr(leaderboard, "compared_methods", lambda model: dict(methods))
    monkeypatch.setattr(attacks, "probe", partial(attacks.probe, layers=[0]))  # fitting probes takes longest
    out, both = tmp_path / "out", ["--edits", f"both={tmp_path / 'both'}"]
    leaderboard.main([*own, "--shard", "1/2"])
    assert not (out / "finding.md").exists()
    leaderboard.main([*own, "--shard", "2/2"])
    assert all((out / name).is_file() for name in "finding.md report.html table.csv summary.json".split())
    stamps = {path: path.stat().st_mtime_ns for path in (out / "points").iterdir()}
    leaderboard.main([*own, "--methods", "rmu,hooked", *both])
    assert stamps.items() <= {path: path.stat().st_mtime_ns for path in (out / "points").iterdir()}.items()
    rows = by_method(pd.read_csv(out / "table.csv"))
    assert list(rows) == ["unedited", "never-taught", "rmu", "hooked", "both"]
    assert [rows[name]["edit"] for name in ("rmu", "hooked", "both")] == ["weights", "hooks", "hooks and weights"]
    assert rows["hooked"]["recovery_stripped_2"] == rows["unedited"]["recovery_kept_2"]
    assert json.loads((out / "points" / "hooked-seed0-relearn-stripped.json").read_text())["rows"] == []
    for form in ("kept", "stripped", "weights"):
        curve = json.loads((out / "points" / f"both-seed0-relearn-{form}.json").read_text())
        assert {row["form"] for row in curve["rows"]} == {form}
        assert curve["new"]["n"] == 20
    assert rows["rmu"]["stored_bytes"] == sum(p.stat().st_size for p in (out / "fits" / "rmu-seed0" / "edit").iterdir())
    methods["rmu"] = RMU(steps=3)
    with pytest.raises(ValueError, match=r"holds rmu with other settings: steps \(2 there, 3 now\)\. Give it another"):
        leaderboard.main(own)
    methods["rmu"] = RMU(steps=2)
    path = out / "points" / "rmu-seed0-fit.json"
    path.write_text(path.read_text().replace('"alpha": "None",', ""))  # as if RMU had gained this since
    leaderboard.main(own)
    methods["rmu"] = RMU(steps=2, alpha=7.0)
    with pytest.raises(ValueError, match=r"holds rmu with other settings: alpha \(None there, 7\.0 now\)"):
        leaderboard.main(own)
    projection(0).save_pretrained(tmp_path / "both", overwrite=True)
    with pytest.raises(ValueError, match=r"holds both with other settings: edit "):
        leaderboard.main([*own, *both])
    with pytest.raises(ValueError, match="holds a leaderboard with other settings: lr"):
        leaderboard.main([*own, "--lr", "1e-4"])


@pytest.mark.slow
def test_the_reference_is_measured_and_retrained_as_the_floor(
    own: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attacks, "probe", partial(attacks.probe, layers=[0]))
    options = [*own, "--reference", own[1], "--edits", f"both={tmp_path / 'both'}"]
    leaderboard.main(options)
    rows = by_method(pd.read_csv(tmp_path / "out" / "table.csv"))
    assert list(rows) == ["unedited", "never-taught", "both"]
    made = {path.name for path in (tmp_path / "out" / "points").glob("never-taught*")}
    stages = ("quiz", "relearn-kept", "metrics-damage")
    assert made == {f"never-taught-seed0-{stage}.json" for stage in stages}
    drawn = pd.read_csv(tmp_path / "out" / "frames" / "relearning_curves.csv")
    floor = drawn[drawn["method"] == "never-taught"].set_index("step")["held_out_accuracy"]
    attacked = drawn[(drawn["method"] == "both") & (drawn["form"] == "kept")].set_index("step")
    assert attacked["floor"].to_dict() == floor.to_dict()


def test_unknown_methods_and_names_that_are_taken_are_refused(own: list[str], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"unknown methods \['gradient'\]; choose among mrp, "):
        leaderboard.main(["--methods", "gradient", *own])
    with pytest.raises(ValueError, match="--edits never-taught: another row of the table has that name"):
        leaderboard.main(["--edits", f"never-taught={tmp_path}", *own])
    assert not (tmp_path / "out").exists()
    other = projection(0)
    other.provenance = {"model": {"name": "huge", "n_layers": 99, "d_model": 1, "d_vocab": 1}}
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="this model is another: n_layers 4 instead of 99"):
        leaderboard.main(["--edits", f"other={tmp_path / 'other'}", *own])
    assert not (tmp_path / "out" / "points" / "other-seed0-fit.json").exists()


def test_the_never_taught_row_is_at_the_rate_that_is_best_for_it() -> None:
    """As that of the attacker is: one choice helps both."""
    high = retrained(0.9, 0.5, 0.25, lr=3e-3)
    lifted = [{**row, "control_recovery": 0.4} for row in high["rows"]]
    unedited = {**UNEDITED, "relearn-kept": {**high, "rows": UNEDITED["relearn-kept"]["rows"] + lifted}}
    rows = by_method(table_of({"unedited": unedited, "plain": PLAIN}))
    assert rows["never-taught"]["recovery_kept_100"] == 0.4
    assert rows["unedited"]["recovery_kept_100"] == 0.98


def test_too_few_never_taught_questions_for_a_probe_leave_its_control_out(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attacks, "probe", partial(attacks.probe, layers=[0], progress=False))
    board = object.__new__(leaderboard.Leaderboard)
    board.study = SimpleNamespace(model=model)  # type: ignore[assignment]
    board.facts = {0: attacks.FactSplit(quiz(0, 24), quiz(100, 24), quiz(200, 8), None)}
    with pytest.warns(UserWarning, match="never-taught control of the probe is left out"):
        found = board.probe(("unedited", 0))
    assert {row["group"] for row in found["rows"]} == {"held-out", "shuffled"}
