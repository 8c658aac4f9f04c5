"""What an edited model still knows inside: bits about the right answer that a probe reads off its states."""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import pandas as pd
import torch
from torch import Tensor
from tqdm.auto import tqdm
from typing_extensions import override

from mrp_lens.attacks.base import Attack, FactSplit, Frames, Setting, labelled
from mrp_lens.attacks.evaluation import check_held_out, check_untaught
from mrp_lens.attacks.registry import register
from mrp_lens.attacks.relearn import Relearn
from mrp_lens.attacks.v_information import FOLDS, LabelledStates, ProbeKind, VInformation, usable_information
from mrp_lens.data import Document, Questions
from mrp_lens.data.questions import Half
from mrp_lens.data.tokenization import PaddingSide
from mrp_lens.edits import Edit, edit_on
from mrp_lens.metrics.activations import hooks_at
from mrp_lens.metrics.bootstrap import mean_interval
from mrp_lens.metrics.controls import NEVER_TAUGHT, UNEDITED
from mrp_lens.metrics.logit_lens import last_states, logit_lens
from mrp_lens.models import LensModel, encoder_for
from mrp_lens.models.generation import drawn_seed
from mrp_lens.models.hooks import Site, frozen
from mrp_lens.utils.frames import rows_of
from mrp_lens.utils.torch_state import ordinary_torch
from mrp_lens.utils.validation import check_one_of, check_positive, generator_for

Target = Literal["answer", "choice"]


@ordinary_torch(gradients=True)
def probe(
    model: LensModel,
    edit: Edit | None,
    *,
    train: Questions,
    held_out: Questions,
    untaught: Questions | None = None,
    layers: Sequence[int] | None = None,
    site: Site = "resid_post",
    kind: ProbeKind = "linear",
    target: Target | None = "answer",
    batch_size: int = 128,
    padding: PaddingSide = "right",
    seed: int = 0,
    progress: bool = True,
) -> pd.DataFrame:
    """How many bits about the right answer a probe reads off each layer, on facts that it was not trained on.

    An attacker who knows the answers to some of the removed facts trains a probe on the states at the end of their
    texts, and asks it for the rest. What it gets is usable information (V-information, arXiv 2002.10689): how much less
    surprised it is at the right answer than a guess that knows the choices and how frequent each answer is, but not the
    state. Both are asked *among the question's own choices*. The prompt states what kind of answer is wanted, which the
    choices tell as well, so that reading this off a state counts for nothing: with four choices, of which none is more
    frequent, there are 2 bits to be had, whatever the number of answers in all. Bits are thus the same unit for both
    targets, and for every set of questions with as many choices.

    What the probe cannot use counts as absent: zero bits do not show that nothing is there. How it is fitted, and why
    it seldom falls below zero when it has nothing to go on: `v_information.usable_information`. It is fitted on the CPU. Ask the
    unedited model as well: where it gives nothing either, a zero says nothing about the edit. (A model that continues
    text need not note whether a choice that it has read is true, and then target "choice" finds nothing.)

    Args:
        model: HookedTransformer or TransformerBridge, without the edit.
        edit: what to attack; None: the unedited model.
        train: facts whose answers the attacker knows.
        held_out: the facts to be found out.
        untaught: facts that the model never learned: what absent looks like. Where a half of them is too few for a probe of
            this target, that group is left out, with a warning that says how many are needed.
        layers: where to read. None: all.
        site: of the hook points.
        kind: "linear" or "mlp" (one hidden layer).
        target: "answer": one state a question, at the last token of the prompt; every answer that occurs among the
            choices is a class, so that answers must recur. "choice": one state a choice, at the last token of prompt +
            choice, and one score for all, so that answers can be any text. It sees how the choices are worded, too: what
            it makes of that alone shows in the never-taught rows. None: "answer" where there are no more different
            answers than facts in `train`, else "choice".
        batch_size: texts at a time. All states at the ends of the texts are kept, in the model's precision.
        padding: "right" or "left"; of no effect beyond rounding.
        seed: of folds, shuffles, halves, initial weights, and the bootstrap.
        progress: show progress bars.

    Returns:
        One row a layer and group. Groups: "held-out"; the controls "shuffled", where the probe was trained on labels
        that belong to other states, and "never-taught", where it was trained on one half of the untaught facts and
        asked for the other, in turn. (A probe of taught facts reads off untaught ones what the model makes up, surely
        and wrongly: far below 0 bits, and no sign of what absent looks like.) Columns: `layer`, `kind`, `target`,
        `group`; `bits` a question, with the 95% interval `low`, `high` over questions or, where several are
        about one, entities (the probe being as it is: another one would be a little off; NaN where no probe was used and
        `bits` is 0 for that reason, which tells nothing of how far off it is); `entropy` and `cross_entropy`, in bits, whose
        difference that is: without and with the state; `accuracy` of the probe among the choices, ties shared; `classes`, how many answers it tells
        apart ("choice": the most choices of a question); `train_n`, how many facts a probe was trained on; `n` facts it
        was asked for.

    Raises:
        TypeError, ValueError: an unknown kind, target, layer or site; too few questions; questions of `held_out` or
            `untaught` that the attacker has seen; with target "answer", more classes than training facts.

    Example:
        >>> known, asked = questions.halves(by="entity")
        >>> frame = probe(model, fit.edit, train=known, held_out=asked, untaught=untaught, target="choice", layers=[1])
    """
    check_one_of(ProbeKind, kind=kind)
    if target is not None:
        check_one_of(Target, target=target)
    check_one_of(PaddingSide, padding=padding)
    check_positive(batch_size=batch_size)
    generator_for(seed)
    check_held_out(held_out, train=train)
    target = target or _target(train, held_out)
    hooks = hooks_at(model, layers, site)
    pairs = [("held-out", train, held_out)]
    if untaught is not None and (halves := _halves(untaught, train, held_out, target, seed)):
        first, second = halves
        pairs += [(NEVER_TAUGHT, first, second), (NEVER_TAUGHT, second, first)]
    widest = max(len(q.choices) for _, *both in pairs for part in both for q in part.questions)
    labels = [_labels(known, asked, target, widest) for _, known, asked in pairs]
    sets = {id(questions): questions for _, *both in pairs for questions in both}
    with edit_on(model, edit), frozen(model):
        states = {
            key: _states(model, questions, target, widest, list(hooks.values()), batch_size, padding, progress)
            for key, questions in sets.items()
        }
    rows = []
    for layer in tqdm(hooks, desc=f"fitting {kind} probes", disable=not progress):
        found: dict[str, list[tuple[VInformation, Questions, int, int]]] = {}
        for (group, known, asked), (of_known, of_asked, classes) in zip(pairs, labels, strict=True):
            facts = LabelledStates(states[id(known)][hooks[layer]], *of_known)
            asked_facts = LabelledStates(states[id(asked)][hooks[layer]], *of_asked)
            parts = {group: facts}
            if group == "held-out":
                other = drawn_seed(generator_for(seed))  # than that of the folds
                parts["shuffled"] = facts.shuffled(generator_for(other))
            for name, learned in parts.items():
                estimate = usable_information(learned, asked_facts, kind=kind, seed=seed)
                found.setdefault(name, []).append((estimate, asked, classes, len(known)))
        rows += [
            {"layer": layer, "kind": kind, "target": target, "group": group, **_figures(parts, seed)}
            for group, parts in found.items()
        ]
    return pd.DataFrame(rows)


def _target(train: Questions, held_out: Questions) -> Target:
    """ "answer" where no more different answers are among the choices than there are facts to learn them from."""
    return "answer" if len(_answers(train, held_out)) <= len(train) else "choice"


def _halves(
    untaught: Questions, train: Questions, held_out: Questions, target: Target, seed: int
) -> tuple[Questions, Questions] | None:
    """The untaught facts in two halves, no entity in both where entities are known; None, with a warning, where one of them
    is too few for a probe to learn from.

    Raises:
        TypeError, ValueError: no Questions, or some of them are among the taught.
    """
    check_untaught(untaught, train=train, held_out=held_out)
    entities = {q.entity for q in untaught.questions}
    by: Half = "entity" if all(entities) else "question"
    halves = None if by == "entity" and len(entities) < 2 else untaught.halves(by=by, seed=seed)
    fewest = 0 if halves is None else min(map(len, halves))
    needed = max(FOLDS, len(_answers(untaught)) if target == "answer" else 0)  # as `_labels` will ask of either
    if fewest >= needed:
        return halves
    # Told of this line: a suite asks here before its work, and again with each probe, and Python then says it once.
    warnings.warn(
        f"the never-taught control of the probe is left out: a half of the {len(untaught)} untaught questions of {untaught.name!r} is "
        f"{fewest}, and a probe of target {target!r} needs {needed} in each half; give {2 * needed} or more",
        stacklevel=1,
    )
    return None


def _labels(
    train: Questions, held_out: Questions, target: Target, widest: int
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor], int]:
    """Choices and right places of both, as `LabelledStates` wants them, `widest` a question, and the number of classes.

    Raises:
        ValueError: too few training facts.
    """
    if len(train) < FOLDS:
        raise ValueError(f"only {len(train)} training facts in {train.name!r}; a probe needs {FOLDS} or more")
    numbers = {text: number for number, text in enumerate(_answers(train, held_out))}
    if target == "answer" and len(numbers) > len(train):
        raise ValueError(
            f"{len(numbers)} different answers among the choices, and only {len(train)} training facts in {train.name!r}: "
            "a class of its own for each cannot be learned; use target='choice', or give more training facts"
        )

    def labels(part: Questions) -> tuple[Tensor, Tensor]:
        rows = [[numbers[c] for c in q.choices] + [-1] * (widest - len(q.choices)) for q in part.questions]
        return torch.tensor(rows), torch.tensor([q.answer for q in part.questions])

    most = max(len(q.choices) for part in (train, held_out) for q in part.questions)
    return labels(train), labels(held_out), len(numbers) if target == "answer" else most


def _answers(*parts: Questions) -> list[str]:
    """Every different choice, in the order of appearance."""
    return list(dict.fromkeys(choice for part in parts for q in part.questions for choice in q.choices))


def _states(
    model: LensModel,
    questions: Questions,
    target: Target,
    widest: int,
    hooks: Sequence[str],
    batch_size: int,
    padding: PaddingSide,
    progress: bool,
) -> dict[str, Tensor]:
    """Hook -> states at the ends of the prompts, or of prompt + choice (of `widest` choices, 0 where a question has fewer)."""
    endings = [("",) if target == "answer" else q.choices for q in questions.questions]
    where = [(place, choice) for place, texts in enumerate(endings) for choice in range(len(texts))]
    encoder = encoder_for(model)
    documents = [Document(questions.questions[place].prompt, endings[place][choice]) for place, choice in where]
    size = (len(endings), 1 if target == "answer" else widest, int(model.cfg.d_model))
    kept: dict[str, Tensor] = {}
    rows = encoder.encode(documents, keep="end")
    batches = last_states(model, encoder, rows, hooks, batch_size=batch_size, padding=padding, progress=progress)
    for places, states in batches:
        first, second = torch.tensor([where[place] for place in places]).T
        for hook, of_hook in states.items():
            kept.setdefault(hook, torch.zeros(size, dtype=of_hook.dtype))[first, second] = of_hook.cpu()
    return {hook: of_hook[:, 0] if target == "answer" else of_hook for hook, of_hook in kept.items()}


def _figures(parts: Sequence[tuple[VInformation, Questions, int, int]], seed: int) -> dict[str, float | int]:
    """What the probes of one layer and group make of the facts they were asked for, taken together."""
    estimates, asked, classes, known = zip(*parts, strict=True)
    entities = Questions(tuple(question for part in asked for question in part.questions)).entities
    bits = torch.cat([estimate.bits for estimate in estimates]).cpu().numpy()
    # Exactly 0 are the bits of a probe that gained too little to be used: of these, resampling would find nothing else.
    low, high = mean_interval(bits, entities, seed=seed) if bits.any() else (float("nan"), float("nan"))
    return {
        "bits": float(bits.mean()),
        "low": low,
        "high": high,
        "entropy": float(torch.cat([estimate.blind for estimate in estimates]).mean()),
        "cross_entropy": float(torch.cat([estimate.surprise for estimate in estimates]).mean()),
        "accuracy": float(torch.cat([estimate.right for estimate in estimates]).mean()),
        "classes": max(classes),
        "train_n": min(known),
        "n": len(bits),
    }


@register(
    "probe",
    summary="Reads the answers off the states: bits at each layer, before, with the edit, and after retraining.",
    source="arXiv 2002.10689",
)
@dataclass(frozen=True, kw_only=True)
class Probe(Attack):
    """A probe and the logit lens on every layer of the unedited, the edited, and the retrained model.

    Attributes:
        probe_kind: "linear" or "mlp".
    """

    probe_kind: ProbeKind = "linear"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_one_of(ProbeKind, probe_kind=self.probe_kind)

    @override
    def check_facts(self, facts: FactSplit) -> None:
        """Refuse too few facts to train on; warn where there are too few never-taught ones for their control."""
        if len(facts.train) < FOLDS:
            raise ValueError(
                f"the attack {self.name!r} needs {FOLDS} questions for its training or more, and half of them are {len(facts.train)}; "
                "leave it out, or give more questions"
            )
        if facts.untaught is not None:
            _halves(facts.untaught, facts.train, facts.held_out, _target(facts.train, facts.held_out), seed=0)

    @override
    def run(self, setting: Setting) -> Frames:
        """The frames "probe_bits" and "logit_lens"."""
        probes, lenses = [], []
        for state, name, read in self._states(setting):
            found = setting.store.once(f"probe-{state}", read)
            probes.append(pd.DataFrame(found["probe"]).assign(method=name))
            lenses.append(pd.DataFrame(found["lens"]).assign(method=name))
        return {
            "probe_bits": pd.concat(probes, ignore_index=True),
            "logit_lens": pd.concat(lenses, ignore_index=True),
        }

    def _states(self, setting: Setting) -> Iterator[tuple[str, str, Callable[[], Mapping[str, Any]]]]:
        """States of the model: file, name in the frames, and what reads them."""
        yield UNEDITED, UNEDITED, lambda: self._read(setting, None)
        yield "edited", setting.name, lambda: self._read(setting, setting.edit)

        def relearned() -> Mapping[str, Any]:
            with setting.budget(Relearn).relearned(setting):
                return self._read(setting, None)

        yield "relearned", f"{setting.name}, relearned", relearned

    def _read(self, setting: Setting, edit: Edit | None) -> Mapping[str, Any]:
        """What a probe and the logit lens read off the model as it is now, and with this edit on."""
        arguments = setting.arguments("train", "held_out", "untaught")
        bits = probe(setting.model, edit, kind=self.probe_kind, target=None, **arguments)
        asked = labelled({"forget": setting.facts.held_out, NEVER_TAUGHT: setting.facts.untaught})
        with edit_on(setting.model, edit):
            seen = logit_lens(setting.model, asked, **setting.arguments())
        return {"probe": rows_of(bits), "lens": rows_of(seen[seen["group"] != "all"])}

    @override
    def rows(self, frames: Frames, name: str) -> Iterator[Mapping[str, Any]]:
        """Each state's best layer, and the never-taught control's own: the same choice helps both, so that either is an
        upper bound and the two can be compared."""
        if "probe_bits" not in frames:
            return
        for (state, kind), part in frames["probe_bits"].groupby(["method", "kind"], sort=False):
            row = part[part["group"] == "held-out"].sort_values("bits", kind="stable").iloc[-1]
            control = part[part["group"] == NEVER_TAUGHT]["bits"]
            yield {
                "method": state,
                "attack": f"probe, {kind}",
                "n": int(row["n"]),
                "layer": int(row["layer"]),
                "bits": row["bits"],
                "bits_low": row["low"],
                "bits_high": row["high"],
                "bits_in_all": row["entropy"],
                "never_taught_bits": float(control.max()),  # NaN without a control
            }
