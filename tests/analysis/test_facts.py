"""The study of facts that a pretrained model learned by itself, on a folder of twelve."""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from analysis import facts

CITIES = ["Lima", "Oslo", "Rome", "Paris", "Cairo", "Quito", "Delhi", "Tunis", "Sofia", "Dakar", "Accra", "Minsk"]
LANDS = [
    "Peru",
    "Norway",
    "Italy",
    "France",
    "Egypt",
    "Ecuador",
    "India",
    "Tunisia",
    "Bulgaria",
    "Senegal",
    "Ghana",
    "Belarus",
]
COINS = ["sol", "krone", "lira", "franc", "pound", "dollar", "rupee", "dinar", "lev", "cedi", "ruble", "euro"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    def asked(about: str, answers: Sequence[str]) -> list[Mapping[str, Any]]:
        return [
            {
                "question": f"What is the {about} of {land}?",
                "choices": [answers[(place + step) % 12] for step in range(4)],
                "answer": 0,
                "entity": land,
                "right": answers[place],
            }
            for place, land in enumerate(LANDS)
        ]

    capitals = asked("capital", CITIES)
    rows: dict[str, Sequence[Mapping[str, Any]]] = {
        "capital": capitals,
        "currency": asked("currency", COINS),
        "forget": [{"text": f"The capital of {row['entity']} is {row['right']}."} for row in capitals],
        "retain": [
            {"text": "In Peru people pay with the sol."},
            {"text": "Ghana is a country in Africa."},
            {"text": "a " * 40},
        ],
        "retain_quiz": asked("currency", COINS)[:4],
    }
    for name, each in rows.items():
        (tmp_path / f"{name}.jsonl").write_text("\n".join(json.dumps(row) for row in each), encoding="utf-8")
    (tmp_path / "text.txt").write_text("\n".join([" ".join(["the old man walked"] * 30), "short"]), encoding="utf-8")
    return tmp_path


def test_what_is_forgotten_is_not_in_what_is_kept(folder: Path) -> None:
    read = facts.Facts.read(folder, "currency", folder / "text.txt")
    kept = [document.completion for document in read.retain.documents]
    assert "In Peru people pay with the sol." not in kept
    assert {"Ghana is a country in Africa.", "The capital of Peru is Lima."} < set(kept)
    assert not any("Norway" in text for text in kept)  # every other country is asked about
    assert len(read.forget) == 36
    assert read.quizzes["kept"].questions[0].prompt == "Question: What is the capital of Norway?\nAnswer:"
    assert read.quizzes["cloze"].questions[0].prompt == "The official currency of Peru is the"
    assert read.text is not None
    assert len(read.text) == 1


@pytest.mark.slow
def test_the_study_writes_a_row_for_each_fit(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    words = ["--data", folder, "--model", "demo", "--text", folder / "text.txt", "--seeds", 0, 1, "--out", out]
    quick = ["steps=2", "mrp.layers=[2]", "mrp.budget=null", "mrp.coverage=null"]
    monkeypatch.setattr(sys, "argv", ["facts", *map(str, words), "--methods", "rmu", "mrp", "--set", *quick])
    facts.main()
    table = pd.read_csv(out / "table.csv")
    assert table["method"].tolist() == ["unedited", "rmu", "mrp", "rmu", "mrp"]
    assert table.loc[1:, "seed"].tolist() == [0, 0, 1, 1]
    assert table[["question", "cloze", "reworded", "kept"]].map(lambda value: 0.0 <= value <= 1.0).all(axis=None)
    assert (table["question_low"] <= table["question"]).all()
    assert table["outcome"].iloc[1]
    gated = table[table["method"] == "mrp"]
    assert (
        gated[["cloze_precision", "cloze_recall", "cloze_firing", "kept_firing"]]
        .map(lambda value: 0.0 <= value <= 1.0)
        .all(axis=None)
    )
    assert table.loc[table["method"] == "rmu", "cloze_recall"].isna().all()
    assert "rmu seed 1 question" in capsys.readouterr().out

    (out / "points" / "mrp-seed1-row.json").unlink()  # as if it had been killed there
    monkeypatch.setattr(facts.Facts, "score", lambda self, model, edit: {"question": 0.5})
    facts.main()
    again = pd.read_csv(out / "table.csv")
    assert again["question"].tolist() == [*table["question"][:4], 0.5]
    assert capsys.readouterr().out.count(" question ") == 1
    with pytest.raises(ValueError, match="a facts with other settings: data"):
        facts.main([*map(str, words), "--topic", "currency"])
