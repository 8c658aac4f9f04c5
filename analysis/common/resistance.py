"""From curves to sentences: what came back, whether the attacks count, and where MRP's resistance comes from."""

from collections.abc import Sequence
from typing import Any

import pandas as pd

from analysis.common.attackers import NEVER_TAUGHT, RANDOM, UNEDITED, USUAL, WEIGHTS, WIDEST
from mrp_lens.attacks import best

BUDGETS = (5, 20, 100)
FEW, MANY = BUDGETS[1], BUDGETS[-1]
INTERVAL = ("recovery", "recovery_low", "recovery_high")
TOGETHER = 0.5  # rank correlation from which two things are said to go together

# What is compared to tell layers from rank: (name of the comparison, narrower edit, wider edit).
COMPARISONS = (
    ("the first half of the layers instead of the second", "mrp", "mrp-early"),
    ("all layers instead of the second half", "mrp", "mrp-all"),
    ("twice the rank in the second half", "mrp", "mrp-wide"),
    ("twice the rank at all layers", "mrp-all", WIDEST),
)


def rows_of_curves(curves: pd.DataFrame, quizzes: pd.DataFrame) -> pd.DataFrame:
    """One row an edit, seed and attacker: recovery after 5, 20 and 100 updates at the attacker's best rate, with what the
    edit had done before. The control "never-taught" is the other half of the never-taught facts."""
    rows: list[dict[str, Any]] = []
    known: dict[Any, dict[str, Any]] = {
        (row["method"], row["seed"]): {str(key): value for key, value in row.items()}
        for row in quizzes.to_dict("records")
    }
    for (method, seed, attacker), part in curves.groupby(["method", "seed", "attacker"], sort=False):
        at_best = best(part).sort_values("step").set_index("step")
        row: dict[str, Any] = {**known[method, seed], "attacker": attacker}
        last = at_best.iloc[-1]
        row |= {name: last[name] for name in ("floor", "ceiling", "train_accuracy", "counts", "n")}
        learned = part.groupby("step")[["new_accuracy"]].max()  # at the best rate for these
        row |= _by_budget(at_best, INTERVAL) | _by_budget(learned, ["new_accuracy"])
        rows.append(row)
        if method == UNEDITED and attacker == USUAL.name and at_best["control_recovery"].notna().any():
            control = at_best.drop(columns=list(INTERVAL)).rename(columns=lambda name: name.removeprefix("control_"))
            rows.append({"method": NEVER_TAUGHT, "seed": seed, "attacker": attacker, **_by_budget(control, INTERVAL)})
    return _with_forms(pd.DataFrame(rows))


def _by_budget(at_best: pd.DataFrame, columns: Sequence[str]) -> dict[str, Any]:
    """`recovery_low` after 5 updates as `recovery_5_low`."""
    named = {}
    for budget in (budget for budget in BUDGETS if budget in at_best.index):
        for column in columns:
            stem, _, end = column.partition("_") if column.startswith("recovery") else (column, "", "")
            named[f"{stem}_{budget}{'_' + end if end else ''}"] = at_best.loc[budget, column]
    return named


def _with_forms(table: pd.DataFrame) -> pd.DataFrame:
    """Beside the recovery with the edit kept, that without its hooks (the unedited model) and in the weights."""
    usual = table[table["attacker"] == USUAL.name].set_index(["method", "seed"])
    headline = f"recovery_{MANY}"
    if headline not in table:
        return table
    for place, row in table[table["attacker"] == USUAL.name].iterrows():
        edited = isinstance(row["layers"], str) and row["layers"] != ""
        hooks = edited and pd.notna(row["rank"])  # a projection; other edits are in the weights as they are
        weights = table[
            (table["attacker"] == WEIGHTS.name) & (table["method"] == row["method"]) & (table["seed"] == row["seed"])
        ]
        if hooks:
            table.loc[place, f"{headline}_stripped"] = usual.loc[(UNEDITED, row["seed"]), headline]
        elif edited:
            table.loc[place, f"{headline}_weights"] = row[headline]
        if len(weights):
            table.loc[place, f"{headline}_weights"] = weights[headline].iloc[0]
    return table


def finding(table: pd.DataFrame) -> str:
    """What the numbers say."""
    usual = table[table["attacker"] == USUAL.name]
    parts = [headline(usual), control(usual), validity(usual), resistance(usual), others(table)]
    return "\n\n".join(part for part in parts if part)


def headline(usual: pd.DataFrame) -> str:
    """Recovery of every edit."""
    budgets = [budget for budget in BUDGETS if f"recovery_{budget}" in usual]
    lines = [
        f"{method} {' / '.join(spread(rows[f'recovery_{budget}']) for budget in budgets)} "
        f"(asked before the attack: {rows['forget_accuracy'].mean():.2f}; what was to stay: {rows['retain_accuracy'].mean():.2f})"
        for method, rows in usual.groupby("method", sort=False)
        if method != NEVER_TAUGHT
    ]
    seeds = usual["seed"].nunique()
    return (
        f"Recovered of what the attacker was not taught, edit kept, after {' / '.join(map(str, budgets))} updates at the attacker's best "
        f"rate ({seeds} seed{'s' if seeds > 1 else ''}: mean, lowest to highest): {'; '.join(lines)}."
    )


def control(usual: pd.DataFrame) -> str:
    """Whether never-taught facts seem to be recovered too."""
    rows = usual[usual["method"] == NEVER_TAUGHT]
    if rows.empty:
        return ""
    cells = [
        (row[f"recovery_{b}"], row[f"recovery_{b}_low"], row[f"recovery_{b}_high"])
        for row in rows.to_dict("records")
        for b in BUDGETS
        if f"recovery_{b}" in row
    ]
    fine = sum(abs(value) < 0.05 or low <= 0 <= high for value, low, high in cells)
    mean = sum(value for value, _, _ in cells) / len(cells)
    return (
        f"The control: one half of the never-taught facts against the floor of the other seems to recover {mean:+.3f} on average; "
        f"in {fine} of {len(cells)} cases it is below 0.05 or its interval covers 0."
    )


def validity(usual: pd.DataFrame) -> str:
    """Whether T was learned, and how fast new facts are."""
    edits = usual[~usual["method"].isin([NEVER_TAUGHT])]
    not_taught = sorted(set(edits.loc[~edits["counts"].astype(bool), "method"]))
    told = (
        f"T was not learned to 0.95 on {', '.join(not_taught)}: these attacks do not count. "
        if not_taught
        else "Every attack counts: T itself was learned to 0.95 or more. "
    )
    speeds = new_speed(edits)
    if speeds.empty:
        return told.strip()
    listed = ", ".join(f"{method} {value:.2f}" for method, value in speeds.items() if method != UNEDITED)
    return (
        f"{told}New facts known after {FEW} updates, as a share of what the unedited model learns with that budget "
        f"({edits.loc[edits['method'] == UNEDITED, f'new_accuracy_{FEW}'].mean():.2f}): {listed}."
    )


def new_speed(usual: pd.DataFrame, budget: int = FEW) -> "pd.Series[float]":
    """Method -> accuracy on new facts after a budget, over that of the unedited model."""
    column = f"new_accuracy_{budget}"
    if column not in usual or usual[column].isna().all():
        return pd.Series(dtype=float)
    means = usual.groupby("method", sort=False)[column].mean().dropna()
    return means / means[UNEDITED]


def resistance(usual: pd.DataFrame) -> str:
    """Where MRP's resistance comes from: hooks, layers, rank, or a model that is hard to train at all."""
    mrp = usual[usual["method"].str.startswith("mrp")]
    if mrp.empty or f"recovery_{FEW}" not in usual:
        return ""
    lines = [*_by_form(mrp), *_by_size(usual)]
    speeds = new_speed(usual, BUDGETS[0])
    recovered = mrp.groupby("method")[f"recovery_{BUDGETS[0]}"].mean()
    if len(recovered) > 2 and recovered.nunique() > 1 and speeds.reindex(recovered.index).nunique() > 1:
        together = float(recovered.rank().corr(speeds[recovered.index].rank()))
        what = (
            "recover less are also taught new facts more slowly"
            if together >= TOGETHER
            else "recover less are not those taught new facts more slowly"
        )
        lines.append(
            f"Over the {len(recovered)} kinds of MRP, recovery after {BUDGETS[0]} updates and the share of new facts learned by then have "
            f"a rank correlation of {together:+.2f}: edits that {what}."
        )
    if RANDOM in set(usual["method"]) and not speeds.empty:
        lines.append(
            f"A random projection of the ranks and layers of {WIDEST} takes the new facts learned after {BUDGETS[0]} updates to "
            f"{speeds[RANDOM]:.2f} of the unedited model's, {WIDEST} to {speeds[WIDEST]:.2f}."
        )
    return f"Where MRP's resistance comes from. {' '.join(lines)}" if lines else ""


def _by_form(mrp: pd.DataFrame) -> list[str]:
    """Kept, stripped, in the weights."""
    lines = []
    column = f"recovery_{MANY}"
    stripped, weights = f"{column}_stripped", f"{column}_weights"
    if stripped in mrp and mrp[stripped].notna().any():
        lines.append(
            f"Hooks: with the hooks kept {mrp[column].min():.2f} to {mrp[column].max():.2f} comes back after {MANY} updates; with them removed "
            f"the model is the unedited one, and {mrp[stripped].mean():.2f} is back without any training."
        )
    if weights in mrp and mrp[weights].notna().any():
        rows = mrp[mrp[weights].notna()]
        lines.append(
            f"In the weights, where retraining can undo the projection, {', '.join(sorted(set(rows['method'])))} gives back "
            f"{rows[weights].mean():.2f} after {MANY} updates, kept as hooks {rows[column].mean():.2f}."
        )
    return lines


def _by_size(usual: pd.DataFrame) -> list[str]:
    """Layers and rank, each comparison at two budgets, told from noise by whether all seeds agree."""
    lines = []
    by_method = {method: rows.set_index("seed") for method, rows in usual.groupby("method")}
    for words, narrow, wide in COMPARISONS:
        if narrow not in by_method or wide not in by_method:
            continue
        told = []
        for budget in (BUDGETS[0], MANY):
            column = f"recovery_{budget}"
            change = (by_method[wide][column] - by_method[narrow][column]).dropna()
            if change.empty:
                continue
            sure = (change > 0).all() or (change < 0).all()
            told.append(f"{change.mean():+.2f} after {budget} updates{'' if sure else ' (the seeds disagree)'}")
        lines.append(f"{words[:1].upper()}{words[1:]}: recovery {', '.join(told)}.")
    return lines


def others(table: pd.DataFrame) -> str:
    """What other attackers bring back."""
    column = f"recovery_{MANY}"
    rows = table[
        (table["attacker"] != USUAL.name) & (table["attacker"] != WEIGHTS.name) & (table["method"] != UNEDITED)
    ]
    if rows.empty or column not in rows:
        return ""
    lines = [
        f"{attacker}: {', '.join(f'{row.method} {getattr(row, column):.2f}' for row in part.itertuples())}"
        for attacker, part in rows.groupby("attacker", sort=False)
    ]
    return f"Other attackers, recovery after {MANY} updates: {'; '.join(lines)}."


def spread(values: "pd.Series[float]") -> str:
    """Mean, and the range where there are several."""
    known = values.dropna()
    if known.empty:
        return "unknown"
    return f"{known.mean():.2f}" if len(known) == 1 else f"{known.mean():.2f} ({known.min():.2f} to {known.max():.2f})"
