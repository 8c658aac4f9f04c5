from dataclasses import asdict, dataclass, fields
from types import SimpleNamespace
from typing import Any

import pytest

from mrp_lens.methods import METHODS, RMU, Block, Depth, Factor, Options, Range, register
from mrp_lens.methods.mrp.method import default_layers, later_layers
from mrp_lens.methods.search_space import Dimension
from tests.conftest import LAYERS


def test_every_method_of_the_library_declares_a_space_of_its_own_settings(model: Any) -> None:
    for name, kind in METHODS.items():
        assert kind.space, name
        assert set(kind.space) <= {field.name for field in fields(kind)}
        for setting, dimension in kind.space.items():
            drawn = {end: what.low for end, what in dimension.draws(model).items() if isinstance(what, Range)}
            default = getattr(kind(), setting)
            made = dimension.value(drawn, default if isinstance(default, int | float) else 4.0)
            assert kind(**{setting: made})


@pytest.mark.parametrize(
    ("dimension", "drawn", "default", "value"),
    [
        (Range(0.1, 3), {"": 0.123456}, None, 0.1235),
        (Range(1, 9, whole=True), {"": 4}, None, 4),
        (Options(("a", "b")), {"": "b"}, None, "b"),
        (Factor(0.1, 10), {".factor": 2.5}, 4.0, 10.0),
        (Factor(0.1, 10, whole=True), {".factor": 0.1}, 4, 1),
        (Depth(), {"": 3}, None, 3),
        (Block(most=3), {".last": 5, ".count": 3}, None, (3, 4, 5)),
        (Block(most=3), {".last": 1, ".count": 3}, None, (0, 1)),
        (Block(least=2, most=2), {".last": 5}, None, (4, 5)),
        (Block(most=8, spread=True), {".first": 6, ".last": 27, ".count": 8}, None, (6, 9, 12, 15, 18, 21, 24, 27)),
        (Block(most=8, spread=True), {".first": 7, ".last": 2, ".count": 3}, None, (2, 4, 7)),
        (Block(most=8, spread=True), {".first": 4, ".last": 5, ".count": 4}, None, (4, 5)),
        (Block(most=8, spread=True), {".first": 0, ".last": 5, ".count": 1}, None, (5,)),
        (Block(most=8, spread=True), {".last": 5, ".count": 3}, None, (3, 4, 5)),
    ],
)
def test_what_is_drawn_becomes_a_setting(dimension: Dimension, drawn: Any, default: Any, value: Any) -> None:
    made = dimension.value(drawn, default)
    assert made == value
    assert type(made) is type(value)


@pytest.mark.parametrize(
    ("dimension", "default", "drawn"),
    [
        (Range(0.1, 3), 0.123456, {"": 0.123456}),
        (Range(0.1, 3), 7, {"": 3.0}),
        (Range(1, 9, whole=True), 0, {"": 1}),
        (Options(("a", "b")), "b", {"": "b"}),
        (Options(("a", "b")), "c", {}),
        (Factor(0.1, 10), 4.0, {".factor": 1.0}),
        (Factor(0.1, 0.5, whole=True), 4, {".factor": 0.5}),
        (Depth(0.5, 1.0), 1, {"": 2}),
        (Block(most=3), (1, 2), {".last": 2, ".count": 2}),
        (Block(most=2), (0, 1, 3), {".last": 3, ".count": 2}),
        (Block(least=2, most=2), (0, 1), {".last": 1}),
        (Block(most=4, spread=True), (0, 1, 3), {".first": 0, ".last": 3, ".count": 3}),
    ],
)
def test_what_comes_nearest_to_a_default_can_be_drawn(
    dimension: Dimension, default: Any, drawn: Any, model: Any
) -> None:
    assert dimension.nearest(default, model) == drawn


def test_layers_are_drawn_by_their_share_of_the_depth(model: Any) -> None:
    assert Depth(0.0, 1.0).draws(model)[""] == Range(0, LAYERS - 1, whole=True)
    assert Depth(0.3, 0.7).draws(model)[""] == Range(1, 2, whole=True)
    assert Depth(0.3, 0.7, lowest=2).draws(model)[""] == Range(2, 2, whole=True)
    assert Block(0.5, 1.0, most=2).draws(model) == {
        ".last": Range(2, LAYERS - 1, whole=True),
        ".count": Range(1, 2, whole=True),
    }


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Range(3, 1), "low <= high"),
        (lambda: Range(0, 1, log=True), "low above 0 where log=True"),
        (lambda: Range(0.5, 3, whole=True), "whole ends"),
        (lambda: Options(()), "at least one text"),
        (lambda: Options(([1],)), "text, number or truth value"),
        (lambda: Depth(0.5, 1.5), "shares of the depth are from 0 to 1"),
        (lambda: Depth(lowest=-1), "lowest is a layer, and the first one is 0; got -1"),
        (lambda: Block(most=0), "1 <= least <= most"),
        (lambda: Factor(0.1, 10).value({".factor": 2.0}, None), "the method derives None; use a Range"),
    ],
)
def test_what_cannot_be_meant_is_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_a_space_names_settings_and_holds_dimensions() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Mine(RMU):
        """A toy."""

    assert asdict(Mine())
    for space, kind, message in (
        ({"depth": Depth()}, ValueError, r"the search space names \['depth'\]"),
        ({}, ValueError, "names nothing"),
        ({"lr": (0.1, 1.0)}, TypeError, "the search space of lr must be a Range"),
    ):
        with pytest.raises(kind, match=message):
            register("mine", summary="", source="", space=space)(Mine)
    assert "mine" not in METHODS


@pytest.mark.parametrize("n_layers", [4, 8, 12, 30, 32, 80])
def test_the_layers_that_projections_have_by_themselves_are_in_their_spaces(n_layers: int) -> None:
    deep: Any = SimpleNamespace(cfg=SimpleNamespace(n_layers=n_layers))
    for name, usual in (("mrp", default_layers(n_layers)), ("mrp-unconditional", later_layers(n_layers))):
        space = METHODS[name].space
        assert space is not None
        assert space["layers"].value(space["layers"].nearest(tuple(usual), deep), None) == tuple(usual)
