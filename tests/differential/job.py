"""Many random models, one after another or a few at a time; what was found is kept one JSON line a model."""

import json
import multiprocessing
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from tests.differential.models import recipe
from tests.differential.trial import MEASURES, trial

# What is measured beside the logits, by the seed's place in a round: exports take as long as all the rest together.
ROUNDS: tuple[tuple[str, ...], ...] = (
    ("choices", "folded"),
    ("perplexity", "rmu"),
    ("confidence", "projection"),
    ("choices", "module"),
    ("perplexity", "projection"),
    ("confidence", "rmu", "untouched"),
    ("choices", "projection"),
)


def rotated(seed: int) -> tuple[str, ...]:
    """The measures of a seed in the fast job: each comes to every family in time."""
    return ("logits", *ROUNDS[seed % len(ROUNDS)])


def thorough(seed: int) -> tuple[str, ...]:
    """The measures of a seed in the long job: all, exports on one model in ten."""
    exports = ("folded", "module") if seed % 10 in (0, 7) else ()
    return tuple(name for name in MEASURES if name not in ("folded", "module")) + exports


def run_one(task: tuple[int, bool]) -> dict[str, Any]:
    """The result of a seed, ready for JSON. In the long job every fourth model is loaded once more, by another class."""
    seed, fast = task
    torch.set_num_threads(1)
    made, started = recipe(seed), time.perf_counter()
    outcomes = trial(made, rotated(seed) if fast else thorough(seed))
    if not fast and seed % 4 == 1:
        for kind in {"auto", "bridge", "hooked"} - {made.backend}:
            again = trial(replace(made, backend=kind), ("logits",))
            outcomes |= {f"{name}, {kind}": outcome for name, outcome in again.items()}
    return {
        "seed": seed,
        "recipe": asdict(made),
        "seconds": round(time.perf_counter() - started, 2),
        "outcomes": {name: asdict(outcome) for name, outcome in outcomes.items()},
    }


def results(seeds: Sequence[int], *, fast: bool, jobs: int = 1, out: Path | None = None) -> Iterator[dict[str, Any]]:
    """The results of the seeds; those of the same models in `out` are read from there, new ones added to it."""
    file = None if out is None else out / ("fast.jsonl" if fast else "results.jsonl")
    known = {} if file is None else {entry["seed"]: entry for entry in _lines(file)}
    kept = [seed for seed in seeds if seed in known and known[seed]["recipe"] == asdict(recipe(seed))]
    yield from (known[seed] for seed in kept)
    for entry in _run([(seed, fast) for seed in seeds if seed not in kept], jobs):
        if file is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
            with file.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(entry) + "\n")
        yield entry


def _run(tasks: Sequence[tuple[int, bool]], jobs: int) -> Iterator[dict[str, Any]]:
    if jobs == 1:
        yield from map(run_one, tasks)
        return
    with multiprocessing.get_context("spawn").Pool(jobs, maxtasksperchild=200) as pool:
        yield from pool.imap_unordered(run_one, tasks)


def _lines(file: Path) -> list[dict[str, Any]]:
    """The lines of a file; a last one that was cut off by a kill is taken out of it."""
    if not file.exists():
        return []
    whole, _, cut = file.read_text(encoding="utf-8").rpartition("\n")
    if cut:
        file.write_text(whole + "\n" * bool(whole), encoding="utf-8")
    return [json.loads(line) for line in whole.splitlines()]


def failures(entry: dict[str, Any]) -> dict[str, dict[str, str]]:
    """The measures of a result that are wrong or crashed."""
    return {name: found for name, found in entry["outcomes"].items() if found["status"] in ("wrong", "crashed")}


def described(entry: dict[str, Any]) -> str:
    """A failing result in a few lines."""
    made = entry["recipe"]
    config = {name: value for name, value in made["config"].items() if value is not None}
    lines = [
        f"seed {entry['seed']}: {made['family']} {made['dtype']} (files {made['stored']}) as {made['backend']}, {config}"
    ]
    lines += [
        f"  tokenizer: {', '.join(f'{key} {made[key]}' for key in ('bos', 'eos', 'pad', 'added', 'missing', 'memory'))}"
    ]
    for name, found in failures(entry).items():
        last = found["reason"] or found["detail"]
        lines.append(f"  {name} {found['status']}: {last[:300]}")
    return "\n".join(lines)


def summary(entries: Iterable[dict[str, Any]]) -> str:
    """How often each measure agreed, was refused (by reason), was wrong or crashed."""
    found = list(entries)
    counts: dict[str, Counter[str]] = {}
    reasons: Counter[str] = Counter()
    for entry in found:
        for name, outcome in entry["outcomes"].items():
            counts.setdefault(name, Counter())[outcome["status"]] += 1
            if outcome["status"] == "refused":
                reasons[f"{name.split(',')[0]}: {outcome['reason']}"] += 1
    lines = [f"{'measure':22}{'ok':>7}{'refused':>9}{'wrong':>7}{'crashed':>9}"]
    for name, count in counts.items():
        lines.append(f"{name:22}{count['ok']:7}{count['refused']:9}{count['wrong']:7}{count['crashed']:9}")
    seconds = sum(entry["seconds"] for entry in found)
    lines.append(
        f"{len(found)} models, {seconds:.0f} s of one core, {sum(bool(failures(e)) for e in found)} with a disagreement"
    )
    lines += ["refused:"] * bool(reasons) + [f"{count:6}  {reason}" for reason, count in reasons.most_common()]
    return "\n".join(lines)


def say(text: str) -> None:
    """A line on the terminal."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()
