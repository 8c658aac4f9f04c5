"""Requests cut from data: whole authors, and relations with nothing of them in what is kept."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from analysis import request_files
from analysis.facts import STATEMENTS


def write(folder: Path, files: Mapping[str, Sequence[Mapping[str, Any]]]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in files.items():
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return folder


def rows(folder: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


def authors(*counts: int) -> dict[str, list[dict[str, Any]]]:
    asked = [
        {"question": f"{author}.{n}?", "author": author} for author, count in enumerate(counts) for n in range(count)
    ]
    documents = [{"question": row["question"], "answer": "so"} for row in asked]
    return {
        "forget": documents,
        "forget_quiz": asked,
        "retain": [{"question": "r"}],
        "retain_quiz": [{"question": "q"}],
    }


def test_authors_stay_whole_and_each_is_in_one_group(tmp_path: Path) -> None:
    data, out = write(tmp_path / "data", authors(2, 3, 1, 4, 1, 2, 2)), tmp_path / "out"
    request_files.main(["tofu", "--data", str(data), "--groups", "3", "--out", str(out)])
    groups = [sorted({row["author"] for row in rows(out, f"authors{n}-quiz")}) for n in (1, 2, 3)]
    assert groups == [[0, 1, 2], [3, 4], [5, 6]]
    for n in (1, 2, 3):
        asked, said = rows(out, f"authors{n}-quiz"), rows(out, f"authors{n}")
        assert [row["question"] for row in asked] == [row["question"] for row in said]
    assert sum(len(rows(out, f"authors{n}")) for n in (1, 2, 3)) == 15
    assert (rows(out, "retain"), rows(out, "retain-quiz")) == ([{"question": "r"}], [{"question": "q"}])


@pytest.mark.parametrize("groups", ["0", "3"])
def test_no_more_groups_than_authors(groups: str, tmp_path: Path) -> None:
    data = write(tmp_path / "data", authors(2, 2))
    with pytest.raises(ValueError, match=f"--groups {groups}: there are 2 authors; choose from 1 to 2"):
        request_files.main(["tofu", "--data", str(data), "--groups", groups, "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_a_quiz_about_other_documents_is_refused(tmp_path: Path) -> None:
    files = authors(2, 2)
    files["forget_quiz"].reverse()
    with pytest.raises(ValueError, match="the same questions in the same order"):
        request_files.main(["tofu", "--data", str(write(tmp_path / "data", files)), "--out", str(tmp_path / "out")])


def test_what_is_kept_tells_nothing_that_is_requested(tmp_path: Path) -> None:
    about = {
        "capital": [{"entity": "Ayland", "right": "Beeville"}],
        "currency": [{"entity": "Ayland", "right": "Ceet"}],
        "state": [{"entity": "Deeland", "right": "Eeville"}],
        "continent": [{"entity": "Ayland", "right": "Effica"}, {"entity": "Geeland", "right": "Effica"}],
    }
    text = "The capital of the state of Deeland is Eeville. " * 4  # of prose, which is kept as it is
    told = [
        "Ayland is a country in Effica.",
        "Geeland is a country in Effica.",
        "The capital of the state of Deeland is Eeville.",
        "The currency of Ayland is the Ceet.",
        text,
    ]
    quiz = [
        "On which continent is Geeland?",
        "What is the currency of Ayland?",
        "What is the capital of the state of Deeland?",
    ]
    files = {
        **about,
        "forget": [{"text": "Beeville, Ayland."}],
        "retain": [{"text": each} for each in told],
        "retain_quiz": [{"question": each} for each in quiz],
    }
    out = tmp_path / "out"
    request_files.main(["facts", "--data", str(write(tmp_path / "data", files)), "--out", str(out)])
    assert [row["text"] for row in rows(out, "retain")] == [told[0], told[1], text]
    assert [row["question"] for row in rows(out, "retain-quiz")] == quiz[:1]
    assert rows(out, "capital") == files["forget"]
    assert [len(rows(out, topic)) for topic in ("currency", "state")] == [
        len(STATEMENTS["currency"]),
        len(STATEMENTS["state"]),
    ]
    assert rows(out, "state")[0]["text"] == "The capital of the state of Deeland is Eeville."
    assert rows(out, "currency-quiz") == about["currency"]
    with pytest.raises(FileExistsError):
        request_files.main(["facts", "--data", str(tmp_path / "data"), "--out", str(out)])
