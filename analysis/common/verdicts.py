"""What the leaderboard's numbers say, in sentences: who forgets at which cost, and whose forgetting withstands retraining."""

import math
from collections.abc import Sequence

import pandas as pd

from analysis.common.attackers import NEVER_TAUGHT, UNEDITED
from analysis.common.endurance import FORGOTTEN_WITHIN, KEPT, TEXT
from analysis.common.standings import HOOKS, WEIGHTS, few, figure, spread

SLOWER = 0.5  # new facts learned, as a share of the unedited model's, below which a model counts as hard to train
FORMS = {"kept": "With the edit kept", "stripped": "With its hooks stripped", "weights": "As weights"}


def finding(table: pd.DataFrame, updates: Sequence[int]) -> str:
    """What the numbers say.

    Args:
        table: of `rows_of_cells`.
        updates: of an attack, after which it was scored.
    """
    methods = {
        str(name): part for name, part in table.groupby("method", sort=False) if name not in (UNEDITED, NEVER_TAUGHT)
    }
    unedited = table[table["method"] == UNEDITED]
    sound = [name for name, part in methods.items() if forgets(part) and keeps(part, unedited)]
    parts = [
        forgetting(methods, unedited),
        *(withstanding(form, methods, sound, updates) for form in FORMS),
        stripping(methods, unedited),
        suppression(methods, updates),
        validity(methods),
        training(methods, unedited, updates),
        probing(methods, unedited, table[table["method"] == NEVER_TAUGHT]),
        control(table[table["method"] == NEVER_TAUGHT], updates),
    ]
    return "\n\n".join(part for part in parts if part)


def forgets(part: pd.DataFrame) -> bool:
    """Whether a method gets what must go down to the level of facts that were never taught, or of guessing below it."""
    if "untaught_accuracy" not in part:
        return True  # nothing to compare with
    return float(part["forget_accuracy"].mean()) <= float(part["untaught_accuracy"].mean()) + FORGOTTEN_WITHIN


def keeps(part: pd.DataFrame, unedited: pd.DataFrame) -> bool:
    """Whether ordinary text, and the worst topic that must stay where it was asked about, are as good as unharmed."""
    column = "worst_topic_accuracy"
    if not float(part["text_perplexity_ratio"].mean()) <= TEXT:
        return False
    return column not in part or float(part[column].mean()) >= KEPT * float(unedited[column].mean())


def forgetting(methods: dict[str, pd.DataFrame], unedited: pd.DataFrame) -> str:
    """Who cannot forget, and who loses what must stay."""
    if "untaught_accuracy" not in unedited:
        return "There are no never-taught questions, so that whether a method forgets enough is not told."
    level = float(unedited["untaught_accuracy"].mean())
    failed = [name for name, part in methods.items() if not forgets(part)]
    costly = [name for name, part in methods.items() if forgets(part) and not keeps(part, unedited)]
    fine = [name for name in methods if name not in (*failed, *costly)]
    asked = f"{KEPT:.0%} of the worst other topic, and " if "worst_topic_accuracy" in unedited else ""
    lines = [
        f"Never-taught facts are answered {level:.2f}. {_listed(fine) or 'No method'} {_verb(fine)} down to that level"
    ]
    lines[0] += (
        f" (within {FORGOTTEN_WITHIN:.2f}) and keep{'s' if len(fine) < 2 else ''} {asked}ordinary text at no more than {TEXT:g} times its perplexity."
    )
    if failed:
        told = "; ".join(f"{name} {figure(methods[name], 'forget_accuracy', 'forget')}" for name in failed)
        lines.append(f"Cannot forget it at these settings: {told}.")
    if costly:
        told = "; ".join(
            f"{name} {figure(methods[name], 'worst_topic_accuracy', 'worst_topic')}, text x{methods[name]['text_perplexity_ratio'].mean():.3f}"
            for name in costly
        )
        lines.append(f"Forget it, but lose too much of the worst other topic or of ordinary text: {told}.")
    return " ".join(lines)


def withstanding(form: str, methods: dict[str, pd.DataFrame], sound: Sequence[str], updates: Sequence[int]) -> str:
    """Who withstands retraining best in one form, at which cost, among those that forget, keep the rest, and whose attack
    counts; and who seems to do better outside these."""
    column = f"recovery_{form}_{updates[-1]}"
    back = {
        name: float(part[column].mean())
        for name, part in methods.items()
        if column in part and part[column].notna().any() and not (form == "stripped" and _is(part, HOOKS))
    }
    if not back:
        return ""
    order = sorted(back, key=lambda name: abs(back[name]))
    fit = [name for name in order if name in sound and counts(methods[name], form)]
    if not fit:
        return f"{FORMS[form]}, no method that forgets and keeps the rest faces an attack that counts."
    first = methods[fit[0]]
    steps = [f"recovery_{form}_{step}" for step in updates]
    told = " / ".join(f"{first[name].mean():.2f}" for name in steps[:-1])
    lines = [
        f"{FORMS[form]}, {fit[0]} withstands best: {told + ' / ' if told else ''}{figure(first, column, column)} of V is back after "
        f"{' / '.join(map(str, updates))} updates{' (its weights are the edit)' if form == 'weights' and _is(first, WEIGHTS) else ''}. "
        f"{cost(first)}",
        *rate_of(first, form),
    ]
    near = [name for name in fit[1:] if _overlap(spread(first, column, column), spread(methods[name], column, column))]
    rest = [name for name in fit[1:] if name not in near]
    for names, words in ((near, "Not told apart from it, as the ranges overlap"), (rest, "More comes back of")):
        if names:
            lines.append(f"{words}: {', '.join(f'{name} {back[name]:.2f}' for name in names)}.")
    better = [name for name in order if name not in fit and abs(back[name]) < abs(back[fit[0]])]
    if better:
        reasons = (f"{name} {back[name]:.2f} ({_unfit(methods[name], name in sound)})" for name in better)
        lines.append(f"Less comes back of {', '.join(reasons)}.")
    return " ".join(lines)


def rate_of(part: pd.DataFrame, form: str) -> list[str]:
    """The rate that served the attacker best, and what it leaves the unedited model: too high a rate takes V from any."""
    rates, left = sorted(set(part[f"lr_{form}"])), float(part[f"unedited_at_lr_{form}"].astype(float).mean())
    if math.isnan(left):  # it does not stand that rate at all
        return []
    told = ", ".join(f"{rate:.1g}" for rate in rates)
    return [f"At the attacker's best rate in the end, {told}, the unedited model is left with {left:.2f} of V."]


def cost(part: pd.DataFrame) -> str:
    """What a method takes."""
    words = [
        (
            "worst other topic",
            figure(part, "worst_topic_accuracy", "worst_topic") if "worst_topic_accuracy" in part else "",
        ),
        ("perplexity of ordinary text", f"x{part['text_perplexity_ratio'].mean():.3f}"),
        ("fit", f"{part['seconds'].mean():.0f} s" if part["seconds"].notna().any() else ""),
        ("stored", f"{part['stored_bytes'].mean() / 1000:,.0f} kB"),
    ]
    return f"Its cost: {', '.join(f'{name} {value}' for name, value in words if value)}."


def stripping(methods: dict[str, pd.DataFrame], unedited: pd.DataFrame) -> str:
    """Whose hooks can simply be taken off."""
    hooked = [name for name, part in methods.items() if _is(part, HOOKS)]
    if not hooked:
        return ""
    known = float(unedited["forget_accuracy"].mean())
    what = "is" if len(hooked) == 1 else "are"
    return f"Stripped of the hooks, {_listed(hooked)} {what} the unedited model, which answers {known:.2f} without any retraining."


def suppression(methods: dict[str, pd.DataFrame], updates: Sequence[int]) -> str:
    """Who is below the floor, at once or after the attack: what is pushed down is still there."""
    at_once = [
        f"{name} {figure(part, 'forget_accuracy', 'forget')}"
        for name, part in methods.items()
        if "untaught_accuracy" in part
        and (ends := spread(part, "forget_accuracy", "forget"))
        and ends[1] < part["untaught_accuracy"].mean()
    ]
    column = f"recovery_kept_{updates[-1]}"
    low = []
    for name, part in methods.items():
        ends = spread(part, column, column) if column in part else None
        if ends is not None and ends[1] < 0:
            low.append(f"{name} {figure(part, column, column)}")
    lines = [f"Answered less often than never-taught facts, so suppressed and not gone: {'; '.join(at_once)}."] * bool(
        at_once
    )
    lines += [f"Recovery below 0 after {updates[-1]} updates, so still suppressed: {'; '.join(low)}."] * bool(low)
    return " ".join(lines)


def counts(part: pd.DataFrame, form: str) -> bool:
    """Whether T was learned to 95%, with every seed."""
    return not part[f"counts_{form}"].isin([False]).any()


def validity(methods: dict[str, pd.DataFrame]) -> str:
    """Which attacks do not count."""
    void = [
        f"{name}, {FORMS[form][0].lower()}{FORMS[form][1:]} ({part[f'train_accuracy_{form}'].min():.2f} of T)"
        for form in FORMS
        for name, part in methods.items()
        if f"counts_{form}" in part and not counts(part, form) and not (form == "weights" and _is(part, WEIGHTS))
    ]
    if not void:
        return "Every attack counts: T itself was learned to 95% or more."
    return f"T was not learned to 95%, so these attacks do not count: {'; '.join(void)}."


def training(methods: dict[str, pd.DataFrame], unedited: pd.DataFrame, updates: Sequence[int]) -> str:
    """Whether the edited models can be trained at all."""
    column = f"new_accuracy_{few(updates)}_kept"
    if column not in unedited or unedited[column].isna().all():
        return ""
    usual = float(unedited[column].mean())
    shares = {name: float(part[column].mean()) / usual for name, part in methods.items() if part[column].notna().any()}
    if not shares or not usual:
        return ""
    slow = {name: share for name, share in shares.items() if share < SLOWER}
    least = min(shares, key=lambda name: shares[name])
    told = (
        f"Hard to train at all, so that what does not come back need not be gone: {', '.join(f'{n} {s:.2f}' for n, s in slow.items())}."
        if slow
        else f"None is a model that cannot be trained; least is learned by {least}, {shares[least]:.2f}."
    )
    return (
        f"New facts after {few(updates)} updates on them: the unedited model answers {usual:.2f}; as a share of that, edits kept: "
        f"{', '.join(f'{name} {share:.2f}' for name, share in shares.items())}. {told}"
    )


def probing(methods: dict[str, pd.DataFrame], unedited: pd.DataFrame, untaught: pd.DataFrame) -> str:
    """Where a probe still reads what was forgotten."""
    bits = {name: float(part["probe_bits"].mean()) for name, part in methods.items()}
    order = sorted(bits, key=lambda name: bits[name])
    if not order:
        return ""
    floor = (
        f", of never-taught facts {untaught['probe_bits'].mean():.2f}" if untaught["probe_bits"].notna().any() else ""
    )
    return (
        f"A linear probe reads {unedited['probe_bits'].mean():.2f} bits about V's answers off the unedited model at its best layer{floor}; "
        f"with the edits {', '.join(f'{name} {bits[name]:.2f}' for name in order)}."
    )


def control(untaught: pd.DataFrame, updates: Sequence[int]) -> str:
    """Whether never-taught facts seem to come back too."""
    columns = [f"recovery_kept_{step}" for step in updates]
    if untaught.empty or not set(columns) <= set(untaught):
        return ""
    values = " / ".join(f"{untaught[column].mean():+.2f}" for column in columns)
    return f"The control: one half of the never-taught facts against the other seems to recover {values}."


def _unfit(part: pd.DataFrame, sound: bool) -> str:
    """Why a method is out of the running."""
    if sound:
        return "T was not learned, so this does not count"
    return "keeps too little of the rest" if forgets(part) else "does not forget to begin with"


def _is(part: pd.DataFrame, kind: str) -> bool:
    return bool(part["edit"].iloc[0] == kind)


def _overlap(first: tuple[float, float] | None, second: tuple[float, float] | None) -> bool:
    return first is None or second is None or (first[0] <= second[1] and second[0] <= first[1])


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}" if names else ""


def _verb(names: Sequence[str]) -> str:
    return "gets it" if len(names) < 2 else "get it"
