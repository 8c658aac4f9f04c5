"""Angles and planes are computed a second time in numpy, from states read one document at a time without padding."""

from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from mrp_lens.data import Corpus
from mrp_lens.data.tokenization import PaddingSide
from mrp_lens.metrics.pca import principal_angles, principal_plane
from mrp_lens.models import LensModel
from mrp_lens.models.hooks import hook_name
from tests.conftest import D_MODEL
from tests.support.edits import projection, weight_edit
from tests.support.states import GROUPS, Array, Subject, matrix, plain_passes

PADDINGS: list[PaddingSide] = ["right", "left"]


def plain_angles(one: Array, other: Array) -> Array:
    """In degrees, between the row spans."""
    (q, _), (r, _) = np.linalg.qr(one.T), np.linalg.qr(other.T)
    return np.degrees(np.arccos(np.linalg.svd(q.T @ r, compute_uv=False).clip(max=1.0)))


@pytest.mark.parametrize("padding", PADDINGS)
def test_principal_angles_equal_the_plain_calculation(subject: Subject, padding: PaddingSide) -> None:
    model, edit, rank = subject.model, projection(1, rank=4) + weight_edit(subject.model, 2), 2
    frame = principal_angles(model, GROUPS, edit, layers=[1, 2], rank=rank, batch_size=4, padding=padding)
    three, one = ["forget-retain", "forget-removed", "retain-removed"], ["forget-retain"]
    expected = [(1, "before", three), (1, "after", three), (2, "before", one), (2, "after", one)]
    cells = [(layer, when, pair, k) for layer, when, pairs in expected for pair in pairs for k in (1, 2)]
    assert [tuple(row) for row in frame[["layer", "when", "pair", "number"]].to_numpy()] == cells
    plain = plain_passes(model, [hook_name(1), hook_name(2)], edit)
    removed = projection(1, rank=4).subspaces()[hook_name(1)].basis.double().numpy()
    for layer, when, pairs in expected:
        states = {group: matrix(plain[group, when][hook_name(layer)]) for group in GROUPS}
        spans = {group: np.linalg.svd(of_group)[2][:rank] for group, of_group in states.items()} | {"removed": removed}
        for pair in pairs:
            rows = frame[(frame["layer"] == layer) & (frame["when"] == when) & (frame["pair"] == pair)]
            angles = plain_angles(*(spans[name] for name in pair.split("-")))
            assert rows["degrees"].tolist() == subject.close(angles, scale=90.0)
            if when == "after" and "removed" in pair:
                assert rows["degrees"].tolist() == subject.close([90.0, 90.0])


def test_the_null_angles_are_those_of_random_subspaces(model: LensModel, untouched: None) -> None:
    """Mean of 20 draws against 1,000 others: within five standard errors of 20."""
    frame = principal_angles(model, GROUPS, projection(1, rank=5), layers=[1], rank=3, seed=4)
    again = principal_angles(model, GROUPS, projection(1, rank=5), layers=[1], rank=3, seed=4)
    assert frame.equals(again)
    generator = np.random.default_rng(0)
    for pair, ranks in {"forget-retain": (3, 3), "forget-removed": (3, 5)}.items():
        draws = np.array(
            [plain_angles(*(generator.normal(size=(rank, D_MODEL)) for rank in ranks)) for _ in range(1000)]
        )
        null = frame[(frame["pair"] == pair) & (frame["when"] == "before")]["null_degrees"].to_numpy()
        assert (np.abs(null - draws.mean(axis=0)) < 5 * draws.std(axis=0) / np.sqrt(20)).all()
        assert all(low < high for low, high in pairwise(null))


def test_a_group_is_at_no_angle_to_itself(model: LensModel, untouched: None) -> None:
    frame = principal_angles(model, {"one": GROUPS["forget"], "other": GROUPS["forget"]}, rank=4)
    assert frame["degrees"].max() < 1e-3
    assert frame["null_degrees"].min() > 30.0


@pytest.mark.parametrize(
    ("position", "dims", "points", "padding"),
    [("last", 2, 300, "right"), ("last", 3, 5, "left"), ("all", 3, 300, "left"), ("all", 2, 9, "right")],
)
def test_the_principal_plane_equals_the_plain_calculation(
    subject: Subject, position: Any, dims: int, points: int, padding: PaddingSide
) -> None:
    model, edit = subject.model, projection(1, 2)
    settings: dict[str, Any] = {"layer": 2, "dims": dims, "points": points, "position": position}
    frame = principal_plane(model, GROUPS, edit, **settings, batch_size=4, padding=padding)
    axes = list("xyz"[:dims])
    shares = [f"share_{axis}" for axis in axes]
    assert list(frame.columns) == ["group", "when", "document", "position", "token", *axes, *shares]
    plain = plain_passes(model, [hook_name(2)], edit)
    states = {key: by_hook[hook_name(2)] for key, by_hook in plain.items()}
    for (group, when), rows in frame.groupby(["group", "when"]):
        group, when = str(group), str(when)
        places = list(zip(rows["document"], rows["position"], strict=True))
        available = states[group, when]
        if position == "last":
            available = {key: h for key, h in available.items() if (key[0], key[1] + 1) not in available}
        assert set(places) <= set(available)
        assert len(places) == len(set(places)) == min(points, len(available)) or (group, points) == ("retain", 5)
        for (document, place), token in zip(places, rows["token"], strict=True):
            text = GROUPS[group].documents[document].prompt + GROUPS[group].documents[document].completion
            ids = model.tokenizer(text, add_special_tokens=False)["input_ids"]
            assert model.tokenizer.decode([ids[place]]) == token

    def chosen(when: str) -> Array:
        rows = frame[frame["when"] == when]
        keys = zip(rows["group"], rows["document"], rows["position"], strict=True)
        return np.array([states[group, when][document, place] for group, document, place in keys])

    before = chosen("before")
    centre = before.mean(axis=0)
    _, singular, directions = np.linalg.svd(before - centre)
    share = singular**2 / (singular**2).sum()
    assert frame[shares].to_numpy().tolist() == [subject.close(share[:dims])] * len(frame)
    for number, axis in enumerate(axes):
        direction = directions[number] * np.sign(directions[number][np.abs(directions[number]).argmax()])
        for when in ("before", "after"):
            centred = chosen(when) - centre
            spread = float(
                np.linalg.norm(centred, axis=1).max()
            )  # a state is rounded by its own size, on whichever axis it is seen
            assert frame[frame["when"] == when][axis].tolist() == subject.close(centred @ direction, scale=spread)


def test_the_points_of_the_plane_are_a_choice_by_seed_and_not_by_batch(model: LensModel, untouched: None) -> None:
    for position in ("last", "all"):
        first, second, other = (
            principal_plane(model, GROUPS, layer=1, points=6, position=position, batch_size=size, seed=seed)  # type: ignore[arg-type]
            for size, seed in ((2, 0), (32, 0), (32, 1))
        )
        labels = ["group", "document", "position", "token"]
        assert first[labels].equals(second[labels])
        assert not first[labels].equals(other[labels])


def test_bad_input_is_refused_by_name(model: LensModel, untouched: None) -> None:
    edit = projection(1)
    for rank, message in ((0, "rank 0 is out of range"), (32, "room for 1 to 31"), (30, "above the 29 directions")):
        with pytest.raises(ValueError, match=message):
            principal_angles(model, GROUPS, edit, rank=rank, layers=[1])
    with pytest.raises(ValueError, match=r"'few', layer 0, before the edit: rank 8 is above the \d directions"):
        principal_angles(model, {"few": Corpus.from_texts(["A baker."]), **GROUPS})
    with pytest.raises(ValueError, match="cannot be named 'removed'"):
        principal_angles(model, {"removed": GROUPS["forget"]}, edit)
    with pytest.raises(ValueError, match="nothing to compare"):
        principal_angles(model, GROUPS["forget"], edit, layers=[2])
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"dims": 4}, "dims must be 2 or 3, got 4"),
        ({"points": 0}, "points must be at least 1"),
        ({"layer": 7}, "layer 7 is out of range"),
        ({"points": 1, "dims": 3}, "2 states that differ along 1 directions make no plot of 3"),
    ]
    for settings, message in wrong:
        with pytest.raises(ValueError, match=message):
            principal_plane(model, GROUPS, **({"layer": 1} | settings))
