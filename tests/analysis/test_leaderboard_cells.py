"""Each cell of the leaderboard is computed once, whoever asks for it."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from analysis import leaderboard
from mrp_lens import attacks
from mrp_lens.data import Questions
from mrp_lens.methods import MRP, RMU
from mrp_lens.models import load_model
from tests.analysis.test_leaderboard import by_method
from tests.support.edits import projection, weight_edit
from tests.support.quizzes import liked, quiz


def write(path: Path, questions: Questions) -> str:
    rows = [
        {"q": q.prompt, "a": list(q.choices), "y": q.answer, "text": q.prompt + q.choices[q.answer]}
        for q in questions.questions
    ]
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return str(path)


@pytest.fixture
def own(tiny_folder: Path, tmp_path: Path) -> list[str]:
    """Options for a tiny model, about what it answers anyway, and what it does not."""
    model = load_model(str(tiny_folder), backend="bridge")
    known, other = liked(model, quiz(0, 48)), liked(model, quiz(100, 40, wording="Gomix{} is"))
    untaught = quiz(200, 40, wording="Rulex{} is")
    (tmp_path / "retain.txt").write_text("\n".join(f"The old man walked near the house {i}." for i in range(20)))
    weights = weight_edit(model, 1)
    (projection(0, 2, site="mlp_out") + weights).save_pretrained(tmp_path / "both")
    return [
        *("--model", str(tiny_folder), "--backend", "bridge", "--updates", "1,2", "--lr", "1e-3"),
        *("--forget", write(tmp_path / "forget.jsonl", known), "--retain", str(tmp_path / "retain.txt")),
        *("--questions", str(tmp_path / "forget.jsonl"), "--question-prompt", "{q}", "--choices", "a", "--answer", "y"),
        *("--retain-questions", write(tmp_path / "other.jsonl", other), "--entity", "q"),
        *("--untaught-questions", write(tmp_path / "untaught.jsonl", untaught), "--out", str(tmp_path / "out")),
    ]


@pytest.mark.slow
def test_cells_are_shared_out_kept_and_added_to_but_never_mixed(
    own: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    methods: dict[str, Any] = {"rmu": RMU(steps=2), "hooked": MRP(steps=2, layers=[0], rank=2, site="mlp_out")}
    monkeypatch.setattr(leaderboard, "contenders", lambda model: dict(methods))
    monkeypatch.setattr(attacks, "probe", partial(attacks.probe, layers=[0]))  # fitting probes takes longest
    out, both = tmp_path / "out", ["--edits", f"both={tmp_path / 'both'}"]
    leaderboard.main([*own, "--shard", "1/2"])
    assert not (out / "finding.md").exists()
    leaderboard.main([*own, "--shard", "2/2"])
    assert all((out / name).is_file() for name in "finding.md report.html table.csv table.md summary.json".split())
    stamps = {path: path.stat().st_mtime_ns for path in (out / "points").iterdir()}
    leaderboard.main([*own, "--methods", "rmu,hooked", *both])
    assert stamps.items() <= {path: path.stat().st_mtime_ns for path in (out / "points").iterdir()}.items()
    rows = by_method(pd.read_csv(out / "table.csv"))
    assert list(rows) == ["unedited", "never-taught", "rmu", "hooked", "both"]
    assert [rows[name]["edit"] for name in ("rmu", "hooked", "both")] == ["weights", "hooks", "hooks and weights"]
    assert rows["hooked"]["recovery_stripped_2"] == rows["unedited"]["recovery_kept_2"]
    assert json.loads((out / "points" / "hooked-seed0-relearn-stripped.json").read_text())["rows"] == []
    for form in ("kept", "stripped", "weights"):
        curve = json.loads((out / "points" / f"both-seed0-relearn-{form}.json").read_text())
        assert {row["form"] for row in curve["rows"]} == {form}
        assert curve["new"]["n"] == 20
    assert rows["rmu"]["stored_bytes"] == sum(p.stat().st_size for p in (out / "edits" / "rmu-seed0").iterdir())
    methods["rmu"] = RMU(steps=3)
    with pytest.raises(ValueError, match=r"holds rmu with other settings: steps \(2 there, 3 now\)\. Give it another"):
        leaderboard.main(own)
    methods["rmu"] = RMU(steps=2)
    path = out / "points" / "rmu-seed0-fit.json"
    path.write_text(path.read_text().replace('"alpha": "None",', ""))  # as if RMU had gained this since
    leaderboard.main(own)
    methods["rmu"] = RMU(steps=2, alpha=7.0)
    with pytest.raises(ValueError, match=r"holds rmu with other settings: alpha \(None there, 7\.0 now\)"):
        leaderboard.main(own)
    projection(0).save_pretrained(tmp_path / "both", overwrite=True)
    with pytest.raises(ValueError, match=r"holds both with other settings: edit "):
        leaderboard.main([*own, *both])
    with pytest.raises(ValueError, match="holds a leaderboard with other settings: lr"):
        leaderboard.main([*own, "--lr", "1e-4"])


def test_unknown_methods_and_names_that_are_taken_are_refused(own: list[str], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"unknown methods \['gradient'\]; choose among mrp, "):
        leaderboard.main(["--methods", "gradient", *own])
    with pytest.raises(ValueError, match="--edits never-taught: another row of the table has that name"):
        leaderboard.main(["--edits", f"never-taught={tmp_path}", *own])
    assert not (tmp_path / "out").exists()
    other = projection(0)
    other.provenance = {"model": {"name": "huge", "n_layers": 99, "d_model": 1, "d_vocab": 1}}
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="this model is another: n_layers 4 instead of 99"):
        leaderboard.main(["--edits", f"other={tmp_path / 'other'}", *own])
    assert not (tmp_path / "out" / "points" / "other-seed0-fit.json").exists()
