"""The study on TOFU, on a tiny model and a few questions: its table has the field's measures beside the never-taught model."""

import json
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from analysis import tofu
from tests.support.families import save_family


@pytest.mark.slow
def test_the_fields_measures_are_in_the_table_and_depth_is_drawn(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = tmp_path / "data"
    data.mkdir()
    colours = ["red", "blue", "green", "white", "old", "house"]
    for name, wording in (("forget", "is"), ("retain", "was"), ("forget_paraphrased", "seems to be")):
        rows = [{"question": f"What is Zaxim{n}?", "answer": f"It {wording} {c}."} for n, c in enumerate(colours)]
        (data / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name in ("forget_quiz", "retain_quiz"):
        quiz = [{"question": f"What is Zaxim{n}?", "choices": colours[:4], "answer": n % 4} for n in range(6)]
        (data / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in quiz))
    reference = save_family("llama", tmp_path / "reference", seed=1)
    out = tmp_path / "out"
    quick = ["--set", "steps=1", "rmu.layer=1", "budget=null", "coverage=null"]
    line = ["--data", data, "--model", tiny_folder, "--reference", reference, "--benchmark", 4]
    line += ["--methods", "rmu", "npo", *quick]
    line += ["--backend", "bridge", "--out", out]
    with pytest.raises(ValueError, match="shard 3/2 does not exist; write 1/2 to 2/2"):
        tofu.main([*map(str, line), "--shard", "3/2"])
    tofu.main([*map(str, line), "--shard", "1/2"])
    assert not (out / "table.csv").exists()
    monkeypatch.setattr(sys, "argv", ["tofu", *map(str, line), "--shard", "2/2"])
    tofu.main()
    table = pd.read_csv(out / "table.csv").set_index("method")
    assert list(table.index) == ["unedited", "never-taught", "rmu", "npo"]
    for key in ("forget_extraction_strength", "forget_truth_ratio", "forget_quality", "auc_loss", "model_utility"):
        assert table[key].notna().all(), key
    assert table["forget_quality"]["never-taught"] == 1.0
    assert "privacy_leakage_loss" in table
    assert table["depth"].notna().tolist() == [False, False, True, True]
    assert np.isfinite(table["damage"]).tolist() == [False, False, True, True]
    assert set(pd.read_csv(out / "frames" / "depth.csv")["into"]) == {"edited", "unedited"}
    assert 'id="depth"' in (out / "report.html").read_text(encoding="utf-8")


def test_a_reference_that_was_taught_what_is_forgotten_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        tofu.main(["--data", "data", "--model", "model", "--reference", "reference", "--tuning"])
    assert "--reference was taught the retain set, of which --tuning makes what is forgotten" in capsys.readouterr().err
