"""One trigger for all prompts, found by gradients: does it bring back facts that the search never saw?"""

import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, Literal, get_args

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm
from typing_extensions import override

from mrp_lens.attacks.base import Attack, FactSplit, Frames, Setting, labelled
from mrp_lens.attacks.evaluation import chance, check_held_out, check_untaught
from mrp_lens.attacks.gradients import answer_losses, input_gradient, input_gradients
from mrp_lens.attacks.registry import register
from mrp_lens.attacks.summary import ACCURACIES, RECOVERY, columns, without_attack
from mrp_lens.data import Document, Questions
from mrp_lens.data.kinds import check_questions
from mrp_lens.data.tokenization import Encoded, Encoder, TokenBatch, in_order
from mrp_lens.edits import Edit, edit_on
from mrp_lens.metrics.activations import states_of
from mrp_lens.metrics.controls import RANDOM_TRIGGER
from mrp_lens.metrics.likelihood import mean_log_probabilities
from mrp_lens.metrics.multiple_choice import answered_right, encoded_choices
from mrp_lens.metrics.recovery import Score, recovery
from mrp_lens.models import LensModel, check_layers, check_lens_model, encoder_for, logits_of
from mrp_lens.models.finite import check_finite, check_states
from mrp_lens.models.hooks import captured, frozen, hook_name, run_segment
from mrp_lens.utils.interrupts import deferred
from mrp_lens.utils.torch_state import ordinary_torch, refuse_inference_tensors
from mrp_lens.utils.validation import check_one_of, check_positive, check_whole, generator_for

logger = logging.getLogger(__name__)
Loss = Literal["answer", "representation"]
SEARCHES = {"answer": "answers", "representation": "states"}  # objective -> what the summary calls it
EVERY = 25  # steps from one scoring of a suite's search to the next


@dataclass(frozen=True)
class Slot:
    """A text as token ids, and the place in it where a trigger goes; the text's own tokens never change."""

    row: Encoded
    place: int

    def filled(self, trigger: Sequence[int]) -> Encoded:
        """The text with the trigger, whose tokens are content and do not count in the loss."""

        def spliced(values: tuple[Any, ...], new: Sequence[Any]) -> tuple[Any, ...]:
            return (*values[: self.place], *new, *values[self.place :])

        return Encoded(
            spliced(self.row.ids, trigger),
            spliced(self.row.content, [True] * len(trigger)),
            spliced(self.row.in_loss, [False] * len(trigger)),
        )


@dataclass(frozen=True)
class Slots:
    """Where triggers of one length stand in the prompts for one model: before the marker, or at the start."""

    encoder: Encoder
    marker: str | None
    length: int

    @classmethod
    def for_model(cls, model: LensModel, marker: str | None, length: int) -> "Slots":
        """Texts are cut so that with the trigger they still fit the model's context.

        Raises:
            ValueError: an empty marker, or a trigger that is empty or leaves no room for a text.
        """
        context = int(model.cfg.n_ctx)
        if not 1 <= length <= context - 2:
            raise ValueError(f"length must be from 1 to {context - 2} (the model's context is {context}), got {length}")
        if marker == "":
            raise ValueError("marker is empty; give text of the prompts, or None for a trigger at their start")
        return cls(encoder_for(model, max_length=context - length), marker, length)

    def of_prompts(self, questions: Questions) -> list[Slot]:
        """The prompts alone, of which the last token counts in the loss."""
        documents = [Document(*self._parts(q.prompt)) for q in questions.questions]
        rows = self.encoder.encode(documents, keep="end")
        last = [(*[False] * (len(row.ids) - 1), True) for row in rows]
        return [Slot(replace(r, in_loss=flags), r.in_loss.index(True)) for r, flags in zip(rows, last, strict=True)]

    def of_choices(self, questions: Questions, *, right_only: bool = False) -> list[Slot]:
        """The prompt with each choice (or the right one), which alone counts in the loss; question by question."""
        rows = encoded_choices(self.encoder, questions, right_only=right_only)
        # The same text split at the trigger's place: the first token that reaches over the split marks it.
        documents = []
        for q in questions.questions:
            head, tail = self._parts(q.prompt)
            documents += [Document(head, tail + c) for c in ((q.choices[q.answer],) if right_only else q.choices)]
        with warnings.catch_warnings():  # of cuts, which were told of when the rows were encoded
            warnings.simplefilter("ignore", UserWarning)
            placed = self.encoder.encode(documents, keep="end")
        return [Slot(row, split.in_loss.index(True)) for row, split in zip(rows, placed, strict=True)]

    def _parts(self, prompt: str) -> tuple[str, str]:
        at = 0 if self.marker is None else prompt.rfind(self.marker)
        if at < 0 or not prompt:
            raise ValueError(
                f"the prompt {prompt!r} holds no {self.marker!r} for a trigger to stand before; give a marker that "
                "all prompts hold, or None for a trigger at their start"
            )
        return prompt[:at], prompt[at:]


def score_with_trigger(
    model: LensModel, slots: Slots, questions: Questions, trigger: Sequence[int] = (), *, batch_size: int = 128
) -> Score:
    """How many questions are answered right with the trigger in every prompt; counted as in `evaluation.score`."""
    rows = [slot.filled(trigger) for slot in slots.of_choices(questions)]
    sizes = [len(q.choices) for q in questions.questions]
    scores = mean_log_probabilities(model, slots.encoder, rows, sizes, batch_size=batch_size, progress=False)
    return Score.of(answered_right(scores, questions), questions.entities)


@dataclass(frozen=True)
class Objective:
    """What a search brings down: `losses(batch, chosen)` of a batch whose rows are the texts numbered `chosen`."""

    slots: Sequence[Slot]
    losses: Callable[[TokenBatch, Sequence[int]], Float[Tensor, " rows"]]


@dataclass(frozen=True)
class TriggerSearch:
    """Greedy coordinate gradient (arXiv 2307.15043) for one trigger that serves all texts of an objective.

    Attributes:
        model: with the edit on, if there is one.
        slots: where the trigger stands.
        objective: what is brought down.
        candidates: replacements tried a step.
        top: tokens a position from which they are drawn.
        batch: texts a step.
        batch_size: rows of one pass.
        generator: on the CPU; all chance comes from it.
    """

    model: LensModel
    slots: Slots
    objective: Objective
    candidates: int
    top: int
    batch: int
    batch_size: int
    generator: torch.Generator

    def start(self) -> Int[Tensor, " length"]:
        """A random trigger."""
        picks = torch.randint(len(self.vocabulary), (self.slots.length,), generator=self.generator)
        return self.vocabulary[picks]

    def step(self, trigger: Int[Tensor, " length"]) -> Int[Tensor, " length"]:
        """The best of `candidates` triggers that differ from this one in one token, or this one if none is better."""
        chosen = torch.randperm(len(self.objective.slots), generator=self.generator)[: self.batch].tolist()
        replacements = self.replacements(trigger, chosen)
        positions = torch.randint(len(trigger), (self.candidates,), generator=self.generator)
        picks = torch.randint(replacements.shape[1], (self.candidates,), generator=self.generator)
        tried = trigger.repeat(self.candidates + 1, 1)
        tried[torch.arange(self.candidates), positions] = replacements[positions, picks]
        return tried[int(self.losses(tried, chosen).argmin())]

    def replacements(self, trigger: Int[Tensor, " length"], chosen: Sequence[int]) -> Int[Tensor, "length top"]:
        """For each position the tokens that lower the loss most to first order; never the one that stands there.

        The embedding is linear in the one-hot tokens, so the gradient towards these is that towards the embedding
        times W_E^T (up to one factor where a model scales its embeddings, which changes no ranking).
        """
        batch, places = self._batch(trigger[None], chosen)
        found = input_gradient(self.model, lambda: self.objective.losses(batch, chosen))
        gradient = found.gradient.double()[torch.arange(len(batch))[:, None], places].sum(dim=0)
        rise = (gradient @ self.model.W_E[self.vocabulary].detach().double().T).cpu()
        check_finite(self.model, rise, "the gradient towards the trigger")
        rise[trigger[:, None] == self.vocabulary] = torch.inf
        return self.vocabulary[rise.topk(min(self.top, len(self.vocabulary) - 1), largest=False).indices]

    def losses(self, triggers: Int[Tensor, "many length"], chosen: Sequence[int]) -> Float[Tensor, " many"]:
        """The mean loss over the chosen texts with each trigger.

        Raises:
            NonFiniteError: one that is not finite.
        """
        found = []
        with frozen(self.model), torch.no_grad():
            for part in triggers.split(max(1, self.batch_size // len(chosen))):
                batch, _ = self._batch(part, chosen)
                losses = self.objective.losses(batch, [*chosen] * len(part))
                found.append(losses.reshape(len(part), len(chosen)).mean(dim=1))
        means = torch.cat(found).cpu()
        check_finite(self.model, means, "the loss of a trigger")
        return means

    def loss(self, trigger: Int[Tensor, " _length"]) -> float:
        """The mean loss over all texts; an empty trigger leaves them as they are."""
        total = 0.0
        for chosen in torch.arange(len(self.objective.slots)).split(self.batch_size):
            total += float(self.losses(trigger[None], chosen.tolist())) * len(chosen)
        return total / len(self.objective.slots)

    def _batch(
        self, triggers: Int[Tensor, "many length"], chosen: Sequence[int]
    ) -> tuple[TokenBatch, Int[Tensor, "rows length"]]:
        """Every chosen text with the first trigger, then with the next, padded on the right; and the triggers' places."""
        slots = [self.objective.slots[place] for place in chosen]
        rows = [slot.filled(trigger) for trigger in triggers.tolist() for slot in slots]
        starts = torch.tensor([slot.place for slot in slots]).repeat(len(triggers))
        return self.slots.encoder.collate(rows), starts[:, None] + torch.arange(triggers.shape[1])

    @cached_property
    def vocabulary(self) -> Int[Tensor, " tokens"]:
        """Ids of the tokenizer's tokens that are no special ones (BOS, EOS, padding, marks of a chat), ascending."""
        tokenizer = self.model.tokenizer
        special = {*tokenizer.all_special_ids}
        special |= {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
        known = {token for token in tokenizer.get_vocab().values() if token < len(self.model.W_E)}
        return torch.tensor(sorted(known - special))


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
        with its 95% interval `recovery_low`, `recovery_high`, as `metrics.recovery` says; `trigger`, its text (its
        tokens are spliced in, so that typing the text may give others).
        After Ctrl-C the rows so far and the trigger so far, with a logged warning; `frame.attrs["interrupted"]` tells.

    Raises:
        TypeError: train, held_out or untaught are no Questions.
        ValueError: questions that are shared or missing, a prompt without the marker, settings out of range, or an
            edit that does not fit the model.

    Example:
        >>> first, second = questions.halves(by="entity")
        >>> frame = jailbreak(model, fit.edit, train=first, held_out=second, untaught=untaught, steps=1, candidates=4)
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
        before = score_with_trigger(model, slots, held_out, batch_size=batch_size)
        objective = (
            answer_objective(model, slots, train)
            if loss == "answer"
            else representation_objective(model, slots, train, layer=layer, batch_size=batch_size)
        )
        generator = generator_for(seed)
        search = TriggerSearch(model, slots, objective, candidates, top, batch, batch_size, generator)

        def score(kind: str, step: int, trigger: Tensor) -> None:
            ids = trigger.tolist()
            count = partial(score_with_trigger, model, slots, trigger=ids, batch_size=batch_size)
            back, floor = count(held_out), chance(held_out) if untaught is None else count(untaught)
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
            done, interrupted = 0, False
            try:
                with deferred(terminate=False) as asked:
                    while done < steps and not asked:
                        trigger, done = search.step(trigger), done + 1
                        bar.update()
                        if done % every == 0 or done == steps:
                            score("found", done, trigger)
                interrupted = bool(asked)
            except KeyboardInterrupt:
                interrupted = True
            if interrupted:
                logger.warning("jailbreak: interrupted after %d of %d steps; the trigger so far is kept", done, steps)
                if rows[-1]["step"] < done:
                    score("found", done, trigger)
    frame = pd.DataFrame(rows)
    frame.attrs["interrupted"] = interrupted
    return frame


def answer_objective(model: LensModel, slots: Slots, train: Questions) -> Objective:
    """Cross-entropy of the right answers, in nats per token."""
    return Objective(slots.of_choices(train, right_only=True), lambda batch, _: answer_losses(model, batch))


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
    check_one_of(Loss, loss=loss)
    if layer is not None and loss != "representation":
        raise ValueError(f"layer={layer} has no effect with loss={loss!r}; leave it out, or use loss='representation'")
    check_whole(**counts)


def _check_questions(train: Questions, held_out: Questions, untaught: Questions | None) -> None:
    given = {"train": train} if untaught is None else {"train": train, "untaught": untaught}
    check_questions(**given)
    for name, questions in given.items():
        if not len(questions):
            raise ValueError(f"no questions in {name}, {questions.name!r}")
    check_held_out(held_out, train=train)
    check_untaught(untaught, train=train, held_out=held_out)
    for questions in (held_out, *given.values()):
        if not all(q.prompt for q in questions.questions):
            raise ValueError(
                f"a question of {questions.name!r} has an empty prompt, before which no trigger can stand; leave it out"
            )


@register("jailbreak", summary="Searches for a trigger for all prompts, by gradients.", source="arXiv 2307.15043")
@dataclass(frozen=True, kw_only=True)
class Jailbreak(Attack):
    """A trigger search for each loss, and how steep the loss is towards the input.

    Attributes:
        search_steps: of each search.
    """

    search_steps: int = 50

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(search_steps=self.search_steps)

    @override
    def check_facts(self, facts: FactSplit) -> None:
        _check_questions(facts.train, facts.held_out, facts.untaught)

    @override
    def run(self, setting: Setting) -> Frames:
        """The frames "jailbreak_curve" (with the column `objective`) and "input_gradients"."""
        searches = []
        for objective in get_args(Loss):

            def search(objective: Loss = objective) -> pd.DataFrame:
                arguments = setting.arguments("train", "held_out", "untaught")
                model, edit, steps = setting.model, setting.edit, self.search_steps
                frame = jailbreak(model, edit, loss=objective, steps=steps, every=EVERY, **arguments)
                return frame.assign(objective=objective)

            searches.append(setting.frame(f"jailbreak-{objective}", search))

        def gradients() -> pd.DataFrame:
            asked = labelled({"forget": setting.facts.held_out, "retain": setting.retain_questions})
            frame = input_gradients(setting.model, setting.edit, asked, **setting.arguments())
            return frame[frame["group"] != "all"]

        return {
            "jailbreak_curve": pd.concat(searches, ignore_index=True).assign(method=setting.name),
            "input_gradients": setting.frame("gradients", gradients).assign(method=setting.name),
        }

    @override
    def rows(self, frames: Frames, name: str) -> Iterator[Mapping[str, Any]]:
        """Of each search the trigger with the lowest loss on T, which the attacker can tell without any answer of V; and once a
        random one."""
        if "jailbreak_curve" not in frames:
            return
        for number, (objective, part) in enumerate(frames["jailbreak_curve"].groupby("objective", sort=False)):
            renamed = {"held_out_accuracy": "accuracy_after", "untaught_accuracy": "floor"}
            rows = part.rename(columns=renamed).assign(ceiling=part["accuracy_before"]).to_dict("records")
            plain, random, *found = [row | {"accuracy_edited": rows[0]["accuracy_after"]} for row in rows]
            best = min(found, key=lambda row: float(row["loss"]))
            shown = [(name, f"jailbreak, {SEARCHES[str(objective)]}", best)]
            if number == 0:
                yield without_attack(plain, name)
                shown.append((RANDOM_TRIGGER, "jailbreak", random))
            for method, attack, row in shown:
                yield {"method": method, "attack": attack, **columns(row, ACCURACIES, RECOVERY)}
