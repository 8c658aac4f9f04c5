"""One trigger for all prompts, found by gradients: does it bring back facts that the search never saw?"""

import logging
from collections.abc import Sequence
from functools import partial
from typing import Any, Literal, get_args

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from mrp_lens.attacks.gradients import answer_losses
from mrp_lens.attacks.recovery import check_held_out, guessed, recovery
from mrp_lens.attacks.triggers import Objective, Slots, TriggerSearch, count_right
from mrp_lens.batching import TokenBatch, in_order
from mrp_lens.checks import generator_for
from mrp_lens.corpus import Questions
from mrp_lens.edit import Edit, edit_on
from mrp_lens.finite import check_states
from mrp_lens.metrics.states import states_of
from mrp_lens.model import LensModel, check_layers, check_lens_model, logits_of
from mrp_lens.stream import captured, frozen, hook_name, run_segment
from mrp_lens.torch_state import ordinary_torch, refuse_inference_tensors

logger = logging.getLogger(__name__)

Loss = Literal["answer", "representation"]


@ordinary_torch(gradients=True)
def jailbreak(
    model: LensModel,
    edit: Edit | None,
    *,
    train: Questions,
    held_out: Questions,
    untaught: Questions | None = None,
    loss: Loss = "answer",
    length: int = 10,
    steps: int = 40,
    candidates: int = 16,
    top: int = 32,
    batch: int = 16,
    layer: int | None = None,
    marker: str | None = None,
    every: int | None = None,
    batch_size: int = 128,
    seed: int = 0,
    progress: bool = True,
) -> pd.DataFrame:
    """Search for tokens that, put into every prompt, undo an edit: greedy coordinate gradient (GCG, arXiv 2307.15043).

    One trigger serves all questions. A step takes the gradient of the loss towards the trigger's one-hot tokens, draws
    `candidates` single replacements from the `top` tokens that it ranks first at each position, runs them all, and
    keeps the best (or the trigger as it was, if none is better). The attacker knows the right answers of `train` and
    has the unedited model; the trigger is scored on `held_out`, whose answers the search never saw. Only so does
    success show that the knowledge was still there: enough tokens force any answer out that the attacker knows
    already. And a trigger may teach what answers look like, which `untaught` questions give away: they are the floor.
    A search that fails shows nothing; a longer one, or another loss, may succeed.

    Args:
        model: HookedTransformer or TransformerBridge, without the edit.
        edit: None: the unedited model is attacked.
        train: what the trigger is optimised on.
        held_out: other facts that the edit removed; what counts.
        untaught: facts that the model was never taught. None: the floor is blind guessing, which is too low if a
            trigger teaches what answers look like.
        loss: "answer": cross-entropy of the right answers, in nats per token. "representation" (the idea of the
            enhanced GCG used against RMU, arXiv 2409.18025): squared distance between the edited model's state for the
            prompt with the trigger and the unedited model's for the prompt without it, at the prompt's last token, where
            the answer is read, divided by the unedited state's squared norm; the mean over questions. This one needs no
            answers. (With all tokens behind the trigger instead, the many that the answer does not depend on prevail.)
        length: tokens of the trigger.
        steps: of the search.
        candidates: replacements that are tried a step.
        top: tokens a position that the gradient puts up for choice.
        batch: training questions a step, drawn anew each time.
        layer: where "representation" compares, at resid_post. None: the last layer, from which the logits follow.
        marker: the trigger stands right before the last place where a prompt says this, such as "Answer:" (the token
            in which it begins). None: at the start of the prompt, behind BOS. Where positions are absolute (GPT-2)
            tokens behind the trigger move to others.
        every: steps from one scoring to the next; the last trigger is always scored. None: it alone. The search may pass
            a better one on its way: that with the lowest `loss` is the attacker's choice, which needs no held-out answer.
        batch_size: rows of one pass.
        seed: of everything drawn.
        progress: show a progress bar.

    Returns:
        One row a scored trigger: `kind`, "none" (no trigger), "random" (the control, and the search's start), "found";
        `step`, steps of search behind it; `loss`, the mean over all of `train`; `train_accuracy`, `held_out_accuracy`,
        `untaught_accuracy` (chance without `untaught`) in [0, 1], of the edited model with this trigger;
        `accuracy_before`, the unedited model's on `held_out` without a trigger; `n` held-out questions; `recovery`
        with its 95% interval `recovery_low`, `recovery_high`, as `recovery.recovery` says; `trigger`, its text (its
        tokens are spliced in, so that typing the text may give others).
        After Ctrl-C the rows so far and the trigger so far, with a logged warning.

    Raises:
        TypeError: train, held_out or untaught are no Questions.
        ValueError: questions that are shared or missing, a prompt without the marker, settings out of range, or an
            edit that does not fit the model.

    Example:
        >>> first, second = questions.halves(by="entity")  # doctest: +SKIP
        >>> jailbreak(model, fit.edit, train=first, held_out=second, untaught=untaught)
    """
    every = steps if every is None else every
    _check_settings(
        loss, layer, steps=steps, candidates=candidates, top=top, batch=batch, every=every, batch_size=batch_size
    )
    _check_questions(train, held_out, untaught)
    check_lens_model(model)
    refuse_inference_tensors(model.parameters())
    layer = check_layers(model, [model.cfg.n_layers - 1 if layer is None else layer])[0]
    slots = Slots.for_model(model, marker, length)
    rows: list[dict[str, Any]] = []
    with frozen(model), tqdm(total=steps, desc=f"jailbreak ({loss})", disable=not progress) as bar:
        before = count_right(model, slots, held_out, batch_size=batch_size)
        objective = (
            answer_objective(model, slots, train)
            if loss == "answer"
            else representation_objective(model, slots, train, layer=layer, batch_size=batch_size)
        )
        generator = generator_for(seed)
        search = TriggerSearch(model, slots, objective, candidates, top, batch, batch_size, generator)

        def score(kind: str, step: int, trigger: Tensor) -> None:
            ids = trigger.tolist()
            count = partial(count_right, model, slots, trigger=ids, batch_size=batch_size)
            back, floor = count(held_out), guessed(held_out) if untaught is None else count(untaught)
            rows.append(
                {
                    "kind": kind,
                    "step": step,
                    "loss": search.loss(trigger),
                    "train_accuracy": count(train).accuracy,
                    "held_out_accuracy": back.accuracy,
                    "untaught_accuracy": floor.accuracy,
                    "accuracy_before": before.accuracy,
                    "n": len(held_out),
                    **recovery(back, floor, before, seed=seed).columns(),
                    "trigger": model.tokenizer.decode(ids),
                }
            )
            bar.set_postfix(loss=f"{rows[-1]['loss']:.3g}", held_out=f"{back.accuracy:.2f}")

        with edit_on(model, edit):
            score("none", 0, torch.tensor([], dtype=torch.long))
            trigger = search.start()
            score("random", 0, trigger)
            done = 0
            try:
                while done < steps:
                    trigger, done = search.step(trigger), done + 1
                    bar.update()
                    if done % every == 0 or done == steps:
                        score("found", done, trigger)
            except KeyboardInterrupt:
                logger.warning("jailbreak: interrupted after %d of %d steps; the trigger so far is kept", done, steps)
                if rows[-1]["step"] < done:
                    score("found", done, trigger)
    return pd.DataFrame(rows)


def answer_objective(model: LensModel, slots: Slots, train: Questions) -> Objective:
    """Cross-entropy of the right answers, in nats per token."""
    return Objective(slots.of_answers(train), lambda batch, _: answer_losses(model, batch))


def representation_objective(
    model: LensModel, slots: Slots, train: Questions, *, layer: int, batch_size: int
) -> Objective:
    """||h - h_unedited||^2 / ||h_unedited||^2 at the last token of the prompt, which h_unedited has without a trigger.

    To be called with the edit off: the states to match are read here, and kept on the model's device.
    """
    hook, prompts = hook_name(layer), slots.of_prompts(train)
    references: dict[int, Tensor] = {}
    for chosen, batch in in_order(slots.encoder, [slot.row for slot in prompts], batch_size):
        states = states_of(model, batch, [hook])[hook].split(batch.content_mask.sum(dim=1).tolist())
        for place, of_row in zip(chosen, states, strict=True):
            references[place] = of_row[-1].float()

    def losses(batch: TokenBatch, chosen: Sequence[int]) -> Float[Tensor, " rows"]:
        with captured(model, [hook]) as store:
            if torch.is_grad_enabled():
                logits_of(model, batch.tokens, batch.attention_mask)
            else:
                run_segment(model, batch.tokens, batch.attention_mask, first=layer, last=layer)
        wanted = torch.stack([references[place] for place in chosen])
        states = store[hook][batch.loss_mask]
        check_states(model, batch, {hook: states.detach()})
        distance = (states.float() - wanted).square().sum(dim=-1)
        return distance.double() / wanted.square().sum(dim=-1).double()

    return Objective(prompts, losses)


def _check_settings(loss: str, layer: int | None, **counts: int) -> None:
    if loss not in get_args(Loss):
        raise ValueError(f"unknown loss {loss!r}; choose one of {', '.join(get_args(Loss))}")
    if layer is not None and loss != "representation":
        raise ValueError(f"layer={layer} has no effect with loss={loss!r}; leave it out, or use loss='representation'")
    for name, value in counts.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")


def _check_questions(train: Questions, held_out: Questions, untaught: Questions | None) -> None:
    for name, questions in (("train", train), ("untaught", untaught)):
        if questions is None and name == "untaught":
            continue
        if not isinstance(questions, Questions):
            raise TypeError(f"{name} must be Questions, got {type(questions).__name__}")
        if not len(questions):
            raise ValueError(f"no questions in {name}, {questions.name!r}")
    check_held_out(held_out, train=train)
    if untaught is not None:
        taught = {q.prompt for questions in (train, held_out) for q in questions.questions}
        shared = [q.prompt for q in untaught.questions if q.prompt in taught]
        if shared:
            raise ValueError(
                f"{len(shared)} untaught questions are in train or held_out too, such as {shared[0]!r}: "
                "give questions about facts that the model was never taught, or None"
            )
