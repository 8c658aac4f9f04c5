"""The trials of a search in a folder that any number of processes work in: drawn by Optuna, kept in its journal.

A trial has a place, from 0 on, and a place has one finished trial in the end. A process that is killed leaves its trial
unfinished; whoever comes next gives that place the same parameters again. What is drawn for a place depends on the seed, the
place and the trials that are finished, so that one process, however often it is killed, finds what an undisturbed one does.
"""

import os
import random
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
from optuna.samplers import BaseSampler, PartialFixedSampler, TPESampler
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from mrp_lens.methods.search_space import Options, Range
from mrp_lens.utils.io import HAS_LOCKS
from mrp_lens.utils.workers import WORKERS, exclusive, is_at_work

JOURNAL, NAME = "study.journal", "tune"
AT_RANDOM = 10  # trials before the sampler has anything to go by
FINISHED = (TrialState.COMPLETE, TrialState.PRUNED)
PLACE, WORKER, RESULT = "place", "worker", "result"  # what a trial is marked with


@dataclass(frozen=True)
class Trial:
    """One set of parameters to try.

    Attributes:
        place: from 0 on.
        number: in the journal, in which trials of killed processes count, too.
        drawn: parameter -> value.
    """

    place: int
    number: int
    drawn: Mapping[str, Any]


@dataclass(frozen=True)
class Finished:
    """A trial that is over.

    Attributes:
        place: from 0 on.
        drawn: parameter -> value.
        pruned: it was given up before all was measured.
        result: what was found, as JSON.
    """

    place: int
    drawn: Mapping[str, Any]
    pruned: bool
    result: Mapping[str, Any]


class _NoLock:
    """The journal's own lock: who writes is alone in the folder already, and a killed process leaves no lock behind."""

    def acquire(self) -> bool:
        return True

    def release(self) -> None:
        pass


class Trials:
    """The trials in a folder.

    Args:
        folder: of the search; it exists.
        draws: parameter -> what is drawn for it.
        first: parameter -> value, of the trial that comes first.
        objectives: how many there are; each is minimised.
        seed: of the sampler.
    """

    def __init__(
        self,
        folder: Path,
        draws: Mapping[str, Range | Options],
        *,
        first: Mapping[str, Any],
        objectives: int,
        seed: int,
    ) -> None:
        self._folder, self._draws, self._first, self._seed = folder, draws, first, seed
        self._asked: dict[int, optuna.Trial] = {}
        path = folder / JOURNAL
        with self._alone():
            _mend(path)
            lock = _NoLock() if HAS_LOCKS else JournalFileOpenLock(str(path))
            storage = JournalStorage(JournalFileBackend(str(path), lock_obj=lock))  # type: ignore[arg-type]
            if NAME in optuna.get_all_study_names(storage):
                self._study = optuna.load_study(study_name=NAME, storage=storage)
            else:
                directions = [StudyDirection.MINIMIZE] * objectives
                self._study = optuna.create_study(study_name=NAME, storage=storage, directions=directions)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Inside, nobody else writes, and Optuna says nothing."""
        with exclusive(self._folder / WORKERS), _quiet():
            yield

    def take(self, total: int, worker: str) -> Trial | None:
        """The next trial to run; None: there is none, since `total` are finished or under way.

        Args:
            total: how many there are to be.
            worker: the name under which this process is at work.
        """
        with self._alone():
            self._fail_abandoned()
            trials = self._study.get_trials(deepcopy=False)
            kept = (TrialState.RUNNING, *FINISHED)
            taken = {trial.user_attrs.get(PLACE) for trial in trials if trial.state in kept}
            place = next((place for place in range(total) if place not in taken), None)
            if place is None:
                return None
            self._study.sampler = self._sampler(place, trials)
            asked = self._study.ask()
            self._asked[asked.number] = asked
            asked.set_user_attr(PLACE, place)
            asked.set_user_attr(WORKER, worker)
            return Trial(
                place, asked.number, {name: _suggested(asked, name, what) for name, what in self._draws.items()}
            )

    def finish(self, trial: Trial, objectives: Sequence[float] | None, result: Mapping[str, Any]) -> bool:
        """Note what a trial found.

        Args:
            trial: that `take` gave.
            objectives: lower is better; None: it was given up.
            result: more on it, as JSON.

        Returns:
            Whether it counts. It does not if this process was taken for dead and another one has finished that place.
        """
        with self._alone():
            trials = self._study.get_trials(deepcopy=False)
            over = {other.user_attrs.get(PLACE) for other in trials if other.state in FINISHED}
            if trials[trial.number].state != TrialState.RUNNING or trial.place in over:
                return False
            self._asked.pop(trial.number).set_user_attr(RESULT, dict(result))
            state = TrialState.PRUNED if objectives is None else TrialState.COMPLETE
            self._study.tell(trial.number, None if objectives is None else list(objectives), state=state)
            return True

    def finished(self, total: int | None = None) -> list[Finished]:
        """The trials that are over, by place; of the first `total` places alone, if that is given."""
        with self._alone():
            trials = self._study.get_trials(deepcopy=False, states=FINISHED)
        found = [
            Finished(trial.user_attrs[PLACE], trial.params, trial.state == TrialState.PRUNED, trial.user_attrs[RESULT])
            for trial in trials
        ]
        kept = [trial for trial in found if total is None or trial.place < total]
        return sorted(kept, key=lambda trial: trial.place)

    def _fail_abandoned(self) -> None:
        """Trials of processes that are gone have failed."""
        for trial in self._study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            worker = trial.user_attrs.get(WORKER)
            if worker is None or not is_at_work(self._folder, worker):
                self._study.tell(trial.number, state=TrialState.FAIL)

    def _sampler(self, place: int, trials: Sequence[FrozenTrial]) -> BaseSampler:
        """For a place: what a failed trial had there, else what comes first, or drawn anew."""
        seed = random.Random(f"mrp_lens tune {self._seed} {place}").getrandbits(32)
        sampler = TPESampler(seed=seed, multivariate=True, constant_liar=True, n_startup_trials=AT_RANDOM)
        failed = [
            trial.params
            for trial in trials
            if trial.state == TrialState.FAIL
            and trial.user_attrs.get(PLACE) == place
            and trial.params.keys() == self._draws.keys()
        ]
        given = failed[-1] if failed else self._first if place == 0 else {}
        return PartialFixedSampler(dict(given), sampler) if given else sampler


def _suggested(trial: optuna.Trial, name: str, what: Range | Options) -> Any:
    if isinstance(what, Options):
        return trial.suggest_categorical(name, what.values)
    if what.whole:
        return trial.suggest_int(name, int(what.low), int(what.high), log=what.log)
    return trial.suggest_float(name, what.low, what.high, log=what.log)


@contextmanager
def _quiet() -> Iterator[None]:
    """Inside, Optuna neither logs nor warns of what is experimental in some of its versions."""
    level = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
            yield
    finally:
        optuna.logging.set_verbosity(level)


def _mend(path: Path) -> None:
    """Cut off a last line that a power cut left unfinished: the next entry would be appended to it."""
    if not path.is_file():
        return
    with path.open("r+b") as file:
        content = file.read()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            file.truncate(whole)
            os.fsync(file.fileno())
