"""`python -m tests.differential --models 2000 --seed 0 --jobs 1 --out DIR`: the long job; the same command goes on with it."""

import argparse
import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from tests.differential.job import described, failures, results, say, summary  # noqa: E402


def main() -> int:
    """Run the job; 1 if anything was wrong or crashed."""
    parser = argparse.ArgumentParser(prog="python -m tests.differential", description=__doc__)
    parser.add_argument("--models", type=int, default=2000, help="how many, of seeds SEED, SEED + 1, ...")
    parser.add_argument("--seed", type=int, default=0, help="the first seed")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--out", type=Path, help="a folder for one JSON line a model; models in it are not run again")
    parser.add_argument("--only", type=int, help="run one seed again and print all that it gave")
    parser.add_argument("--fast", action="store_true", help="measures in rotation, as in the suite")
    parser.add_argument("--first", action="store_true", help="stop at the first disagreement")
    chosen = parser.parse_args()
    if chosen.only is not None:
        return only(chosen.only, fast=chosen.fast)
    say(f"seeds {chosen.seed}..{chosen.seed + chosen.models - 1}")
    found = []
    seeds = range(chosen.seed, chosen.seed + chosen.models)
    for entry in results(seeds, fast=chosen.fast, jobs=chosen.jobs, out=chosen.out):
        found.append(entry)
        if failures(entry):
            say(described(entry))
            if chosen.first:
                return 1
        if len(found) % 100 == 0:
            say(f"... {len(found)} of {chosen.models}")
    say(summary(found))
    return int(any(failures(entry) for entry in found))


def only(seed: int, *, fast: bool) -> int:
    """One seed, with every detail."""
    (entry,) = results([seed], fast=fast)
    say(described(entry))
    for name, outcome in entry["outcomes"].items():
        say(f"{name}: {outcome['status']}\n    {outcome['detail']}")
    return int(bool(failures(entry)))


if __name__ == "__main__":
    sys.exit(main())
