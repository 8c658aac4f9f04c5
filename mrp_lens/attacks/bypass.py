"""What brings the answers back without any training: hooks taken off, weights rounded, directions removed, other words."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, get_args

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from tqdm.auto import tqdm
from typing_extensions import override

from mrp_lens.attacks.ablation import ablated, junk_directions, noisy
from mrp_lens.attacks.base import Attack, Frames, Setting
from mrp_lens.attacks.evaluation import chance, check_held_out, score
from mrp_lens.attacks.prompting import check_same_facts, few_shot, forget_token, in_context, with_token
from mrp_lens.attacks.quantization import quantized
from mrp_lens.attacks.registry import register
from mrp_lens.attacks.summary import ACCURACIES, NO_ATTACK, RECOVERY, columns, without_attack
from mrp_lens.data import Corpus, Questions
from mrp_lens.edits import Edit, edit_on, has_hooks, without_hooks
from mrp_lens.edits.subspace import random_units
from mrp_lens.metrics.bootstrap import bootstrap_interval
from mrp_lens.metrics.multiple_choice import answered_right, choice_scores
from mrp_lens.metrics.recovery import Score, recovery
from mrp_lens.models import LensModel
from mrp_lens.utils.torch_state import ordinary_torch
from mrp_lens.utils.validation import generator_for

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


_COLUMNS = tuple(
    """attack kind variant layer n accuracy_before accuracy_edited accuracy_after floor ceiling recovery recovery_low
    recovery_high drop drop_low drop_high""".split()
)


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

    def count(self, edit: Edit | None, questions: Questions, change: Change = nullcontext) -> Score:
        """Right answers with the edit on, and then the change."""
        with edit_on(self.model, edit), change(self.model):
            return score(self.model, questions, batch_size=self.batch_size)

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


def _no_attack(task: Target) -> Iterator[Variant]:
    yield Variant("no attack", task.edit)


def _hook_stripped(task: Target) -> Iterator[Variant]:
    yield Variant("hook stripped", without_hooks(task.edit))


def _direction_ablated(task: Target) -> Iterator[Variant]:
    assert task.edit is not None
    texts = task.forget if task.shots is None else task.shots.right_answers()
    assert texts is not None
    own = junk_directions(
        task.model, task.edit, texts.spread(DIRECTION_DOCUMENTS), batch_size=task.batch_size, progress=task.progress
    )
    yield Variant("direction ablated, each layer's own", task.edit, partial(ablated, directions=own))
    drawn = random_units(len(own), task.model.cfg.d_model, "gaussian", generator_for(task.seed))
    random = dict(zip(own, drawn, strict=True))
    yield Variant("direction ablated, random ones", task.edit, partial(ablated, directions=random))
    everywhere = {
        layer: partial(ablated, directions=dict.fromkeys(range(task.model.cfg.n_layers), direction))
        for layer, direction in own.items()
    }
    tried = (task.held_out if task.shots is None else task.shots).spread(SELECTION_QUESTIONS)
    right = {layer: task.count(task.edit, tried, change).right for layer, change in everywhere.items()}
    best = max(right, key=lambda layer: right[layer])
    yield Variant("direction ablated, one for all layers", task.edit, everywhere[best], layer=best)


def _weights_rounded(task: Target) -> Iterator[Variant]:
    for bits in BITS:
        yield Variant(f"weights rounded to {bits} bits", task.edit, partial(quantized, bits=bits))


def _noise(task: Target) -> Iterator[Variant]:
    layers = range(task.model.cfg.n_layers) if task.edit is None else task.edit.layers
    for size in NOISE_SIZES:
        change = partial(noisy, layers=layers, size=size, seed=task.seed)
        yield Variant(f"noise of {size:g} of the state's norm", task.edit, change)


def _paraphrased(task: Target) -> Iterator[Variant]:
    other = task.paraphrased
    assert other is not None
    yield Variant("paraphrased", task.edit, reword=lambda asked: other if asked is task.held_out else asked)


def _wrapped(task: Target) -> Iterator[Variant]:
    assert task.retain is not None
    reword = partial(in_context, task.model, retain=task.retain, seed=task.seed)
    yield Variant("wrapped in context", task.edit, reword=reword)


def _few_shot(task: Target) -> Iterator[Variant]:
    assert task.shots is not None
    for name, separator in SEPARATORS.items():
        reword = partial(few_shot, task.model, shots=task.shots, separator=separator, seed=task.seed)
        yield Variant(f"few-shot, joined by {name}", task.edit, reword=reword)


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


def chosen_kinds(task: Target, kinds: Sequence[Kind] | None) -> list[Kind]:
    """The kinds asked for, or all that can be done.

    Raises:
        ValueError: one that does not exist, or for which something is missing.
    """
    missing = {kind: _missing(task, kind) for kind in get_args(Kind)}
    if kinds is None:
        return [kind for kind, what in missing.items() if not what]
    for kind in kinds:
        if kind not in missing:
            raise ValueError(f"unknown kind {kind!r}; choose of {', '.join(map(repr, missing))}")
        if missing[kind]:
            raise ValueError(f"{kind!r} needs {missing[kind]}; give that, or leave the kind out")
    return list(dict.fromkeys(kinds))


def _missing(task: Target, kind: Kind) -> str:
    """What this kind needs and does not have; empty if nothing."""
    either = task.forget if task.shots is None else task.shots
    needs: dict[Kind, dict[str, Any]] = {
        "hook stripped": {"an edit with hooks": has_hooks(task.edit) or None},
        "direction ablated": {"an edit": task.edit, "shots or forget": either},
        "paraphrased": {"paraphrased": task.paraphrased},
        "wrapped in context": {"retain": task.retain},
        "few-shot": {"shots": task.shots},
        "forget token in a retain question": {
            "retain_questions": task.retain_questions,
            "forget": task.forget,
            "retain": task.retain,
        },
    }
    return ", ".join(name for name, given in needs.get(kind, {}).items() if given is None)


@ordinary_torch(gradients=True)
def bypass(
    model: LensModel,
    edit: Edit | None,
    *,
    held_out: Questions,
    untaught: Questions | None = None,
    shots: Questions | None = None,
    forget: Corpus | None = None,
    retain: Corpus | None = None,
    retain_questions: Questions | None = None,
    paraphrased: Questions | None = None,
    kinds: Sequence[Kind] | None = None,
    batch_size: int = 128,
    seed: int = 0,
    progress: bool = True,
) -> pd.DataFrame:
    """What brings the answers back without any training, against never-taught questions and the unedited model.

    The kinds, and what they need:
        "no attack": the edit as it is, with which to compare the others.
        "hook stripped": the edit's hooks are removed, what it wrote into weights stays; an edit with hooks.
        "direction ablated": the direction in which the edit moves the mean state of a layer is taken out of the stream
            (arXiv 2409.18025), from up to 512 texts: the solved `shots`, or else `forget`. One row for every layer's
            own direction at that layer, one with random directions instead (the control), one for the direction of a
            single layer at all layers: the `layer` that gives the attacker most right answers on 200 of the `shots`
            (without them, on `held_out`: then the row is biased in the attacker's favour). An edit, and `shots` or
            `forget`.
        "weights rounded": every matrix of the blocks, with what the edit wrote, to 8 and to 4 bits; hooks stay.
        "noise": on the stream behind the edited layers (without an edit, all), of 0.05, 0.1, 0.2 of each state's norm.
        "paraphrased": the same facts in other words; `paraphrased`.
        "wrapped in context": behind a document that says nothing about the question; `retain`.
        "few-shot": behind four solved questions of the same group, joined by a space or by a line break; `shots`.
        "forget token in a retain question": one token of the forget set before questions that should not suffer, which
            is where RMU breaks (arXiv 2501.19202); `retain_questions`, `forget`, `retain`. The token occurs most in
            `forget` for its number in `retain`.

    Args:
        model: HookedTransformer or TransformerBridge, without the edit.
        edit: what is attacked; None: the unedited model.
        held_out: questions on forgotten facts of which the attacker has seen nothing.
        untaught: questions on facts that were never taught, for the floor; asked as they are in "paraphrased".
        shots: other questions on forgotten facts, which the attacker can answer.
        forget: forgotten texts.
        retain: texts that say nothing about the forgotten facts.
        retain_questions: questions on facts that should stay.
        paraphrased: `held_out` in other words: same order, choices and answers.
        kinds: None: all that the edit and the data allow.
        batch_size: texts at a time.
        seed: of the draws, the noise and the intervals.
        progress: show progress bars.

    Returns:
        One row a variant: `attack` ("bypass"), `kind`, `variant`, `layer` (NaN where there is no single one), `n`
        questions; accuracies in [0, 1]: `accuracy_before` (unedited, no attack), `accuracy_edited` (edited, no attack),
        `accuracy_after` (edited, under attack), the controls `floor` (never-taught questions, edited, under the same
        attack; without `untaught`, guessing) and `ceiling` (unedited, under the same attack: it may hurt by itself);
        `recovery` between the two with its 95% interval `recovery_low`, `recovery_high`. On retain questions instead of
        floor and recovery, which are NaN: `drop`, by how much more the token hurts the edited model than the unedited
        one (in accuracy), with its 95% interval over questions `drop_low`, `drop_high`.

    Raises:
        TypeError, ValueError: data of another type or empty, held-out questions among the shots, paraphrases of other
            facts, an unknown kind, or one that the edit or the data do not allow.
    """
    _check_data(Questions, untaught=untaught, shots=shots, retain_questions=retain_questions, paraphrased=paraphrased)
    _check_data(Corpus, forget=forget, retain=retain)
    check_held_out(held_out, shots=shots)
    if paraphrased is not None:
        check_same_facts(held_out, paraphrased)
    task = Target(
        model=model,
        edit=edit,
        held_out=held_out,
        untaught=untaught,
        shots=shots,
        forget=forget,
        retain=retain,
        retain_questions=retain_questions,
        paraphrased=paraphrased,
        batch_size=batch_size,
        seed=seed,
        progress=progress,
    )
    chosen = chosen_kinds(task, kinds)
    before = task.count(None, held_out)
    edited = before if edit is None else task.count(edit, held_out)
    rows = []
    with tqdm(total=len(chosen), desc="bypassing", unit="kind", disable=not progress) as bar:
        for kind in chosen:
            bar.set_postfix_str(kind)
            if kind == "forget token in a retain question":
                rows.append({"kind": kind, **_on_retain_questions(task)})
            else:
                rows += [{"kind": kind, **_row(task, variant, before, edited)} for variant in VARIANTS[kind](task)]
            bar.update()
    return pd.DataFrame(rows).assign(attack="bypass").reindex(columns=list(_COLUMNS))


def _row(task: Target, variant: Variant, before: Score, edited: Score) -> dict[str, Any]:
    asked = variant.reword(task.held_out)
    after = task.count(variant.edit, asked, variant.change)
    ceiling = after if variant.edit is None else task.count(None, asked, variant.change)
    untaught = None if task.untaught is None else variant.reword(task.untaught)
    floor = chance(asked) if untaught is None else task.count(variant.edit, untaught, variant.change)
    return {
        "variant": variant.name,
        "layer": variant.layer,
        "n": len(task.held_out),
        "accuracy_before": before.accuracy,
        "accuracy_edited": edited.accuracy,
        "accuracy_after": after.accuracy,
        "floor": floor.accuracy,
        "ceiling": ceiling.accuracy,
        **recovery(after, floor, ceiling, seed=task.seed).columns(),
    }


def _on_retain_questions(task: Target) -> dict[str, Any]:
    plain, forget, retain = task.retain_questions, task.forget, task.retain
    assert plain is not None
    assert forget is not None
    assert retain is not None
    token = forget_token(task.model, forget, retain)
    given = with_token(plain, token)
    before, ceiling = task.right(None, plain), task.right(None, given)
    edited, after = task.right(task.edit, plain), task.right(task.edit, given)
    drops = (edited - after) - (before - ceiling)
    low, high = bootstrap_interval(drops, seed=task.seed)
    return {
        "variant": f"forget token {token.text.strip()!r} in a retain question",
        "n": len(plain),
        "accuracy_before": before.mean(),
        "accuracy_edited": edited.mean(),
        "accuracy_after": after.mean(),
        "ceiling": ceiling.mean(),
        "drop": drops.mean(),
        "drop_low": low,
        "drop_high": high,
    }


def _check_data(kind: type[Questions] | type[Corpus], **given: Any) -> None:
    """Refuse data of another type, or empty."""
    for name, data in given.items():
        if data is not None and not isinstance(data, kind):
            raise TypeError(f"{name} must be {kind.__name__} or None, got {type(data).__name__}")
        if data is not None and not len(data):
            raise ValueError(f"{name} ({data.name!r}) is empty; leave it out, or give at least one")


@register(
    "bypass",
    summary="Gets around the edit without any training: hooks off, directions out, other words.",
    source="arXiv 2409.18025",
)
@dataclass(frozen=True, kw_only=True)
class Bypass(Attack):
    """Every kind of bypass that the edit and the data allow; there is nothing to set."""

    @override
    def run(self, setting: Setting) -> Frames:
        """The frame "bypass"."""

        def found() -> pd.DataFrame:
            return bypass(
                setting.model,
                setting.edit,
                held_out=setting.facts.held_out,
                untaught=setting.facts.untaught,
                shots=setting.facts.train,
                forget=setting.task.forget_texts,
                retain=setting.task.retain,
                retain_questions=setting.retain_questions,
                seed=setting.seed,
                progress=setting.progress,
            )

        return {"bypass": setting.frame("bypass", found)}

    @override
    def rows(self, frames: Frames, name: str) -> Iterator[Mapping[str, Any]]:
        """A row a variant."""
        for row in frames["bypass"].to_dict("records") if "bypass" in frames else ():
            if row["kind"] == NO_ATTACK:
                yield without_attack(row, name)
            elif pd.notna(row["recovery"]):
                yield {"method": name, "attack": row["variant"], **columns(row, ACCURACIES, RECOVERY)}
            else:  # on retain questions, of which nothing was removed
                yield {"method": name, "attack": row["variant"], **columns(row, ("n", *ACCURACIES[1:4], "ceiling"))}
