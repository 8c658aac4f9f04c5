"""Who attacks in `analysis.relearning`, and which edits are attacked."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import pandas as pd

from mrp_lens import attacks
from mrp_lens.attacks.base import FactSplit
from mrp_lens.attacks.finetuning import Form, Parameters
from mrp_lens.data import Corpus, Questions
from mrp_lens.data.questions import Half
from mrp_lens.data.task import UnlearningTask
from mrp_lens.edits import Edit
from mrp_lens.methods import MRP, RMU, AdaptiveRMU
from mrp_lens.methods.mrp.method import default_rank
from mrp_lens.models import LensModel, is_bridge

UNEDITED, RANDOM, NEVER_TAUGHT = "unedited", "random-projection", "never-taught"
WIDEST = "mrp-all-wide"  # whose ranks and layers the random projection has
FEW_FACTS = 25


def variants(model: LensModel) -> dict[str, Any]:
    """The methods that are compared: MRP at several sets of layers and ranks, RMU, Adaptive RMU."""
    depth, rank = int(model.cfg.n_layers), default_rank(model)
    every, first_half = range(depth), range(depth // 2)
    return {
        "mrp": MRP(),
        "mrp-wide": MRP(rank=2 * rank),
        "mrp-early": MRP(layers=first_half),
        "mrp-all": MRP(layers=every),
        WIDEST: MRP(layers=every, rank=2 * rank),
        "mrp-mlp": MRP(layers=every, site="mlp_out"),
        "rmu": RMU(),
        "adaptive-rmu": AdaptiveRMU(),
    }


@dataclass(frozen=True)
class Attack:
    """One way to retrain.

    Attributes:
        data: what on: "half" of the forgotten facts, "near" facts that the edit was to keep, or "unrelated" text.
        split: how that half is drawn.
        samples: at most so many documents of it.
        form, parameters: as in `attacks.relearn`.
    """

    data: Literal["half", "near", "unrelated"] = "half"
    split: Half = "entity"
    samples: int | None = None
    form: Form = "kept"
    parameters: Parameters = "all"

    @property
    def name(self) -> str:
        """In words, as far as it differs from the usual attack."""
        words = {
            "data": self.data,
            "split": f"by {self.split}",
            "samples": f"{self.samples} facts",
            "form": self.form,
            "parameters": self.parameters,
        }
        usual = Attack()
        return "-".join(word for key, word in words.items() if getattr(self, key) != getattr(usual, key)) or "usual"


USUAL, WEIGHTS = Attack(), Attack(form="weights")
OTHERS = (
    Attack(split="question"),
    Attack(samples=FEW_FACTS),
    Attack(data="near"),
    Attack(data="unrelated"),
    Attack(parameters="lora"),
    Attack(parameters="before"),
    Attack(parameters="at"),
    Attack(parameters="after"),
)


def possible(attack: Attack, model: LensModel, edit: Edit | None) -> bool:
    """Whether there is something to retrain in this way."""
    if attack.parameters == "lora":
        return is_bridge(model)
    if attack.parameters in ("before", "at", "after"):
        return edit is not None and not (attack.parameters == "after" and edit.layers[-1] == model.cfg.n_layers - 1)
    return True


def retrain(
    model: LensModel,
    edit: Edit | None,
    attack: Attack,
    task: UnlearningTask,
    *,
    new: Questions | None,
    limit: int | None,
    steps: int,
    lr: Sequence[float] | None,
    marks: Sequence[int],
    seed: int,
) -> pd.DataFrame:
    """The rows of `attacks.relearn` for this attack; Ctrl-C ends the study.

    Args:
        model, edit, steps, lr, marks, seed: as there.
        attack: how.
        case: T is drawn from its questions on what was forgotten, V is the rest of them.
        new: facts that no model here knows; None: never-taught ones, if the case has any.
        limit: at most this many questions on what was forgotten.

    Raises:
        ValueError: the case lacks the questions that this attack needs, or they do not say whom they are about.
    """
    split = attack.split if attack.split != USUAL.split else None  # by entity where the questions know it
    facts = FactSplit.of(task, by=split, limit=limit, seed=seed)
    sources: dict[str, Questions | Corpus | None] = {
        "half": facts.train,
        "near": task.retain_questions,
        "unrelated": task.held_out,
    }
    train = sources[attack.data]
    if train is None:
        raise ValueError("near data are questions on what was to stay; give --retain-questions")
    frame = attacks.relearn(
        model,
        edit,
        train=train,
        held_out=facts.held_out,
        untaught=facts.untaught,
        new=(facts.new if new is None else new) if attack in (USUAL, WEIGHTS) else None,
        steps=steps,
        lr=lr,
        samples=attack.samples,
        form=attack.form,
        parameters=attack.parameters,
        marks=marks,
        seed=seed,
    )
    if frame.attrs["interrupted"]:
        raise KeyboardInterrupt
    return frame.assign(attacker=attack.name)
