"""The findings of a campaign as one table: what each attack brought back, beside its controls, and whether it counts."""

from collections.abc import Callable, Iterator
from typing import Any

import pandas as pd

from mrp_lens.attacks.finetuning import FORM_TITLES
from mrp_lens.attacks.relearn import TAUGHT, best
from mrp_lens.attacks.suite import UNEDITED, Frames
from mrp_lens.utils.frames import Row, rows_of

NEVER_TAUGHT, RANDOM_TRIGGER = "never-taught", "random-trigger"
BUDGETS = (5, 20, 100)
SLOWER = 0.2
"""New facts count as learned more slowly where so much of their accuracy is missing, against the unedited model."""
OBJECTIVES = {"answer": "answers", "representation": "states"}
ACCURACIES = ("n", "accuracy_before", "accuracy_edited", "accuracy_after", "floor", "ceiling")
RECOVERY = ("recovery", "recovery_low", "recovery_high")


def rows_of_attacks(frames: Frames, name: str) -> list[Row]:
    """One row an attack, and its controls.

    Args:
        frames: of `campaign`.
        name: of the edit.

    Returns:
        Rows of `method` (the edit's name; "unedited", "never-taught" and "random-trigger" are controls), `attack`, and
        on the held-out questions `n`, `accuracy_before` (unedited), `accuracy_edited`, `accuracy_after` the attack,
        `floor`, `ceiling`, `recovery` with its interval; for probes `layer` (their best), `bits` with their interval,
        `never_taught_bits` and `bits_in_all`. The edit's row "no attack" has `forget_accuracy`, `untaught_accuracy`
        and, where it was retrained, `recovery_5`, `recovery_20`, `recovery_100`, `recovery_100_stripped`,
        `recovery_100_weights`.
    """
    makers: dict[str, Callable[[pd.DataFrame, str], Iterator[dict[str, Any]]]] = {
        "relearning_curves": _retrained,
        "bypass": _bypassed,
        "jailbreak_curve": _searched,
        "probe_bits": _probed,
    }
    rows = [row for key, make in makers.items() if key in frames for row in make(frames[key], name)]
    plain = [row for row in rows if row["attack"] == "no attack"]
    rest = [row for row in rows if row["attack"] != "no attack"]
    return [row for found in plain[:1] + rest for row in rows_of(pd.DataFrame([found]))]


def notes_of(frames: Frames, name: str) -> list[str]:
    """What must be known to read the table: attacks that do not count, and edited models that are hard to train at all."""
    if "relearning_curves" not in frames:
        return []
    notes = []
    curves = frames["relearning_curves"]
    for (method, form, parameters), part in curves.groupby(["method", "form", "parameters"], sort=False):
        attack = f"{method}: {_title(str(form), str(parameters))}"
        if not part["counts"].any():
            most = part["train_accuracy"].max()
            notes.append(
                f"{attack} does not count: {most:.0%} of its own training questions are answered at most, below {TAUGHT:.0%}. "
                "Give it more updates or other rates"
            )
        if method == name:
            unedited = curves[(curves["method"] == UNEDITED) & (curves["parameters"] == parameters)]
            notes += _slower(attack, _learned(part), _learned(unedited))
    return notes


def _learned(curves: pd.DataFrame) -> "pd.Series[float]":
    """Accuracy on new facts at the best rate for these, by step."""
    return curves.groupby("step")["new_accuracy"].max().astype(float).dropna()


def _slower(attack: str, edited: "pd.Series[float]", unedited: "pd.Series[float]") -> Iterator[str]:
    both = pd.DataFrame({"edited": edited, "unedited": unedited}).dropna().reset_index()
    missing = both["unedited"] - both["edited"]
    if (missing >= SLOWER).any():
        worst = both.loc[int(missing.argmax())]
        yield (
            f"{attack}: this model learns new facts more slowly than the unedited one ({worst['edited']:.0%} against "
            f"{worst['unedited']:.0%} after {worst['step']:.0f} updates), so little recovery may mean that it is hard to train, not that it forgot"
        )


def _title(form: str, parameters: str) -> str:
    which = "" if parameters == "all" else f" ({parameters})"
    return f"relearn{which}, {FORM_TITLES[form]}"


def _retrained(curves: pd.DataFrame, name: str) -> Iterator[dict[str, Any]]:
    """The edit's rows at the attacker's best rate, the never-taught control of each, and the unedited model's."""
    found = best(curves).rename(columns={"held_out_accuracy": "accuracy_after"})
    edited = found[found["method"] == name]
    usual = edited[(edited["form"] == "kept") & (edited["parameters"] == "all")]
    for row in usual[usual["step"] == 0].to_dict("records"):
        yield _no_attack(row, name) | {"untaught_accuracy": row["floor"]} | _by_budget(edited)
    for (method, form, parameters), part in found.groupby(["method", "form", "parameters"], sort=False):
        last = part["step"].max()
        shown = {*BUDGETS, last} if method == name and form == "kept" else {last}
        for row in part[part["step"].isin(shown)].to_dict("records"):
            title = f"{_title(str(form), str(parameters))}, {row['step']} steps"
            if method != name:
                title = title.replace(f", {FORM_TITLES['kept']}", "")
            yield {"method": method, "attack": title, **_chosen(row, ACCURACIES), **_chosen(row, RECOVERY)}
            if row["step"] == last and method == name and pd.notna(row["control_recovery"]):
                control = {end: row[f"control_{end}"] for end in RECOVERY}
                yield {"method": NEVER_TAUGHT, "attack": title, **_chosen(row, ("floor", "ceiling")), **control}


def _by_budget(edited: pd.DataFrame) -> dict[str, float]:
    """`recovery_5` and the like, as far as there are such budgets."""
    rows = edited[edited["parameters"] == "all"].set_index(["form", "step"])["recovery"].to_dict()
    wanted: dict[str, tuple[str, int]] = {f"recovery_{steps}": ("kept", steps) for steps in BUDGETS}
    wanted |= {f"recovery_{BUDGETS[-1]}_{form}": (form, BUDGETS[-1]) for form in ("stripped", "weights")}
    return {key: rows[place] for key, place in wanted.items() if place in rows}


def _bypassed(frame: pd.DataFrame, name: str) -> Iterator[dict[str, Any]]:
    for row in frame.to_dict("records"):
        if row["kind"] == "no attack":
            yield _no_attack(row, name)
        elif pd.notna(row["recovery"]):
            yield {"method": name, "attack": row["variant"], **_chosen(row, ACCURACIES), **_chosen(row, RECOVERY)}
        else:  # on retain questions, of which nothing was removed
            yield {"method": name, "attack": row["variant"], **_chosen(row, ("n", *ACCURACIES[1:4], "ceiling"))}


def _searched(frame: pd.DataFrame, name: str) -> Iterator[dict[str, Any]]:
    """The last trigger of each search, and once a random one."""
    for number, (objective, part) in enumerate(frame.groupby("objective", sort=False)):
        renamed = {"held_out_accuracy": "accuracy_after", "untaught_accuracy": "floor"}
        rows = part.rename(columns=renamed).assign(ceiling=part["accuracy_before"]).to_dict("records")
        plain, random, *_, found = [row | {"accuracy_edited": rows[0]["accuracy_after"]} for row in rows]
        shown = [(name, f"jailbreak, {OBJECTIVES[str(objective)]}", found)]
        if number == 0:
            yield _no_attack(plain, name)
            shown.append((RANDOM_TRIGGER, "jailbreak", random))
        for method, attack, row in shown:
            yield {"method": method, "attack": attack, **_chosen(row, ACCURACIES), **_chosen(row, RECOVERY)}


def _probed(frame: pd.DataFrame, _name: str) -> Iterator[dict[str, Any]]:
    """Each state's best layer."""
    for (state, kind), part in frame.groupby(["method", "kind"], sort=False):
        row = part[part["group"] == "held-out"].sort_values("bits", kind="stable").iloc[-1]
        control = part[(part["group"] == "never-taught") & (part["layer"] == row["layer"])]["bits"]
        bits = {"bits": row["bits"], "bits_low": row["low"], "bits_high": row["high"], "bits_in_all": row["entropy"]}
        never_taught = float(control.iloc[0]) if len(control) else float("nan")
        yield {
            **{"method": state, "attack": f"probe, {kind}", "n": int(row["n"]), "layer": int(row["layer"])},
            **bits,
            "never_taught_bits": never_taught,
        }


def _no_attack(row: dict[Any, Any], name: str) -> dict[str, Any]:
    known = _chosen(row, ACCURACIES) | {"accuracy_after": row["accuracy_edited"]}
    return {
        "method": name,
        "attack": "no attack",
        **known,
        **_chosen(row, RECOVERY),
        "forget_accuracy": row["accuracy_edited"],
    }


def _chosen(row: dict[Any, Any], keys: tuple[str, ...]) -> dict[str, Any]:
    return {key: row[key] for key in keys if key in row}
