"""Commands that are killed at random moments and started again must end as an undisturbed run does, bit for bit.

    python -m tests.support.kills --command unlearn --times 50 --signal KILL --seed 0

Each run is a fork of one process that has imported everything, so that the moments fall into the work and not into imports. They
are spread evenly over the phases of a run: loading, the fit, measuring, the page.
"""

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from tqdm import tqdm

from mrp_lens.training.checkpoints import Checkpoint
from tests.support.commands import data_words

COLOURS = ["red", "blue", "green", "white"]
ENOUGH = 300.0  # seconds that no run here takes
LOADED = {  # the first file that is written once the model is there
    **{"unlearn": "points/model.json", "tune": "tune.json"},
    **dict.fromkeys(("sweep", "attack"), "points/unedited.json"),
}
PHASES = ("load", "fit", "measure", "page")


class Killed(BaseException):
    """What nothing catches, as nothing catches SIGKILL."""


def kill_at_save(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """The process ends right after the checkpoint was written for the n-th time."""
    real, saves = Checkpoint.save, []

    def save(self: Checkpoint, state: Any) -> None:
        real(self, state)
        saves.append(1)
        if len(saves) == number:
            raise Killed

    monkeypatch.setattr(Checkpoint, "save", save)


def write_data(folder: Path) -> None:
    """Texts and questions for the tiny model."""

    def rows(first: int, count: int, thing: str) -> str:
        return "\n".join(
            json.dumps(
                {"text": f"The colour of {thing}{n} is {COLOURS[n % 4]}.", "q": f"The colour of {thing}{n} is"}
                | {"a": COLOURS, "y": n % 4, "who": f"{thing}{n // 2}"}
            )
            for n in range(first, first + count)
        )

    (folder / "forget.jsonl").write_text(rows(0, 44, "Zaxim"))
    (folder / "kept.jsonl").write_text(rows(0, 20, "House "))
    (folder / "untaught.jsonl").write_text(rows(100, 20, "Zaxim"))
    (folder / "retain.txt").write_text("\n".join(f"The old man walked near the house {i}." for i in range(40)))


def arguments(command: str, model: Path, data: Path, out: Path, method: str) -> list[str]:
    """The command line of a small run."""
    common = [*data_words(model, data, out=None), "--out", str(out)]
    more = {
        "unlearn": ["--method", method, "--steps", "60", "--batch-size", "8"],
        "sweep": ["--methods", "mrp,rmu", "--layers", "1,2", "--coefficients", "3", "--steps", "30"],
        "tune": ["--method", method, "--steps", "10", "--trials", "5", "--seed", "1"],
        "attack": [
            *("--edit", str(data / "edit"), "--untaught-questions", str(data / "untaught.jsonl"), "--entity", "who"),
            *("--steps", "10", "--lr", "1e-3", "--search-steps", "1", "--questions-limit", "16"),
        ],
    }
    return [command, *common, *more[command]]


def start(line: Sequence[str], log: Path) -> int:
    """Run a command in a fork of this process; returns its number."""
    number = os.fork()
    if number:
        return number
    code = 1
    warnings.simplefilter("default")  # as for a user: under pytest a warning would end the command
    try:
        with log.open("ab") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        from mrp_lens.cli import main

        main(line)
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException as error:
        print(repr(error), flush=True)  # noqa: T201
        code = 2
    finally:
        os._exit(code)


def wait(number: int) -> int:
    """Its exit code; minus the signal's number if it was killed."""
    return os.waitstatus_to_exitcode(os.waitpid(number, 0)[1])


def found(out: Path, command: str) -> dict[str, str]:
    """Everything a run found, by file, but for how long it took."""
    kept: dict[str, str] = {}
    for path in sorted(out.rglob("*")):
        name = str(path.relative_to(out))
        if path.suffix == ".csv":
            kept[name] = pd.read_csv(path).drop(columns="seconds", errors="ignore").to_csv()
        elif path.suffix in (".safetensors",) or path.name == "edit_config.json":
            kept[name] = path.read_bytes().hex()
        elif path.name == "summary.json":
            summary = json.loads(path.read_text())
            rows = [{key: value for key, value in row.items() if key != "seconds"} for row in summary["rows"]]
            kept[name] = json.dumps([rows, summary["examples"], summary["notes"]])
        elif path.is_file():
            kept[name] = ""
    assert "table.csv" in kept
    assert command != "unlearn" or "edit/edit.safetensors" in kept
    return kept


def phases(command: str, line: Sequence[str], out: Path, log: Path) -> dict[str, tuple[float, float]]:
    """Seconds from its start at which each phase of an undisturbed run begins and ends."""
    begun = time.monotonic()
    number = start(line, log)
    marks: dict[str, float] = {}
    watched = {
        "load": out / LOADED[command],
        "fit": out / "fit.json" if command == "unlearn" else out / "table.csv",
        "measure": out / "table.csv",
    }
    while os.waitpid(number, os.WNOHANG)[0] == 0:
        for phase, path in watched.items():
            if phase not in marks and path.exists():
                marks[phase] = time.monotonic() - begun
        time.sleep(0.002)
        assert time.monotonic() - begun < ENOUGH
    marks["page"] = time.monotonic() - begun
    ends = [marks[phase] for phase in PHASES if phase in marks]
    return dict(
        zip([phase for phase in PHASES if phase in marks], zip([0.0, *ends[:-1]], ends, strict=True), strict=True)
    )


def killed_and_resumed(
    command: str,
    *,
    model: Path,
    data: Path,
    work: Path,
    times: int,
    number: signal.Signals,
    seed: int,
    method: str = "mrp",
) -> Counter[str]:
    """Kill and resume `times` times; returns how many kills fell into each phase.

    Raises:
        AssertionError: a resumed run failed, or found something else than the undisturbed one.
    """
    log = work / "log.txt"
    whole = work / "whole"
    line = arguments(command, model, data, whole, method)
    spans = phases(command, line, whole, log)
    assert (whole / "summary.json").is_file(), log.read_text()[-3000:]
    wanted = found(whole, command)
    rng = random.Random(seed)
    hit: Counter[str] = Counter()
    for attempt in range(times):
        out = work / f"killed-{attempt}"
        line = arguments(command, model, data, out, method)
        kills = 0
        while True:
            phase = rng.choice(list(spans))
            moment = rng.uniform(*spans[phase])
            process = start(line, log)
            if kills < 2:  # a run is killed once or twice, then left alone
                time.sleep(moment)
                kills += 1 + rng.randrange(2)
                os.kill(process, number)
                hit[phase] += 1
            code = wait(process)
            if code == 0:
                break
            assert code in (-number, 128 + number, 130), f"{code}: {log.read_text()[-3000:]}"
        again = found(out, command)
        different = [name for name in {**wanted, **again} if wanted.get(name) != again.get(name)]
        assert not different, f"attempt {attempt}: {different}"
        shutil.rmtree(out)
    return hit


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--command", choices=["unlearn", "sweep", "attack", "tune"], required=True)
    parser.add_argument("--method", default="mrp")
    parser.add_argument("--times", type=int, default=50)
    parser.add_argument("--signal", default="KILL")
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        model = prepared(work)
        begun = time.monotonic()
        options: dict[str, Any] = {"times": chosen.times, "seed": chosen.seed, "method": chosen.method}
        number = signal.Signals[f"SIG{chosen.signal}"]
        hit = killed_and_resumed(chosen.command, model=model, data=work, work=work, number=number, **options)
    spent = time.monotonic() - begun
    sys.stdout.write(
        f"{chosen.command} ({chosen.method}): {chosen.times} of {chosen.times} runs ended as the undisturbed one; "
        f"{sum(hit.values())} times SIG{chosen.signal}, {dict(hit)}; seed {chosen.seed}, {spent:.0f} s\n"
    )


def prepared(work: Path) -> Path:
    """Data, an edit, and the tiny model; everything imported that the forks need."""
    import torch

    import mrp_lens.cli.attack
    import mrp_lens.cli.sweep
    import mrp_lens.cli.tune
    import mrp_lens.cli.unlearn
    import mrp_lens.runs.trials  # noqa: F401
    from tests.support.edits import projection
    from tests.support.families import save_family

    torch.set_num_threads(1)
    # tqdm's own lock is shared by all forks: one killed while it holds it would stop all later ones.
    tqdm.set_lock(threading.RLock())
    write_data(work)
    model = save_family("llama", work / "model")
    projection(1, 2).save_pretrained(work / "edit")
    return model


if __name__ == "__main__":
    main()
