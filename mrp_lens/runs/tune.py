"""The search for a method's settings on a model and data: trials on a tuning split, and a report on the other one."""

import shutil
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import MISSING, asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pandas as pd
import yaml
from tqdm.auto import tqdm

from mrp_lens import metrics, plots
from mrp_lens.data import UnlearningTask
from mrp_lens.data.tuning_split import tuning_split
from mrp_lens.edits import Edit, load_edit
from mrp_lens.edits.provenance import fingerprint
from mrp_lens.methods import METHODS, Fit, FitTemplate, Method
from mrp_lens.methods.base import recorded
from mrp_lens.methods.fit import EDIT, LOG
from mrp_lens.methods.rmu import BEFORE_MLP, Misdirection
from mrp_lens.methods.search_space import Depth, Dimension, Space
from mrp_lens.metrics.controls import UNEDITED
from mrp_lens.models import LensModel, identity_of
from mrp_lens.models.finite import NonFiniteError
from mrp_lens.runs.front import chosen_of, figures_of, on_front
from mrp_lens.training import NonFiniteLossError
from mrp_lens.training.checkpoints import CheckpointError
from mrp_lens.training.loop import TooLittleMemoryError
from mrp_lens.utils.frames import rows_of
from mrp_lens.utils.io import as_json, one_line, write_text
from mrp_lens.utils.result_store import POINTS, ResultStore
from mrp_lens.utils.torch_state import ordinary_torch
from mrp_lens.utils.validation import check_positive, check_whole, int_seed, whole_numbers
from mrp_lens.utils.workers import at_work, exclusive, forget_dead

if TYPE_CHECKING:
    from mrp_lens.runs.trials import Finished, Trial, Trials

KIND = "tune"
FITS = "fits"  # of trials that are not measured yet
BEST, PICTURE = "best.yaml", "pareto.html"
SAMPLE = 32  # held-out documents that tell whether a trial is worth measuring
LOOK = 0.5  # seconds between two looks at what other processes do
BEYOND = 1.0  # an accuracy is at most this; what breaks the budget counts as worse than any that keeps to it


@dataclass(frozen=True)
class Tuned:
    """What a search found.

    Attributes:
        trials: one row a finished trial: `trial`, `state` ("complete", or "pruned": given up), `forget_accuracy`,
            `retain_accuracy` (with `forget_low`, ..., 95%, as of `metrics.accuracy`), `damage` (nats a token; with
            `damage_low`, `damage_high`), `on_front`, `chosen`, `seconds`, `reason` (of a pruned one), and the settings.
        best: the row of the chosen trial.
        front: the rows that no other trial beats in both forgetting and damage, least damage first.
        reported: the unedited model and the chosen trial's edit on the half that no trial was measured on; the same columns.
        why: why this one was chosen.
        method: the chosen settings.
        edit: what they give.
        controls: `chance` and `unedited_accuracy`, of the forget questions for tuning.
    """

    trials: pd.DataFrame
    best: Mapping[str, Any]
    front: pd.DataFrame
    reported: pd.DataFrame
    why: str
    method: Method
    edit: Edit
    controls: Mapping[str, float]

    @property
    def forgot_nothing(self) -> bool:
        """Whether the chosen trial cannot be told from the unedited model by the forget questions for tuning (95%)."""
        return bool(self.best["forget_high"] >= self.controls["unedited_accuracy"])

    @property
    def picture(self) -> pd.DataFrame:
        """The frame of `plots.pareto`, whose `budget` is the search's; that of each fit is `fit_budget`."""
        done = self.trials[self.trials["state"] == "complete"].drop(columns="reason")
        return done.rename(columns={"budget": "fit_budget"}).assign(**self.controls)


@ordinary_torch(gradients=True)
def tune(
    model: LensModel,
    task: UnlearningTask,
    method: str | Method = "rmu",
    out: str | Path = "runs/tune",
    *,
    trials: int = 30,
    seed: int = 0,
    budget: float | None = None,
    choose: int | None = None,
    tuning_share: float = 0.5,
    prune_above: float = 1.0,
    progress: bool = True,
) -> Tuned:
    """Search a method's settings: what forgets most for least damage.

    Every trial fits the method to all of the forget set and retain set, and is measured on the tuning part of the quizzes and of the
    held-out text (`tuning_split`). The first trial has the method's defaults, as near as its space comes to them; then settings are
    drawn by multivariate TPE, up to the tenth at random, from the space that the method declares; what a method that is given as
    an object has besides its defaults is kept. The chosen trial is fitted once more, saved, and measured on the other part, which
    nothing was chosen by.

    The folder holds `tune.json` (what the search depends on), `study.journal` (Optuna's), and in the end `edit/`, `log.csv`,
    `best.yaml` and `pareto.html`. The same call goes on with a search that was killed, with more `trials` it adds to one, and any
    number of processes may make it at the same time.

    Args:
        model: HookedTransformer or TransformerBridge; left as it is.
        task: the data, with `questions`, `retain_questions` and held-out text.
        method: by name, or one whose given settings are kept.
        out: the folder.
        trials: how many in all, pruned ones included.
        seed: of the split, of the search and of every fit. Several processes at a time find what depends on who is first.
        budget: nats of damage a token. With it the least accuracy on the forget questions within the budget is searched; without,
            both are lowered at once.
        choose: the trial to take. None: see `Tuned.why`.
        tuning_share: of the questions (of their entities, where all are known) and held-out documents.
        prune_above: nats of damage a token on 32 held-out documents, above which a trial is not measured further; nor is one whose
            fit or figures are not finite, or whose settings the method refuses.
        progress: show progress bars.

    Raises:
        ImportError: Optuna is not installed.
        ValueError: there is nothing to search (an unknown method, one without a search space, all of its settings given), the task
            lacks quizzes or held-out text, a value is out of range, the method cannot be fitted with what the first trial has, no trial
            was measured, or the folder belongs to another search (which differs is said).
        KeyboardInterrupt: Ctrl-C; the trials that are done stay, and the one under way goes on.
    """
    trials_in = optuna_trials()
    base = METHODS[method]() if isinstance(method, str) else method
    space = open_space(base)
    check_whole(trials=trials)
    check_positive(budget=budget, prune_above=prune_above)
    if choose is not None and choose not in range(trials):
        raise ValueError(f"choose={choose} is no trial; choose one from 0 to {trials - 1}")
    tuning, unseen = tuning_split(task, tuning_share, seed=int_seed(seed))
    draws = {name + end: what for name, way in space.items() for end, what in way.draws(model).items()}
    settings = {
        "model": identity_of(model),
        "data": task.fingerprints(),
        "method": base.name,
        "settings": asdict(base),
        "space": {name: asdict(what) for name, what in draws.items()},
        "seed": int_seed(seed),
        "budget": budget,
        "tuning_share": tuning_share,
        "prune_above": prune_above,
    }
    store = ResultStore.claim(out, KIND, settings)
    search = _Search(model, task, tuning, unseen, base, space, int_seed(seed), budget, prune_above, store, progress)
    with at_work(store.folder) as worker:
        first = drawn_by_default(base, space, model, task)
        objectives = 1 if budget is not None else 2
        found = trials_in(store.folder, draws, first=first, objectives=objectives, seed=int_seed(seed))
        search.run(found, trials, worker)
        with exclusive(store.folder / POINTS):  # the first one fits and measures, the others read
            tuned = search.outcome(found.finished(trials), choose)
    forget_dead(store.folder)
    store.tidy()
    return tuned


def optuna_trials() -> "type[Trials]":
    """The trials' class, which needs Optuna.

    Raises:
        ImportError: it is not installed.
    """
    try:
        from mrp_lens.runs.trials import Trials
    except ModuleNotFoundError as error:
        raise ImportError(
            "tune needs Optuna, which is not installed; install it with: pip install 'mrp_lens[tune]'"
        ) from error
    return Trials


def open_space(method: Method) -> Space:
    """What there is to search: the method's declared space without the settings that were given, nor layers that these leave out.

    Raises:
        ValueError: the method declares none, or all of it was given.
    """
    if method.space is None:
        known = ", ".join(name for name, kind in METHODS.items() if kind.space is not None)
        raise ValueError(
            f"{method.name or type(method).__name__} declares no search space: register it with space={{...}}, or choose one of {known}"
        )
    kept = {field.name for field in fields(method) if getattr(method, field.name) != _default(field)}
    space = {name: what for name, what in method.space.items() if name not in kept}
    if not space:
        raise ValueError(
            f"all settings that {method.name} has to search are given: {', '.join(method.space)}; leave one out"
        )
    layer = space.get("layer")
    if isinstance(method, Misdirection) and isinstance(layer, Depth):
        space["layer"] = replace(layer, lowest=_lowest(method))
    return space


def _lowest(method: Misdirection[Any]) -> int:
    """The lowest layer at which every matrix of `trained_layers`, or a single one if these are not given, has a part in the states."""
    last = max(0, *whole_numbers(method.trained_layers or (0,), "trained_layers"))
    return last + 1 if method.site in BEFORE_MLP else last


def _default(field: Any) -> Any:
    return field.default if field.default_factory is MISSING else field.default_factory()


@ordinary_torch(gradients=False)
def method_of(base: Method, space: Space, drawn: Mapping[str, Any], model: LensModel, task: UnlearningTask) -> Method:
    """The method with the settings that were drawn; factors are on what it derives with the others."""
    chosen = replace(base, **plain_settings(space, drawn, model))
    derived = _derived(chosen, model, task)
    relative = {
        name: way.value(_parts(name, way, drawn, model), derived[name])
        for name, way in space.items()
        if way.needs_default
    }
    return replace(chosen, **relative)


def plain_settings(space: Space, drawn: Mapping[str, Any], model: LensModel) -> dict[str, Any]:
    """The settings that were drawn themselves, without those that are factors on what the method derives."""
    return {
        name: way.value(_parts(name, way, drawn, model), None) for name, way in space.items() if not way.needs_default
    }


def _parts(name: str, way: Dimension, drawn: Mapping[str, Any], model: LensModel) -> dict[str, Any]:
    """What was drawn for one setting, by the endings of the parameters' names."""
    return {end: drawn[name + end] for end in way.draws(model)}


@ordinary_torch(gradients=False)
def drawn_by_default(base: Method, space: Space, model: LensModel, task: UnlearningTask) -> dict[str, Any]:
    """What comes nearest to the method as it is given: parameter -> value."""
    derived = _derived(base, model, task)
    known = {name: way for name, way in space.items() if derived[name] is not None}
    return {
        name + end: value for name, way in known.items() for end, value in way.nearest(derived[name], model).items()
    }


def _derived(method: Method, model: LensModel, task: UnlearningTask) -> Mapping[str, Any]:
    """Its settings, with what it derives from model and data in the place of None."""
    if not isinstance(method, FitTemplate):
        return asdict(method)
    return recorded(method, method.prepared(model, task.forget, task.retain, None, None)[1])


@dataclass(frozen=True)
class _Search:
    """What a search works on."""

    model: LensModel
    task: UnlearningTask
    tuning: UnlearningTask
    unseen: UnlearningTask
    base: Method
    space: Space
    seed: int
    budget: float | None
    prune_above: float
    store: ResultStore
    progress: bool

    def run(self, found: "Trials", total: int, worker: str) -> None:
        """Run trials until there are so many, with whoever else works in the folder."""
        with exclusive(self.store.folder / POINTS):  # first of all, since no trial of a damaged model is of use
            self.unedited("tuning")
        with tqdm(total=total, desc="trials", disable=not self.progress) as bar:
            while True:
                bar.n = len(found.finished(total))
                bar.refresh()
                trial = found.take(total, worker)
                if trial is not None:
                    objectives, result = self.tried(trial)
                    found.finish(trial, objectives, result)
                    shutil.rmtree(self._kept(trial.place), ignore_errors=True)
                elif bar.n >= total:
                    return
                else:  # the rest is under way elsewhere, and is taken over if it stops there
                    time.sleep(LOOK)

    def _kept(self, place: int) -> Path:
        return self.store.folder / FITS / f"trial-{place}"

    def _fitted(self, method: Method, folder: Path) -> Fit:
        task = self.task
        return Fit.once(
            folder,
            lambda checkpoint: method.fit(
                self.model, task.forget, task.retain, seed=self.seed, progress=self.progress, checkpoint=checkpoint
            ),
        )

    def tried(self, trial: "Trial") -> tuple[list[float] | None, dict[str, Any]]:
        """The objectives of a trial (None: it was given up), and its row.

        Raises:
            ValueError: the first trial, which is the method as the user gave it, cannot be done; a later one is given up for that.
            CheckpointError, TooLittleMemoryError: as of a sweep.
        """
        begun = time.perf_counter()
        result: dict[str, Any] = {"settings": as_json(plain_settings(self.space, trial.drawn, self.model))}
        objectives = None
        try:
            method = method_of(self.base, self.space, trial.drawn, self.model, self.task)
            result["settings"] = as_json({name: getattr(method, name) for name in self.space})
            edit = self._fitted(method, self._kept(trial.place)).edit
            sample = metrics.damage(
                self.model, edit, self.tuning.held_out.spread(SAMPLE), seed=self.seed, progress=False
            )
            result["row"] = {"damage": metrics.value(sample)}
            if result["row"]["damage"] > self.prune_above:
                result["reason"] = f"damage on {sample['documents'].iloc[0]} documents above {self.prune_above:g} nats"
            else:
                result["row"] = self.measured(self.tuning, edit)
                objectives = self._objectives(result["row"])
        except (CheckpointError, TooLittleMemoryError):  # nothing that the next search would find, too
            raise
        except (ValueError, NonFiniteLossError) as error:
            if trial.place == 0 and not isinstance(error, NonFiniteError | NonFiniteLossError):
                raise
            result |= {"row": {}, "reason": one_line(error)}
        return objectives, {**result, "seconds": round(time.perf_counter() - begun, 3)}

    def _objectives(self, row: Mapping[str, float]) -> list[float]:
        if self.budget is None:
            return [row["forget_accuracy"], row["damage"]]
        over = row["damage"] - self.budget
        return [row["forget_accuracy"] if over <= 0 else BEYOND + over]

    def unedited(self, split: Literal["tuning", "reported"]) -> dict[str, float]:
        """The figures of the model as it is, on one part of the split."""
        part = self.tuning if split == "tuning" else self.unseen
        row: dict[str, float] = self.store.once(f"{UNEDITED}-{split}", lambda: {"row": self.measured(part, None)})[
            "row"
        ]
        return row

    def measured(self, part: UnlearningTask, edit: Edit | None) -> dict[str, float]:
        """The figures of one row, on one part of the split."""
        return figures_of(self.model, part, edit, seed=self.seed)

    def outcome(self, finished: "list[Finished]", choose: int | None) -> Tuned:
        """Choose, fit once more, save, and measure on the other part."""
        before = self.unedited("tuning")
        frame = rows_of_trials(finished)
        done = frame[frame["state"] == "complete"]
        if choose is not None and choose not in set(done["trial"]):
            raise ValueError(f"trial {choose} was pruned; choose one of {', '.join(map(str, done['trial']))}")
        if done.empty:
            raise ValueError(
                f"none of {len(frame)} trials was measured: {frame['reason'].iloc[-1]}. Raise prune_above, or run more trials"
            )
        best, why = choose, "it was asked for"
        if best is None:
            best, why = chosen_of(done, chance=before["forget_chance"], budget=self.budget)
        frame["chosen"] = frame["trial"] == best
        drawn = next(trial.drawn for trial in finished if trial.place == best)
        method = method_of(self.base, self.space, drawn, self.model, self.task)
        edit, reported = self._saved(method, best)
        controls = {"chance": before["forget_chance"], "unedited_accuracy": before["forget_accuracy"]}
        if self.budget is not None:
            controls["budget"] = self.budget
        tuned = Tuned(
            trials=frame,
            best=dict(rows_of(frame[frame["chosen"]])[0]),
            front=frame[frame["on_front"]].sort_values(["damage", "trial"], ignore_index=True),
            reported=reported,
            why=why,
            method=method,
            edit=edit,
            controls=controls,
        )
        content = {"method": method.name, "seed": self.seed, **as_json(asdict(method))}
        write_text(self.store.folder / BEST, yaml.safe_dump(content, sort_keys=False))
        picture = plots.pareto(tuned.picture).to_html(include_plotlyjs=True, config={"displaylogo": False})
        write_text(self.store.folder / PICTURE, picture)
        return tuned

    def _saved(self, method: Method, place: int) -> tuple[Edit, pd.DataFrame]:
        """The edit of the chosen trial as it is on disk, and what it does on the other part."""
        out, name = self.store.folder, f"chosen-{place}"
        known = self.store.stored(name)
        edit = None
        if known is not None:
            with suppress(ValueError, OSError):  # another trial's, or none: it is made again
                there = load_edit(out / EDIT)
                edit = there if fingerprint(there) == known["edit"] else None
        if edit is None:
            kept = out / FITS / name
            fit = self._fitted(method, kept)
            fit.edit.save_pretrained(out / EDIT, overwrite=True)
            write_text(out / LOG, fit.log.to_csv(index=False))
            edit = load_edit(out / EDIT)
            if known is None or known["edit"] != fingerprint(edit):
                row, seconds = self.measured(self.unseen, edit), float(fit.log["seconds"].iloc[-1])
                known = self.store.keep(name, {"edit": fingerprint(edit), "row": row, "seconds": seconds})
            shutil.rmtree(kept, ignore_errors=True)
        assert known is not None
        rows = [
            {"method": UNEDITED, **self.unedited("reported"), "seconds": 0.0},
            {"method": method.name, **known["row"], "seconds": known["seconds"]},
        ]
        return edit, pd.DataFrame(rows)


def rows_of_trials(finished: "list[Finished]") -> pd.DataFrame:
    """A row a trial, with the settings behind what was found."""
    rows = [
        {
            "trial": trial.place,
            "state": "pruned" if trial.pruned else "complete",
            **dict.fromkeys(
                ("forget_accuracy", "forget_low", "forget_high", "retain_accuracy", "retain_low", "retain_high")
            ),
            **dict.fromkeys(("damage", "damage_low", "damage_high")),
            **{name: value for name, value in trial.result["row"].items() if not name.endswith("chance")},
            "seconds": trial.result["seconds"],
            "reason": trial.result.get("reason", ""),
            **{name: _cell(value) for name, value in trial.result["settings"].items()},
        }
        for trial in finished
    ]
    frame = pd.DataFrame(rows)
    figures = [name for name in map(str, frame) if name.endswith(("accuracy", "low", "high")) or name == "damage"]
    frame = frame.astype(dict.fromkeys(figures, float))
    values = frame[["forget_accuracy", "damage"]].to_numpy(float)
    frame.insert(2, "on_front", on_front(values))
    return frame


def _cell(value: Any) -> Any:
    """A list as text: a cell of a table holds one value."""
    return ",".join(map(str, value)) if isinstance(value, list) else value
