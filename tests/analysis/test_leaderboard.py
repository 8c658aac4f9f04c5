"""The leaderboard's rows and sentences follow from its cells."""

from typing import Any

import pandas as pd
import pytest
from analysis.common.standings import compact, markdown, rows_of_cells
from analysis.common.verdicts import finding

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


def said(**methods: dict[str, Any]) -> str:
    return finding(table_of(methods), UPDATES)


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
    text = compact(table, UPDATES)
    rows = text.set_index("").T
    assert rows["hooked"].tolist() == [
        *("0.25 [0.20, 0.30]", "0.98 [0.93, 1.03]", "x1.100", "0.10 / 0.20 / 0.30 [0.20, 0.40] †", "as unedited"),
        *("-", "0.80", "0.50 [0.40, 0.60]", "40 s", "33 kB"),
    ]
    assert rows.loc["in the weights, 5 / 20 / 100", "written"] == "as kept"
    assert "†" not in str(rows.loc["edit kept, 5 / 20 / 100", "written"])
    lines = markdown(text, table, UPDATES).splitlines()
    assert len({len(line) for line in lines[:6]}) == 1  # aligned


def test_several_seeds_are_a_mean_and_a_range() -> None:
    first = table_of({"hooked": stages(HOOKS, retrained(0.1, 0.2, 0.3), forget=0.2)})
    second = table_of({"hooked": stages(HOOKS, retrained(0.3, 0.4, 0.7), forget=0.3)}, seed=1)
    table = pd.concat([first, second], ignore_index=True)
    row = compact(table, UPDATES).set_index("").loc["hooked"]
    assert row["asked at once"] == "0.25 (0.20 to 0.30)"
    assert row["edit kept, 5 / 20 / 100"] == "0.20 / 0.30 / 0.50 (0.30 to 0.70)"
    assert "lowest to highest of 2 seeds" in markdown(compact(table, UPDATES), table, UPDATES)
    assert "hooked withstands best: 0.20 / 0.30 / 0.50 (0.30 to 0.70)" in finding(table, UPDATES)


def test_the_finding_names_who_withstands_best_in_each_form_and_at_which_cost() -> None:
    weak = stages(HOOKS, retrained(0.5, 0.8, 0.9), weights=retrained(0.1, 0.1, 0.15))
    strong = stages(HOOKS, retrained(0.1, 0.2, 0.3), weights=retrained(0.8, 0.8, 0.85))
    text = said(weak=weak, strong=strong)
    assert (
        "With the edit kept, strong withstands best: 0.10 / 0.20 / 0.30 [0.20, 0.40] of V is back after 5 / 20" in text
    )
    assert "More comes back of: weak 0.90." in text
    assert "As weights, weak withstands best: 0.10 / 0.10 / 0.15 [0.05, 0.25]" in text
    assert (
        "Its cost: worst other topic 0.98 [0.93, 1.03], perplexity of ordinary text x1.100, fit 40 s, stored 33 kB."
        in text
    )
    assert "Stripped of the hooks, weak and strong are the unedited model, which answers 1.00" in text
    weak = stages(HOOKS, retrained(0.1, 0.2, 0.35))
    assert "Not told apart from it, as the ranges overlap: weak 0.35." in said(weak=weak, strong=strong)


def test_what_the_attackers_rate_leaves_the_unedited_model_stands_beside_what_comes_back() -> None:
    high = retrained(0.9, 0.5, 0.25, lr=3e-3)
    unedited = {**UNEDITED, "relearn-kept": {**high, "rows": UNEDITED["relearn-kept"]["rows"] + high["rows"]}}
    text = said(unedited=unedited, hooked=stages(HOOKS, retrained(0.1, 0.2, 0.2, lr=3e-3)))
    assert "At the attacker's best rate in the end, 0.003, the unedited model is left with 0.25 of V." in text
    assert "rate in the end, 0.001, the unedited model is left with 0.98 of V." in said(plain=PLAIN)


def test_recovery_below_0_counts_by_its_size() -> None:
    text = said(pushed=stages(HOOKS, retrained(-0.5, -0.5, -0.5), forget=0.05), plain=PLAIN)
    assert "With the edit kept, plain withstands best" in text
    assert "Answered less often than never-taught facts, so suppressed and not gone: pushed 0.05 [0.00, 0.10]." in text
    assert "Recovery below 0 after 100 updates, so still suppressed: pushed -0.50 [-0.60, -0.40]." in text
    assert "suppressed" not in said(plain=PLAIN)


def test_a_method_that_ruins_ordinary_text_does_not_keep_the_rest() -> None:
    babbling = stages(HOOKS, retrained(0.0, 0.0, 0.01))
    babbling["quiz"]["text"]["perplexity"] = 1000.0
    text = said(babbling=babbling, plain=PLAIN)
    assert "babbling 0.98 [0.93, 1.03], text x100.000." in text
    assert "With the edit kept, plain withstands best" in text


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
    shown = compact(rows_of_cells(cells, UPDATES), UPDATES)
    assert list(shown["worst other topic"]) == ["-"] * 3
    assert "of the worst other topic" not in finding(rows_of_cells(cells, UPDATES), UPDATES)


def test_who_cannot_forget_or_loses_the_rest_or_is_not_attacked_validly_is_out_of_the_running() -> None:
    text = said(
        stubborn=stages(HOOKS, retrained(0.0, 0.0, 0.0), forget=0.9),
        ruined=stages(WEIGHTS, retrained(0.0, 0.0, 0.01), worst=0.3),
        untrained=stages(HOOKS, retrained(0.0, 0.0, 0.02, taught=0.6)),
        plain=PLAIN,
    )
    assert "Cannot forget it at these settings: stubborn 0.90 [0.85, 0.95]." in text
    lost = "Forget it, but lose too much of the worst other topic or of ordinary text: ruined 0.30 [0.25, 0.35], text x1.100."
    assert lost in text
    assert "untrained and plain get it down to that level" in text
    assert "With the edit kept, plain withstands best" in text
    assert (
        "Less comes back of stubborn 0.00 (does not forget to begin with), ruined 0.01 (keeps too little of the rest), "
        "untrained 0.02 (T was not learned, so this does not count)." in text
    )
    assert "T was not learned to 95%, so these attacks do not count: untrained, with the edit kept (0.60 of T)." in text
    assert "Every attack counts" in said(plain=PLAIN)
    assert "As weights, no method that forgets and keeps the rest" in said(
        ruined=stages(WEIGHTS, retrained(0.0, 0.0, 0.01), worst=0.3)
    )


def test_a_model_that_cannot_be_trained_is_named() -> None:
    slow = said(slow=stages(HOOKS, retrained(0.1, 0.2, 0.3, new=0.2)), plain=PLAIN)
    assert "the unedited model answers 0.80; as a share of that, edits kept: slow 0.25, plain 1.00." in slow
    assert "Hard to train at all, so that what does not come back need not be gone: slow 0.25." in slow
    assert "None is a model that cannot be trained; least is learned by plain, 1.00." in said(plain=PLAIN)


def test_probes_and_the_control_have_their_sentences() -> None:
    text = said(
        loud=stages(HOOKS, retrained(0.1, 0.2, 0.3), bits=0.9), mute=stages(WEIGHTS, retrained(0.1, 0.2, 0.3), bits=0.1)
    )
    assert (
        "reads 1.90 bits about V's answers off the unedited model at its best layer, of never-taught facts 0.03;"
        in text
    )
    assert "with the edits mute 0.10, loud 0.90." in text
    assert "against the other seems to recover +0.02 / +0.02 / +0.02." in text
