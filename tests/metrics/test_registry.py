"""A metric and a figure of one's own, registered by one decorated function each, are in tables and on the page."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import plotly.graph_objects as go
import pytest

from mrp_lens import metrics, plots
from mrp_lens.data import Corpus, Question, Questions
from mrp_lens.data.task import UnlearningTask
from mrp_lens.metrics import METRICS, Measured, frames_for, register, rows_and_frames_for, rows_for
from mrp_lens.plots import FIGURES
from mrp_lens.runs.record import Run
from mrp_lens.runs.report import report
from mrp_lens.runs.report.diagnostics import diagnostics
from tests.conftest import state_of
from tests.support.edits import conditional, projection

QUIZ = Questions(tuple(Question("The sky is", (" red", " blue"), i) for i in (0, 1, 1)))
EDIT = projection(1, 2)


@pytest.fixture
def task(texts: tuple[Corpus, Corpus]) -> UnlearningTask:
    return UnlearningTask((texts[0],), texts[1], texts[1].spread(5), QUIZ, QUIZ.spread(2))


@pytest.fixture
def toys(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, bool]]:
    """A metric and a figure, forgotten again after the test; the list tells with which edit the metric was called."""
    for registry in (METRICS, FIGURES):
        len(registry)  # what belongs to the library is registered by now
        monkeypatch.setattr(registry, "_entries", dict(registry._entries))
    calls: list[tuple[Any, bool]] = []

    @plots.register("toy_by_side")
    def toy_by_side(frame: plots.Frame) -> go.Figure:
        """Toys on each side."""
        return go.Figure(go.Scatter(y=list(frame["toys"])), {"title": "what the toy drew"})

    @register(
        "toy",
        summary="Counts toys.",
        row=lambda frame: {"toys": frame["toys"].sum()},
        headings={"toys": "toys in all"},
        figures=["toy_by_side"],
    )
    def toy(measured: Measured) -> pd.DataFrame:
        hooked = any(point.fwd_hooks for point in measured.model.hook_dict.values())
        calls.append((measured.edit, hooked))
        return pd.DataFrame({"side": ["forget", "retain"], "toys": [1, 2]})

    return calls


@pytest.mark.parametrize("table", ["unlearn", "sweep", "leaderboard"])
def test_a_metric_of_ones_own_is_in_every_row(
    model: Any, task: UnlearningTask, toys: list[Any], table: str, untouched: None
) -> None:
    row = rows_for(table, Measured(model=model, task=task, edit=EDIT, progress=False))
    assert (row["toys"], type(row["toys"])) == (3.0, float)
    assert toys == [(EDIT, True)], "the edit was not on"
    assert not any(point.fwd_hooks for point in model.hook_dict.values())
    assert metrics.headings()["toys"] == "toys in all"


def test_a_metric_with_a_figure_of_ones_own_is_on_the_page(
    model: Any, task: UnlearningTask, toys: list[Any], tmp_path: Path
) -> None:
    run = Run("x", {}, 0, rows=[{"method": "mine", "toys": 3.0}])
    run.frames |= diagnostics(model, task, {"unedited": None, "mine": EDIT}, {}, progress=False)
    assert run.frames["toy_by_side"]["method"].tolist() == ["unedited"] * 2 + ["mine"] * 2
    run.write(tmp_path / "run", overwrite=False)
    page = report(tmp_path / "run").read_text(encoding="utf-8")
    for expected in ("<th>toys in all</th>", 'id="toy_by_side"', "Toys on each side.", "what the toy drew"):
        assert expected in page, expected
    assert "toy_by_side" in FIGURES
    assert list(FIGURES) == sorted(FIGURES)


def test_rows_have_the_keys_of_version_0_1_in_their_order_and_the_damage(
    model: Any, task: UnlearningTask, untouched: None
) -> None:
    measured = Measured(model=model, task=task, edit=EDIT, progress=False)
    ends = ("accuracy", "low", "high")
    expected = {
        "unlearn": [
            *("forget_probability", "forget_probability_low", "forget_probability_high", "text_perplexity"),
            *(f"{side}_{key}" for side in ("forget", "retain") for key in (*ends, "chance")),
            *("damage", "damage_low", "damage_high"),
        ],
        "sweep": [f"{s}_{key}" for s in ("forget", "retain") for key in (*ends, "max_probability", "max_logit")],
        "leaderboard": ["damage", "damage_low", "damage_high"],
    }
    rows = {table: rows_for(table, measured) for table in expected}
    assert {table: list(row) for table, row in rows.items()} == expected
    with EDIT.applied(model):
        first = metrics.accuracy(model, QUIZ).iloc[0]
        sure = metrics.confidence(model, {"forget": QUIZ}, mode="forced").set_index("measure")["mean"]
        text = metrics.perplexity(model, task.held_out)["perplexity"].iloc[0]
        probability = metrics.answer_probability(model, task.forget_texts).iloc[0]
    assert rows["unlearn"]["text_perplexity"] == text
    assert [rows["unlearn"][key] for key in expected["unlearn"][:3]] == [*probability[["probability", "low", "high"]]]
    assert [rows["unlearn"][f"forget_{key}"] for key in (*ends, "chance")] == [*first[[*ends, "chance"]]]
    assert [rows["sweep"][f"forget_{key}"] for key in ends] == [*first[[*ends]]]
    assert rows["sweep"]["forget_max_logit"] == sure["max_logit"]
    assert rows["unlearn"]["damage"] == metrics.damage(model, EDIT, task.held_out)["damage"].iloc[0]
    bare = UnlearningTask(task.forget, task.retain, task.held_out)
    assert list(rows_for("unlearn", Measured(model=model, task=bare, progress=False))) == expected["unlearn"][:4]
    assert rows_for("sweep", Measured(model=model, task=bare, progress=False)) == {}


def test_a_benchmark_has_the_fields_measures_and_those_that_compare_need_a_reference(
    model: Any, other: Any, task: UnlearningTask, untouched: None
) -> None:
    asked = Corpus.from_rows(
        [{"p": "The old", "c": " man."}, {"p": "A", "c": " house."}], prompt="{p}", completion="{c}"
    )
    own = replace(task, forget=(asked,), retain=asked)
    bare = rows_for("benchmark", Measured(model=model, task=own, edit=EDIT, progress=False))
    compared = {"depth", "depth_of_states", "forget_quality"} | {"auc_loss", "privacy_leakage_min_k_plus_plus"}
    alone = {"forget_probability", "forget_exact_memorization", "forget_extraction_strength", "forget_truth_ratio"} | {
        *("forget_rouge_l", "forget_token_f1", "answers_perplexity", "answers_gibberish", "model_utility", "damage"),
        *("forget_accuracy", "retain_accuracy"),
    }
    assert alone <= set(bare)
    assert not compared & set(bare)
    measured = Measured(model=model, task=own, edit=EDIT, reference=other, unseen=task.retain, progress=False)
    row, frames = rows_and_frames_for("benchmark", measured)
    assert compared <= set(row) - set(bare)
    assert set(frames) == {"depth"}
    assert row["depth"] == frames["depth"]["depth"].iloc[0]


def test_every_figure_of_a_metric_draws_its_frame(model: Any, task: UnlearningTask, untouched: None) -> None:
    measured = Measured(model=model, task=task, edit=EDIT, limit=2, documents=4, progress=False)
    of_any = {"alignment_by_layer", "norms", "confidence_by_method"}
    frames = frames_for(measured)
    assert set(frames) == of_any | {"displacement", "principal_plane", "propagation"}
    gates = {"gate", "gate_tokens"}
    assert {name for metric in METRICS.values() for name in metric.figures} == set(frames) | gates | {"depth"}
    assert set(frames_for(replace(measured, reference=model))) == set(frames) | {"depth"}
    gated = frames_for(replace(measured, edit=conditional(1, 2)))
    assert set(gated) == set(frames) | gates
    frames |= {name: gated[name] for name in gates}
    for name, frame in frames.items():
        assert isinstance(FIGURES[name](frame), go.Figure)
    assert set(frames_for(Measured(model=model, task=task, progress=False))) == of_any
    assert frames["displacement"]["documents"].max() == 4


def test_what_cannot_be_registered_or_asked_for_is_named(model: Any, task: UnlearningTask, toys: list[Any]) -> None:
    def frame(measured: Measured) -> pd.DataFrame:
        return pd.DataFrame({"side": ["forget"]})

    measured = Measured(model=model, task=task, progress=False)
    with pytest.raises(ValueError, match="unknown table 'demo'; choose one of benchmark, leaderboard, sweep, unlearn"):
        rows_for("demo", measured)
    with pytest.raises(TypeError, match="Measured"):
        rows_for(measured, "unlearn")  # type: ignore[arg-type]
    assert len(repr(measured)) < 500
    with pytest.raises(
        ValueError, match=r"the metric 'other' names the tables demo; choose among benchmark, leaderboard"
    ):
        register("other", summary="", tables=["demo"])(frame)
    with pytest.raises(ValueError, match="a metric named 'toy' is registered already"):
        register("toy", summary="")(frame)
    register("typo", summary="", row=lambda frame: {"x": frame["sides"].iloc[0]}, tables=["benchmark"])(frame)
    with pytest.raises(
        ValueError,
        match=r"the metric 'typo' \(tests.*\) cannot be made: KeyError: 'sides'; its frame has the columns side",
    ):
        rows_for("benchmark", measured)
    register("twin", summary="", row=lambda frame: {"toys": 1.0}, figures=["toy_by_side"])(frame)
    with pytest.raises(ValueError, match="'twin' gives the key toys, which another metric gives too"):
        rows_for("leaderboard", measured)
    with pytest.raises(ValueError, match="'twin' gives the figure toy_by_side, which another metric gives too"):
        frames_for(measured)


def test_a_metric_that_compares_gets_the_model_without_the_edit(model: Any, task: UnlearningTask, toys: Any) -> None:
    seen = []

    @register("pair", summary="", row=lambda frame: {"moved": frame["moved"].iloc[0]}, compares=True)
    def pair(measured: Measured) -> pd.DataFrame | None:
        seen.append(state_of(measured.model)["tl_hooks"])
        return None if measured.edit is None else pd.DataFrame({"moved": [1.0]})

    plain = state_of(model)["tl_hooks"]
    row = rows_for("leaderboard", Measured(model=model, task=task, edit=EDIT))
    assert {key: value for key, value in row.items() if not key.startswith("damage")} == {"toys": 3.0, "moved": 1.0}
    assert rows_for("leaderboard", Measured(model=model, task=task)) == {"toys": 3.0}
    assert seen == [plain, plain]


def test_every_metric_says_what_it_is() -> None:
    assert all(re.fullmatch(r"[A-Z].*\.", metric.summary) for metric in METRICS.values())
