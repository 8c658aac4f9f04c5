"""What the study of sequences of requests concludes follows from what was found after each request."""

from collections.abc import Sequence
from typing import Any

import pandas as pd
import pytest

from analysis.common import endurance
from mrp_lens.plots import accuracies

ORDER = ("a", "b", "c")
KNOWN: dict[str, Any] = {"asked": dict.fromkeys(ORDER, 1.0), "kept": dict.fromkeys(ORDER, 1.0), "text_perplexity": 5.0}
UNEDITED: dict[str, Any] = {**KNOWN, "untaught_accuracy": 0.25}


def cell(
    method: str, asked: Sequence[float], kept: Sequence[float], *, seed: int = 0, **changes: Any
) -> dict[str, Any]:
    """What was found after as many requests as there are accuracies; the topics that stay are the others of ORDER."""
    count = len(asked)
    found = {
        "asked": dict(zip(ORDER, asked, strict=False)),
        "kept": dict(zip(ORDER[count:], kept, strict=True)),
        "text_perplexity": 5.5,
    }
    took = {"trained_numbers": 4096, "stored_bytes": 20000, "seconds": 30.0}
    return {"method": method, "seed": seed, "requests": count, "order": list(ORDER[:count]), **found, **took, **changes}


def sequence(method: str, first: Sequence[float], worst: Sequence[float], **changes: Any) -> list[dict[str, Any]]:
    """Three requests: accuracy on the first after each (the later ones are at 0.3), and on the worst topic that stays."""
    return [
        cell(method, [first[0]], [1.0, worst[0]], **changes),
        cell(method, [first[1], 0.3], [worst[1]], **changes),
        cell(method, [first[2], 0.3, 0.3], [], **changes),
    ]


def found(*cells: dict[str, Any]) -> tuple[pd.DataFrame, str]:
    table = endurance.rows_of_cells(cells, UNEDITED)
    return table, endurance.finding(table, (2, 3))


def test_rows_tell_the_requests_so_far_from_what_stays() -> None:
    table, _ = found(cell("mrp", [0.4, 0.2], [0.9]), cell("mrp", [0.4, 0.2, 0.3], []))
    row = table[(table["method"] == "mrp") & (table["requests"] == 2)].iloc[0]
    assert row["forget_accuracy"] == pytest.approx(0.3)
    assert [row[f"forget_{which}_accuracy"] for which in ("highest", "lowest", "latest", "first")] == [
        0.4,
        0.2,
        0.2,
        0.4,
    ]
    assert (row["request"], row["order"], row["worst_topic"]) == ("b", "a, b", "c")
    assert (row["worst_topic_accuracy"], row["retain_accuracy"], row["text_perplexity_ratio"]) == (0.9, 0.9, 1.1)
    assert (row["accuracy_a"], row["accuracy_c"]) == (0.4, 0.9)
    last = table.iloc[-1]
    assert pd.isna(last["worst_topic_accuracy"])
    assert last["forget_accuracy"] == pytest.approx(0.3)


def test_the_unedited_model_is_asked_the_same() -> None:
    table, _ = found(*sequence("mrp", [0.3] * 3, [0.9, 0.9]), *sequence("rmu", [0.3] * 3, [0.9, 0.9]))
    rows = table[table["method"] == "unedited"]
    assert rows["requests"].tolist() == [1, 2, 3]
    assert (rows["forget_accuracy"] == 1.0).all()
    assert rows["text_perplexity_ratio"].tolist() == [1.0] * 3
    assert rows["worst_topic_accuracy"].isna().tolist() == [False, False, True]


def test_the_headline_follows_the_numbers() -> None:
    one, other = sequence("mrp", [0.3] * 3, [0.9, 0.8]), sequence("mrp", [0.3, 0.5, 0.3], [0.9, 0.9], seed=1)
    text = found(*one, *other)[1]
    assert (
        "After 2 requests (2 seeds: mean, lowest to highest; never taught: 0.25), accuracy on these / the worst" in text
    )
    assert "mrp 0.35 (0.30 to 0.40) / 0.85 (0.80 to 0.90) / x1.10" in text
    assert (
        "text, as no topic is left to stay: unedited 1.00 (1.00 to 1.00) / x1.00; mrp 0.30 (0.30 to 0.30) / x1.10"
        in text
    )
    assert "The worst topic that stays, after 1 / 2 requests: mrp 0.90 / 0.85." in text


@pytest.mark.parametrize(
    ("changed", "able"),
    [
        ({}, True),
        ({"asked": {"a": 0.36, "b": 0.25}}, False),  # one of the requests is still known
        ({"asked": {"a": 0.14, "b": 0.25}}, False),  # or suppressed
        ({"kept": {"c": 0.94}}, False),
        ({"text_perplexity": 5.6}, False),
    ],
)
def test_a_method_does_both_only_if_every_request_topic_and_text_is_as_it_should_be(
    changed: dict[str, Any], able: bool
) -> None:
    text = found(cell("mrp", [0.25, 0.25], [0.96]), {**cell("mrp", [0.25, 0.25], [0.96], seed=1), **changed})[1]
    assert f"after 2 {'mrp' if able else 'none'}." in text


def test_where_nothing_tells_the_never_taught_level_nothing_is_judged() -> None:
    table = endurance.rows_of_cells([cell("mrp", [0.25, 0.25], [0.96])], UNEDITED | {"untaught_accuracy": None})
    text = endurance.finding(table, (2,))
    assert "never" not in text
    assert "After 2 requests (1 seed), accuracy" in text


def test_a_first_request_that_comes_back_is_named() -> None:
    text = found(*sequence("mrp", [0.3, 0.3, 0.32], [1, 1]), *sequence("npo", [0.3, 0.5, 0.6], [1, 1]))[1]
    assert (
        "to after 3 requests: mrp 0.30 to 0.32; npo 0.30 to 0.60. It comes back by more than 0.05 in every seed with npo."
        in text
    )
    assert "in every seed with none." in found(*sequence("mrp", [0.3, 0.3, 0.32], [1, 1]))[1]


def test_mrp_is_set_against_its_papers_rivals() -> None:
    seeds = [
        sequence("mrp", [0.3] * 3, [1, 0.9], seed=s) + sequence("npo", [0.5] * 3, [1, 0.8], seed=s) for s in (0, 1)
    ]
    text = found(*seeds[0], *seeds[1])[1]
    assert (
        "mrp against npo after 2: -0.10 on the distance of the requests from never taught, +0.10 on the worst topic"
        in text
    )
    seeds[1][1]["asked"] = {"a": 0.7, "b": 0.7}
    assert (
        "npo after 2: +0.10 on the distance of the requests from never taught (the seeds disagree)"
        in (found(*seeds[0], *seeds[1])[1])
    )
    assert "against" not in found(*sequence("mrp", [0.3] * 3, [1, 1]))[1]


def test_taking_a_request_back_has_its_sentence() -> None:
    cells = sequence("mrp", [0.3] * 3, [1, 1])
    back = {"a": 0.4, "b": 0.9, "c": 0.2}
    cells[2]["taken_back"] = {"asked": back, "kept": {}, "text_perplexity": 5.0}
    assert "taken back again: mrp of 3 0.30 to 0.90 (the others 0.30 to 0.30)." in found(*cells)[1]
    cells[2] |= {"kept": {"d": 0.8}, "taken_back": {"asked": back, "kept": {"d": 0.7}, "text_perplexity": 5.0}}
    unedited = UNEDITED | {"kept": {**KNOWN["kept"], "d": 1.0}}
    table = endurance.rows_of_cells(cells, unedited)
    told = endurance.finding(table, (2, 3))
    assert "mrp of 3 0.30 to 0.90 (the others 0.30 to 0.30, the worst topic that stays 0.80 to 0.70)." in told
    assert "taken back" not in found(*sequence("rmu", [0.3] * 3, [1, 1]))[1]


def test_a_sequence_that_breaks_off_is_reported_and_not_counted() -> None:
    broken = {"method": "npo", "seed": 0, "requests": 3, "order": list(ORDER), "failed": "request 3: no number"}
    table, text = found(*sequence("mrp", [0.3] * 3, [1, 1]), *sequence("npo", [0.3] * 3, [1, 1])[:2], broken)
    assert "Broken off: npo, seed 0: request 3: no number." in text
    assert "npo unknown" not in text
    assert "xnan" not in text
    shown = endurance.compact(table, (3,)).set_index("method")["requests so far"]
    assert (shown["npo"], shown["mrp"]) == ("", "0.30")


def test_where_every_sequence_breaks_off_that_is_what_is_said() -> None:
    broken = {"method": "npo", "seed": 0, "requests": 1, "order": ["a"], "failed": "request 1: no number"}
    table, text = found(broken)
    assert "Broken off: npo, seed 0: request 1: no number." in text
    assert list(endurance.compact(table, (1,))["requests so far"]) == [""]


def test_courses_are_those_of_the_seeds_that_lasted() -> None:
    lasting, broken = sequence("npo", [0.3, 0.3, 0.4], [1, 0.9]), sequence("npo", [0.9, 0.9, 0.9], [0.1, 0.1], seed=1)
    gone = {"method": "npo", "seed": 1, "requests": 3, "order": list(ORDER), "failed": "request 3: no number"}
    text = found(*lasting, *broken[:2], gone)[1]
    assert "after 3 requests: npo 0.30 to 0.40." in text


def test_seeds_that_do_not_differ_do_not_disagree() -> None:
    def told(gains: Sequence[float]) -> list[str]:
        own = pd.DataFrame({"seed": range(len(gains)), "worst_topic_accuracy": [0.5 + gain for gain in gains]})
        fixed = {"forget_accuracy": 0.3, "untaught_accuracy": 0.3, "text_perplexity_ratio": 1.0}
        frames = [frame.assign(**fixed).set_index("seed") for frame in (own, own.assign(worst_topic_accuracy=0.5))]
        return endurance._compared(*frames)

    assert not any("disagree" in words for words in [*told([0.0]), *told([0.0, 0.1])])
    assert "+0.00 on the worst topic that stays (the seeds disagree)" in told([-0.1, 0.1])


def test_every_method_is_drawn_after_each_length() -> None:
    broken = {"method": "npo", "seed": 0, "requests": 3, "order": list(ORDER), "failed": "request 3: no number"}
    table = found(*sequence("mrp", [0.3] * 3, [1, 1]), *sequence("npo", [0.3] * 3, [1, 1])[:2], broken)[0]
    frame = endurance.pictures(table, (2, 3))["accuracies"]
    methods = ["unedited, 2 requests", "mrp, 2 requests", "npo, 2 requests", "unedited, 3 requests", "mrp, 3 requests"]
    assert frame["method"].tolist() == methods
    assert accuracies(frame).data
    assert accuracies(endurance.pictures(table, (3,))["accuracies"]).data  # where no topic is left to stay


def test_the_table_tells_what_a_request_takes() -> None:
    table, text = found(*sequence("mrp", [0.3] * 3, [1, 1]))
    assert "One request takes: mrp 4,096 numbers trained, 20.0 kB stored, 30 s." in text
    shown = {(r["method"], r["requests"]): r for r in endurance.compact(table, (2, 3)).to_dict("records")}
    assert list(shown) == [(method, length) for method in ("unedited", "mrp") for length in ("2", "3")]
    assert [shown["mrp", "3"][heading] for heading in ("trained", "stored", "fit")] == ["4,096", "20.0 kB", "30 s"]
    assert shown["unedited", "3"]["fit"] == ""
