"""From the cells of the leaderboard to its rows, and to a compact table of them."""

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from analysis.common.attackers import NEVER_TAUGHT, UNEDITED
from mrp_lens.attacks import best
from mrp_lens.metrics.recovery import FORM_TITLES

CELLS = Mapping[tuple[str, int], Mapping[str, Mapping[str, Any]]]
HOOKS, WEIGHTS, BOTH = "hooks", "weights", "hooks and weights"
NONE, DOES_NOT_COUNT = "-", "†"
LEGEND = (
    "Recovery of V after {updates} updates of all weights on T, at the attacker's best rate; behind the last, and behind accuracies and bits, "
    "{spread}. 0 is as if never taught, 1 as before the edit, below 0 is suppressed. Stripped: the hooks removed; as weights: "
    "the projections written into the matrices, or, where that is not exact and the edit has matrices too, these alone. "
    "New facts: accuracy on these after {few} updates on them, edit kept. "
    "Probe: bits about V's answers that a linear probe reads at its best layer. "
    "†: T was not learned to 95%, so this attack does not count."
)


def few(updates: Sequence[int]) -> int:
    """The number of updates after which new facts are asked."""
    return updates[min(1, len(updates) - 1)]


def rows_of_cells(cells: CELLS, updates: Sequence[int]) -> pd.DataFrame:
    """One row a method and seed; behind the unedited model the floor, facts that were never taught.

    Args:
        cells: (method, seed) -> stage -> what was found; the unedited model is one of the methods.
        updates: of an attack, after which it was scored.
    """
    rows: list[dict[str, Any]] = []
    for (name, seed), stages in cells.items():
        unedited = cells[UNEDITED, seed]
        row: dict[str, Any] = {"method": name, "seed": seed, "edit": _kind(stages["fit"])}
        row |= _answers(stages["quiz"], unedited["quiz"])
        for form in FORM_TITLES:
            row |= _attacked(form, stages, unedited, updates)
        row |= _read(stages["probe"]["rows"], "held-out", "probe_bits")
        row |= {"seconds": stages["fit"]["seconds"], "stored_bytes": stages["fit"]["bytes"]}
        rows.append(row)
        if name == UNEDITED and "untaught" in stages["quiz"]:
            rows.append({"method": NEVER_TAUGHT, "seed": seed, "edit": "", **_never_taught(stages, updates)})
    return pd.DataFrame(rows)


def _kind(fit: Mapping[str, Any]) -> str:
    """What an edit consists of; nothing for the unedited model."""
    if fit["hooks"]:
        return BOTH if fit["weights"] else HOOKS
    return WEIGHTS if fit["weights"] else ""


def _answers(quiz: Mapping[str, Any], unedited: Mapping[str, Any]) -> dict[str, Any]:
    """Accuracy on what must go and on the worst topic that must stay, and the cost for ordinary text."""
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
    kind, source = _kind(stages["fit"]), stages[f"relearn-{form}"]
    if form == "stripped" and kind == HOOKS:
        source = unedited["relearn-kept"]  # without its hooks it is the unedited model
    if form == "weights" and kind == WEIGHTS:
        source = stages["relearn-kept"]
    if form == "weights" and kind == BOTH and not source["rows"]:
        source = stages["relearn-stripped"]  # what of it can be exported as plain weights
    if not source["rows"]:
        return {}
    curves = pd.DataFrame(source["rows"])
    at_best = best(curves)
    row = _by_updates(at_best, f"recovery_{form}", "", updates)
    rate = at_best.sort_values("step")["lr"].iloc[-1]
    # A rate that is too high takes V from any model: what it leaves the unedited one tells that from forgetting.
    spared = [r["recovery"] for r in unedited["relearn-kept"]["rows"] if (r["lr"], r["step"]) == (rate, updates[-1])]
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


def _never_taught(stages: Mapping[str, Any], updates: Sequence[int]) -> dict[str, Any]:
    """The floor: never-taught facts asked of the unedited model, one half of them after the attack against the other,
    and what a probe reads about them."""
    row = _with_ends("forget", "forget_accuracy", stages["quiz"]["untaught"][0])
    curves = best(pd.DataFrame(stages["relearn-kept"]["rows"]))
    row |= _by_updates(curves, "recovery_kept", "control_", updates)
    return row | _read(stages["probe"]["rows"], NEVER_TAUGHT, "probe_bits")


def compact(table: pd.DataFrame, updates: Sequence[int]) -> pd.DataFrame:
    """The table as text, one row a method: means over the seeds, where there are several."""
    rows = []
    for method, part in table.groupby("method", sort=False):
        row = {
            "": str(method),
            "asked at once": figure(part, "forget_accuracy", "forget"),
            "worst other topic": figure(part, "worst_topic_accuracy", "worst_topic"),
            "text": _mean(part, "text_perplexity_ratio", "x{:.3f}"),
        }
        for form, title in FORM_TITLES.items():
            row[f"{title}, {' / '.join(map(str, updates))}"] = _recoveries(part, form, updates)
        row |= {
            f"new facts, {few(updates)}": _mean(part, f"new_accuracy_{few(updates)}_kept", "{:.2f}"),
            "probe, bits": figure(part, "probe_bits", "probe_bits"),
            "fit": _mean(part, "seconds", "{:.0f} s"),
            "stored": _mean(part.assign(kilobytes=part["stored_bytes"] / 1000), "kilobytes", "{:,.0f} kB"),
        }
        rows.append(row)
    return pd.DataFrame(rows)


def _mean(part: pd.DataFrame, column: str, form: str) -> str:
    known = part[column].dropna() if column in part else part.iloc[:0, 0]
    return form.format(known.astype(float).mean()) if len(known) else NONE


def figure(part: pd.DataFrame, column: str, stem: str) -> str:
    """A figure of one method with its interval, or, of several seeds, the mean with the lowest and the highest."""
    mean, ends = _mean(part, column, "{:.2f}"), spread(part, column, stem)
    if mean == NONE or ends is None:
        return mean
    return f"{mean} ({ends[0]:.2f} to {ends[1]:.2f})" if len(part) > 1 else f"{mean} [{ends[0]:.2f}, {ends[1]:.2f}]"


def spread(part: pd.DataFrame, column: str, stem: str) -> tuple[float, float] | None:
    """The interval of a figure of one method; of several seeds the lowest and the highest; None where it is unknown."""
    if column not in part or part[column].isna().all():
        return None
    if len(part) > 1:
        return float(part[column].min()), float(part[column].max())
    low, high = (part[f"{stem}_{end}"].iloc[0] if f"{stem}_{end}" in part else None for end in ("low", "high"))
    return None if pd.isna(low) or pd.isna(high) else (float(low), float(high))


def _recoveries(part: pd.DataFrame, form: str, updates: Sequence[int]) -> str:
    """One cell: recovery after each number of updates."""
    kind, columns = part["edit"].iloc[0], [f"recovery_{form}_{step}" for step in updates]
    if form == "stripped" and kind == HOOKS:
        return "as unedited"
    if form == "weights" and kind == WEIGHTS:
        return "as kept"
    if not set(columns) <= set(part) or part[columns].isna().all(axis=None):
        return NONE
    values = [_mean(part, column, "{:.2f}") for column in columns[:-1]]
    counted = part[f"counts_{form}"].isin([False]).sum() == 0
    return " / ".join([*values, figure(part, columns[-1], columns[-1])]) + ("" if counted else f" {DOES_NOT_COUNT}")


def markdown(text: pd.DataFrame, table: pd.DataFrame, updates: Sequence[int]) -> str:
    """The compact table in Markdown, its columns aligned, with what the figures mean."""
    lines = [list(text.columns), *text.to_numpy().tolist()]
    widths = [max(len(line[column]) for line in lines) for column in range(len(text.columns))]
    lines.insert(1, ["-" * width for width in widths])
    drawn = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in lines
    ]
    seeds = table["seed"].nunique()
    ends = f"lowest to highest of {seeds} seeds" if seeds > 1 else "its 95% interval"
    legend = LEGEND.format(updates=" / ".join(map(str, updates)), few=few(updates), spread=ends)
    return "\n".join(drawn) + f"\n\n{legend}\n"


def pictures(cells: CELLS, table: pd.DataFrame, updates: Sequence[int]) -> dict[str, pd.DataFrame]:
    """The frames that the report draws."""
    last = updates[-1]
    back = []
    for form, title in FORM_TITLES.items():
        if (column := f"recovery_{form}_{last}") in table:
            ends = {f"{column}{end}": f"recovery{end}" for end in ("", "_low", "_high")}
            rows = table[["method", "seed", *ends]].rename(columns={"method": "attack", **ends})
            back.append(rows.assign(method=f"{title}, {last} updates"))
    drawn = {"accuracies": table[table["method"] != NEVER_TAUGHT], "recoveries": pd.concat(back, ignore_index=True)}
    for name, stages in {"relearning_curves": [f"relearn-{f}" for f in FORM_TITLES], "probe_bits": ["probe"]}.items():
        drawn[name] = pd.concat(
            [
                pd.DataFrame(found[stage]["rows"]).assign(method=method, seed=seed)
                for (method, seed), found in cells.items()
                for stage in stages
                if found[stage]["rows"]
            ],
            ignore_index=True,
        )
    return drawn
