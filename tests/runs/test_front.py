import math
from typing import Any

import numpy as np
import pandas as pd
from hypothesis import given
from hypothesis import strategies as st

from mrp_lens.runs.front import chosen_of, on_front

FIGURE = st.one_of(st.sampled_from([0.0, 0.25, 0.5, 1.0, math.nan]), st.floats(0, 2))
ROWS = st.lists(st.tuples(FIGURE, FIGURE), min_size=1, max_size=12)


def beats(a: tuple[float, float], b: tuple[float, float]) -> bool:
    return a[0] <= b[0] and a[1] <= b[1] and a != b


@given(ROWS)
def test_the_front_is_what_nothing_beats(rows: list[tuple[float, float]]) -> None:
    measured = [row for row in rows if not any(map(math.isnan, row))]
    expected = [row in measured and not any(beats(other, row) for other in measured) for row in rows]
    assert on_front(np.array(rows, dtype=float)).tolist() == expected


def frame(*rows: tuple[float, float]) -> Any:
    table = pd.DataFrame(rows, columns=["forget_accuracy", "damage"])
    return table.assign(trial=range(len(rows)), on_front=on_front(table.to_numpy(float)))


def test_within_a_budget_the_least_is_left() -> None:
    rows = frame((0.3, 0.2), (0.5, 0.05), (0.4, 0.1), (0.4, 0.09), (0.9, 0.0))
    assert chosen_of(rows, chance=0.25, budget=0.1)[0] == 3
    best, why = chosen_of(rows.iloc[:2], chance=0.25, budget=0.01)
    assert best == 1
    assert "none kept to the budget of 0.01 nats" in why


def test_without_one_what_is_left_and_what_is_lost_add_up_to_the_least() -> None:
    assert chosen_of(frame((0.3, 0.2), (0.4, 0.05), (0.9, 0.0)), chance=0.25, budget=None)[0] == 1
    # Below chance nothing more is forgotten: less damage counts.
    assert chosen_of(frame((0.1, 0.2), (0.2, 0.1)), chance=0.25, budget=None)[0] == 1
