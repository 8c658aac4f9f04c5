"""What brings the answers back without any training: hooks taken off, weights rounded, directions removed, other words."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any, Literal, get_args

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from tqdm.auto import tqdm
from typing_extensions import override

from mrp_lens.attacks.ablation import ablated, junk_directions, noisy
from mrp_lens.attacks.base import Attack, Frames, Setting
from mrp_lens.attacks.evaluation import chance, check_held_out, check_untaught, score
from mrp_lens.attacks.prompting import check_same_facts, few_shot, forget_token, in_context, with_token
from mrp_lens.attacks.quantization import block_matrices, quantized, quantized_to_nf4
from mrp_lens.attacks.registry import register
from mrp_lens.attacks.summary import ACCURACIES, NO_ATTACK, RECOVERY, columns, without_attack
from mrp_lens.data import Corpus, Questions
from mrp_lens.edits import Edit, edit_on, has_hooks, without_hooks
from mrp_lens.edits.subspace import random_units
from mrp_lens.metrics.bootstrap import drop_interval
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
    "weights in NF4",
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
ROUNDABLE = "matrices of a known layout that are not quantised already"

Change = Callable[[LensModel], AbstractContextManager[Any]]

_COLUMNS = tuple(
    """attack kind variant layer n accuracy_before accuracy_edited accuracy_after floor ceiling recovery recovery_low
    recovery_high drop drop_low drop_high""".split()
)


@dataclass(frozen=True, kw_only=True)
class Given:
    """The arguments of `bypass`; what some kinds need is None where these are left out."""

    model: LensModel
    edit: Edit | None
    held_out: Questions
    untaught: Questions | None
    shots: Any
    forget: Any
    retain: Any
    retain_questions: Any
    paraphrased: Any
    batch_size: int
    seed: int
    progress: bool

    def score(self, edit: Edit | None, questions: Questions, change: Change = nullcontext) -> Score:
        """Right answers with the edit on, and then the change."""
        with edit_on(self.model, edit), change(self.model):
            return score(self.model, questions, batch_size=self.batch_size)

    def right(self, edit: Edit | None, questions: Questions) -> NDArray[np.float64]:
        """1 for each question that is answered right with the edit on, 0 for the others."""
        with edit_on(self.model, edit):
            scores = choice_scores(self.model, questions, batch_size=self.batch_size, progress=False)
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


def _directions_ablated(given: Given) -> Iterator[Variant]:
    assert given.edit is not None
    texts: Corpus = given.forget if given.shots is None else given.shots.right_answers()
    model, texts = given.model, texts.spread(DIRECTION_DOCUMENTS)
    own = junk_directions(model, given.edit, texts, batch_size=given.batch_size, progress=given.progress)
    yield Variant("direction ablated, each layer's own", given.edit, partial(ablated, directions=own))
    drawn = random_units(len(own), model.cfg.d_model, "gaussian", generator_for(given.seed))
    random = dict(zip(own, drawn, strict=True))
    yield Variant("direction ablated, random ones", given.edit, partial(ablated, directions=random))
    everywhere = {
        layer: partial(ablated, directions=dict.fromkeys(range(model.cfg.n_layers), direction))
        for layer, direction in own.items()
    }
    tried = (given.held_out if given.shots is None else given.shots).spread(SELECTION_QUESTIONS)
    right = {layer: given.score(given.edit, tried, change).right for layer, change in everywhere.items()}
    best = max(right, key=lambda layer: right[layer])
    yield Variant("direction ablated, one for all layers", given.edit, everywhere[best], layer=best)


def _noise(given: Given) -> Iterator[Variant]:
    layers = range(given.model.cfg.n_layers) if given.edit is None else given.edit.layers
    for size in NOISE_SIZES:
        change = partial(noisy, layers=layers, size=size, seed=given.seed)
        yield Variant(f"noise of {size:g} of the state's norm", given.edit, change)


def _reworded(given: Given, name: str, reword: Callable[..., Questions], **options: Any) -> Variant:
    return Variant(name, given.edit, reword=partial(reword, given.model, seed=given.seed, **options))


VARIANTS: dict[Kind, Callable[[Given], Iterable[Variant]]] = {
    "no attack": lambda given: [Variant("no attack", given.edit)],
    "hook stripped": lambda given: [Variant("hook stripped", without_hooks(given.edit))],
    "direction ablated": _directions_ablated,
    "weights rounded": lambda given: [
        Variant(f"weights rounded to {bits} bits", given.edit, partial(quantized, bits=bits)) for bits in BITS
    ],
    "weights in NF4": lambda given: [Variant("weights in NF4", given.edit, quantized_to_nf4)],
    "noise": _noise,
    "paraphrased": lambda given: [
        Variant("paraphrased", given.edit, reword=lambda asked: given.paraphrased if asked is given.held_out else asked)
    ],
    "wrapped in context": lambda given: [_reworded(given, "wrapped in context", in_context, retain=given.retain)],
    "few-shot": lambda given: [
        _reworded(given, f"few-shot, joined by {name}", few_shot, shots=given.shots, separator=separator)
        for name, separator in SEPARATORS.items()
    ],
}


def chosen_kinds(given: Given, kinds: Sequence[Kind] | None) -> list[Kind]:
    """The kinds asked for, or all that can be done.

    Raises:
        TypeError: a string instead of several.
        ValueError: one that does not exist, or for which something is missing.
    """
    needs = _needs(given)
    missing = {
        kind: ", ".join(name for name, value in needs.get(kind, {}).items() if value is None) for kind in get_args(Kind)
    }
    if kinds is None:
        return [kind for kind, what in missing.items() if not what]
    if isinstance(kinds, str):
        raise TypeError(f"kinds is one string, {kinds!r}; write [{kinds!r}] for a single kind")
    for kind in kinds:
        if kind not in missing:
            raise ValueError(f"unknown kind {kind!r}; choose of {', '.join(map(repr, missing))}")
        if missing[kind]:
            raise ValueError(f"{kind!r} needs {missing[kind]}; give that, or leave the kind out")
    return list(dict.fromkeys(kinds))


def _needs(given: Given) -> dict[Kind, dict[str, Any]]:
    """What the kinds need, by what it is called; None where it is missing."""
    either = given.forget if given.shots is None else given.shots
    roundable = _roundable(given.model)
    return {
        "hook stripped": {"an edit with hooks": has_hooks(given.edit) or None},
        "direction ablated": {"an edit": given.edit, "shots or forget": either},
        "weights rounded": {ROUNDABLE: roundable},
        "weights in NF4": {
            ROUNDABLE: roundable,
            "bitsandbytes (pip install 'mrp_lens[bitsandbytes]')": find_spec("bitsandbytes"),
        },
        "paraphrased": {"paraphrased": given.paraphrased},
        "wrapped in context": {"retain": given.retain},
        "few-shot": {"shots": given.shots},
        "forget token in a retain question": {
            "retain_questions": given.retain_questions,
            "forget": given.forget,
            "retain": given.retain,
        },
    }


def _roundable(model: LensModel) -> bool | None:
    """Whether its matrices can be rounded; None if not."""
    try:
        return bool(block_matrices(model))
    except ValueError:  # of another layout, or quantised already
        return None


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
        "weights in NF4": the same in the 4-bit format of QLoRA; the package bitsandbytes.
        "noise": on the stream behind the edited layers (without an edit, all), of 0.05, 0.1, 0.2 of each state's norm. Each pass
            has noise of its own, choices of several tokens as well, so that the row depends on `batch_size`.
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
        one (in accuracy), with its 95% interval `drop_low`, `drop_high` (which has a width even where all
        questions are alike).

    Raises:
        TypeError, ValueError: data of another type or empty, held-out questions among the shots, paraphrases of other
            facts, an unknown kind, or one that the edit or the data do not allow.
    """
    _check_data(Questions, untaught=untaught, shots=shots, retain_questions=retain_questions, paraphrased=paraphrased)
    _check_data(Corpus, forget=forget, retain=retain)
    check_held_out(held_out, shots=shots)
    check_untaught(untaught, held_out=held_out, shots=shots)
    if paraphrased is not None:
        check_same_facts(held_out, paraphrased)
    given = Given(
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
    chosen = chosen_kinds(given, kinds)
    before = given.score(None, held_out)
    edited = before if edit is None else given.score(edit, held_out)
    rows = []
    with tqdm(total=len(chosen), desc="bypassing", unit="kind", disable=not progress) as bar:
        for kind in chosen:
            bar.set_postfix_str(kind)
            if kind == "forget token in a retain question":
                rows.append({"kind": kind, **_on_retain_questions(given)})
            else:
                rows += [{"kind": kind, **_row(given, variant, before, edited)} for variant in VARIANTS[kind](given)]
            bar.update()
    return pd.DataFrame(rows).assign(attack="bypass").reindex(columns=list(_COLUMNS))


def _row(given: Given, variant: Variant, before: Score, edited: Score) -> dict[str, Any]:
    asked = variant.reword(given.held_out)
    after = given.score(variant.edit, asked, variant.change)
    ceiling = after if variant.edit is None else given.score(None, asked, variant.change)
    untaught = None if given.untaught is None else variant.reword(given.untaught)
    floor = chance(asked) if untaught is None else given.score(variant.edit, untaught, variant.change)
    return {
        "variant": variant.name,
        "layer": variant.layer,
        "n": len(given.held_out),
        "accuracy_before": before.accuracy,
        "accuracy_edited": edited.accuracy,
        "accuracy_after": after.accuracy,
        "floor": floor.accuracy,
        "ceiling": ceiling.accuracy,
        **recovery(after, floor, ceiling, seed=given.seed).columns(),
    }


def _on_retain_questions(given: Given) -> dict[str, Any]:
    token = forget_token(given.model, given.forget, given.retain)
    plain = given.retain_questions
    asked = with_token(given.model, plain, token)
    before, ceiling = given.right(None, plain), given.right(None, asked)
    edited, after = given.right(given.edit, plain), given.right(given.edit, asked)
    drops = (edited - after) - (before - ceiling)
    low, high = drop_interval(drops, plain.entities, seed=given.seed)
    return {
        "variant": f"forget token {token.strip()!r} in a retain question",
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
                shots=setting.facts.train,
                forget=setting.task.forget_texts,
                retain=setting.task.retain,
                retain_questions=setting.retain_questions,
                **setting.arguments("held_out", "untaught"),
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
