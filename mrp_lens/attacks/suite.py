"""Every attack on one edit, piece by piece, in a folder that can be resumed."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import pandas as pd

from mrp_lens.attacks.bypass import bypass
from mrp_lens.attacks.evaluation import check_held_out
from mrp_lens.attacks.finetuning import LORA_RANK, Attacker, Form, Parameters, unlocked
from mrp_lens.attacks.gcg import Loss, jailbreak
from mrp_lens.attacks.gradients import input_gradients
from mrp_lens.attacks.probe import probe
from mrp_lens.attacks.relearn import documents_of, limited, relearn, with_floor
from mrp_lens.attacks.v_information import Kind
from mrp_lens.data import Questions
from mrp_lens.data.questions import Half
from mrp_lens.data.task import UnlearningTask
from mrp_lens.edits import Edit, edit_on, projection_in
from mrp_lens.edits.provenance import fingerprint
from mrp_lens.metrics.logit_lens import logit_lens
from mrp_lens.models import LensModel, identity_of
from mrp_lens.models.finite import NonFiniteError
from mrp_lens.utils.frames import rows_of
from mrp_lens.utils.store import ResultStore
from mrp_lens.utils.torch_state import ordinary_torch
from mrp_lens.utils.validation import one_of, positive

Attack = Literal["relearn", "probe", "bypass", "jailbreak"]


UNEDITED, REFERENCE = "unedited", "reference"
WITHOUT_EDIT: tuple[Parameters, ...] = ("all", "lora")  # the others are told apart by the edited layers
EVERY = 25  # steps of a trigger search
Frames = dict[str, pd.DataFrame]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a campaign covers, and its budgets.

    Attributes:
        attacks: which.
        forms: of the edit, that are retrained; None: all that it has.
        parameters: that retraining may change.
        steps: updates of each retraining.
        lr: its grid of rates; None: three around one that suits the model's width.
        samples: at most this many facts of T are trained on; None: all.
        probe_kind: "linear" or "mlp".
        search_steps: of each search for a trigger.
        split: how the questions are halved; None: by entity where these are known.
        questions: at most this many on what was forgotten, evenly spread, T and V together; None: all.
        seed: of every random choice.
    """

    attacks: tuple[Attack, ...] = get_args(Attack)
    forms: tuple[Form, ...] | None = None
    parameters: tuple[Parameters, ...] = ("all",)
    steps: int = 100
    lr: tuple[float, ...] | None = None
    samples: int | None = None
    probe_kind: Kind = "linear"
    search_steps: int = 50
    split: Half | None = None
    questions: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for kind, name in ((Attack, "attacks"), (Form, "forms"), (Parameters, "parameters")):
            for value in getattr(self, name) or ():
                one_of(kind, **{name: value})
        one_of(Kind, probe_kind=self.probe_kind)
        positive(samples=self.samples, search_steps=self.search_steps, questions=self.questions)
        Attacker(steps=self.steps, seed=self.seed)

    def attacker(self, form: Form, parameters: Parameters) -> Attacker:
        """Who retrains this form of the edit."""
        return Attacker(steps=self.steps, form=form, parameters=parameters, seed=self.seed)


@dataclass(frozen=True)
class Facts:
    """The questions in their roles: T, V, and never-taught ones, of which a half that is no floor is taught as new facts."""

    train: Questions
    held_out: Questions
    untaught: Questions | None
    new: Questions | None

    @classmethod
    def of(cls, task: UnlearningTask, plan: Plan) -> "Facts":
        """The case's questions, split and checked.

        Raises:
            ValueError: there are no questions about what was forgotten, or they cannot be split so.
        """
        train, held_out = task.split(plan.split, limit=plan.questions, seed=plan.seed)
        untaught = task.untaught_alike
        check_held_out(held_out, train=train, untaught=untaught)
        return cls(train, held_out, untaught, None if untaught is None else untaught.halves(seed=plan.seed)[1])

    def fingerprints(self) -> dict[str, str]:
        """Role -> hash of the questions."""
        parts = {"train": self.train, "held_out": self.held_out, "untaught": self.untaught}
        return {role: part.fingerprint for role, part in parts.items() if part is not None}


def possible_forms(model: LensModel, edit: Edit, wanted: tuple[Form, ...] | None) -> tuple[Form, ...]:
    """The forms that are wanted, or all in which this edit can be retrained.

    Raises:
        ValueError: one that is wanted and that the edit does not have.
    """
    found: list[Form] = []
    for form in wanted or get_args(Form):
        if wanted is None and form == "weights" and projection_in(edit) is None:
            continue  # it is in the weights as it is, or is no projection
        try:
            with Attacker(form=form).faced_with(model, edit):
                found.append(form)
        except ValueError:
            if wanted is not None:
                raise
    return tuple(found)


def labelled(parts: Mapping[str, Questions | None]) -> Questions:
    """Questions as one set, each part with its name as the group."""
    return Questions(
        tuple(replace(q, group=name) for name, part in parts.items() if part is not None for q in part.questions)
    )


@dataclass(frozen=True)
class Campaign:
    """The attacks of a plan on one edit; see `campaign`."""

    model: LensModel
    edit: Edit
    name: str
    task: UnlearningTask
    facts: Facts
    plan: Plan
    forms: tuple[Form, ...]
    store: ResultStore
    reference: LensModel | None
    progress: bool

    def frames(self) -> Frames:
        """What every attack of the plan found."""
        run: Mapping[Attack, Callable[[], Frames]] = {
            "relearn": self._relearn,
            "probe": self._probe,
            "bypass": lambda: {"bypass": self.store.frame("bypass", self._bypass)},
            "jailbreak": self._jailbreak,
        }
        found = {name: frame for attack in self.plan.attacks for name, frame in run[attack]().items()}
        self.store.tidy()
        return found

    def _relearn(self) -> Frames:
        curves = []
        for parameters in self.plan.parameters:
            targets: list[tuple[str, Edit | None, Form]] = [(self.name, self.edit, form) for form in self.forms]
            if parameters in WITHOUT_EDIT:
                targets.append((UNEDITED, None, "kept"))
            of_edits = [self._curves(self.model, *target, parameters) for target in targets]
            if self.reference is not None and parameters in WITHOUT_EDIT:
                floor = self._curves(self.reference, REFERENCE, None, "kept", parameters)
                of_edits = [self._on_floor(frame, floor) for frame in of_edits]
            curves += of_edits
        return {"relearning_curves": pd.concat(curves, ignore_index=True)}

    def _curves(
        self, model: LensModel, name: str, edit: Edit | None, form: Form, parameters: Parameters
    ) -> pd.DataFrame:
        """One curve a rate."""
        frames = []
        for rate in self.plan.attacker(form, parameters).rates(self.model, self.plan.lr):

            def curve(rate: float = rate) -> pd.DataFrame:
                frame = relearn(
                    model,
                    edit,
                    train=self.facts.train,
                    held_out=self.facts.held_out,
                    untaught=self.facts.untaught,
                    new=self.facts.new,
                    steps=self.plan.steps,
                    lr=rate,
                    samples=self.plan.samples,
                    form=form,
                    parameters=parameters,
                    seed=self.plan.seed,
                    progress=self.progress,
                )
                if frame.attrs["interrupted"]:
                    raise KeyboardInterrupt
                return frame

            role = name if edit is None else "edited"
            frames.append(self.store.frame(f"relearn-{role}-{form}-{parameters}-lr{rate:.6g}", curve))
        return pd.concat(frames, ignore_index=True).assign(method=name)

    def _on_floor(self, curves: pd.DataFrame, floor: pd.DataFrame) -> pd.DataFrame:
        """With the reference's floor, at the rates at which its loss stayed finite; as they are if there is none."""
        whole = floor.loc[floor["step"] == self.plan.steps, "lr"]
        comparable = curves[curves["lr"].isin(whole)]
        return with_floor(comparable, floor, seed=self.plan.seed) if len(comparable) else curves

    def _probe(self) -> Frames:
        probes, lenses = [], []
        for state, contents in self._states():
            content = self.store.once(f"probe-{state}", contents)
            name = {UNEDITED: UNEDITED, "edited": self.name}.get(state, f"{self.name}, relearned")
            probes.append(pd.DataFrame(content["probe"]).assign(method=name))
            lenses.append(pd.DataFrame(content["lens"]).assign(method=name))
        return {
            "probe_bits": pd.concat(probes, ignore_index=True),
            "logit_lens": pd.concat(lenses, ignore_index=True),
        }

    def _states(self) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
        """States of the model, by name, with what reads them."""
        yield UNEDITED, lambda: self._read(None)
        yield "edited", lambda: self._read(self.edit)

        def relearned() -> dict[str, Any]:
            attacker = self.plan.attacker("kept", "all")
            rates = attacker.rates(self.model, self.plan.lr)
            taught = documents_of(limited(self.facts.train, self.plan.samples))
            with attacker.retrained(
                self.model, self.edit, taught, lr=rates[len(rates) // 2], progress=self.progress
            ) as outcome:
                if outcome == "interrupted":
                    raise KeyboardInterrupt
                if outcome == "diverged":
                    raise NonFiniteError(
                        f"retraining at lr {rates[len(rates) // 2]:.2g} made the loss NaN or infinite, so that there is no retrained model "
                        "to probe; give lower rates"
                    )
                return self._read(None)

        yield "relearned", relearned

    def _read(self, edit: Edit | None) -> dict[str, Any]:
        """What a probe and the logit lens read off the model as it is now, and with this edit on."""
        facts, seed, progress = self.facts, self.plan.seed, self.progress
        answers = {choice for q in (*facts.train.questions, *facts.held_out.questions) for choice in q.choices}
        bits = probe(
            self.model,
            edit,
            train=facts.train,
            held_out=facts.held_out,
            untaught=facts.untaught,
            kind=self.plan.probe_kind,
            target="answer" if len(answers) <= len(facts.train) else "choice",
            seed=seed,
            progress=progress,
        )
        asked = labelled({"forget": facts.held_out, "never-taught": facts.untaught})
        with edit_on(self.model, edit):
            seen = logit_lens(self.model, asked, seed=seed, progress=progress)
        return {"probe": rows_of(bits), "lens": rows_of(seen[seen["group"] != "all"])}

    def _bypass(self) -> pd.DataFrame:
        return bypass(
            self.model,
            self.edit,
            held_out=self.facts.held_out,
            untaught=self.facts.untaught,
            shots=self.facts.train,
            forget=self.task.forget_texts,
            retain=self.task.retain,
            retain_questions=self._retain_questions(),
            seed=self.plan.seed,
            progress=self.progress,
        )

    def _jailbreak(self) -> Frames:
        searches = []
        for objective in get_args(Loss):

            def search(objective: Loss = objective) -> pd.DataFrame:
                frame = jailbreak(
                    self.model,
                    self.edit,
                    train=self.facts.train,
                    held_out=self.facts.held_out,
                    untaught=self.facts.untaught,
                    loss=objective,
                    steps=self.plan.search_steps,
                    every=EVERY,
                    seed=self.plan.seed,
                    progress=self.progress,
                )
                if frame["step"].max() < self.plan.search_steps:  # it returns what it has after Ctrl-C
                    raise KeyboardInterrupt
                return frame.assign(objective=objective)

            searches.append(self.store.frame(f"jailbreak-{objective}", search))
        steep = self.store.frame("gradients", self._gradients)
        return {
            "jailbreak_curve": pd.concat(searches, ignore_index=True).assign(method=self.name),
            "input_gradients": steep.assign(method=self.name),
        }

    def _gradients(self) -> pd.DataFrame:
        asked = labelled({"forget": self.facts.held_out, "retain": self._retain_questions()})
        frame = input_gradients(self.model, self.edit, asked, seed=self.plan.seed, progress=self.progress)
        return frame[frame["group"] != "all"]

    def _retain_questions(self) -> Questions | None:
        """As many as there are in V."""
        quiz = self.task.retain_questions
        return None if quiz is None else quiz.spread(len(self.facts.held_out))


@ordinary_torch(gradients=True)
def campaign(
    model: LensModel,
    edit: Edit,
    task: UnlearningTask,
    plan: Plan,
    out: str | Path,
    *,
    name: str = "edited",
    reference: LensModel | None = None,
    progress: bool = True,
) -> Frames:
    """Attack an edit in every way of a plan, as far as that has not been done.

    The folder holds `campaign.json` (the settings) and one file a piece, each whole or not at all: a curve of retraining
    for each form, choice of parameters and rate, also of the unedited model and of the reference; what probes read off
    the unedited, the edited and the retrained model; the bypasses; a trigger search for each loss; gradients.

    Args:
        model: HookedTransformer or TransformerBridge without the edit; left exactly as it is.
        edit: what to attack.
        case: the data, with `questions`; `untaught_questions` are the floor, its control, and the new facts.
        plan: what to do.
        out: the folder; another plan's `attacks` may be added to it.
        name: of the edit, in the frames.
        reference: a model that never saw what was forgotten: the floor of retraining in place of never-taught facts.
        progress: show progress bars.

    Returns:
        Name -> frame, each with a column `method` (or `model`): "relearning_curves", "probe_bits", "logit_lens",
        "bypass", "jailbreak_curve" (with `objective`), "input_gradients", those of the attacks in the plan.

    Raises:
        ValueError: no questions, an edit that was made for another model or has not such a form, parameters that this
            model has not, or a folder of other settings (which differ is said).
        KeyboardInterrupt: Ctrl-C; the pieces that are done stay.
    """
    with edit.applied(model):  # refuses another model than its own, before any work
        pass
    facts = Facts.of(task, plan)
    forms = possible_forms(model, edit, plan.forms)
    for parameters in plan.parameters:
        plan.attacker("kept", parameters).rates(model, plan.lr)
        if parameters != "all":  # which every model has, and which takes a copy of the model
            with unlocked(model, edit, parameters, lora_rank=LORA_RANK, seed=plan.seed):
                pass
    budgets = {key: value for key, value in asdict(plan).items() if key != "attacks"}
    settings = {
        "model": identity_of(model),
        "edit": fingerprint(edit),
        "reference": None if reference is None else identity_of(reference),
        "data": task.fingerprints() | facts.fingerprints(),
        **budgets,
        "forms": forms,
    }
    store = ResultStore.claim(out, "campaign", settings)
    return Campaign(model, edit, name, task, facts, plan, forms, store, reference, progress).frames()
