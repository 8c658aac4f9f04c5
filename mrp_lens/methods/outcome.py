"""How far a fit got: towards its target, and into its budget of damage."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

Ended = Literal["target", "unknown", "returned", "budget", "unmoved", "stalled", "steps", "interrupted"]

MOVED = 0.1  # share of the way to the target below which a fit has not moved
OVER = 1.5  # times the budget that the last measurement may be above it: the multiplier swings around it
SPENT = 0.8  # share of the budget from which on it is what ended a fit

REMEDIES: Mapping[Ended, str] = {
    "budget": "allow for more damage (budget), or give a retain set that is less like the forget set",
    "unmoved": "ask a quiz whether the model knows the forget set at all; if it does, try other layers (tune)",
    "stalled": "try more layers or a larger rank (MRP), or another layer (RMU)",
    "returned": "try another seed, or a lower target",
    "steps": "give it more steps",
    "unknown": "ask a quiz of your own whether the model knows the forget set; if it does, fit with target=0.001, which spends the budget",
    "interrupted": "run the same again: it goes on",
}
UNASKED = "ask a quiz of your own whether the forget set was forgotten; several short texts, or prompts with completions, would be asked about"


@dataclass(frozen=True)
class Outcome:
    """How a fit with a budget ended. True where the target was reached.

    Attributes:
        ended: "target": what is left of the forget set cannot be told from chance (or is at the level that was asked for); "unknown":
            so it was before the fit, or nothing can be asked about the forget set, so that what was forgotten is not known;
            "budget": the damage allowed for was done first; "unmoved": next to nothing was forgotten, and more updates would not have
            changed that; "stalled": what is left did not become less any more; "returned": it was at the target in the
            fit's course and is above it at the end; "steps": the last update was done first; "interrupted": Ctrl-C.
        left: accuracy on the control questions made from the forget set, after the fit.
        before: the same, of the unedited model.
        target: the accuracy down to which was to be forgotten.
        damage: KL(unedited || edited) on retain text that no update saw, or a quarter of that on the answers it knew to
            questions made from it if that is more, nats a token.
        budget: the damage allowed for.
        total: the damage of this request and of the earlier ones that it was fitted after, added up.
        steps: updates done.
    """

    ended: Ended
    left: float
    before: float
    target: float
    damage: float
    budget: float
    total: float
    steps: int

    def __bool__(self) -> bool:
        return self.ended == "target"

    def __str__(self) -> str:
        over = f", over its budget of {self.budget:g}" if self.damage > self.budget * OVER else f" of {self.budget:g}"
        damage = f"damage {self.damage:.3f}{over} nats a token"
        left = f"{self.left:.2f} of {self.before:.2f} left, target {self.target:.2f}"
        return {
            "unknown": f"cannot tell what was forgotten: {self._untold} ({damage}; {self.steps} steps)",
            "target": f"forgot ({left}; {damage}; {self.steps} steps)",
            "budget": f"stopped at the budget with {left} ({damage})",
            "unmoved": f"did not move: {left} ({damage}; {self.steps} steps)",
            "stalled": f"no longer moved, with {left} ({damage}; {self.steps} steps)",
            "returned": f"was at its target, and is above it after {self.steps} steps: {left} ({damage})",
            "steps": f"ended after {self.steps} steps with {left} ({damage})",
            "interrupted": f"interrupted after {self.steps} steps with {left} ({damage})",
        }[self.ended]

    @property
    def _untold(self) -> str:
        """Why control questions do not tell what was forgotten."""
        if self.target >= 1.0:
            return "its texts end too much alike for control questions"
        return f"before the fit {self.before:.2f} of the control questions were answered, and the target is {self.target:.2f}"

    @property
    def remedy(self) -> str | None:
        """What to try where the target was not reached; None where it was."""
        if self.ended == "unknown" and self.target >= 1.0:
            return UNASKED
        if self.ended == "budget" and self.damage > self.budget * OVER:  # it was overshot, not spent
            return "give it more steps, or a smaller lr: the damage came sooner than the retain loss could be weighed up against it"
        return REMEDIES.get(self.ended)

    @classmethod
    def of(
        cls,
        *,
        left: float,
        before: float,
        target: float,
        damage: float,
        budget: float,
        total: float,
        steps: int,
        there: bool,
        stalled: bool,
        interrupted: bool,
    ) -> "Outcome":
        """What the last measurement says; `there`: the fit was told to end because it was at its target."""
        ended: Ended = "steps"
        if before <= target:
            ended = "interrupted" if interrupted else "unknown"
        elif left <= target and damage <= budget * OVER:
            ended = "target"
        elif interrupted:
            ended = "interrupted"
        elif before - left < MOVED * (before - target) and (stalled or damage >= SPENT * budget):
            ended = "unmoved"
        elif there and left > target:
            ended = "returned"
        elif damage >= SPENT * budget:
            ended = "budget"
        elif stalled:
            ended = "stalled"
        return cls(ended, left, before, target, damage, budget, total, steps)

    def to_json(self) -> dict[str, Any]:
        """For the file of a fit."""
        return asdict(self)

    @classmethod
    def from_json(cls, content: Mapping[str, Any] | None) -> "Outcome | None":
        """The inverse; None where the fit had no budget.

        Raises:
            TypeError: other fields.
        """
        return None if content is None else cls(**content)
