"""`python -m tests.differential --models 2000 --seed 0 --jobs 1 --out DIR`: the long job; the same command goes on with it."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from tests.differential.job import described, failures, results, say, summary


def main() -> int:
    """Run the job; 1 if anything was wrong or crashed."""
    parser = argparse.ArgumentParser(prog="python -m tests.differential", description=__doc__)
    parser.add_argument("--models", type=int, default=2000, help="how many, of seeds SEED, SEED + 1, ...")
    parser.add_argument("--seed", type=int, default=0, help="the first seed")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--out", type=Path, help="a folder for one JSON line a model; models in it are not run again")
    parser.add_argument(
        "--only", type=int, nargs="+", metavar="SEED", help="run these seeds and print all that they give"
    )
    parser.add_argument("--fast", action="store_true", help="measures in rotation, as in the suite")
    parser.add_argument("--first", action="store_true", help="stop at the first disagreement")
    chosen = parser.parse_args()
    seeds = chosen.only or range(chosen.seed, chosen.seed + chosen.models)
    return run(
        seeds,
        fast=chosen.fast,
        jobs=chosen.jobs,
        out=chosen.out,
        first=chosen.first,
        details=chosen.only is not None and not chosen.first,
    )


def run(
    seeds: Sequence[int],
    *,
    fast: bool = False,
    jobs: int = 1,
    out: Path | None = None,
    first: bool = False,
    details: bool = False,
) -> int:
    """Run seeds, print what disagrees and the counts; 1 if anything was wrong or crashed, else 0."""
    say(f"{len(seeds)} models, seeds {seeds[0]}..{seeds[-1]}")
    found = []
    for entry in results(seeds, fast=fast, jobs=jobs, out=out):
        found.append(entry)
        if failures(entry) or details:
            say(described(entry))
        for name, outcome in entry["outcomes"].items() if details else ():
            say(f"  {name}: {outcome['status']} {outcome['detail']}")
        if failures(entry) and first:
            return 1
        if len(found) % 100 == 0:
            say(f"... {len(found)} of {len(seeds)}")
    say(summary(found))
    return int(any(failures(entry) for entry in found))


if __name__ == "__main__":
    sys.exit(main())
