"""Studies whose results are computed one by one, each in a file of its own, and shared out between processes."""

import argparse
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from analysis.common.methods import changed, settings_of
from mrp_lens.cli.sweep import shard_of
from mrp_lens.methods import Fit
from mrp_lens.methods.fit import EDIT
from mrp_lens.models import LensModel
from mrp_lens.utils.result_store import ResultStore
from mrp_lens.utils.validation import check_shard

Job = tuple[str, int]
"""What is fitted or attacked, by name, and the seed."""

ROW = "row"  # the only part of each job, in a study that computes one thing of it


def result_name(job: Job, part: str) -> str:
    """The name of a result's file."""
    return f"{job[0]}-seed{job[1]}-{part.replace(' ', '-')}"


def shard_in(options: argparse.Namespace) -> tuple[int, int]:
    """Of `--shard`, before anything is removed.

    Raises:
        ValueError: it is none, or one of several with `--overwrite`.
    """
    number, count = shard_of(options.shard)
    check_shard(number, count, overwrite=options.overwrite)
    return number, count


class ResumableStudy(ABC):
    """A study in a folder that is gone on with after an interruption.

    Attributes:
        store: of the results.
    """

    store: ResultStore

    @property
    @abstractmethod
    def jobs(self) -> Sequence[Job]:
        """All of them, in the order of the table; a shard takes every n-th."""

    @abstractmethod
    def parts(self) -> list[tuple[Job, str]]:
        """All results, in the order in which they are computed."""

    @abstractmethod
    def result(self, job: Job, part: str) -> Any:
        """One of them, computed and stored unless it is there already."""

    def fitted(self, name: str, method: Any, model: LensModel, data: Any, *, seed: int) -> Fit:
        """A fit that is saved in the study's folder before anything else is done with it; Ctrl-C ends the study.

        Args:
            name: of its folder in `fits/`.
            method: to fit.
            model: that it is fitted to.
            data: with `forget` and `retain`.
            seed: of the fit.
        """
        return Fit.once(
            self.fit_folder(name),
            lambda checkpoint: method.fit(model, data.forget, data.retain, seed=seed, checkpoint=checkpoint),
        )

    def check_settings(self, name: str, method: Any, *, known: Mapping[str, str] | None = None) -> None:
        """Refuse to go on with other settings of a method.

        Args:
            name: of the method.
            method: with its settings.
            known: those of a result. None: those that were noted before the first fit, which this does.

        Raises:
            ValueError: says which differ.
        """
        begun = self.store.once(f"{name}-settings", lambda: settings_of(method)) if known is None else known
        if differing := changed(begun, method):
            raise ValueError(
                f"{self.store.folder} holds {name} with other settings: {'; '.join(differing)}; choose another folder"
            )

    def fit_folder(self, name: str) -> Path:
        """Where the fit of that name is saved."""
        return self.store.folder / "fits" / name

    def edit_folder(self, name: str) -> Path:
        """Where the edit of that fit is."""
        before = self.store.folder / "edits" / name  # where version 0.1 kept it
        return before if before.is_dir() else self.fit_folder(name) / EDIT

    def run(self, shard: tuple[int, int]) -> bool:
        """Compute this shard's results that have no file yet; whether every result of every shard has one now.

        Raises:
            ValueError: there is no such shard.
        """
        number, count = shard
        check_shard(number, count)
        mine = set(self.jobs[number - 1 :: count])
        with tqdm([part for part in self.parts() if part[0] in mine], desc="results") as bar:
            for job, part in bar:
                bar.set_postfix_str(result_name(job, part))
                self.result(job, part)
        if any(self.store.stored(result_name(job, part)) is None for job, part in self.parts()):
            print(f"Shard {number}/{count} is done; other results of {self.store.folder} are still missing.")
            return False
        self.store.tidy()
        return True
