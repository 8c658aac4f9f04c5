"""The picture of a search."""

import numpy as np
import pandas as pd
import pytest

from mrp_lens import plots
from mrp_lens.plots.theme import GREY
from tests.support.frames import tuned


def test_the_front_is_joined_from_left_to_right_and_the_chosen_one_is_marked() -> None:
    frame = tuned()
    figure = plots.pareto(frame)
    traces = {trace.name: trace for trace in figure.data}
    front = frame[frame["on_front"]].sort_values("damage")
    assert list(traces["front"].x) == list(front["damage"])
    assert list(traces["front"].y) == list(front["forget_accuracy"])
    assert (np.diff(traces["front"].y) < 0).all()
    assert "lines" in traces["front"].mode
    assert len(traces["beaten"].x) == len(frame) - len(front)
    assert traces["beaten"].mode == "markers"
    assert list(traces["chosen"].x) == list(frame[frame["chosen"]]["damage"])
    assert traces["chance"].line.color == traces["unedited"].line.color == GREY


def test_what_is_not_known_of_a_trial_is_no_yes() -> None:
    frame = tuned().astype({"chosen": object, "on_front": object})
    frame.loc[~frame["chosen"].astype(bool), "chosen"] = np.nan  # as of frames that were put one below the other
    traces = {trace.name: trace for trace in plots.pareto(frame).data}
    assert len(traces["chosen"].x) == 1


def test_hovering_tells_a_trial_and_its_settings_as_text() -> None:
    frame = tuned(3).assign(kind="<s>bold</s>", budget=0.1)
    told = next(trace for trace in plots.pareto(frame).data if trace.name == "chosen").text[0]
    row = frame[frame["chosen"]].iloc[0]
    assert told.startswith(f"trial: {row['trial']}<br>forget_accuracy: {row['forget_accuracy']:.4g}<br>")
    assert f"<br>lr: {row['lr']:.4g}<br>layer: 3" in told
    assert "kind: &lt;s&gt;bold&lt;/s&gt;" in told
    assert "budget" not in told
    assert "chosen" not in told


def test_trials_that_were_not_measured_are_left_out_and_none_is_refused() -> None:
    frame = tuned(6)
    frame.loc[0, "forget_accuracy"] = np.nan
    assert sum(len(trace.x) for trace in plots.pareto(frame).data if trace.name in ("front", "beaten")) == 5
    with pytest.raises(ValueError, match="pareto: nothing to draw, the column damage holds no number"):
        plots.pareto(frame.assign(damage=np.nan))
    with pytest.raises(ValueError, match="pareto needs the columns on_front"):
        plots.pareto(pd.DataFrame({"damage": [1.0], "forget_accuracy": [0.5]}))
