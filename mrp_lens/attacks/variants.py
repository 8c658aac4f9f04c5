"""The ways around an edit that need no training: what each does to the edited model, or to the questions."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from mrp_lens.attacks.ablation import ablated, junk_directions, noisy
from mrp_lens.attacks.quantise import rounded
from mrp_lens.attacks.recovery import Counted, counted
from mrp_lens.attacks.rewording import few_shot, in_context
from mrp_lens.checks import generator_for
from mrp_lens.corpus import Corpus, Questions
from mrp_lens.edit import Edit, edit_on
from mrp_lens.edit.stack import has_hooks, stripped
from mrp_lens.metrics.answers import answered_right, choice_scores
from mrp_lens.model import LensModel
from mrp_lens.subspace import random_units

Kind = Literal[
    "no attack",
    "hook stripped",
    "direction ablated",
    "weights rounded",
    "noise",
    "paraphrased",
    "wrapped in context",
    "few-shot",
    "forget token in a retain question",
]
BITS = (8, 4)
NOISE_SIZES = (0.05, 0.1, 0.2)
SEPARATORS = {"a space": " ", "a line break": "\n"}
DIRECTION_DOCUMENTS = 512
SELECTION_QUESTIONS = 200

Change = Callable[[LensModel], AbstractContextManager[Any]]


@dataclass(frozen=True, kw_only=True)
class Target:
    """What all variants share; the arguments of `bypass`."""

    model: LensModel
    edit: Edit | None
    held_out: Questions
    untaught: Questions | None
    shots: Questions | None
    forget: Corpus | None
    retain: Corpus | None
    retain_questions: Questions | None
    paraphrased: Questions | None
    batch_size: int
    seed: int
    progress: bool

    def count(self, edit: Edit | None, questions: Questions, change: Change = nullcontext) -> Counted:
        """Right answers with the edit on, and then the change."""
        with edit_on(self.model, edit), change(self.model):
            return counted(self.model, questions, batch_size=self.batch_size)

    def right(self, edit: Edit | None, questions: Questions) -> NDArray[np.float64]:
        """1 for each question that is answered right with the edit on, 0 for the others."""
        with edit_on(self.model, edit):
            scores = choice_scores(self.model, questions, batch_size=self.batch_size)
        return answered_right(scores, questions)


@dataclass(frozen=True)
class Variant:
    """One way around the edit: what is done to the edited model, or to the questions.

    Attributes:
        name: of the row.
        edit: what is on under the attack.
        change: done to the model, on top.
        reword: done to the questions.
        layer: where it acts, if at one layer.
    """

    name: str
    edit: Edit | None
    change: Change = nullcontext
    reword: Callable[[Questions], Questions] = lambda questions: questions
    layer: float = float("nan")


def _no_attack(case: Target) -> Iterator[Variant]:
    yield Variant("no attack", case.edit)


def _hook_stripped(case: Target) -> Iterator[Variant]:
    yield Variant("hook stripped", stripped(case.edit))


def _direction_ablated(case: Target) -> Iterator[Variant]:
    assert case.edit is not None
    texts = case.forget if case.shots is None else case.shots.right_answers()
    assert texts is not None
    own = junk_directions(
        case.model, case.edit, texts.spread(DIRECTION_DOCUMENTS), batch_size=case.batch_size, progress=case.progress
    )
    yield Variant("direction ablated, each layer's own", case.edit, partial(ablated, directions=own))
    drawn = random_units(len(own), case.model.cfg.d_model, "gaussian", generator_for(case.seed))
    random = dict(zip(own, drawn, strict=True))
    yield Variant("direction ablated, random ones", case.edit, partial(ablated, directions=random))
    everywhere = {
        layer: partial(ablated, directions=dict.fromkeys(range(case.model.cfg.n_layers), direction))
        for layer, direction in own.items()
    }
    tried = (case.held_out if case.shots is None else case.shots).spread(SELECTION_QUESTIONS)
    right = {layer: case.count(case.edit, tried, change).right for layer, change in everywhere.items()}
    best = max(right, key=lambda layer: right[layer])
    yield Variant("direction ablated, one for all layers", case.edit, everywhere[best], layer=best)


def _weights_rounded(case: Target) -> Iterator[Variant]:
    for bits in BITS:
        yield Variant(f"weights rounded to {bits} bits", case.edit, partial(rounded, bits=bits))


def _noise(case: Target) -> Iterator[Variant]:
    layers = range(case.model.cfg.n_layers) if case.edit is None else case.edit.layers
    for size in NOISE_SIZES:
        change = partial(noisy, layers=layers, size=size, seed=case.seed)
        yield Variant(f"noise of {size:g} of the state's norm", case.edit, change)


def _paraphrased(case: Target) -> Iterator[Variant]:
    other = case.paraphrased
    assert other is not None
    yield Variant("paraphrased", case.edit, reword=lambda asked: other if asked is case.held_out else asked)


def _wrapped(case: Target) -> Iterator[Variant]:
    assert case.retain is not None
    reword = partial(in_context, case.model, retain=case.retain, seed=case.seed)
    yield Variant("wrapped in context", case.edit, reword=reword)


def _few_shot(case: Target) -> Iterator[Variant]:
    assert case.shots is not None
    for name, separator in SEPARATORS.items():
        reword = partial(few_shot, case.model, shots=case.shots, separator=separator, seed=case.seed)
        yield Variant(f"few-shot, joined by {name}", case.edit, reword=reword)


VARIANTS: dict[Kind, Callable[[Target], Iterator[Variant]]] = {
    "no attack": _no_attack,
    "hook stripped": _hook_stripped,
    "direction ablated": _direction_ablated,
    "weights rounded": _weights_rounded,
    "noise": _noise,
    "paraphrased": _paraphrased,
    "wrapped in context": _wrapped,
    "few-shot": _few_shot,
}


def chosen_kinds(case: Target, kinds: Sequence[Kind] | None) -> list[Kind]:
    """The kinds asked for, or all that can be done.

    Raises:
        ValueError: one that does not exist, or for which something is missing.
    """
    missing = {kind: _missing(case, kind) for kind in get_args(Kind)}
    if kinds is None:
        return [kind for kind, what in missing.items() if not what]
    for kind in kinds:
        if kind not in missing:
            raise ValueError(f"unknown kind {kind!r}; choose of {', '.join(map(repr, missing))}")
        if missing[kind]:
            raise ValueError(f"{kind!r} needs {missing[kind]}; give that, or leave the kind out")
    return list(dict.fromkeys(kinds))


def _missing(case: Target, kind: Kind) -> str:
    """What this kind needs and does not have; empty if nothing."""
    either = case.forget if case.shots is None else case.shots
    needs: dict[Kind, dict[str, Any]] = {
        "hook stripped": {"an edit with hooks": has_hooks(case.edit) or None},
        "direction ablated": {"an edit": case.edit, "shots or forget": either},
        "paraphrased": {"paraphrased": case.paraphrased},
        "wrapped in context": {"retain": case.retain},
        "few-shot": {"shots": case.shots},
        "forget token in a retain question": {
            "retain_questions": case.retain_questions,
            "forget": case.forget,
            "retain": case.retain,
        },
    }
    return ", ".join(name for name, given in needs.get(kind, {}).items() if given is None)
