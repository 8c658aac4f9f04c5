"""Which trials of a search are worth a look, and which one is taken."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from numpy.typing import NDArray


def on_front(values: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Which rows no other row beats: none is at most as large in every column and smaller in one.

    Args:
        values: [trials, objectives], each minimised; NaN: not measured, and never on the front.
    """
    measured = ~np.isnan(values).any(axis=1)
    beaten = np.array([bool(((values <= row).all(axis=1) & (values < row).any(axis=1)).any()) for row in values], bool)
    return measured & ~beaten


def chosen_of(rows: pd.DataFrame, *, chance: float, budget: float | None) -> tuple[int, str]:
    """The row that is taken, and why.

    With a budget: of the trials within it the one that leaves least of the forget set; where there is none, the one that does least
    damage. Without: the one on the front for which accuracy above chance and damage in nats add up to the least, so that a nat of
    damage a token weighs as much as all of the forget set.

    Args:
        rows: the trials that were measured: `trial`, `forget_accuracy`, `damage`, `on_front`.
        chance: what guessing gives on the forget questions.
        budget: nats of damage a token.
    """
    if budget is not None and (rows["damage"] <= budget).any():
        best = _least(rows[rows["damage"] <= budget], ["forget_accuracy", "damage", "trial"])
        return best, f"it leaves least of the forget set among those within the budget of {budget:g} nats"
    if budget is not None:
        best = _least(rows, ["damage", "forget_accuracy", "trial"])
        return best, f"none kept to the budget of {budget:g} nats; it does least damage"
    front = rows[rows["on_front"]]
    total = (front["forget_accuracy"] - chance).clip(lower=0.0) + front["damage"]
    best = _least(front.assign(total=total), ["total", "damage", "forget_accuracy", "trial"])
    return best, "on the front, accuracy above chance and damage in nats add up to the least"


def _least(rows: pd.DataFrame, columns: Sequence[str]) -> int:
    return int(rows.sort_values(list(columns))["trial"].iloc[0])
