"""Deliberate faults, put into a copy of the package one at a time: the fast job has to catch each of them.

`python -m tests.differential.faults` runs them all; each takes as long as it takes to be caught.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.differential.job import failures, say

ROOT = Path(__file__).parents[2]
SEEDS = range(100)


@dataclass(frozen=True)
class Fault:
    """A change in the package.

    Attributes:
        name: what is wrong then.
        pattern: a regular expression that one place of all the package's files matches.
        replacement: what stands there then (`re.sub`).
        also: further pairs of the two, where the package looks twice.
    """

    name: str
    pattern: str
    replacement: str
    also: tuple[tuple[str, str], ...] = ()


FAULTS = (
    Fault("the prompt's last token counts in the loss", r"end > len\(document\.prompt\)", "end >= len(document.prompt)"),
    Fault(
        "HookedTransformer is accepted whatever it computes (a dropped window)",
        r"if not difference <= allowed:",
        'if kind != "hooked" and not difference <= allowed:',
        also=((r"if reason is not None:\n        names = ", 'if reason is not None and kind != "hooked":\n        names = '),),
    ),
    Fault(
        "the attention mask is padded on the other side than the tokens",
        r"padded\(\[True\] \* len\(row\.ids\), False\)",
        "padded([True] * len(row.ids), False)[::-1]",
    ),
    Fault("BOS counts as content", r"\[False, \*content\]", "[True, *content]"),
    Fault("predictions are read one position late", r"pad\(batch\.loss_mask\[:, 1:\], \(0, 1\)\)", "pad(batch.loss_mask[:, 1:], (1, 0))"),
    Fault("a choice's score is the sum over its tokens", r"(values\[(?:choice|scored)\] = .*)\.mean\(\)", r"\1.sum()"),
    Fault("answers go to their neighbours", r"yield chosen, encoder\.collate", "yield sorted(chosen), encoder.collate"),
    Fault("folding projects the wrong side of a matrix", r"rows = values\.T if transposed else values", "rows = values if transposed else values.T"),
    Fault("a folded export leaves the bias as it was", r'if f"\{matrix\}\.bias" in base\.files:', "if False:"),
    Fault("a folded export of tied embeddings changes the unembedding too", r"if base\.tied(?: and not changes\.untied)?:", "if False:"),
    Fault("RMU forgets the retain term", r"self\.settings\.alpha \* part", "0.0 * part"),
    Fault("RMU's alpha is squared", r"self\.settings\.alpha \* part", "self.settings.alpha ** 2 * part"),
    Fault("a text's positions depend on what it is batched with", r"attention_mask\.shape\[1\] <= limit or", "True or"),
)  # fmt: skip


def apply(fault: Fault, package: Path) -> None:
    """Make the change.

    Raises:
        ValueError: a pattern does not match exactly one place.
    """
    files = list(package.rglob("*.py"))
    for pattern, replacement in ((fault.pattern, fault.replacement), *fault.also):
        texts = {file: file.read_text("utf-8") for file in files}
        count = sum(len(re.findall(pattern, text)) for text in texts.values())
        if count != 1:
            raise ValueError(
                f"the fault no longer applies: rewrite it ({fault.name!r}: {pattern!r} is found {count} times)"
            )
        (file,) = (file for file, text in texts.items() if re.search(pattern, text))
        file.write_text(re.sub(pattern, replacement, texts[file]), "utf-8")


def sound_seeds(seeds: Sequence[int] = SEEDS) -> list[int]:
    """The seeds on which the package as it is agrees with the oracle: what fails there with a fault, fails of it."""
    with tempfile.TemporaryDirectory(prefix="faults-") as temporary:
        out = Path(temporary)
        _job(ROOT, ["--models", str(len(seeds)), "--seed", str(seeds[0]), "--out", str(out)])
        entries = [json.loads(line) for line in (out / "fast.jsonl").read_text("utf-8").splitlines()]
    return sorted(entry["seed"] for entry in entries if not failures(entry))


def caught_by(fault: Fault, seeds: Sequence[int]) -> str | None:
    """What the fast job says of a copy with the fault: its first disagreement; None if it finds none."""
    with tempfile.TemporaryDirectory(prefix="faults-") as temporary:
        copy = Path(temporary)
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / "mrp_lens", copy / "mrp_lens", ignore=ignored)
        shutil.copytree(ROOT / "tests" / "differential", copy / "tests" / "differential", ignore=ignored)
        (copy / "tests" / "__init__.py").touch()
        apply(fault, copy / "mrp_lens")
        done = _job(copy, ["--first", "--only", *map(str, seeds)])
    lines = [line.strip() for line in done.stdout.splitlines() if re.match(r"  \w+ (wrong|crashed): ", line)]
    if done.returncode == 1 and lines:
        return lines[0]
    if done.returncode != 0:
        raise RuntimeError(f"the job did not run: {done.stderr[-2000:]}")
    return None


def _job(root: Path, arguments: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """The fast job on the package that lies in `root`."""
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.differential", "--fast", *arguments]
    return subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)


def main() -> int:
    """Run all faults; 1 if one was not caught. An argument is how many models to try, the suite's 100 otherwise."""
    tried = range(int(sys.argv[1])) if len(sys.argv) > 1 else SEEDS
    seeds = sound_seeds(tried)
    say(f"{len(seeds)} of {len(tried)} models agree without a fault")
    missed = 0
    for fault in FAULTS:
        found = caught_by(fault, seeds)
        missed += found is None
        say(f"{'MISSED' if found is None else 'caught'}: {fault.name}{'' if found is None else ': ' + found[:160]}")
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main())
