import pandas as pd
import pytest

from mrp_lens.metrics import value

ROW = {"n": 4, "accuracy": 0.75, "low": 0.25, "high": 1.0, "chance": 0.5}


@pytest.mark.parametrize("groups", [["all"], ["forget"], ["all", "forget", "retain"]])
def test_the_value_of_a_frame_is_the_column_before_its_interval(groups: list[str]) -> None:
    frame = pd.DataFrame([{"group": group, **ROW} for group in groups])
    assert (value(frame), type(value(frame))) == (0.75, float)
    assert value(frame.iloc[:1].drop(columns=["group", "n"])) == 0.75


@pytest.mark.parametrize(
    ("frame", "message"),
    [
        (pd.DataFrame([{"group": "forget", **ROW}] * 2), r"has 2 rows; choose one, such as frame\[frame\['group'\]"),
        (pd.DataFrame([{"group": "all", "layer": layer, **ROW} for layer in (0, 1)]), "has 2 rows"),
        (pd.DataFrame([ROW]).iloc[:0], "has 0 rows"),
        (pd.DataFrame({"x": [1.0]}), "columns x has no interval `low`, `high` behind a value"),
        (pd.DataFrame(), "columns none has no interval"),
    ],
    ids=["groups", "layers", "no row", "no interval", "nothing"],
)
def test_a_frame_without_one_value_is_refused(frame: pd.DataFrame, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        value(frame)
