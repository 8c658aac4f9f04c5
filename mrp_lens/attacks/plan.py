"""What a campaign of attacks covers, on which questions, and in which forms of the edit."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal, get_args

from mrp_lens.attacks.attacker import Attacker, Form
from mrp_lens.attacks.readout import Kind
from mrp_lens.attacks.recovery import check_held_out
from mrp_lens.attacks.retraining import Parameters
from mrp_lens.case import Case
from mrp_lens.checks import one_of, positive
from mrp_lens.corpus import Questions
from mrp_lens.corpus.questions import Half
from mrp_lens.edit import Edit
from mrp_lens.edit.stack import projection_in
from mrp_lens.model import LensModel

Attack = Literal["relearn", "probe", "bypass", "jailbreak"]


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
    def of(cls, case: Case, plan: Plan) -> "Facts":
        """The case's questions, split and checked.

        Raises:
            ValueError: there are no questions about what was forgotten, or they cannot be split so.
        """
        train, held_out = case.split(plan.split, limit=plan.questions, seed=plan.seed)
        untaught = case.untaught_alike
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
