"""Requests one after another: the study measures what it says, loses nothing, and is gone on with shard by shard."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from analysis import continual
from analysis.common.methods import with_settings
from analysis.common.requests import Requests, numbers_in
from mrp_lens.data import Corpus, Questions
from mrp_lens.data.task import UnlearningTask
from mrp_lens.data.world import World
from mrp_lens.edits import load_edit
from mrp_lens.methods import MRP, RMU, Fit
from mrp_lens.metrics import perplexity
from mrp_lens.models import LensModel
from mrp_lens.plots import accuracies
from mrp_lens.training.loop import NonFiniteLossError
from tests.conftest import D_MODEL

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


def table_of(*cells: dict[str, Any]) -> pd.DataFrame:
    return continual.rows_of_cells(cells, UNEDITED)


def shown(table: pd.DataFrame, *lengths: int) -> dict[tuple[str, str], dict[str, str]]:
    """(method, number of requests) -> its row of the table for people."""
    rows = continual.compact(table, lengths).to_dict("records")
    return {(row["method"], row["requests"]): {str(key): cell for key, cell in row.items()} for row in rows}


def test_rows_tell_the_requests_so_far_from_what_stays() -> None:
    table = table_of(cell("mrp", [0.4, 0.2], [0.9]), cell("mrp", [0.4, 0.2, 0.3], []))
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
    table = table_of(*sequence("mrp", [0.3] * 3, [0.9, 0.9]), *sequence("rmu", [0.3] * 3, [0.9, 0.9]))
    rows = table[table["method"] == "unedited"]
    assert rows["requests"].tolist() == [1, 2, 3]
    assert (rows["forget_accuracy"] == 1.0).all()
    assert rows["text_perplexity_ratio"].tolist() == [1.0] * 3
    assert rows["worst_topic_accuracy"].isna().tolist() == [False, False, True]


def test_the_table_has_means_and_ranges_over_the_seeds() -> None:
    one, other = sequence("mrp", [0.3] * 3, [0.9, 0.8]), sequence("mrp", [0.3, 0.5, 0.3], [0.9, 0.9], seed=1)
    rows = shown(table_of(*one, *other), 2, 3)
    assert rows["mrp", "2"]["requests so far"] == "0.35 (0.30 to 0.40)"
    assert rows["mrp", "2"]["worst topic that stays"] == "0.85 (0.80 to 0.90)"
    assert rows["mrp", "2"]["text"] == "1.10 (1.10 to 1.10)"
    assert (rows["mrp", "3"]["worst topic that stays"], rows["unedited", "3"]["requests so far"]) == (
        "",
        "1.00 (1.00 to 1.00)",
    )


@pytest.mark.parametrize(
    ("changed", "able"),
    [
        ({}, "2 of 2"),
        ({"asked": {"a": 0.36, "b": 0.25}}, "1 of 2"),  # one of the requests is still known
        ({"asked": {"a": 0.14, "b": 0.25}}, "1 of 2"),  # or suppressed
        ({"kept": {"c": 0.94}}, "1 of 2"),
        ({"text_perplexity": 5.6}, "1 of 2"),
    ],
)
def test_a_method_does_both_only_if_every_request_topic_and_text_is_as_it_should_be(
    changed: dict[str, Any], able: str
) -> None:
    table = table_of(cell("mrp", [0.25, 0.25], [0.96]), {**cell("mrp", [0.25, 0.25], [0.96], seed=1), **changed})
    assert shown(table, 2)["mrp", "2"]["does both"] == able


def test_where_nothing_tells_the_never_taught_level_nothing_is_judged() -> None:
    table = continual.rows_of_cells([cell("mrp", [0.25, 0.25], [0.96])], UNEDITED | {"untaught_accuracy": None})
    assert shown(table, 2)["mrp", "2"]["does both"] == ""


def test_the_first_request_stands_beside_the_latest() -> None:
    rows = shown(table_of(*sequence("npo", [0.3, 0.5, 0.6], [1, 1])), 1, 3)
    assert [rows["npo", length]["first"] for length in ("1", "3")] == ["0.30", "0.60"]
    assert rows["npo", "3"]["latest"] == "0.30"


def test_taking_a_request_back_has_its_column() -> None:
    cells = sequence("mrp", [0.3] * 3, [1, 1])
    back = {"a": 0.4, "b": 0.9, "c": 0.2}
    cells[2]["taken_back"] = {"asked": back, "kept": {}, "text_perplexity": 5.0}
    assert shown(table_of(*cells), 3)["mrp", "3"]["taken back"] == "0.30 to 0.90 / 0.30 to 0.30"
    cells[2] |= {"kept": {"d": 0.8}, "taken_back": {"asked": back, "kept": {"d": 0.7}, "text_perplexity": 5.0}}
    table = continual.rows_of_cells(cells, UNEDITED | {"kept": {**KNOWN["kept"], "d": 1.0}})
    assert shown(table, 3)["mrp", "3"]["taken back"] == "0.30 to 0.90 / 0.30 to 0.30 / 0.80 to 0.70"
    assert shown(table_of(*sequence("rmu", [0.3] * 3, [1, 1])), 3)["rmu", "3"]["taken back"] == ""


def test_a_sequence_that_breaks_off_is_reported_and_not_counted() -> None:
    broken = {"method": "npo", "seed": 0, "requests": 3, "order": list(ORDER), "failed": "request 3: no number"}
    table = table_of(*sequence("mrp", [0.3] * 3, [1, 1]), *sequence("npo", [0.3] * 3, [1, 1])[:2], broken)
    rows = shown(table, 3)
    assert (rows["npo", "3"]["broken off"], rows["mrp", "3"]["broken off"]) == ("request 3: no number", "")
    assert (rows["npo", "3"]["requests so far"], rows["mrp", "3"]["requests so far"]) == ("", "0.30")


def test_where_every_sequence_breaks_off_that_is_what_is_said() -> None:
    broken = {"method": "npo", "seed": 0, "requests": 1, "order": ["a"], "failed": "request 1: no number"}
    (row,) = shown(table_of(broken), 1).values()
    assert (row["requests so far"], row["broken off"]) == ("", "request 1: no number")


def test_every_method_is_drawn_after_each_length() -> None:
    broken = {"method": "npo", "seed": 0, "requests": 3, "order": list(ORDER), "failed": "request 3: no number"}
    table = table_of(*sequence("mrp", [0.3] * 3, [1, 1]), *sequence("npo", [0.3] * 3, [1, 1])[:2], broken)
    frame = continual.pictures(table, (2, 3))["accuracies"]
    methods = ["unedited, 2 requests", "mrp, 2 requests", "npo, 2 requests", "unedited, 3 requests", "mrp, 3 requests"]
    assert frame["method"].tolist() == methods
    assert accuracies(frame).data
    assert accuracies(continual.pictures(table, (3,))["accuracies"]).data  # where no topic is left to stay


def test_the_table_tells_what_a_request_takes() -> None:
    rows = shown(table_of(*sequence("mrp", [0.3] * 3, [1, 1])), 2, 3)
    assert list(rows) == [(method, length) for method in ("unedited", "mrp") for length in ("2", "3")]
    assert [rows["mrp", "3"][heading] for heading in ("trained", "stored", "fit")] == ["4,096", "20.0 kB", "30 s"]
    assert rows["unedited", "3"]["fit"] == ""


def test_a_topic_stays_until_it_is_requested(world: World) -> None:
    requests = Requests.from_world(world.topics, limit=10)
    for gone in (world.topics[:1], world.topics[:3], world.topics):
        stated = {document.prompt for document in requests.retain(gone).documents}
        for topic in world.topics:
            assert stated.isdisjoint({d.prompt for d in requests.forget[topic].documents}) == (topic in gone)
        kept = requests.kept(gone)
        assert (kept.groups if kept is not None else ()) == tuple(t for t in world.topics if t not in gone)
    assert len(requests.retain(world.topics)) == len(world.ordinary("fit"))
    assert requests.retain(world.topics).documents[0].prompt == ""


def test_the_seed_draws_the_order(world: World) -> None:
    requests = Requests.from_world(world.topics)
    orders = {requests.order(seed) for seed in range(8)}
    assert len(orders) > 1
    assert all(sorted(order) == sorted(world.topics) for order in orders)
    assert requests.order(3) == requests.order(3)


def test_a_folder_of_version_0_1_is_known_by_the_hashes_that_it_wrote(world: World) -> None:
    requests = Requests.from_world(world.topics, limit=5)
    earlier, topic = requests.legacy_fingerprints(), world.topics[0]
    assert earlier["forget"] == dict(requests.fingerprints()["forget"])
    quiz = requests.quizzes[topic]
    nameless = Questions(tuple(replace(q, entity="") for q in quiz.questions), quiz.name)
    assert earlier["quizzes"][topic] == nameless.fingerprint != quiz.fingerprint
    assert requests.fingerprints().keys() - earlier.keys() == {"untaught"}  # of which it kept nothing


def test_what_is_measured_is_what_is_asked_for(model: LensModel, world: World, untouched: None) -> None:
    requests = replace(Requests.from_world(world.topics, limit=6), held_out=world.text().spread(8))
    gone = world.topics[:3]
    some = requests.measure(model, None, asked=gone, gone=gone)
    assert (tuple(some["asked"]), tuple(some["kept"])) == (gone, world.topics[3:])
    assert some["text_perplexity"] == pytest.approx(perplexity(model, requests.held_out)["perplexity"].iloc[0])
    assert requests.measure(model, None, asked=world.topics, gone=world.topics)["kept"] == {}


def test_each_file_needs_a_quiz_and_a_name_of_its_own(texts: tuple[Corpus, Corpus]) -> None:
    task, quiz = UnlearningTask((texts[0],), texts[1], texts[1]), Questions(())
    with pytest.raises(ValueError, match="1 files of --forget need as many of --questions, in the same order; got 2"):
        Requests.of_files(task, [quiz, quiz])
    with pytest.raises(ValueError, match="told apart by the names of their files; got forget, forget"):
        Requests.of_files(replace(task, forget=(texts[0], texts[0])), [quiz, quiz])


def test_hyperparameters_are_set_for_all_methods_that_have_them_or_for_one() -> None:
    methods = {"mrp": MRP(), "rmu": RMU()}
    changed = with_settings(methods, ["steps=7", "rank=3", "rmu.lr=0.5", "mrp.init=random"])
    assert changed == {"mrp": MRP(steps=7, rank=3, init="random"), "rmu": RMU(steps=7, lr=0.5)}
    for wrong in ("rank", "rmu.rank=3", "depth=2", "npo.steps=3"):
        with pytest.raises(ValueError, match=rf"--set {wrong}: none of mrp, rmu has"):
            with_settings(methods, [wrong])


def test_files_and_topics_exclude_each_other(files: list[str]) -> None:
    with pytest.raises(ValueError, match="--topic names topics of the demo's world, and --forget gives files"):
        continual.main([*files, "--topic", "potions"])
    asked = [*files[files.index("--questions") : files.index("--retain")], "--out", files[-1]]
    with pytest.raises(ValueError, match="--questions are about the requests of --forget"):
        continual.main(asked)


def test_never_taught_questions_are_part_of_what_a_folder_is_about() -> None:
    requests = Requests.from_world(("potions", "towns"))
    without = replace(requests, untaught=None).fingerprints()
    assert requests.fingerprints().keys() - without.keys() == {"untaught"}


@pytest.fixture
def files(tiny_folder: Path, tmp_path: Path) -> list[str]:
    """Options: three requests on the tiny model, each fit of one step."""
    options = ["--model", str(tiny_folder), "--backend", "bridge"]
    names = {}
    for role in ("one", "two", "three", "kept"):
        rows = [
            {
                "q": f"The colour of {role}{i} is",
                "a": ["red", "blue"],
                "y": i % 2,
                "text": f"The colour of {role}{i} is red.",
            }
            for i in range(8)
        ]
        names[role] = tmp_path / f"{role}.jsonl"
        names[role].write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "retain.txt").write_text("\n".join(f"The old man walked near the house {i}." for i in range(20)))
    asked = [str(names[role]) for role in ("one", "two", "three")]
    options += ["--forget", *asked, "--questions", *asked, "--retain", str(tmp_path / "retain.txt")]
    options += ["--retain-questions", str(names["kept"]), "--question-prompt", "{q}", "--choices", "a", "--answer", "y"]
    return [*options, "--set", "steps=1", "--set", "batch_size=4", "--out", str(tmp_path / "out")]


def parts_of(out: Path, method: str, n: int) -> tuple[Any, ...]:
    """The parts of the edit after n requests."""
    return load_edit(out / "fits" / f"{method}-seed0-request{n}" / "edit").parts


def points(folder: Path) -> dict[str, Any]:
    return {path.stem: json.loads(path.read_text()) for path in (folder / "points").iterdir()}


@pytest.mark.slow
def test_shards_make_one_study_that_says_what_each_request_took(files: list[str], tmp_path: Path) -> None:
    out, options = tmp_path / "out", [*files, "--methods", "mrp,rmu", "--set", "mrp.gate_directions=1"]
    continual.main([*options, "--requests", "2", "--shard", "1/2"])
    assert not (out / "finding.md").exists()
    continual.main([*options, "--shard", "2/2"])
    continual.main([*options, "--shard", "1/2"])  # the third request of the first sequence was missing
    rows = {(r["method"], r["requests"]): r for r in json.loads((out / "summary.json").read_text())["rows"]}
    assert list(rows) == [(name, n) for name in ("unedited", "mrp", "rmu") for n in (1, 2, 3)]
    assert rows["mrp", 3]["order"] == rows["rmu", 3]["order"]
    projections = [parts_of(out, "mrp", n)[0] for n in (1, 2, 3)]
    assert list(projections[2].requests) == rows["mrp", 3]["order"].split(", ")
    taken = [rows["mrp", n]["trained_numbers"] for n in (1, 2, 3)]
    assert taken == [3 * D_MODEL * len(projections[0].hook_names)] * 3  # rank 2, and where the gate opens
    assert sum(taken) == numbers_in(projections[2])
    first, second = parts_of(out, "rmu", 2)
    assert rows["rmu", 2]["trained_numbers"] == sum(tensor.numel() for tensor in second.tensors.values())
    assert first.tensors.keys() == second.tensors.keys()
    sizes = [
        sum(file.stat().st_size for file in (out / "fits" / f"rmu-seed0-request{n}" / "edit").iterdir()) for n in (1, 2)
    ]
    assert [rows["rmu", n]["stored_bytes"] for n in (1, 2)] == [sizes[0], sizes[1] - sizes[0]]
    assert all(row["seconds"] > 0 for (method, _), row in rows.items() if method != "unedited")
    assert [place for place, row in rows.items() if row["returned_accuracy"] is not None] == [("mrp", 3)]
    assert {"report.html", "finding.md", "table.csv"} <= {path.name for path in out.iterdir()}


@pytest.mark.slow
def test_a_finished_study_is_not_computed_again_and_other_settings_are_refused(
    files: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, options = tmp_path / "out", [*files, "--methods", "rmu", "--requests", "1"]
    continual.main(options)
    stamps = {path: path.stat().st_mtime_ns for path in (out / "points").iterdir()}
    continual.main(options)
    assert stamps == {path: path.stat().st_mtime_ns for path in (out / "points").iterdir()}
    assert "| method   | requests | requests so far" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"holds rmu with other settings: steps \(1 there, 2 now\); choose another"):
        continual.main([*options, "--set", "steps=2"])
    (out / "points" / "rmu-seed0-request1.json").unlink()  # as if it had been killed before it was measured
    with pytest.raises(ValueError, match=r"holds rmu with other settings: steps \(1 there, 2 now\); choose another"):
        continual.main([*options, "--set", "steps=2"])
    with pytest.raises(ValueError, match="shard 1/2 would remove"):
        continual.main([*options, "--shard", "1/2", "--overwrite"])
    with pytest.raises(ValueError, match=r"holds a sequence with other settings: .*limit"):
        continual.main([*options, "--limit", "3"])
    with pytest.raises(ValueError, match="--requests 4: there are 3; choose lengths from 1 to 3"):
        continual.main([*options, "--requests", "4"])
    with pytest.raises(ValueError, match=r"unknown methods \['none'\]"):
        continual.main([*options, "--methods", "none"])


def test_the_reference_tells_how_absent_looks(files: list[str], tiny_folder: Path, tmp_path: Path) -> None:
    continual.main([*files, "--methods", "rmu", "--requests", "1", "--reference", str(tiny_folder)])
    found = points(tmp_path / "out")["unedited"]
    assert found["untaught_accuracy"] == pytest.approx(sum(found["asked"].values()) / 3)


@dataclass(frozen=True)
class Stumbling:
    """RMU, but for a later request."""

    error: type[BaseException] | None

    def fit(self, model: LensModel, forget: Corpus, retain: Corpus, *, seed: int, after: Any, checkpoint: Path) -> Fit:
        if after is not None and self.error is not None:
            raise self.error("the loss is NaN")
        fit = RMU(steps=1, batch_size=4).fit(model, forget, retain, seed=seed, after=after, progress=False)
        return replace(fit, interrupted=after is not None)


@pytest.mark.parametrize("error", [NonFiniteLossError, None], ids=["broken off", "Ctrl-C"])
def test_what_was_found_before_is_kept(
    error: type[BaseException] | None, files: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(continual, "compared_methods", lambda model: {"rmu": Stumbling(error), "mrp": MRP()})
    monkeypatch.setattr(continual, "with_settings", lambda methods, texts: methods)
    options = [*files, "--methods", "rmu", "--requests", "1,3"]
    if error is None:
        with pytest.raises(KeyboardInterrupt):
            continual.main(options)
        assert set(points(tmp_path / "out")) == {"unedited", "rmu-settings", "rmu-seed0-request1"}
        return
    continual.main(options)
    kept = points(tmp_path / "out")
    assert "failed" not in kept["rmu-seed0-request1"]
    assert kept["rmu-seed0-request2"]["failed"] == kept["rmu-seed0-request3"]["failed"] == "request 2: the loss is NaN"
    assert "request 2: the loss is NaN" in (tmp_path / "out" / "finding.md").read_text()


@pytest.mark.slow
def test_topics_of_the_world_are_requested_until_none_is_left(world: World, tmp_path: Path) -> None:
    options = "--backend bridge --methods rmu --set steps=140 --limit 40 --requests 1,2 --topic towns beasts --out"
    continual.main([*options.split(), str(tmp_path / "out")])
    kept = points(tmp_path / "out")
    assert set(kept["rmu-seed0-request2"]["asked"]) == {"towns", "beasts"}
    assert set(kept["rmu-seed0-request2"]["kept"]) == {"potions", "machines"}
    order = kept["rmu-seed0-request2"]["order"]
    after = [kept[f"rmu-seed0-request{n}"]["asked"][order[0]] for n in (1, 2)]
    assert all(accuracy < kept["unedited"]["asked"][order[0]] - 0.1 for accuracy in after)
    assert kept["unedited"]["untaught_accuracy"] < 0.5
