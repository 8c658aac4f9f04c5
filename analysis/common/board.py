"""The leaderboard as a table: rows of what was found of each method, and the same as text."""

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from analysis.common.resumable import Job
from analysis.common.tables import DOES_NOT_COUNT, NONE, figure, markdown, mean_of
from mrp_lens import metrics
from mrp_lens.attacks import best, with_floor
from mrp_lens.attacks.summary import NO_ATTACK
from mrp_lens.metrics.controls import NEVER_TAUGHT, UNEDITED
from mrp_lens.metrics.recovery import FORM_TITLES
from mrp_lens.utils.frames import rows_of

ATTACK, METRICS = "attack-", "metrics-"  # parts that others register
RELEARN_STAGE = "relearn-"  # and the form of the edit
KEPT, STRIPPED = f"{RELEARN_STAGE}kept", f"{RELEARN_STAGE}stripped"
BENCHMARK = "benchmark"  # the field's measures
MEASURES = {
    "forget_exact_memorization": "exact memorisation",
    "forget_extraction_strength": "extraction strength",
    "forget_truth_ratio": "truth ratio",
    "forget_quality": "forget quality, p",
    "forget_token_f1": "own words, F1",
    "depth": "depth",
    "depth_of_states": "of states",
    "model_utility": "utility",
    "answers_repetition": "repetition",
    "answers_gibberish": "gibberish",
}
"""Of these, the columns that are shown; `table.csv` has all."""
HOOKS, WEIGHTS, BOTH = "hooks", "weights", "hooks and weights"
READING = """\
Damage: KL(unedited || edited) of held-out text, nats a token. Recovery of V after {updates} updates of all weights on T, at the
attacker's best rate, chosen on V (the never-taught row at its own); behind the last, and behind accuracies and bits, {spread}. 0 is
as if never taught, 1 as before the edit, below 0 is suppressed. Stripped: the hooks removed; in the weights: the projections written
into the matrices, or, where that is not exact and the edit has matrices too, these alone. Worst: the attack that certainly brings
back most (which one: `table.csv`), after {last} updates where it retrains. New facts: accuracy on these after {few} updates on them,
edit kept: far below the unedited model's, what does not come back need not be gone. Probe: bits about V's answers that a linear probe
reads at its best layer. {mark}: T was not learned to 95%, so this attack does not count. Compare only methods whose first column is
near the never-taught row and whose next three are near the unedited row: what was never forgotten cannot come back, and a ruined
model answers nothing."""

Cells = Mapping[Job, Mapping[str, Mapping[str, Any]]]
"""Of each row, what was found in each stage."""


def few(updates: Sequence[int]) -> int:
    """The number of updates after which new facts are asked."""
    return updates[min(1, len(updates) - 1)]


def with_reference_floor(cells: Cells, last: int) -> Cells:
    """The cells with every recovery between the answers of a model that never saw the forget set, after the same retraining, and those of
    the unedited model; as they are where no such model was retrained.

    Args:
        cells: (method, seed) -> stage -> what was found.
        last: the updates of the retraining.
    """
    known: dict[Job, dict[str, Mapping[str, Any]]] = {}
    for (name, seed), stages in cells.items():
        floor = cells.get((NEVER_TAUGHT, seed), {}).get(KEPT)
        known[name, seed] = dict(stages)
        for stage, found in stages.items():
            if floor is not None and stage.startswith(RELEARN_STAGE) and found["rows"]:
                curves = with_floor(pd.DataFrame(found["rows"]), pd.DataFrame(floor["rows"]), steps=last, seed=seed)
                known[name, seed][stage] = {**found, "rows": rows_of(curves)}
    return known


def rows_of_cells(cells: Cells, updates: Sequence[int]) -> pd.DataFrame:
    """One row a method and seed; behind the unedited model the floor, facts that were never taught.

    Args:
        cells: (method, seed) -> stage -> what was found; the unedited model is one of the methods.
        updates: of an attack, after which it was scored.
    """
    rows: list[dict[str, Any]] = []
    for (name, seed), stages in cells.items():
        unedited = cells[UNEDITED, seed]
        if name == NEVER_TAUGHT:
            rows.append(_never_saw(stages, unedited, updates) | {"method": name, "seed": seed, "edit": ""})
            continue
        row: dict[str, Any] = {"method": name, "seed": seed, "edit": _kind(stages["fit"])}
        row |= _answers(stages["quiz"], unedited["quiz"])
        for form in FORM_TITLES:
            row |= _attacked(form, stages, unedited, updates)
        row |= _read(stages["probe"]["rows"], "held-out", "probe_bits")
        row |= {"seconds": stages["fit"]["seconds"], "stored_bytes": stages["fit"]["bytes"]}
        row |= _further(stages)
        row |= {} if name == UNEDITED else _worst(row, stages, updates[-1])
        rows.append(_benchmark(stages) | row)  # the board's own quizzes, of more questions, before those measured there
        if name == UNEDITED and "untaught" in stages["quiz"] and (NEVER_TAUGHT, seed) not in cells:
            rows.append({"method": NEVER_TAUGHT, "seed": seed, "edit": "", **_never_taught(stages, updates)})
    return pd.DataFrame(rows)


def further_columns(cells: Cells) -> dict[str, str]:
    """Column that a registered attack or metric adds -> its heading."""
    headings = metrics.headings()
    columns = dict.fromkeys(column for stages in cells.values() for column in _further(stages))
    own = [column for column in columns if not column.endswith(("_low", "_high")) and column != "damage"]
    return {column: headings.get(column, column.replace("_", " ")) for column in own}


def _benchmark(stages: Mapping[str, Any]) -> dict[str, Any]:
    """The field's measures, behind the columns that come first."""
    row: dict[str, Any] = dict.fromkeys(("method", "seed", "edit"))
    for stage, found in stages.items():
        if stage.startswith(BENCHMARK):
            row |= found["row"]
    return row


def _worst(row: Mapping[str, Any], stages: Mapping[str, Any], last: int) -> dict[str, Any]:
    """The attack that certainly brings back most, by the lower end of its interval, among those that count."""
    found = {
        title: f"recovery_{form}_{last}" for form, title in FORM_TITLES.items() if row.get(f"counts_{form}", False)
    }
    for stage in stages:
        if stage.startswith(ATTACK):
            found[stage.removeprefix(ATTACK)] = f"recovery_{stage.removeprefix(ATTACK)}"
    known = {title: key for title, key in found.items() if not pd.isna(row.get(f"{key}_low", float("nan")))}
    if not known:
        return {}
    title = max(known, key=lambda name: float(row[f"{known[name]}_low"]))
    return {"worst_attack": title, **{f"worst{end}": row[f"{known[title]}{end}"] for end in ("", "_low", "_high")}}


def _further(stages: Mapping[str, Any]) -> dict[str, Any]:
    """What each further attack certainly brought back, by the lower end of its interval, and what registered metrics say."""
    row: dict[str, Any] = {}
    for stage, found in stages.items():
        if stage.startswith(METRICS):
            row |= found["row"]
        if stage.startswith(ATTACK) and found["rows"]:
            most = max(found["rows"], key=_certain)
            ends = {end: most.get(f"recovery{end}") for end in ("", "_low", "_high")}
            row |= {f"recovery_{stage.removeprefix(ATTACK)}{end}": value for end, value in ends.items()}
    return row


def brought_back(rows: pd.DataFrame, method: str) -> pd.DataFrame:
    """Those `rows_of_attacks` of a method that tell what an attack brought back: not that of no attack."""
    if "recovery" not in rows:
        return rows[:0]
    return rows[rows["recovery"].notna() & (rows["method"] == method) & (rows["attack"] != NO_ATTACK)]


def _certain(attacked: Mapping[str, Any]) -> float:
    """What an attack brought back at least; the recovery itself, of an attack that gives no interval."""
    low = attacked.get("recovery_low")
    return float(attacked["recovery"] if low is None or pd.isna(low) else low)


def _kind(fit: Mapping[str, Any]) -> str:
    """What an edit consists of; nothing for the unedited model."""
    if fit["hooks"]:
        return BOTH if fit["weights"] else HOOKS
    return WEIGHTS if fit["weights"] else ""


def _answers(quiz: Mapping[str, Any], unedited: Mapping[str, Any]) -> dict[str, Any]:
    """Accuracy on the forget quiz and on the worst topic of the retain quiz, and the cost for ordinary text."""
    row = _with_ends("forget", "forget_accuracy", quiz["forget"][0])
    if "retain" in quiz:
        topics = quiz["retain"][1:] or quiz["retain"]
        worst = min(topics, key=lambda topic: float(topic["accuracy"]))
        row |= {"worst_topic_name": worst["group"], **_with_ends("worst_topic", "worst_topic_accuracy", worst)}
    if "untaught" in unedited:
        row["untaught_accuracy"] = unedited["untaught"][0]["accuracy"]
    text = quiz["text"]["perplexity"]
    return row | {"text_perplexity": text, "text_perplexity_ratio": text / unedited["text"]["perplexity"]}


def _with_ends(stem: str, key: str, found: Mapping[str, Any], column: str = "accuracy") -> dict[str, Any]:
    return {key: found[column], f"{stem}_low": found["low"], f"{stem}_high": found["high"]}


def _attacked(
    form: str, stages: Mapping[str, Any], unedited: Mapping[str, Any], updates: Sequence[int]
) -> dict[str, Any]:
    """What retraining brings back in one form; nothing where the edit has no such form."""
    kind, source = _kind(stages["fit"]), stages[f"{RELEARN_STAGE}{form}"]
    if form == "stripped" and kind == HOOKS:
        source = unedited[KEPT]  # without its hooks it is the unedited model
    if form == "weights" and kind == WEIGHTS:
        source = stages[KEPT]
    if form == "weights" and kind == BOTH and not source["rows"]:
        source = stages[STRIPPED]  # what of it can be exported as plain weights
    if not source["rows"]:
        return {}
    curves = pd.DataFrame(source["rows"])
    at_best = best(curves)
    row = _by_updates(at_best, f"recovery_{form}", "", updates)
    rate = at_best.sort_values("step")["lr"].iloc[-1]
    # A rate that is too high takes V from any model: what it leaves the unedited one tells that from forgetting.
    spared = [r["recovery"] for r in unedited[KEPT]["rows"] if (r["lr"], r["step"]) == (rate, updates[-1])]
    row |= {f"lr_{form}": rate, f"unedited_at_lr_{form}": spared[0] if spared else None}
    row |= {f"counts_{form}": bool(curves["counts"].any()), f"train_accuracy_{form}": curves["train_accuracy"].max()}
    if form != "stripped" and source["new"]:
        stem = f"new_accuracy_{few(updates)}_{form}"
        row |= _with_ends(stem, stem, source["new"])
    return row


def _by_updates(at_best: pd.DataFrame, stem: str, prefix: str, updates: Sequence[int]) -> dict[str, Any]:
    """`recovery_kept_5` with `recovery_kept_5_low` and `recovery_kept_5_high`, and so on."""
    by_step = at_best.set_index("step")
    return {
        f"{stem}_{step}{end}": by_step.loc[step, f"{prefix}recovery{end}"]
        for step in updates
        if step in by_step.index
        for end in ("", "_low", "_high")
    }


def _read(bits: Sequence[Mapping[str, Any]], group: str, key: str) -> dict[str, Any]:
    """Bits at the layer where the most are read."""
    of_group = [row for row in bits if row["group"] == group]
    if not of_group:
        return {}
    most = max(of_group, key=lambda row: float(row["bits"]))
    return {**_with_ends(key, key, most, "bits"), f"{key}_layer": most["layer"]}


def _never_saw(stages: Mapping[str, Any], unedited: Mapping[str, Any], updates: Sequence[int]) -> dict[str, Any]:
    """The floor, where there is a model that never saw the forget set: what it answers and what is measured of it."""
    floor = _never_taught(unedited, updates) if "untaught" in unedited["quiz"] else {}
    return _benchmark(stages) | floor | _answers(stages["quiz"], unedited["quiz"]) | _further(stages)


def _never_taught(stages: Mapping[str, Any], updates: Sequence[int]) -> dict[str, Any]:
    """The floor: never-taught facts asked of the unedited model, one half of them after the attack against the other,
    and what a probe reads about them."""
    row = _with_ends("forget", "forget_accuracy", stages["quiz"]["untaught"][0])
    curves = best(pd.DataFrame(stages[KEPT]["rows"]), by="control_recovery")  # as the attacker's is chosen
    row |= _by_updates(curves, "recovery_kept", "control_", updates)
    return row | _read(stages["probe"]["rows"], NEVER_TAUGHT, "probe_bits")


def compact(table: pd.DataFrame, updates: Sequence[int], further: Mapping[str, str]) -> pd.DataFrame:
    """The table as text, one row a method: means over the seeds, where there are several.

    Args:
        table: of `rows_of_cells`.
        updates: of an attack, after which it was scored.
        further: column that a registered attack or metric adds -> its heading.
    """
    rows = []
    for method, part in table.groupby("method", sort=False):
        row = {
            "": str(method),
            "asked at once": figure(part, "forget_accuracy", "forget"),
            "worst other topic": figure(part, "worst_topic_accuracy", "worst_topic"),
            "text": mean_of(part, "text_perplexity_ratio", "x{:.3f}"),
            "damage": figure(part, "damage", "damage", "{:.3f}"),
        }
        for form, title in FORM_TITLES.items():
            row[f"{title}, {' / '.join(map(str, updates))}"] = _recoveries(part, form, updates)
        row |= {
            "worst": figure(part, "worst", "worst"),
            f"new facts, {few(updates)}": mean_of(part, f"new_accuracy_{few(updates)}_kept"),
            "probe, bits": figure(part, "probe_bits", "probe_bits"),
            "fit": mean_of(part, "seconds", "{:.0f} s"),
            "stored": mean_of(part, "stored_bytes", "{:,.0f} kB", scale=1e-3),
        }
        row |= {heading: figure(part, column, column) for column, heading in further.items()}
        rows.append(row)
    return pd.DataFrame(rows)


def _recoveries(part: pd.DataFrame, form: str, updates: Sequence[int]) -> str:
    """One cell: recovery after each number of updates."""
    kind, columns = part["edit"].iloc[0], [f"recovery_{form}_{step}" for step in updates]
    if form == "stripped" and kind == HOOKS:
        return "as unedited"
    if form == "weights" and kind == WEIGHTS:
        return "as kept"
    if not set(columns) <= set(part) or part[columns].isna().all(axis=None):
        return NONE
    values = [mean_of(part, column) for column in columns[:-1]]
    counted = part[f"counts_{form}"].isin([False]).sum() == 0
    return " / ".join([*values, figure(part, columns[-1], columns[-1])]) + ("" if counted else f" {DOES_NOT_COUNT}")


def finding(table: pd.DataFrame, updates: Sequence[int], further: Mapping[str, str] | None = None) -> str:
    """The compact table with the headings of further columns, and how to read it."""
    seeds = table["seed"].nunique()
    spread = f"lowest to highest of {seeds} seeds" if seeds > 1 else "its 95% interval"
    steps = " / ".join(map(str, updates))
    reading = READING.format(updates=steps, few=few(updates), last=updates[-1], spread=spread, mark=DOES_NOT_COUNT)
    tables = [markdown(compact(table, updates, further or {}))]
    if not (shown := measures(table)).empty:
        tables.append(markdown(shown))
    return "\n\n".join([*tables, reading])


def measures(table: pd.DataFrame) -> pd.DataFrame:
    """The field's measures as text, one row a method; nothing where they were not taken.

    Args:
        table: of `rows_of_cells`.
    """
    taken = {key: title for key, title in MEASURES.items() if key in table}
    if not taken:
        return pd.DataFrame()
    rows = [
        {"": str(method), **{title: figure(part, key, key) for key, title in taken.items()}}
        for method, part in table.groupby("method", sort=False)
    ]
    return pd.DataFrame(rows)


def pictures(cells: Cells, table: pd.DataFrame, updates: Sequence[int]) -> dict[str, pd.DataFrame]:
    """The frames that the report draws."""
    last = updates[-1]
    back = []
    for form, title in FORM_TITLES.items():
        if (column := f"recovery_{form}_{last}") in table:
            ends = {f"{column}{end}": f"recovery{end}" for end in ("", "_low", "_high")}
            rows = table[["method", "seed", *ends]].rename(columns={"method": "attack", **ends})
            back.append(rows.assign(method=f"{title}, {last} updates"))
    drawn = {"accuracies": table[table["method"] != NEVER_TAUGHT], "recoveries": pd.concat(back, ignore_index=True)}
    for name, stages in {
        "relearning_curves": [f"{RELEARN_STAGE}{f}" for f in FORM_TITLES],
        "probe_bits": ["probe"],
    }.items():
        drawn[name] = pd.concat(
            [
                pd.DataFrame(found[stage]["rows"]).assign(method=method, seed=seed)
                for (method, seed), found in cells.items()
                for stage in stages
                if found.get(stage, {}).get("rows")
            ],
            ignore_index=True,
        )
    return drawn
