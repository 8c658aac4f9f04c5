"""What brings the answers back without any training: hooks taken off, weights rounded, directions removed, other words."""

from collections.abc import Sequence
from typing import Any

import pandas as pd
from tqdm.auto import tqdm

from mrp_lens.attacks.recovery import Counted, check_held_out, guessed, recovery
from mrp_lens.attacks.rewording import check_same_facts, forget_token, with_token
from mrp_lens.attacks.variants import VARIANTS, Kind, Target, Variant, chosen_kinds
from mrp_lens.corpus import Corpus, Questions
from mrp_lens.edit import Edit
from mrp_lens.metrics.intervals import bootstrap_interval
from mrp_lens.model import LensModel
from mrp_lens.torch_state import ordinary_torch


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
    case = Target(
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
    chosen = chosen_kinds(case, kinds)
    before = case.count(None, held_out)
    edited = before if edit is None else case.count(edit, held_out)
    rows = []
    with tqdm(total=len(chosen), desc="bypassing", unit="kind", disable=not progress) as bar:
        for kind in chosen:
            bar.set_postfix_str(kind)
            if kind == "forget token in a retain question":
                rows.append({"kind": kind, **_on_retain_questions(case)})
            else:
                rows += [{"kind": kind, **_row(case, variant, before, edited)} for variant in VARIANTS[kind](case)]
            bar.update()
    return pd.DataFrame(rows).assign(attack="bypass").reindex(columns=list(_COLUMNS))


_COLUMNS = tuple(
    """attack kind variant layer n accuracy_before accuracy_edited accuracy_after floor ceiling recovery recovery_low
    recovery_high drop drop_low drop_high""".split()
)


def _row(case: Target, variant: Variant, before: Counted, edited: Counted) -> dict[str, Any]:
    asked = variant.reword(case.held_out)
    after = case.count(variant.edit, asked, variant.change)
    ceiling = after if variant.edit is None else case.count(None, asked, variant.change)
    untaught = None if case.untaught is None else variant.reword(case.untaught)
    floor = guessed(asked) if untaught is None else case.count(variant.edit, untaught, variant.change)
    return {
        "variant": variant.name,
        "layer": variant.layer,
        "n": len(case.held_out),
        "accuracy_before": before.accuracy,
        "accuracy_edited": edited.accuracy,
        "accuracy_after": after.accuracy,
        "floor": floor.accuracy,
        "ceiling": ceiling.accuracy,
        **recovery(after, floor, ceiling, seed=case.seed).columns(),
    }


def _on_retain_questions(case: Target) -> dict[str, Any]:
    plain, forget, retain = case.retain_questions, case.forget, case.retain
    assert plain is not None
    assert forget is not None
    assert retain is not None
    token = forget_token(case.model, forget, retain)
    given = with_token(plain, token)
    before, ceiling = case.right(None, plain), case.right(None, given)
    edited, after = case.right(case.edit, plain), case.right(case.edit, given)
    drops = (edited - after) - (before - ceiling)
    low, high = bootstrap_interval(drops, seed=case.seed)
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
