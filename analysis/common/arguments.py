"""What the studies share: their options, the model and data these name, and writing what was found."""

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

import pandas as pd

from mrp_lens.cli.run_folder import check_out
from mrp_lens.data import TaskConfig, UnlearningTask, task_for
from mrp_lens.methods import Fit
from mrp_lens.models import LensModel, load_model
from mrp_lens.runs.record import Run
from mrp_lens.runs.report import report
from mrp_lens.utils.frames import rows_of
from mrp_lens.utils.io import write_text

Number = TypeVar("Number", int, float)


def parser_for(doc: str | None, out: str) -> argparse.ArgumentParser:
    """The options of every study: the model, the data in the words of `mrp-lens unlearn`, seed and output folder."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo", help="`demo` (default), a local Hugging Face folder, or a Hub name")
    parser.add_argument("--topic", help="of the demo's world, to forget (default potions)")
    parser.add_argument(
        "--forget", nargs="+", action="extend", help="sources of the forget set; without them, the topic of the demo"
    )
    for option in fields(TaskConfig):
        if option.name != "forget":
            parser.add_argument(f"--{option.name.replace('_', '-')}", help="as in `mrp-lens unlearn`")
    parser.add_argument("--backend", default="auto", help="auto, hooked or bridge (default auto)")
    parser.add_argument("--dtype", help="of the model, such as bfloat16 (default float32)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs") / out, help=f"output folder (default runs/{out})")
    parser.add_argument("--overwrite", action="store_true", help="replace the output folder if it holds a run")
    return parser


def add_resumable_options(parser: argparse.ArgumentParser, *, seeds: str = "--seed", methods: bool = True) -> None:
    """Those of the studies that fit or attack many edits one by one; `methods`: whether these may be chosen."""
    if methods:
        parser.add_argument("--methods", help="separated by commas")
    parser.add_argument("--seeds", help=f"such as 0,1,2 (default: {seeds})")
    parser.add_argument("--limit", type=int, help="at most this many questions of each quiz")
    add_shard_option(parser)


def add_shard_option(parser: argparse.ArgumentParser) -> None:
    """That of the studies whose work several processes may share."""
    parser.add_argument("--shard", default="1/1", help="i/n: this process's part of the work (default 1/1)")


def add_set_option(parser: argparse.ArgumentParser) -> None:
    """That of the studies whose methods may have other settings than their defaults (see `with_settings`)."""
    parser.add_argument(
        "--set",
        nargs="+",
        action="extend",
        default=[],
        metavar="[METHOD.]NAME=VALUE",
        help="a hyperparameter, such as steps=50 or rmu.alpha=4, of one method or of all that have it",
    )


def add_attacker_options(parser: argparse.ArgumentParser) -> None:
    """Those of the studies that retrain edited models."""
    parser.add_argument(
        "--edits", nargs="+", action="extend", default=[], metavar="NAME=DIR", help="saved edits to attack, unfitted"
    )
    parser.add_argument("--lr", help="the attacker's grid, such as 3e-4,1e-3 (default: three around one by width)")


def numbers(text: str | None, kind: type[Number], option: str) -> tuple[Number, ...] | None:
    """ "3,5" -> (3, 5).

    Raises:
        ValueError: a part is not such a number.
    """
    try:
        return None if text is None else tuple(kind(part) for part in text.split(","))
    except ValueError as error:
        raise ValueError(f"{option} takes numbers separated by commas, got {text!r}") from error


def named_paths(texts: Sequence[str], option: str) -> dict[str, str]:
    """Name -> path, of `NAME=PATH`.

    Raises:
        ValueError: a text without `=`, or a name twice.
    """
    named: dict[str, str] = {}
    for text in texts:
        name, equals, path = text.partition("=")
        if not (name and equals and path):
            raise ValueError(f"{option} takes NAME=PATH, got {text!r}")
        if name in named:
            raise ValueError(f"{option} {name}= is given twice, {named[name]} and {path}")
        named[name] = path
    return named


@dataclass(frozen=True)
class Study:
    """A model, its data, and the record to fill."""

    model: LensModel
    task: UnlearningTask
    run: Run
    out: Path
    overwrite: bool

    @classmethod
    def begin(cls, name: str, title: str, arguments: argparse.Namespace, *, in_place: bool = False) -> "Study":
        """Check the output folder (a sweep checks its own), read the data, load the model."""
        if not in_place:
            check_out(arguments.out, overwrite=arguments.overwrite)
        task = task_for(arguments.model, TaskConfig.from_options(vars(arguments)), topic=arguments.topic)
        run = Run(name, vars(arguments), arguments.seed, title=title)
        model = load_model(arguments.model, backend=arguments.backend, dtype=arguments.dtype)
        return cls(model, task, run, arguments.out, arguments.overwrite)

    def another(self, name: str | None) -> LensModel | None:
        """Another model, such as one that never saw the forget set, loaded as the study's own; None where none is named."""
        if not name:
            return None
        return load_model(name, backend=self.run.arguments["backend"], dtype=self.run.arguments["dtype"])

    def check_one_direction(self) -> None:
        """Refuse several forget corpora, for a study that looks at RMU's direction.

        Raises:
            ValueError: there are several.
        """
        if len(self.task.forget) > 1:
            raise ValueError(
                f"{len(self.task.forget)} files of --forget: RMU steers each to a direction of its own, and this study looks at one; give "
                "one file, with all of the texts"
            )

    def fit(self, method: Any, *, seed: int | None = None) -> Fit:
        """Fit with the study's data and seed (or another); Ctrl-C ends the study."""
        chosen = self.run.seed if seed is None else seed
        fit: Fit = method.fit(self.model, self.task.forget, self.task.retain, seed=chosen)
        if fit.interrupted:
            raise KeyboardInterrupt
        return fit

    def end(
        self, finding: str, frames: Mapping[str, pd.DataFrame], rows: pd.DataFrame, *, in_place: bool = False
    ) -> None:
        """Print the finding, write the folder and its page; in place where the folder holds results one by one.

        Args:
            finding: a table in Markdown and a paragraph on how to read it.
            frames: what the report draws, by the name of the figure; of one without rows, nothing.
            rows: of `table.csv`.
            in_place: the folder exists.
        """
        self.run.frames |= {name: frame for name, frame in frames.items() if len(frame)}
        self.run.rows = rows_of(rows)
        print(finding)
        extras: Sequence[Callable[[Path], object]] = [
            lambda folder: write_text(folder / "finding.md", finding + "\n"),
            report,
        ]
        if in_place:
            self.run.write_into(self.out)
            for extra in extras:
                extra(self.out)
        else:
            self.run.write(self.out, overwrite=self.overwrite, extras=extras)
        print(f"Written to {self.out}: report.html, finding.md, table.csv, summary.json.")
