"""Pictures of attacks: which rate is shown, what is a control, and what the rows are called."""

from typing import Any

import numpy as np
import pandas as pd
import pytest

from mrp_lens import plots
from mrp_lens.plots.theme import FORGET, GREY
from tests.plots.test_plots import entries, titles, told
from tests.support.attack_frames import attacked, input_gradients, jailbreak, probed, relearning, unembedded


def test_of_several_rates_the_attackers_best_is_drawn() -> None:
    frame = relearning()
    figure = plots.relearning_curves(frame)
    best = frame[frame["lr"] == 1e-3]
    np.testing.assert_allclose(told(figure, "forget, held out"), best[["step", "held_out_accuracy"]])
    np.testing.assert_allclose(told(figure, "new facts"), best[["step", "new_accuracy"]])
    floor, ceiling = (entries(figure, name)[0] for name in ("never taught (floor)", "unedited (ceiling)"))
    assert (set(floor.y), set(ceiling.y)) == ({0.25}, {0.99})
    with pytest.raises(ValueError, match="several rows for step 0"):
        plots.relearning_curves(frame.drop(columns="counts"))


def test_forms_have_panels_of_their_own_and_the_unedited_model_has_none() -> None:
    forms = relearning(forms=("kept", "stripped")).assign(method="mrp")
    figure = plots.relearning_curves(pd.concat([forms, relearning().assign(method="unedited")]))
    assert titles(figure) == ["mrp, edit kept", "mrp, hooks stripped", "unedited"]
    assert titles(plots.relearning_curves(forms[forms["form"] == "kept"])) == ["mrp"]


def test_new_facts_that_are_unknown_are_left_out() -> None:
    assert not entries(plots.relearning_curves(relearning().assign(new_accuracy=None)), "new facts")


def test_recoveries_stand_in_the_order_of_the_table_and_controls_are_grey() -> None:
    frame = attacked()
    unknown = pd.DataFrame({"method": ["mrp"], "attack": "probe, linear", "recovery": np.nan})
    figure = plots.recoveries(pd.concat([frame, unknown]))
    labels = list(figure.layout.yaxis.ticktext)
    assert labels[:2] == ["relearn, edit kept, 5 steps", "relearn, edit kept, 20 steps"]
    assert labels[-1].startswith("never-taught: relearn")
    assert len(labels) == 7  # a row without a recovery has no place
    edited = frame[frame["method"] == "mrp"]
    shown = told(figure, "forget")[:, [0, 2, 3]]
    np.testing.assert_allclose(shown, edited[["recovery", "recovery_low", "recovery_high"]])
    (control,) = entries(figure, "unedited and other controls")
    assert (control.marker.color, list(control.x), list(control.y)) == (GREY, [0.02], [6.0])
    assert [entries(figure, name)[0].x for name in ("never taught", "unedited")] == [(0.0, 0.0), (1.0, 1.0)]
    with pytest.raises(ValueError, match="needs the columns attack or variant"):
        plots.recoveries(frame.drop(columns="attack"))


def test_without_a_recovery_of_an_edit_there_is_nothing_to_draw() -> None:
    frame = attacked()
    controls = frame.assign(recovery=frame["recovery"].where(frame["method"] != "mrp"))
    for nothing in (controls, frame.assign(recovery=np.nan)):
        with pytest.raises(ValueError, match="no row of an edit has a recovery"):
            plots.recoveries(nothing)


def test_an_interval_far_outside_does_not_squeeze_the_axis() -> None:
    frame = attacked().assign(recovery_low=-4.7)
    low, high = plots.recoveries(frame).layout.xaxis.range
    assert (low, high) == (-0.15, 1.12)
    assert plots.recoveries(frame.assign(recovery=-0.4)).layout.xaxis.range[0] < -0.4


def test_probes_of_controls_are_grey_and_all_there_is_to_know_is_a_line() -> None:
    figure = plots.probe_bits(probed())
    held_out = probed().query("group == 'held-out'")[["layer", "bits", "low", "high"]]
    np.testing.assert_allclose(told(figure, "forget, held out"), held_out)
    assert {entries(figure, name)[0].line.color for name in ("random labels", "never taught")} == {GREY}
    assert entries(figure, "exactly known")[0].y == (2.0, 2.0)


def test_the_lens_has_a_level_for_guessing_and_grey_for_never_taught_facts() -> None:
    figure = plots.logit_lens(unembedded())
    assert entries(figure, "uniform guess")[0].y == (0.25, 0.25)
    fewer = pd.concat([unembedded(), unembedded().query("group == 'forget'").assign(group="other", chance=0.5)])
    assert [level.y for level in entries(plots.logit_lens(fewer), "uniform guess")] == [(0.25, 0.25), (0.5, 0.5)]
    assert entries(figure, "never taught")[0].line.color == GREY
    assert entries(figure, "forget")[0].line.color == FORGET


def test_the_unedited_model_stands_once_beside_several_edits() -> None:
    frames = [input_gradients().assign(method=method) for method in ("mrp", "rmu")]
    figure = plots.input_gradients(pd.concat(frames))
    assert list(figure.layout.xaxis3.ticktext) == ["unedited", "mrp", "rmu"]
    assert [len(trace.x) for trace in entries(figure, "forget")] == [3] * 3
    np.testing.assert_allclose(entries(figure, "forget")[2].y, [0.015, 10.0, 10.0])


def test_a_search_begins_at_a_random_trigger_and_shows_what_is_known_without_one() -> None:
    figure: Any = plots.jailbreak_curve(jailbreak())
    np.testing.assert_allclose(told(figure, "forget, held out"), [[0, 0.44], [25, 0.5], [50, 0.52]])
    np.testing.assert_allclose(told(figure, "forget, no trigger"), [[0, 0.27]])
    assert entries(figure, "never taught (floor)")[0].line.color == GREY
