"""Retraining on T (RTT, arXiv 2410.08827): teach an edited model some of what it lost, and ask for the rest."""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, get_args

import pandas as pd
from typing_extensions import override

from mrp_lens.attacks.base import Attack, Frames, Setting
from mrp_lens.attacks.evaluation import Evaluator, score
from mrp_lens.attacks.finetuning import LORA_RANK, Attacker, Form, Parameters, possible_forms, unlocked
from mrp_lens.attacks.registry import register
from mrp_lens.attacks.summary import ACCURACIES, RECOVERY, columns, without_attack
from mrp_lens.data import Corpus, Questions
from mrp_lens.edits import Edit
from mrp_lens.metrics.controls import NEVER_TAUGHT, UNEDITED
from mrp_lens.metrics.recovery import FORM_TITLES, Score, best, recovery
from mrp_lens.models import LensModel
from mrp_lens.models.finite import NonFiniteError
from mrp_lens.training.callbacks import Evaluation
from mrp_lens.utils.torch_state import ordinary_torch
from mrp_lens.utils.validation import check_one_of, check_positive, check_whole

MARKS = (0, 5, 20, 40, 100)
"""Updates after which an attack is scored, besides its last."""
TAUGHT = 0.95
"""An attack counts only if its own training questions come to be answered this often."""
BUDGETS = (5, 20, 100)
"""Updates after which the summary has a row of the edited model."""
SLOWER = 0.2
"""New facts count as learned more slowly where so much of their accuracy is missing, against the unedited model."""
REFERENCE = "reference"
WITHOUT_EDIT: tuple[Parameters, ...] = ("all", "lora")  # the others are told apart by the edited layers


@ordinary_torch(gradients=True)
def relearn(
    model: LensModel,
    edit: Edit | None,
    *,
    train: Questions | Corpus,
    held_out: Questions,
    untaught: Questions | None = None,
    new: Questions | None = None,
    steps: int = 100,
    lr: float | Sequence[float] | None = None,
    samples: int | None = None,
    batch_size: int = 32,
    form: Form = "kept",
    parameters: Parameters = "all",
    lora_rank: int = LORA_RANK,
    marks: Sequence[int] = MARKS,
    seed: int = 0,
    progress: bool = True,
) -> pd.DataFrame:
    """Retrain on some of the forgotten facts and score on others: what comes back was never removed.

    `train` says nothing about the facts of `held_out`, so accuracy that comes back on these was still in the model
    (arXiv 2410.08827). Recovery = (accuracy after - floor) / (ceiling - floor): the floor is the accuracy, after the same
    attack, on facts that were never taught; the ceiling that of the unedited model on `held_out`.

    Args:
        model: HookedTransformer or TransformerBridge without the edit; it is left exactly as it was.
        edit: what to attack; None: the unedited model.
        train: T. Questions are trained on as prompts with their right answers. Of a Corpus, "accuracy" is the share of
            its counted tokens that the model would say.
        held_out: V, which shares nothing with T but what they are about; `questions.halves()` splits.
        untaught: never-taught questions, like those of V: a random half of them is the floor, the other half the
            control, whose own recovery ought to be 0. None: the floor is what guessing gives.
        new: facts that the model does not know, as many as in T: another run with the same budget is taught these, for
            a model that cannot be trained is not one that has unlearned.
        steps: updates.
        lr: rate, or the attacker's grid of rates. None: three around 0.128 / d_model (ten times that for "lora").
        samples: at most this many documents of T, evenly spread; None: all.
        batch_size, form, parameters, lora_rank, seed: see `Attacker`.
        marks: updates after which to score; the last is scored always.
        progress: show progress bars.

    Returns:
        A row a rate and mark: `attack`, `form`, `parameters`, `samples`, `lr`, `step`, `train_accuracy` (on at
        most 100 documents of T), `held_out_accuracy`, `n`; on `held_out` without attack `accuracy_before` (unedited)
        and `accuracy_edited`; `floor`, `n_floor`, `untaught_floor` (that of never-taught questions, whatever `floor` is;
        NaN without them), `ceiling`; `effective_n`, `effective_n_floor`, `effective_n_ceiling`: as how many independent
        questions these three accuracies count, where several are about one entity; `recovery`, `recovery_low`, `recovery_high` (95%),
        for the never-taught control `control_recovery`, `control_recovery_low`, `control_recovery_high`; `new_accuracy`; `counts`: whether T
        reaches 0.95 at this rate (texts always count); `seconds`. A rate that makes the loss infinite has its rows until then; so has all
        after Ctrl-C, which `frame.attrs["interrupted"]` tells.

    Raises:
        TypeError: train, held_out, untaught or marks of another kind.
        ValueError: T and V overlap, a budget of 0, a form that the edit does not have, a model that was loaded in
            inference mode; NonFiniteError where its logits are NaN or infinite before any update.

    Example:
        >>> taught, asked = questions.halves(by="entity")
        >>> curve = relearn(model, fit.edit, train=taught, held_out=asked, steps=2, lr=1e-3)
    """
    attacker = Attacker(
        steps=steps, batch_size=batch_size, form=form, parameters=parameters, lora_rank=lora_rank, seed=seed
    )
    rates = attacker.rates(model, lr)
    if isinstance(marks, int):
        raise TypeError(f"marks are several numbers of updates, got {marks}; write [{marks}] for a single one")
    evaluator = Evaluator.of(model, edit, limited(train, samples), held_out, untaught, seed=seed)
    points = sorted({mark for mark in marks if 0 <= mark <= steps} | {steps})

    described = {"attack": "relearn", "form": form, "parameters": parameters, "samples": len(evaluator.taught)}
    rows: list[dict[str, Any]] = []
    for rate in rates:
        begun = time.perf_counter()
        curve: dict[int, dict[str, Any]] = {}
        learned: dict[int, float] = {}

        def evaluate(step: int, curve: dict[int, dict[str, Any]] = curve, begun: float = begun) -> None:
            curve[step] = evaluator.figures(model) | {"seconds": time.perf_counter() - begun}

        def evaluate_new(step: int, learned: dict[int, float] = learned, new: Any = new) -> None:
            learned[step] = score(model, new).accuracy

        retrained = partial(attacker.retrained, model, edit, lr=rate, progress=progress)
        with retrained(documents_of(evaluator.taught), callbacks=[Evaluation(evaluate, points)]) as outcome:
            pass
        if new is not None and outcome == "finished":
            with retrained(new.right_answers(), callbacks=[Evaluation(evaluate_new, points)]) as outcome:
                pass
        # Of a text most tokens are not to be known from those before: how many are says little about what was learned.
        counts = isinstance(train, Corpus) or any(figures["train_accuracy"] >= TAUGHT for figures in curve.values())
        for step, figures in curve.items():
            row = described | {"lr": rate, "step": step, **figures}
            rows.append(row | {"new_accuracy": learned.get(step, float("nan")), "counts": counts})
        if outcome == "interrupted":
            break
    frame = pd.DataFrame(rows)
    frame.attrs["interrupted"] = outcome == "interrupted"
    return frame


@contextmanager
def relearned(
    model: LensModel,
    edit: Edit | None,
    *,
    train: Questions | Corpus,
    steps: int = 100,
    lr: float | None = None,
    samples: int | None = None,
    batch_size: int = 32,
    form: Form = "kept",
    parameters: Parameters = "all",
    lora_rank: int = LORA_RANK,
    seed: int = 0,
    progress: bool = True,
) -> Iterator[LensModel]:
    """The model as `relearn` leaves it at one rate, to look at; exactly as it was on exit.

    Arguments as for `relearn`; lr None: 0.128 / d_model. After Ctrl-C it is the model as far as it was retrained.

    Raises:
        TypeError, ValueError: as `relearn`; NonFiniteError where the rate makes the loss infinite.

    Example:
        >>> taught, asked = questions.halves(by="entity")
        >>> with relearned(model, fit.edit, train=taught, steps=2):
        ...     frame = ml.metrics.accuracy(model, asked)
    """
    attacker = Attacker(
        steps=steps, batch_size=batch_size, form=form, parameters=parameters, lora_rank=lora_rank, seed=seed
    )
    rates = attacker.rates(model, lr)
    taught = documents_of(limited(train, samples))
    rate = rates[len(rates) // 2]
    with attacker.retrained(model, edit, taught, lr=rate, progress=progress) as outcome:
        if outcome == "diverged":
            raise NonFiniteError(f"retraining at lr {rate:.2g} made the loss NaN or infinite; give a lower lr")
        yield model


def with_floor(
    curves: pd.DataFrame, reference: pd.DataFrame, *, steps: int | None = None, seed: int = 0
) -> pd.DataFrame:
    """The curves with another floor: a model that never saw what was forgotten, under the same attack.

    Args:
        curves: of `relearn`.
        reference: of `relearn` on that model, with the same data, rates and marks.
        steps: updates of the attack. A rate at which the reference has no row after so many, since its loss became infinite, is
            left out; without any other rate the curves keep the floor that they have. None: as many as the reference's last.
        seed: of the interval.

    Returns:
        The curves with other `floor`, `n_floor` and recovery. The never-taught control and its `untaught_floor` stay.

    Raises:
        ValueError: a rate and mark of the curves that the reference lacks.
    """
    finished = reference.loc[reference["step"] == (steps or reference["step"].max()), "lr"]
    known = reference.set_index(["lr", "step"])
    gone = set(reference["lr"]) - set(finished)
    comparable = curves[~curves["lr"].isin(gone)]
    if not len(comparable):
        return curves
    rows = []
    for row in comparable.to_dict("records"):
        place = (row["lr"], row["step"])
        if place not in known.index:
            raise ValueError(f"the reference has no row for lr {place[0]:.2g} and step {place[1]}; attack it likewise")
        floor = _score(known.loc[place], "held_out_accuracy", "effective_n")
        after = _score(row, "held_out_accuracy", "effective_n")
        ceiling = _score(row, "ceiling", "effective_n_ceiling")
        found = recovery(after, floor, ceiling, seed=seed).columns()
        # Curves of earlier versions have one name for both.
        taught = {"untaught_floor": row.get("untaught_floor", row.get("floor", float("nan")))}
        of_floor = {"floor": floor.accuracy, "n_floor": floor.n, "effective_n_floor": floor.independent}
        rows.append(row | taught | of_floor | found)
    return pd.DataFrame(rows)


def _score(row: Mapping[Any, Any] | pd.Series, accuracy: str, effective_n: str) -> Score:
    """The score that a row of a curve holds in these columns; those of earlier versions have no `effective_n`."""
    n, independent = int(row["n"]), row.get(effective_n)
    return Score(row[accuracy] * n, n, None if pd.isna(independent) else independent)


def limited(train: Questions | Corpus, samples: int | None) -> Questions | Corpus:
    """At most `samples` documents of T.

    Raises:
        TypeError: neither Questions nor a Corpus.
        ValueError: samples below 1.
    """
    if not isinstance(train, Questions | Corpus):
        raise TypeError(f"train must be Questions or a Corpus, got {type(train).__name__}")
    check_whole(samples=samples)
    return train.spread(samples)


def documents_of(train: Questions | Corpus) -> Corpus:
    """T as documents."""
    return train.right_answers() if isinstance(train, Questions) else train


@register(
    "relearn",
    summary="Retrains on half of the forgotten facts, and asks for the other half.",
    source="arXiv 2410.08827",
)
@dataclass(frozen=True, kw_only=True)
class Relearn(Attack):
    """Retraining, with the edit and without, of each form and choice of parameters at each rate.

    Attributes:
        forms: of the edit, that are retrained: "kept", "stripped", "weights"; None: all that it has.
        parameters: that retraining may change: "all", "lora", "before", "at", "after".
        steps: updates of each retraining.
        lr: its grid of rates; None: three around 0.128 / d_model (ten times that for "lora").
        samples: at most this many facts of T are trained on; None: all.
    """

    forms: tuple[Form, ...] | None = None
    parameters: tuple[Parameters, ...] = ("all",)
    steps: int = 100
    lr: tuple[float, ...] | None = None
    samples: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for kind, name in ((Form, "forms"), (Parameters, "parameters")):
            for value in getattr(self, name) or ():
                check_one_of(kind, **{name: value})
        check_positive(steps=self.steps, samples=self.samples)

    def attacker(self, form: Form, parameters: Parameters, *, seed: int) -> Attacker:
        """Who retrains this form of the edit."""
        return Attacker(steps=self.steps, form=form, parameters=parameters, seed=seed)

    @override
    def resolved(self, model: LensModel, edit: Edit) -> "Relearn":
        forms = possible_forms(model, edit, self.forms)
        for parameters in self.parameters:
            self.attacker("kept", parameters, seed=0).rates(model, self.lr)
            if parameters != "all":  # which every model has, and which takes a copy of the model
                with unlocked(model, edit, parameters, lora_rank=LORA_RANK, seed=0):
                    pass
        return replace(self, forms=forms)

    @override
    def run(self, setting: Setting) -> Frames:
        """The frame "relearning_curves"; of the unedited model too, and with the floor of the reference if there is one."""
        curves = []
        for parameters in self.parameters:
            targets: list[tuple[str, Edit | None, Form]] = [
                (setting.name, setting.edit, form) for form in self.forms or get_args(Form)
            ]
            if parameters in WITHOUT_EDIT:
                targets.append((UNEDITED, None, "kept"))
            found = [self._curves(setting, setting.model, *target, parameters) for target in targets]
            if setting.reference is not None and parameters in WITHOUT_EDIT:
                floor = self._curves(setting, setting.reference, REFERENCE, None, "kept", parameters)
                found = [with_floor(frame, floor, steps=self.steps, seed=setting.seed) for frame in found]
            curves += found
        return {"relearning_curves": pd.concat(curves, ignore_index=True)}

    def _curves(
        self, setting: Setting, model: LensModel, name: str, edit: Edit | None, form: Form, parameters: Parameters
    ) -> pd.DataFrame:
        """One curve a rate."""
        frames = []
        for rate in self.attacker(form, parameters, seed=setting.seed).rates(setting.model, self.lr):

            def curve(rate: float = rate) -> pd.DataFrame:
                return relearn(
                    model,
                    edit,
                    steps=self.steps,
                    lr=rate,
                    samples=self.samples,
                    form=form,
                    parameters=parameters,
                    **setting.arguments("train", "held_out", "untaught", "new"),
                )

            role = name if edit is None else "edited"
            frames.append(setting.frame(f"relearn-{role}-{form}-{parameters}-lr{rate:.6g}", curve))
        curves = pd.concat(frames, ignore_index=True).assign(method=name)
        asked = setting.facts.untaught is not None
        # Points of earlier versions have it as the floor alone.
        known = curves.get("untaught_floor", curves["floor"]).astype(float)
        return curves.assign(untaught_floor=known.fillna(curves["floor"]) if asked else float("nan"))

    @contextmanager
    def relearned(self, setting: Setting) -> Iterator[LensModel]:
        """The model after retraining at the middle rate, with the edit kept.

        Raises:
            NonFiniteError: the loss became infinite.
            KeyboardInterrupt: Ctrl-C.
        """
        attacker = self.attacker("kept", "all", seed=setting.seed)
        rates = attacker.rates(setting.model, self.lr)
        rate = rates[len(rates) // 2]
        taught = documents_of(limited(setting.facts.train, self.samples))
        with attacker.retrained(setting.model, setting.edit, taught, lr=rate, progress=setting.progress) as outcome:
            if outcome == "interrupted":
                raise KeyboardInterrupt
            if outcome == "diverged":
                raise NonFiniteError(
                    f"retraining at lr {rate:.2g} made the loss NaN or infinite, so that there is no retrained model to probe; "
                    "give lower rates"
                )
            yield setting.model

    @override
    def rows(self, frames: Frames, name: str) -> Iterator[Mapping[str, Any]]:
        """The edit's rows at the attacker's best rate, the never-taught control of each at its own, and the unedited model's.

        The edit's row "no attack" has `forget_accuracy`, `untaught_accuracy` (where there are never-taught questions), and where
        there are such forms and budgets `recovery_5`, `recovery_20`, `recovery_100`, `recovery_100_stripped`, `recovery_100_weights`.
        """
        if "relearning_curves" not in frames:
            return
        curves = frames["relearning_curves"]
        found = best(curves).rename(columns={"held_out_accuracy": "accuracy_after"})
        edited = found[found["method"] == name]
        usual = edited[(edited["form"] == "kept") & (edited["parameters"] == "all")]
        for row in usual[usual["step"] == 0].to_dict("records"):
            level = {"untaught_accuracy": _untaught_floor(row)}
            yield (
                without_attack(row, name) | (level if pd.notna(level["untaught_accuracy"]) else {}) | _by_budget(edited)
            )
        for (method, form, parameters), part in found.groupby(["method", "form", "parameters"], sort=False):
            last = part["step"].max()
            shown = {*BUDGETS, last} if method == name and form == "kept" else {last}
            for row in part[part["step"].isin(shown)].to_dict("records"):
                title = f"{_title(str(form), str(parameters))}, {row['step']} steps"
                if method != name:
                    title = title.replace(f", {FORM_TITLES['kept']}", "")
                yield {"method": method, "attack": title, **columns(row, ACCURACIES, RECOVERY)}
                if row["step"] == last and method == name:
                    own = curves[(curves["method"] == name) & (curves["form"] == form) & (curves["step"] == last)]
                    yield from _control(own[own["parameters"] == parameters], title)

    @override
    def notes(self, frames: Frames, name: str) -> Iterator[str]:
        """Which retrainings do not count, and which models are hard to train at all."""
        if "relearning_curves" not in frames:
            return
        curves = frames["relearning_curves"]
        for (method, form, parameters), part in curves.groupby(["method", "form", "parameters"], sort=False):
            attack = f"{method}: {_title(str(form), str(parameters))}"
            if not part["counts"].any():
                most = part["train_accuracy"].max()
                yield (
                    f"{attack} does not count: {most:.0%} of its own training questions are answered at most, below {TAUGHT:.0%}. "
                    "Give it more updates or other rates"
                )
            if method == name:
                unedited = curves[(curves["method"] == UNEDITED) & (curves["parameters"] == parameters)]
                yield from _slower(attack, part, unedited)


def _control(curves: pd.DataFrame, title: str) -> Iterator[dict[str, Any]]:
    """The row of the never-taught control after the last updates, at its own best rate; none where it is not known."""
    row = best(curves, by="control_recovery").iloc[0].to_dict()
    if pd.notna(row["control_recovery"]):
        found = {"floor": _untaught_floor(row), "ceiling": row["ceiling"]}
        yield {"method": NEVER_TAUGHT, "attack": title, **found, **{end: row[f"control_{end}"] for end in RECOVERY}}


def _untaught_floor(row: Mapping[Any, Any]) -> float:
    """The never-taught level of a row, whatever its floor is; frames of earlier versions have it as the floor alone."""
    return float(row.get("untaught_floor", row["floor"]))


def _slower(attack: str, edited: pd.DataFrame, unedited: pd.DataFrame) -> Iterator[str]:
    """Whether new facts are learned more slowly, each model at its best rate for these."""
    learned = [curves.groupby("step")["new_accuracy"].max().astype(float).dropna() for curves in (edited, unedited)]
    both = pd.DataFrame(dict(zip(("edited", "unedited"), learned, strict=True))).dropna().reset_index()
    missing = both["unedited"] - both["edited"]
    if (missing >= SLOWER).any():
        worst = both.loc[int(missing.argmax())]
        yield (
            f"{attack}: this model learns new facts more slowly than the unedited one ({worst['edited']:.0%} against "
            f"{worst['unedited']:.0%} after {worst['step']:.0f} updates), so little recovery may mean that it is hard to train, not that it forgot"
        )


def _title(form: str, parameters: str) -> str:
    which = "" if parameters == "all" else f" ({parameters})"
    return f"relearn{which}, {FORM_TITLES[form]}"


def _by_budget(edited: pd.DataFrame) -> dict[str, float]:
    """`recovery_5` and the like, as far as there are such budgets."""
    rows = edited[edited["parameters"] == "all"].set_index(["form", "step"])["recovery"].to_dict()
    wanted: dict[str, tuple[str, int]] = {f"recovery_{steps}": ("kept", steps) for steps in BUDGETS}
    wanted |= {f"recovery_{BUDGETS[-1]}_{form}": (form, BUDGETS[-1]) for form in ("stripped", "weights")}
    return {key: rows[place] for key, place in wanted.items() if place in rows}
