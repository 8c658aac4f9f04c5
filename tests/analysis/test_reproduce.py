"""A recorded study is run again on the recorded files, and what comes out is held against the record."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from analysis import layers, reproduce
from analysis.reproduce import Recipe, compared, finding
from mrp_lens.utils.frames import versions

RECIPES = sorted((Path(__file__).parents[2] / "reproduce").glob("*.toml"))
ROWS: list[dict[str, Any]] = [
    {"method": "unedited", "seed": 0, "forget_accuracy": 1.0, "forget_low": 0.98, "forget_high": 1.0, "damage": None},
    {"method": "rmu", "seed": 0, "forget_accuracy": 0.3, "forget_low": 0.25, "forget_high": 0.35}
    | {"damage": 0.01, "damage_low": 0.008, "damage_high": 0.012, "seconds": 40.0},
]

Study = Callable[..., Path]


@pytest.fixture
def study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Study:
    """Makes a recipe for a study that reads one file, and finds these rows."""

    def made(rows: list[dict[str, Any]]) -> Path:
        def main(arguments: list[str]) -> None:
            out = Path(arguments[-1])
            out.mkdir(exist_ok=True)
            (out / "arguments.json").write_text(json.dumps(arguments))
            (out / "summary.json").write_text(json.dumps({"rows": rows, "versions": versions(), "finished": "today"}))

        monkeypatch.setattr(layers, "main", main)
        folder = tmp_path / "reproduce"
        folder.mkdir(exist_ok=True)
        (folder / "toy.toml").write_text(
            'study = "analysis.layers"\noptions = ["--prompt", "Q: {q}", "--forget", "$data/forget.txt"]\n'
            'files = ["$data/forget.txt"]\ninputs.data = "a folder with forget.txt"\n'
        )
        (tmp_path / "data").mkdir(exist_ok=True)
        (tmp_path / "data" / "forget.txt").write_text("Gomix is old.")
        return folder / "toy.toml"

    return made


def run(recipe: Path, *options: str) -> None:
    folder = recipe.parent.parent
    reproduce.main([str(recipe), "--input", f"data={folder / 'data'}", "--out", str(folder / "out"), *options])


def test_a_study_is_run_with_its_inputs_and_compared_with_its_record(
    study: Study, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(study(ROWS), "--record")
    record = json.loads((tmp_path / "reproduce" / "toy.json").read_text())
    assert record["sha256"] == {"$data/forget.txt": hashlib.sha256(b"Gomix is old.").hexdigest()}
    assert record["rows"] == ROWS
    assert json.loads((tmp_path / "out" / "arguments.json").read_text()) == [
        *("--prompt", "Q: {q}", "--forget", f"{tmp_path}/data/forget.txt", "--out", f"{tmp_path}/out")
    ]
    capsys.readouterr()
    run(study(ROWS))
    assert "3 of 3 figures lie in the record's 95% interval" in capsys.readouterr().out
    worse = [ROWS[0], {**ROWS[1], "forget_accuracy": 0.36, "damage": 0.0119}]
    run(study(worse))
    shown = capsys.readouterr().out
    assert "2 of 3 figures" in shown
    assert "rmu 0" in shown
    assert "0.300 [0.250, 0.350] | 0.360" in shown
    assert "damage" not in shown
    table = pd.read_csv(tmp_path / "out" / "reproduced.csv")
    assert table["inside"].tolist() == [True, False, True]


def test_a_table_whose_rows_nothing_tells_apart_is_not_recorded(study: Study, tmp_path: Path) -> None:
    recipe = study([*ROWS, ROWS[1]])
    with pytest.raises(ValueError, match="several rows about 'rmu 0'"):
        run(recipe, "--record")
    assert not (tmp_path / "reproduce" / "toy.json").exists()
    run(study([ROWS[0], *({**ROWS[1], "attacker": name} for name in ("usual", "unrelated"))]), "--record")


def test_other_files_are_refused_before_any_work(study: Study, tmp_path: Path) -> None:
    recipe = study(ROWS)
    run(recipe, "--record")
    (tmp_path / "out" / "summary.json").unlink()
    (tmp_path / "data" / "forget.txt").write_text("Gomix is young.")
    with pytest.raises(ValueError, match=r"\$data/forget\.txt: not the content that was recorded.*--other-files"):
        run(recipe)
    assert not (tmp_path / "out" / "summary.json").exists()
    run(recipe, "--other-files")
    (tmp_path / "data" / "forget.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"forget\.txt, which .* calls \$data/forget\.txt, is not there"):
        run(recipe)


def test_what_is_given_has_to_be_what_the_recipe_asks_for(study: Study, tmp_path: Path) -> None:
    recipe, out = study(ROWS), ["--out", str(tmp_path / "out")]
    with pytest.raises(ValueError, match=r"--input data=PATH is missing: a folder with forget\.txt"):
        reproduce.main([str(recipe), *out])
    with pytest.raises(ValueError, match=r"--input model=\.\.\. is not asked for; this recipe takes data"):
        run(recipe, "--input", "model=there")
    with pytest.raises(ValueError, match="--input takes NAME=PATH, got 'there'"):
        reproduce.main([str(recipe), *out, "--input", "there"])
    with pytest.raises(ValueError, match="--input data= is given twice"):
        run(recipe, "--input", "data=there")
    with pytest.raises(FileNotFoundError, match=r"toy\.json is not there"):
        run(recipe)
    with pytest.raises(FileNotFoundError, match=r"none\.toml is not there; the recipes are"):
        run(recipe.with_name("none.toml"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("study = ", "is not TOML"),
        ('study = "analysis.layers"\nseed = 1', "has seed; a recipe has about, files"),
        ('study = "os"', "study must be a module of this package such as 'analysis.leaderboard', got 'os'"),
        ('study = "analysis.layers"\noptions = ["$model"]', r"speaks of \['model'\] and says what \[\] are"),
    ],
)
def test_what_is_no_recipe_is_refused(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "bad.toml"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        Recipe.read(path)


def test_a_study_that_does_not_end_is_no_result(study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = study(ROWS)
    monkeypatch.setattr(layers, "main", lambda arguments: None)
    with pytest.raises(ValueError, match=r"holds no summary\.json: the study has not come to its end"):
        run(recipe, "--record")


def test_a_row_or_figure_that_is_missing_now_is_not_inside() -> None:
    recorded = pd.DataFrame(ROWS)
    table = compared(recorded, pd.DataFrame([{"method": "rmu", "seed": 0.0, "forget_accuracy": 0.25}]))
    assert table["row"].tolist() == ["unedited 0", "rmu 0", "rmu 0"]
    assert table["figure"].tolist() == ["forget_accuracy", "forget_accuracy", "damage"]
    assert table["inside"].tolist() == [False, True, False]
    assert "1 of 3 figures" in finding(table, {"torch": "2"})


def test_rows_are_told_apart_by_all_that_they_are_about() -> None:
    rows = [
        {
            "method": "mrp",
            "seed": 0,
            "requests": n,
            "layer": None,
            "forget_accuracy": n / 10,
            "forget_low": n / 10 - 0.02,
        }
        | {"forget_high": n / 10 + 0.02}
        for n in (1, 2, 3)
    ]
    table = compared(pd.DataFrame(rows), pd.DataFrame(rows[::-1]))
    assert table["row"].tolist() == ["mrp 0 1", "mrp 0 2", "mrp 0 3"]
    assert table["inside"].all()
    alike = [{**row, "requests": 1} for row in rows]
    with pytest.raises(ValueError, match="the record has several rows about 'mrp 0 1'"):
        compared(pd.DataFrame(alike), pd.DataFrame(alike))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_of_the_repository_has_a_record_of_the_files_it_reads(path: Path) -> None:
    recipe = Recipe.read(path)
    record = json.loads(recipe.record.read_text(encoding="utf-8"))
    assert list(record["sha256"]) == list(recipe.files)
    own = Recipe(path, recipe.study, [], [name for name in recipe.files if "$" not in name], {})
    assert own.hashes({}).items() <= record["sha256"].items()
    assert len(compared(pd.DataFrame(record["rows"]), pd.DataFrame(record["rows"])).query("not inside")) == 0
    assert len(record["rows"]) > 2


def test_there_are_recipes() -> None:
    assert RECIPES
