"""Every picture, from frames such as the metrics make: what is drawn, in which colours, and what is refused."""

import re
from functools import cache
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import plotly.io
import pytest
import torch

from mrp_lens import plots
from mrp_lens.plots.facets import Panels
from mrp_lens.plots.theme import FORGET, GREY, GREY_BAND, RETAIN, Axis, Look, group_colours, shortened_apart
from tests.support import frames
from tests.support.frames import GROUPS, METHODS, PLAIN, SEEDS, VARIANTS, alignment, by_method, gates, geometry, sweep


@cache
def draw(name: str) -> go.Figure:
    return plots.FIGURES[name.split(":")[0]](VARIANTS[name])


def titles(figure: go.Figure) -> list[str]:
    return [annotation.text for annotation in figure.layout.annotations]


def entries(figure: go.Figure, name: str) -> list[Any]:
    """The traces of that name which draw something."""
    return [trace for trace in figure.data if trace.name == name and not only_explains(trace)]


def only_explains(trace: Any) -> bool:
    """Whether the trace is there for its entry in the legend, about a symbol."""
    return trace.x is not None and list(trace.x) == [None]


def told(figure: go.Figure, name: str) -> Any:
    """What hovering over the traces of that name tells, a row a point: x, y, and the ends of the interval."""
    return np.concatenate([np.array(trace.customdata, dtype=float) for trace in entries(figure, name)])


def test_every_picture_is_listed_by_its_name() -> None:
    assert list(plots.FIGURES) == sorted(PLAIN)
    assert all(getattr(plots, name) is function for name, function in plots.FIGURES.items())
    assert set(plots.__all__) == {*PLAIN, "FIGURES", "Frame", "register"}


@pytest.mark.parametrize("name", VARIANTS)
def test_every_trace_has_data_and_every_axis_a_title(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(go.Figure, "show", lambda *_: pytest.fail("the library shows nothing by itself"))
    before = (plotly.io.templates.default, plotly.io.renderers.default)
    figure = draw(name)
    assert (plotly.io.templates.default, plotly.io.renderers.default) == before
    assert isinstance(figure, go.Figure)
    assert figure.data
    for trace in figure.data:
        assert only_explains(trace) or np.isfinite(np.asarray(trace.y, dtype=float)).any(), trace.name
    assert figure.layout.title.text
    of_axes: dict[str, list[str]] = {}  # axes that match share a title
    for axis in (*figure.select_xaxes(), *figure.select_yaxes()):
        of_axes.setdefault(axis.matches or axis.plotly_name.replace("axis", ""), []).append(axis.title.text or "")
    assert all(any(texts) for texts in of_axes.values())
    assert not re.search("NaN|Infinity", figure.to_json())


CONTROL = re.compile(
    "never taught|une|unchanged|exact|uniform|sampling|unrel|random|noise|norm|chance|c = norm|coefficient|u·h|target|budget"
)


@pytest.mark.parametrize("name", VARIANTS)
def test_forget_and_retain_have_the_same_colours_everywhere_and_controls_are_grey(name: str) -> None:
    figure = draw(name)
    for trace in figure.data:
        if trace.type == "heatmap":
            continue  # from white to a colour that is nobody's
        colours = {trace.line.color, trace.marker.color} - {None}
        if trace.name.startswith(("forget", "retain")):
            assert colours == {FORGET if trace.name.startswith("forget") else RETAIN}
        elif CONTROL.match(trace.name):
            assert colours == {GREY}
        elif trace.name != "text":  # of which the retain corpus is made
            assert not colours & {FORGET, RETAIN, GREY}, trace.name
    for shape in figure.layout.shapes:
        assert shape.fillcolor == GREY_BAND


@pytest.mark.parametrize("name", [name for name in VARIANTS if "four methods" in name])
def test_each_method_has_a_panel_or_a_place_on_the_axis(name: str) -> None:
    figure = draw(name)
    for method in METHODS:
        on_axis = any(method in (axis.ticktext or ()) for axis in figure.select_xaxes())
        assert on_axis or any(title.startswith(method) for title in titles(figure))


@pytest.mark.parametrize("picture", PLAIN)
def test_a_frame_that_does_not_fit_is_refused_with_what_would(picture: str) -> None:
    function, frame = plots.FIGURES[picture], PLAIN[picture]()
    with pytest.raises(ValueError, match="needs the columns") as refusal:
        function(pd.DataFrame({"other": [1.0]}))
    message = rf"{picture} needs the columns (.*); the frame has other\. Such a frame comes from (.*)"
    said = re.fullmatch(message, str(refusal.value))
    assert said
    for name in said[1].split(", "):
        with pytest.raises(ValueError, match=f"{picture} needs the columns .*{name}"):
            function(frame.drop(columns=name))
    with pytest.raises(ValueError, match="no rows"):
        function(frame.iloc[:0])
    with pytest.raises(TypeError, match=f"{picture} takes a DataFrame or a mapping of columns, got list"):
        function([1, 2])


@pytest.mark.slow
@pytest.mark.parametrize("picture", PLAIN)
def test_columns_may_be_tensors_arrays_and_objects(picture: str) -> None:
    frame = PLAIN[picture]()
    columns: dict[str, Any] = {}
    rounded = frame.copy()
    for number, name in enumerate(frame):
        values: Any = frame[name].tolist()
        if pd.api.types.is_float_dtype(frame[name]) and name not in ("layer", "seed"):
            tensor = torch.tensor(values, dtype=torch.bfloat16, requires_grad=True)
            rounded[name] = tensor.detach().double().numpy()
            values = list(tensor) if number % 2 else tensor
        elif pd.api.types.is_integer_dtype(frame[name]):
            values = torch.tensor(values) if number % 2 else frame[name].to_numpy(np.int32)
        columns[str(name)] = values
    assert plots.FIGURES[picture](columns).to_json() == plots.FIGURES[picture](rounded).to_json()
    objects = pd.DataFrame({name: pd.Series(list(values), dtype=object) for name, values in columns.items()})
    assert plots.FIGURES[picture](objects).to_json() == plots.FIGURES[picture](rounded).to_json()


def test_points_and_intervals_are_those_of_the_frame() -> None:
    frame = alignment()
    shown = told(plots.alignment_by_layer(frame), "forget")
    expected = frame[frame["group"] == "forget"][["layer", "cosine", "low", "high"]]
    np.testing.assert_allclose(shown, expected)
    bars = entries(plots.alignment_by_layer(frame), "forget")[0].error_y
    np.testing.assert_allclose(bars.array, expected["high"] - expected["cosine"])
    np.testing.assert_allclose(bars.arrayminus, expected["cosine"] - expected["low"])


def test_groups_stand_a_few_pixels_apart_and_both_tell_their_true_place() -> None:
    figure = plots.norms(alignment())
    forget, retain = (np.array(entries(figure, group)[0].x) for group in GROUPS)
    assert (retain - forget > 0).all()
    assert (retain - forget < 0.1).all()
    np.testing.assert_array_equal(told(figure, "forget")[:, 0], range(8))


def test_seeds_are_points_around_their_mean() -> None:
    frame = alignment(seed=SEEDS)
    figure = plots.alignment_by_layer(frame)
    points, mean = entries(figure, "retain")
    assert (points.mode, len(points.x)) == ("markers", 24)
    means = frame[frame["group"] == "retain"].groupby("layer")["cosine"].mean()
    np.testing.assert_allclose(mean.y, means)
    assert figure.layout.title.subtitle.text.startswith("Faint points: 3 seeds; lines: their mean. Grey: unrelated")
    assert plots.alignment_by_layer(alignment()).layout.title.subtitle.text.startswith("Bars: 95% over documents. Grey")
    with pytest.raises(ValueError, match="several rows for layer 0; add a column method, coefficient or seed"):
        plots.alignment_by_layer(frame.drop(columns="seed"))


def test_alignment_against_c_leaves_out_rows_without_a_coefficient() -> None:
    frame = alignment([5], coefficient=(1.0, 4.0))
    figure = plots.alignment_by_coefficient(pd.concat([frame, frame.iloc[:1].assign(coefficient=np.nan)]))
    np.testing.assert_array_equal(told(figure, "forget")[:, 0], [1.0, 4.0])
    with pytest.raises(ValueError, match="the column coefficient holds no number in any of 4 rows"):
        plots.alignment_by_coefficient(frame.assign(coefficient=np.nan))
    relative = plots.alignment_by_coefficient(frame.assign(relative_coefficient=frame["coefficient"] / 2))
    np.testing.assert_array_equal(told(relative, "forget")[:, 0], [0.5, 2.0])


def test_layers_have_integer_ticks_and_c_a_grey_line_beside_the_norms() -> None:
    figure = plots.norms(alignment(range(32)).assign(coefficient=6.5))
    assert (figure.layout.xaxis.tick0, figure.layout.xaxis.dtick % 1) == (0, 0)
    assert [(trace.y, trace.line.color) for trace in entries(figure, "coefficient c")] == [((6.5, 6.5), GREY)]


def test_a_sweep_is_cut_by_coefficient_only_where_layers_have_several() -> None:
    frame = sweep()
    figure = plots.layer_effects(frame)
    assert titles(figure) == ["mrp", "rmu, c = 4", "rmu, c = 16", "adaptive-rmu"]
    controls = {"never taught", "unedited (forget)", "unedited (retain)"}
    assert {trace.name for trace in figure.data} == {*GROUPS, *controls}
    adaptive = frame[frame["method"] == "adaptive-rmu"]
    betas = pd.concat([adaptive, adaptive.assign(coefficient=2.0)])
    assert titles(plots.layer_effects(betas)) == ["adaptive-rmu, beta = 2", "adaptive-rmu, beta = 5"]
    of_norm = frame[frame["coefficient"] == 4.0].assign(coefficient=lambda f: 2 * f["layer"] + f["seed"])
    assert titles(plots.layer_effects(of_norm)) == ["rmu"]
    mean = frame[frame["method"] == "mrp"].groupby("layer")["forget_accuracy"].mean()
    np.testing.assert_allclose(entries(figure, "forget")[1].y, mean)
    with pytest.raises(ValueError, match="unknown measure 'loss'; choose one of accuracy, cosine, max_probability"):
        plots.layer_effects(frame, "loss")


def test_coefficients_stand_on_a_log_axis_beside_the_norm_with_a_symbol_for_each_layer() -> None:
    figure = plots.coefficient_effects(sweep(seeds=[0]))
    assert figure.layout.xaxis.type == "log"
    assert {trace.x for trace in entries(figure, "c = norm")} == {(1.0, 1.0)}
    assert titles(figure) == ["rmu", "adaptive-rmu"]
    symbols = {trace.marker.symbol for trace in figure.data if trace.name == "forget"}
    assert len(symbols) == 7
    assert symbols == {trace.marker.symbol for trace in figure.data if trace.name.startswith("layer ")}
    many = plots.coefficient_effects(sweep(range(20), seeds=[0]))  # more than there are symbols
    hovered = {trace.hovertemplate.split("<br>")[0] for trace in many.data if trace.name == "forget"}
    assert {f"%{{fullData.name}}, layer {layer}" for layer in (0, 16)} <= hovered


def test_noise_that_differs_from_layer_to_layer_makes_no_panels() -> None:
    frame = frames.noise_sensitivity().assign(noise=lambda f: f["norm"])
    assert titles(plots.noise_sensitivity(frame)) == []
    several = plots.noise_sensitivity(frames.noise_sensitivity(noise=(0.1, 1.0)))
    assert titles(several) == ["noise of variance 0.1", "noise of variance 1"]


def test_zeros_that_a_logarithmic_axis_cannot_show_are_told() -> None:
    frame = frames.noise_sensitivity()
    told = "Zeros have no place on a logarithmic axis."
    assert told not in plots.noise_sensitivity(frame).layout.title.subtitle.text
    unmoved = frame.assign(sensitivity=frame["sensitivity"].where(frame["layer"] > 0, 0.0))
    assert plots.noise_sensitivity(unmoved).layout.title.subtitle.text.endswith(told)


def test_errors_of_the_proposition_have_the_interval_of_what_was_measured() -> None:
    frame = frames.proposition_1(range(1))
    figure = plots.theory_check(frame)
    trace = entries(figure, "prompt 0")[1]
    rows = frame[frame["statistic"] == "trace"]
    low, high = np.array(trace.customdata)[:, 2:].T
    np.testing.assert_allclose(low, rows["low"] / rows["predicted"] - 1)
    np.testing.assert_allclose(high, rows["high"] / rows["predicted"] - 1)
    assert "mean" in titles(figure)[0]
    assert entries(figure, "prompt 0")[0].error_y.array == (None,) * 5
    assert set(entries(figure, "sampling alone")[0].y) == {0.01, 0.018}


def test_confidence_places_the_groups_of_a_method_beside_its_name() -> None:
    figure = plots.confidence_by_method(by_method(frames.confidence()))
    forget, retain = (np.array(entries(figure, group)[0].x) for group in GROUPS)
    np.testing.assert_allclose((forget + retain) / 2, range(4))
    assert list(figure.layout.xaxis.ticktext) == list(METHODS)
    levels = [trace.y[0] for trace in entries(figure, "uniform")]
    assert levels == [1 / 512, 6.24, 0.0, 1 / 512]  # the largest logit has none


def test_a_violin_of_many_tokens_keeps_their_quantiles() -> None:
    frame = frames.token_confidence(4000)
    values = np.array(entries(plots.confidence_distribution(frame, "entropy"), "forget")[0].y)
    of_all = frame[frame["group"] == "forget"]["entropy"]
    assert len(values) == 500
    np.testing.assert_allclose(np.quantile(values, [0.25, 0.5, 0.75]), of_all.quantile([0.25, 0.5, 0.75]), rtol=0.01)


def test_names_that_are_cut_stay_apart() -> None:
    alike = [
        "The following is a question about biosecurity. A",
        "The following is a question about biosecurity. B",
        "short",
    ]
    ends = shortened_apart(alike, 40)
    assert len(set(ends)) == 3
    assert [len(end) for end in ends] == [40, 40, 5]
    assert ends[0].endswith("biosecurity. A")
    assert shortened_apart(["a" * 50, "b" * 50], 40) == ["a" * 39 + "…", "b" * 39 + "…"]
    panels = Panels([("", pd.DataFrame())], x=Axis("x"), y=Axis("y"), title="t", note="n")
    for number, name in enumerate([*alike, alike[0], *(f"{'c' * 45}{n}{'d' * 45}" for n in range(3))]):
        panels.series(0, pd.DataFrame({"x": [0, 1], "y": [number, number]}), "x", "y", Look(name, FORGET))
    shown = [trace.name for trace in panels.figure().data]
    assert shown[3] == shown[0]  # the same series in another place
    assert len(set(shown)) == 6


def test_ten_groups_have_colours_of_their_own_and_none_is_that_of_a_control() -> None:
    colours = group_colours(["forget", "retain", *(f"topic {n}" for n in range(10))])
    assert len(set(colours.values()) | {GREY}) == 13
    assert len(set(group_colours(f"topic {n}" for n in range(19)).values()) | {GREY}) == 22


def test_never_taught_facts_that_are_not_known_leave_chance_as_the_level() -> None:
    frame = frames.accuracies().assign(untaught_accuracy=np.nan, forget_chance=0.25)
    assert "chance" in {trace.name for trace in plots.accuracies(frame).data}


def test_accuracies_stand_in_the_order_of_the_table_with_their_intervals() -> None:
    frame = frames.accuracies()
    figure = plots.accuracies(frame)
    assert list(figure.layout.yaxis.ticktext) == list(frame["method"])
    assert figure.layout.yaxis.range == (5.5, -0.5)  # the first on top
    expected = frame[["forget_accuracy", "forget_low", "forget_high"]]
    np.testing.assert_allclose(told(figure, "forget")[:, [0, 2, 3]], expected)
    assert [entries(figure, name)[0].x for name in ("never taught", "unchanged")] == [(0.26, 0.26), (1.0, 1.0)]
    np.testing.assert_allclose(told(plots.accuracies(frames.unlearned()), "forget")[:, 0], [0.81, 0.12])
    assert plots.accuracies(frame.iloc[:1]).layout.yaxis.ticktext == ("unedited",)
    wrecked = plots.accuracies(frame.assign(text_perplexity_ratio=[1.0, 1.0, 1.1, 1.2, 1.3, 7138.0]))
    assert wrecked.layout.xaxis2.type == "log"  # or all others would lie on the line at 1
    mixed = plots.accuracies(frames.unlearned().assign(retain_accuracy=0.8))
    assert mixed.layout.xaxis.title.text == "probability per token, accuracy of retain"
    long = [f"runs/compare/some-long-experiment-of-mine/rank-{rank}" for rank in range(6)]
    assert len(set(plots.accuracies(frame.assign(method=long)).layout.yaxis.ticktext)) == 6


def test_losses_far_apart_stand_on_a_log_axis_without_zeros() -> None:
    frame = frames.training()
    figure = plots.training(frame)
    assert figure.layout.yaxis.type == "log"
    assert entries(figure, "retain")[0].y[:2] == (None, 0.3)
    assert {trace.name for trace in figure.data} == {"loss", "forget", "retain", "forget cross entropy"}
    assert plots.training(frame.assign(loss=-frame["loss"])).layout.yaxis.type != "log"


def test_the_course_of_a_fit_stands_beside_its_target_and_its_budget() -> None:
    frame = frames.budgeted()
    figure = plots.budget(
        pd.concat([frame.assign(method="mrp"), frame.assign(method="gradient-ascent", budget=np.nan)])
    )
    assert len(entries(figure, "forget questions")) == 1  # the fit without a budget has no panel
    np.testing.assert_allclose(told(figure, "forget questions"), frame[["step", "left"]])
    damage = told(figure, "retain text")
    assert np.isnan(damage[:5, 1]).all()  # none yet, on a log axis
    np.testing.assert_allclose(damage[5:], frame[["step", "damage"]].iloc[5:])
    assert [entries(figure, name)[0].y for name in ("target", "budget")] == [(0.34, 0.34), (0.05, 0.05)]
    np.testing.assert_allclose(told(figure, "budget so far"), frame[["step", "allowed"]])
    assert {trace.name for trace in plots.training(frame).data} == {"loss", "forget", "retain", "forget cross entropy"}


def test_what_was_removed_is_shown_where_it_was_removed() -> None:
    assert set(told(plots.removed_energy(geometry()), "forget, before")[:, 0]) == {3, 5}
    with pytest.raises(ValueError, match="removed_rank is 0 in every row"):
        plots.removed_energy(geometry().assign(removed_rank=0))
    with pytest.raises(ValueError, match="no rows with when = 'after', there is 'before'"):
        plots.displacement(geometry().query("when == 'before'"))


def test_of_many_angles_the_smallest_and_the_largest_are_among_the_four_shown() -> None:
    shown = {trace.name for trace in plots.principal_angles(frames.principal_angles()).data}
    assert shown == {"angle 1", "angle 3", "angle 6", "angle 8", "random subspaces"}
    frame = frames.principal_angles()
    one = frame[frame["pair"] == frame["pair"].iloc[0]]
    narrow = one[one["number"] <= 2].assign(pair="forget, removed")
    figure = plots.principal_angles(pd.concat([frame, narrow]))
    panel = figure.layout.annotations[-1].text
    assert panel == "forget, removed"
    of_panel = {trace.name for trace in figure.data if trace.xaxis == f"x{len(titles(figure))}"}
    assert of_panel == {"angle 1", "angle 2", "random subspaces"}


def test_each_token_stands_in_its_cell_with_its_share_and_long_documents_go_on_below() -> None:
    frame = frames.gate_tokens(10)
    figure = plots.gate_tokens(frame, line=8)
    assert titles(figure) == [f"one, blocks.{layer}.hook_resid_post" for layer in (1, 3)]
    labels = [f"{group} {n}{more}" for group in GROUPS for n in (0, 4) for more in ("", ", from 8")]
    for axis, heat, layer in zip(figure.select_yaxes(), figure.data, (1, 3), strict=True):
        assert list(axis.ticktext) == labels
        assert axis.range[0] > axis.range[1]  # the first document on top
        assert [len(row) for row in heat.z] == [8] * 8
        assert list(heat.z[2]) == [(n % 7 + layer) / 10 for n in range(8)]
        assert list(heat.z[3]) == [(1 + layer) / 10, (2 + layer) / 10, *[None] * 6]
        assert list(heat.text[2]) == ["The", "colour", "of", "&lt;s&gt;", "is", "'\\n'", "green", "The"]
        assert heat.customdata[3][1] == "' of', position 9"
    with pytest.raises(ValueError, match="gate_tokens: several rows for group forget, document 0, position 0"):
        plots.gate_tokens(pd.concat([frame, frame]))
    with pytest.raises(ValueError, match="line must be"):
        plots.gate_tokens(frame, line=0)


def test_gates_of_several_sites_have_a_panel_each() -> None:
    figure = plots.gate(gates(("resid_post", "mlp_out")))
    assert titles(figure) == [f"{name}, {site}" for name in ("one", "two") for site in ("resid_post", "mlp_out")]
    recall = told(plots.gate(gates()), "forget tokens (recall)")
    assert [list(row) for row in recall[:3].round(2)] == [[1, 0.58], [3, 0.74], [5, 0.9]]


def test_planes_before_and_after_share_their_axes_and_tell_the_token() -> None:
    figure = plots.principal_plane(frames.principal_plane())
    assert (figure.layout.xaxis2.matches, figure.layout.yaxis2.matches) == ("x", "y")
    assert figure.layout.xaxis.title.text == "component 1 (34% of variance)"
    assert figure.data[0].text[1] == "'&lt;s&gt;', document 1"  # as markup it would vanish
    seeds = pd.concat([frames.principal_plane().assign(seed=seed) for seed in (0, 1)])
    assert titles(plots.principal_plane(seeds)) == [f"seed {n}, {when}" for n in (0, 1) for when in ("before", "after")]
    space = plots.principal_plane(frames.principal_plane("xyz"))
    assert space.layout.scene.xaxis.range == space.layout.scene2.xaxis.range
    with pytest.raises(ValueError, match="10 panels in three dimensions are more than a page can show, 8"):
        plots.principal_plane(by_method(frames.principal_plane("xyz"), ("a", "b", "c", "d", "e")))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cosine": "high"}, "the column cosine must hold numbers, got 'high'"),
        ({"layer": [1, 2, 3]}, "the columns differ in length"),
        ({"cosine": torch.zeros(2, 2)}, "the column cosine must hold one value a row"),
        ({"cosine": None}, "nothing to draw"),
    ],
)
def test_columns_that_cannot_be_drawn_are_named(change: dict[str, Any], message: str) -> None:
    columns = {str(name): values.tolist() for name, values in alignment([0]).items()}
    with pytest.raises(ValueError, match=message):
        plots.alignment_by_layer(columns | change)
    twice = pd.concat([alignment(), alignment()[["layer"]]], axis=1)
    with pytest.raises(ValueError, match="has the column layer more than once"):
        plots.alignment_by_layer(twice)
