"""The study of selectivity exchanges what it says, holds out what it says, and its tables follow from its frames."""

import json
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from analysis import selectivity
from analysis.common.selectivity_tables import (
    COVERED,
    EXCHANGED,
    GATED,
    OPEN,
    PLAIN,
    RANDOM_GATED,
    UNBOUNDED,
    UNBOUNDED_GATED,
    WHAT,
    WITHOUT,
    energy_table,
    propagation_table,
    score_table,
    token_table,
)
from mrp_lens import metrics
from mrp_lens.data import Corpus, Document, Questions, UnlearningTask
from mrp_lens.data.world import World
from mrp_lens.edits import ConditionalProjectionEdit, ProjectionEdit, load_edit
from mrp_lens.methods import MRP
from mrp_lens.metrics.controls import RANDOM_PROJECTION, UNEDITED
from mrp_lens.models import LensModel, load_model
from tests.analysis.test_studies import cells_of
from tests.support.edits import conditional, projection


def test_rows_and_gates_are_exchanged_and_each_hook_stands_alone() -> None:
    plain, gated = projection(1, 2, seed=5), conditional(1, 2)
    found: dict[Any, Any] = selectivity.exchanges(plain, gated, unbounded=projection(1, 2, seed=9), seed=3)
    gates, names = gated.gates("edit"), gated.hook_names

    def rows(edit: ProjectionEdit) -> torch.Tensor:
        return torch.stack([edit.subspaces()[hook].basis for hook in names])

    assert found[UNEDITED, None] is None
    assert type(found[OPEN, None]) is ProjectionEdit
    torch.testing.assert_close(rows(found[OPEN, None]), rows(gated))
    torch.testing.assert_close(rows(found[EXCHANGED, None]), rows(plain))
    assert all(
        torch.equal(found[EXCHANGED, None].gates("edit")[hook].direction, gates[hook].direction) for hook in names
    )
    torch.testing.assert_close(rows(found[UNBOUNDED_GATED, None]), rows(found[UNBOUNDED, None]))
    assert found[UNBOUNDED_GATED, None].gates("edit").keys() == gates.keys()
    assert (UNBOUNDED, None) not in selectivity.exchanges(plain, gated, seed=3)
    assert type(found[RANDOM_PROJECTION, None]) is ProjectionEdit
    torch.testing.assert_close(rows(found[RANDOM_PROJECTION, None]), rows(found[RANDOM_GATED, None]))
    assert isinstance(found[RANDOM_GATED, None], ConditionalProjectionEdit)
    for layer, hook in zip((1, 2), names, strict=True):
        for method, whole in ((PLAIN, plain), (GATED, gated)):
            alone = found[method, layer]
            assert alone.hook_names == (hook,)
            assert isinstance(alone, ConditionalProjectionEdit) == (method == GATED)
            assert torch.equal(alone.subspaces()[hook].basis, whole.subspaces()[hook].basis)


@pytest.mark.slow
def test_the_fit_without_gates_is_the_same_otherwise(model: LensModel) -> None:
    gated = MRP(steps=7, budget=0.5)
    task = UnlearningTask.from_world("potions")  # of more than 7,000 tokens, which the rank grows with
    plain = selectivity.alike(gated, model, task)
    assert not plain.conditional
    unlike = {field.name for field in fields(gated) if getattr(plain, field.name) != getattr(gated, field.name)}
    assert unlike == {"conditional", "layers", "rank"}
    resolved = [method.prepared(model, task.forget, task.retain, None, None)[1] for method in (plain, gated)]
    assert resolved[0] == resolved[1]


def test_statements_are_what_looks_like_the_forget_set(world: World) -> None:
    task = UnlearningTask.from_world("potions")
    chosen = selectivity.statements(task)
    assert chosen is not None
    assert len(chosen) == len(task.retain) - len(world.ordinary("fit"))
    plain = Corpus.from_texts(["A line.", "word " * 41, "Another line."])
    texts = replace(task, forget=(plain,), retain=plain)
    assert [d.completion for d in (selectivity.statements(texts) or plain).documents] == ["A line.", "Another line."]
    assert selectivity.statements(replace(texts, retain=Corpus.from_texts(["A line."]))) is None


def test_a_fit_without_entities_reads_nothing_that_names_them() -> None:
    task = UnlearningTask.from_world("potions")
    split = selectivity.without_entities(task, seed=1)
    assert split is not None
    left, unseen = split
    gone, kept = ({q.entity for q in quiz.questions} for quiz in (unseen, left.questions or unseen))
    assert gone
    assert gone.isdisjoint(kept)
    texts = [document.prompt + document.completion for document in left.forget_texts.documents]
    assert not any(name in text for name in gone for text in texts)
    assert all(any(name in text for text in texts) for name in kept)
    assert left.retain == task.retain
    nameless = Questions(tuple(replace(q, entity="") for q in unseen.questions))
    assert selectivity.without_entities(replace(task, questions=nameless), seed=1) is None
    elsewhere = Corpus((Document("", "Nobody is named here."),), "elsewhere")
    assert selectivity.without_entities(replace(task, forget=(elsewhere,)), seed=1) is None


def test_the_share_that_rows_take_stands_beside_what_is_left_of_it() -> None:
    rows = [
        {"method": "mrp", "layer": layer, "group": group, "when": when, "seed": seed, "removed_rank": rank}
        | {"removed_energy": share + 0.1 * seed, "removed_energy_null": 0.25, "displacement": 0.5}
        for seed in (0, 1)
        for layer, rank in ((2, 4), (3, 0))
        for group, shares in (("forget", (0.6, 0.1)), ("retain", (0.2, 0.1)))
        for when, share in zip(("before", "after"), shares, strict=True)
    ]
    assert cells_of(energy_table(pd.DataFrame(rows))) == [
        [
            "method",
            "layer",
            "forget",
            "retain",
            "random",
            "forget, left",
            "retain, left",
            "forget, moved",
            "retain, moved",
        ],
        ["mrp", "2", "0.650", "0.250", "0.250", "0.150", "0.150", "0.500", "0.500"],
    ]


def test_what_comes_back_is_told_of_the_next_and_the_last_layer() -> None:
    rows = [
        {"method": "mrp", "source": source, "layer": layer, "group": "forget", "before": 0.5, "after": 0.1 * layer}
        for source in (1, 4)
        for layer in range(source, 5)
    ]
    frame = pd.DataFrame(rows).assign(null=0.1)
    assert cells_of(propagation_table(frame)) == [
        ["method", "removed at", "forget, next layer", "forget, last layer", "random"],
        ["mrp", "1", "0.500 to 0.200", "0.500 to 0.400", "0.100"],
    ]
    assert "nothing lies above it" in propagation_table(frame[frame["source"] == 4])


def test_tokens_are_told_from_both_ends_where_they_are_frequent() -> None:
    tokens = pd.DataFrame(
        {
            "group": "forget",
            "token": [" a|b", "rare", " the", "\n"],
            "share": [0.9, 1.0, 0.1, 0.2],
            "times": [3, 2, 9, 3],
        }
    )
    assert cells_of(token_table(tokens))[1] == [
        "forget",
        r"` a/b` 0.90, `\n` 0.20, ` the` 0.10",
        r"` the` 0.10, `\n` 0.20, ` a/b` 0.90",
    ]


def test_scores_have_their_interval_or_the_range_of_the_seeds() -> None:
    row = {"forget_accuracy": 0.3, "forget_low": 0.2, "forget_high": 0.4, "retain_accuracy": 0.9, "damage": 0.01}
    table = pd.DataFrame(
        [
            {"method": OPEN, "seed": 0, **row},
            {"method": GATED, "seed": 0, **row, "ended": "target"},
            {"method": GATED, "seed": 1, **row, "forget_accuracy": 0.5, "ended": "steps"},
        ]
    )
    one, two = cells_of(score_table(table, [OPEN, GATED, PLAIN]))[1:]
    assert one[:4] == [OPEN, "rows of the gated fit, every token", "0.30 [0.20, 0.40]", "0.90"]
    assert (two[2], two[-1]) == ("0.40 (0.30 to 0.50)", "target, steps")


@pytest.fixture
def options(tiny_folder: Path, tmp_path: Path) -> list[str]:
    """The tiny model and files of one's own, in which the quiz names entities."""
    names = [f"Zaxim{i}" for i in range(12)]
    rows = [
        {"text": f"The colour of {n} is red.", "q": f"Which colour has {n}?", "a": ["red", "blue"], "y": i % 2, "e": n}
        for i, n in enumerate(names)
    ]
    quiz = tmp_path / "forget.jsonl"
    quiz.write_text("\n".join(json.dumps(row) for row in rows))
    long = "The old man walked near the house " * 6  # more words than a statement has
    (tmp_path / "retain.txt").write_text(
        "\n".join(f"{text} {i}." for i in range(10) for text in ("A baker slept", long))
    )
    return [
        *("--model", str(tiny_folder), "--backend", "bridge", "--out", str(tmp_path / "out")),
        *("--forget", str(quiz), "--retain", str(tmp_path / "retain.txt"), "--questions", str(quiz)),
        *("--retain-questions", str(quiz), "--question-prompt", "{q}", "--choices", "a", "--answer", "y"),
        *("--entity", "e", "--set", "steps=2", "batch_size=4", "gate_directions=2"),
    ]


def test_both_quizzes_are_needed(options: list[str]) -> None:
    place = options.index("--retain-questions")
    with pytest.raises(ValueError, match="give --questions and --retain-questions"):
        selectivity.main([*options[:place], *options[place + 2 :]])
    with pytest.raises(ValueError, match="conditional=false leaves no gate"):
        selectivity.main([*options, "--set", "conditional=false"])


@pytest.mark.slow
def test_the_study_runs_shard_by_shard_on_a_model_and_data_of_ones_own(
    options: list[str], tiny_folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    selectivity.main([*options, "--shard", "1/2"])
    assert not (out / "finding.md").exists()
    selectivity.main([*options, "--shard", "2/2"])
    assert {"finding.md", "report.html", "summary.json", "table.csv"} <= {path.name for path in out.iterdir()}
    stamps = {path: path.stat().st_mtime_ns for path in (out / "points").iterdir()}
    selectivity.main(options)
    assert stamps == {path: path.stat().st_mtime_ns for path in (out / "points").iterdir()}

    table = pd.read_csv(out / "table.csv")
    whole = table[table["layer"].isna()].set_index("method")
    assert list(whole.index) == list(WHAT)
    assert whole[["damage", "answer_damage", "text_perplexity_ratio"]].T[UNEDITED].tolist() == [0.0, 0.0, 1.0]
    assert whole.loc[[OPEN, EXCHANGED, WITHOUT], "damage"].gt(0.0).all()
    fitted = [PLAIN, GATED, UNBOUNDED, *COVERED]
    assert whole.loc[fitted, "steps"].tolist() == [2.0] * len(fitted)
    assert whole["ended"].notna().tolist() == [name in fitted and name != UNBOUNDED for name in whole.index]
    alone = table[table["layer"].notna()]
    plain, gated = (load_edit(out / "fits" / f"{name}-seed0" / "edit") for name in (PLAIN, GATED))
    assert isinstance(gated, ConditionalProjectionEdit)
    assert isinstance(plain, ProjectionEdit)
    assert plain.hook_names == gated.hook_names
    assert len(alone) == 2 * len(gated.hook_names)

    unseen = metrics.damage(
        load_model(str(tiny_folder), backend="bridge"),
        ProjectionEdit(gated.subspaces()),
        Questions.from_file(tmp_path / "forget.jsonl", prompt="{q}", choices="a", answer="y").right_answers(),
    )
    assert whole.loc[OPEN, "answer_damage"] == pytest.approx(unseen["damage"].iloc[0])
    energy = pd.read_csv(out / "frames" / "removed_energy.csv")
    assert set(energy["group"]) == {"forget", "retain", "statements"}
    gates = pd.read_csv(out / "frames" / "gate.csv")
    assert set(gates["method"]) == {"corpora", "retain statements", "quiz prompts", "unseen entities"}
    finding = (out / "finding.md").read_text()
    assert [line for line in finding.splitlines() if line.startswith("## ")][3] == "## 4. Where or what"
