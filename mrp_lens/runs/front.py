"""What edits forget and what damage they do: the figures, which of them are worth a look, and which one is taken."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from mrp_lens import metrics
from mrp_lens.data import UnlearningTask
from mrp_lens.edits import Edit, edit_on
from mrp_lens.models import LensModel


def figures_of(
    model: LensModel, task: UnlearningTask, edit: Edit | None, *, seed: int, limit: int | None = None
) -> dict[str, float]:
    """Accuracy on the forget and retain questions, and damage to the held-out text.

    Args:
        edit: None: the unedited model.
        limit: questions of each quiz at most.

    Returns:
        `forget_accuracy` and `retain_accuracy`, each with `_low`, `_high` (95%), `_chance` and `_answer_probability` in the place
        of `_accuracy`; `damage` (nats a token), `damage_low` and `damage_high`.
    """
    row: dict[str, float] = {}
    with edit_on(model, edit):
        for side, quiz in task.quiz(limit=limit).items():
            asked = metrics.accuracy(model, quiz, seed=seed, progress=False).iloc[0]
            columns = ("accuracy", "low", "high", "chance", "answer_probability")
            row |= {f"{side}_{column}": float(asked[column]) for column in columns}
    if edit is None:
        return row | {"damage": 0.0, "damage_low": 0.0, "damage_high": 0.0}
    found = metrics.damage(model, edit, task.held_out, seed=seed, progress=False).iloc[0]
    return row | {
        "damage": float(found["damage"]),
        "damage_low": float(found["low"]),
        "damage_high": float(found["high"]),
    }


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
