"""`mrp-lens sweep`: a table once all points are there, shards, and what it refuses."""

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest

from mrp_lens.cli.sweep import Sweep, shard_of
from tests.support.commands import MAIN, completed, data_words, invoke, summary_of


def words(folder: Path, files: Path, out: str, *extra: str) -> list[str]:
    return [
        *("sweep", *data_words(folder, files, out=out)),
        *("--steps", "2", "--layers", "1,2", "--coefficients", "3,9", *extra),
    ]


@pytest.mark.slow
def test_the_command_writes_a_table_once_all_shards_are_there(tiny_folder: Path, files: Path) -> None:
    first = completed(*words(tiny_folder, files, "out", "--shard", "1/2"))
    assert "other points" in first.output
    assert not (files / "out" / "summary.json").exists()
    completed(*words(tiny_folder, files, "out", "--shard", "2/2"))
    summary = summary_of(files / "out")
    rows = summary["rows"]
    assert len(rows) == len(pd.read_csv(files / "out" / "table.csv")) == 1 + 2 + 4 + 2
    assert rows[0]["layer"] is None
    assert (files / "out" / "frames" / "layer_effects.csv").is_file()
    assert summary["arguments"]["coefficients"] == [3.0, 9.0]
    assert summary["arguments"]["questions"] == str(files / "forget.jsonl")
    again = Sweep.parsed(["--config", str(files / "out" / "summary.json")])
    assert again is not None
    assert again.execute() is not None  # all points are there


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--layers", "9"], "layer 9 is out of range"),
        (["--shard", "0/2"], "shard 0/2 does not exist"),
        (["--coefficients", "x"], "--coefficients takes numbers"),
    ],
)
def test_the_command_names_what_is_wrong(tiny_folder: Path, files: Path, extra: list[str], message: str) -> None:
    result = invoke(*words(tiny_folder, files, "out", *extra))
    assert isinstance(result.exception, ValueError)
    assert message in str(result.exception)
    assert not list((files / "out").rglob("*"))


def test_a_shard_is_two_numbers() -> None:
    assert shard_of("2/4") == (2, 4)
    for text in ("2", "1/x", "1/2/3"):
        with pytest.raises(ValueError, match="--shard takes i/n"):
            shard_of(text)


def test_a_model_of_ones_own_needs_data(tiny_folder: Path, tmp_path: Path) -> None:
    result = invoke("sweep", "--model", str(tiny_folder), "--out", str(tmp_path / "o"))
    assert "give forget=... and retain=..." in str(result.exception)
    result = invoke("sweep", "--forget", "x.jsonl", "--out", str(tmp_path / "o"))
    assert "forget and retain go together" in str(result.exception)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_sweep_killed_three_times_and_one_in_two_shards_end_as_an_undisturbed_one(
    tiny_folder: Path, files: Path
) -> None:
    main = [sys.executable, "-c", MAIN]

    def start(*arguments: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen([*main, *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    steps = ("--steps", "40")
    began = time.monotonic()
    assert start(*words(tiny_folder, files, "whole", *steps)).wait() == 0
    whole = time.monotonic() - began
    rng = random.Random(time.time_ns())
    kills = 0
    while kills < 3:
        process = start(*words(tiny_folder, files, "killed", *steps))
        time.sleep(rng.uniform(0.3, 0.9) * whole)
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            kills += process.wait() == -signal.SIGKILL
        else:  # it was done before the blow fell
            break
    assert kills
    assert start(*words(tiny_folder, files, "killed", *steps)).wait() == 0
    shards = [start(*words(tiny_folder, files, "shards", *steps, "--shard", f"{i}/2")) for i in (1, 2)]
    assert [shard.wait() for shard in shards] == [0, 0]
    assert start(*words(tiny_folder, files, "shards", *steps)).wait() == 0
    tables = {name: (files / name / "table.csv").read_bytes() for name in ("whole", "killed", "shards")}
    assert tables["killed"] == tables["whole"]
    assert tables["shards"] == tables["whole"]
    assert not list((files / "killed").rglob("*.partial"))
