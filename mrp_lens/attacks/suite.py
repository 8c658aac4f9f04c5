"""Every attack on one edit, result by result, in a folder that can be resumed."""

from dataclasses import asdict, dataclass, replace
from pathlib import Path

import pandas as pd

from mrp_lens.attacks.base import Attack, FactSplit, Setting
from mrp_lens.attacks.registry import ATTACKS
from mrp_lens.data.questions import Half
from mrp_lens.data.task import UnlearningTask
from mrp_lens.edits import Edit
from mrp_lens.edits.provenance import fingerprint
from mrp_lens.models import LensModel, identity_of
from mrp_lens.utils.result_store import ResultStore
from mrp_lens.utils.torch_state import ordinary_torch
from mrp_lens.utils.validation import PlainSettings, check_positive, generator_for

KIND = "campaign"
"""What its folder is called since version 0.1: the settings lie in `campaign.json`."""
FLAT = ("relearn", "probe", "bypass", "jailbreak")
"""Whose budgets lie side by side in that file, whichever attacks are run; those of any other attack have a file of their own."""


@dataclass(frozen=True, kw_only=True)
class SuiteConfig(PlainSettings):
    """What a suite of attacks covers, and its budgets.

    Attributes:
        attacks: names of those that are run; None: all that are registered.
        budgets: of attacks whose defaults will not do. That of an attack that is not run serves those that look at its
            result: a probe reads a model retrained as `Relearn` says.
        split: how the questions are halved; None: by entity where these are known.
        questions: at most this many on what was forgotten, evenly spread, T and V together; None: all.
        seed: of every random choice.

    Raises:
        TypeError: attacks are one name instead of several.
        ValueError: an unknown attack, two budgets of one, or a number that is not above 0.

    Example:
        >>> config = SuiteConfig(attacks=("relearn", "probe"), budgets=(ml.attacks.Relearn(steps=20),))
    """

    attacks: tuple[str, ...] | None = None
    budgets: tuple[Attack, ...] = ()
    split: Half | None = None
    questions: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.attacks, str):
            raise TypeError(f"attacks must be a tuple of names such as ('relearn',), got {self.attacks!r}")
        for name in self.attacks or ():
            ATTACKS[name]
        names = [attack.name for attack in self.budgets]
        if len(set(names)) < len(names):
            raise ValueError(f"several budgets of one attack: {', '.join(names)}; give one each")
        check_positive(questions=self.questions)
        generator_for(self.seed)

    def budget(self, name: str) -> Attack:
        """The attack of that name, with its budget.

        Raises:
            ValueError: there is none.
        """
        return next((attack for attack in self.budgets if attack.name == name), None) or ATTACKS[name]()

    @property
    def chosen(self) -> tuple[Attack, ...]:
        """The attacks that are run."""
        names = ATTACKS if self.attacks is None else self.attacks
        return tuple(self.budget(name) for name in dict.fromkeys(names))

    def resolved(self, model: LensModel, edit: Edit) -> "SuiteConfig":
        """With the budgets of all attacks, as they will be spent on a model and edit.

        Raises:
            ValueError: what cannot be done with them.
        """
        names = dict.fromkeys((*FLAT, *(attack.name for attack in (*self.budgets, *self.chosen))))
        return replace(self, budgets=tuple(self.budget(name).resolved(model, edit) for name in names))


@ordinary_torch(gradients=True)
def run_suite(
    model: LensModel,
    edit: Edit,
    task: UnlearningTask,
    config: SuiteConfig,
    out: str | Path,
    *,
    name: str = "edited",
    reference: LensModel | None = None,
    progress: bool = True,
) -> dict[str, pd.DataFrame]:
    """Attack an edit in every way of a configuration, as far as that has not been done.

    The folder holds `campaign.json` (the settings) and one file a result, each whole or not at all: a curve of retraining
    for each form, choice of parameters and rate, also of the unedited model and of the reference; what probes read off
    the unedited, the edited and the retrained model; the bypasses; a trigger search for each loss; gradients.

    Args:
        model: HookedTransformer or TransformerBridge without the edit; left exactly as it is.
        edit: what to attack.
        task: the data, with `questions`; `untaught_questions` are the floor, its control, and the new facts.
        config: what to do.
        out: the folder; it may be gone on with for other attacks.
        name: of the edit, in the frames.
        reference: a model that never saw what was forgotten: the floor of retraining in place of never-taught facts.
        progress: show progress bars.

    Returns:
        Name -> frame, each with a column `method` (or `model`), those of the attacks that were run: "relearning_curves";
        "probe_bits", "logit_lens"; "bypass"; "jailbreak_curve" (with `objective`), "input_gradients".

    Raises:
        ValueError: no questions, an edit that was made for another model or has not such a form, parameters that this
            model has not, a folder of other settings (which differ is said), or two attacks with a frame of one name.
        KeyboardInterrupt: Ctrl-C; the results that are whole stay.
    """
    with edit.applied(model):  # refuses another model than its own, before any work
        pass
    facts = FactSplit.of(task, by=config.split, limit=config.questions, seed=config.seed)
    config = config.resolved(model, edit)
    for attack in config.chosen:
        attack.check_facts(facts)
    settings = {
        "model": identity_of(model),
        "edit": fingerprint(edit),
        "reference": None if reference is None else identity_of(reference),
        "data": task.fingerprints() | facts.fingerprints(),
        **{key: value for name in FLAT for key, value in asdict(config.budget(name)).items()},
        **{key: getattr(config, key) for key in ("split", "questions", "seed")},
    }
    store = ResultStore.claim(out, KIND, settings, earlier={"data": _data_as_0_1_wrote(task, facts)})
    setting = Setting(
        model=model,
        edit=edit,
        name=name,
        task=task,
        facts=facts,
        reference=reference,
        store=store,
        budgets=config.budgets,
        seed=config.seed,
        progress=progress,
    )
    frames: dict[str, pd.DataFrame] = {}
    for attack in config.chosen:
        if attack.name not in FLAT:
            store.check_same(f"{attack.name}-settings", asdict(attack))
        found = attack.run(setting)
        if taken := sorted(frames.keys() & found):
            raise ValueError(f"the attack {attack.name!r} makes a frame {taken[0]!r}, as another does; rename it")
        frames |= found
    store.tidy()
    return frames


def _data_as_0_1_wrote(task: UnlearningTask, facts: FactSplit) -> dict[str, str]:
    """The hashes of the data by which version 0.1 knew its folders."""
    parts = {role: getattr(facts, role) for role in facts.fingerprints()}
    return task.legacy_fingerprints() | {
        role: replace(task, questions=part).legacy_fingerprints()["questions"] for role, part in parts.items()
    }
