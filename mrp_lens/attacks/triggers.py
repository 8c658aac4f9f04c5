"""Triggers: tokens put into prompts, where they stand, what they do to answers, and a search for the best ones."""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mrp_lens.attacks.gradients import input_gradient
from mrp_lens.attacks.recovery import Counted
from mrp_lens.batching import Encoded, Encoder, TokenBatch
from mrp_lens.corpus import Document, Questions
from mrp_lens.finite import NonFiniteError
from mrp_lens.metrics.answers import answered_right
from mrp_lens.metrics.likelihood import encoded_choices, mean_log_probabilities
from mrp_lens.model import LensModel, dtype_of
from mrp_lens.stream import frozen


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
        return cls(Encoder.for_model(model, max_length=context - length), marker, length)

    def of_prompts(self, questions: Questions) -> list[Slot]:
        """The prompts alone, of which the last token counts in the loss."""
        documents = [Document(*self._parts(q.prompt)) for q in questions.questions]
        rows = self.encoder.encode(documents, keep="end")
        last = [(*[False] * (len(row.ids) - 1), True) for row in rows]
        return [Slot(replace(r, in_loss=flags), r.in_loss.index(True)) for r, flags in zip(rows, last, strict=True)]

    def of_choices(self, questions: Questions) -> list[Slot]:
        """The prompt with each choice, which alone counts in the loss; question by question."""
        pairs = [(q.prompt, choice) for q in questions.questions for choice in q.choices]
        return self._placed(pairs, encoded_choices(self.encoder, questions))

    def of_answers(self, questions: Questions) -> list[Slot]:
        """The prompt with the right choice, which alone counts in the loss."""
        pairs = [(q.prompt, q.choices[q.answer]) for q in questions.questions]
        return self._placed(pairs, encoded_choices(self.encoder, questions, right_only=True))

    def _placed(self, pairs: Sequence[tuple[str, str]], rows: Sequence[Encoded]) -> list[Slot]:
        # The same text split at the trigger's place: the first token that reaches over the split marks it.
        parts = [self._parts(prompt) for prompt, _ in pairs]
        documents = [Document(head, tail + pair[1]) for (head, tail), pair in zip(parts, pairs, strict=True)]
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


def count_right(
    model: LensModel, slots: Slots, questions: Questions, trigger: Sequence[int] = (), *, batch_size: int = 128
) -> Counted:
    """How many questions are answered right with the trigger in every prompt; as `recovery.counted`, which see."""
    rows = [slot.filled(trigger) for slot in slots.of_choices(questions)]
    sizes = [len(q.choices) for q in questions.questions]
    scores = mean_log_probabilities(model, slots.encoder, rows, sizes, batch_size=batch_size)
    return Counted(float(answered_right(scores, questions).sum()), len(questions))


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
        self._check(rise, "the gradient towards the trigger")
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
        self._check(means, "the loss of a trigger")
        return means

    def loss(self, trigger: Int[Tensor, " _length"]) -> float:
        """The mean loss over all texts; an empty trigger leaves them as they are."""
        total = 0.0
        for chosen in torch.arange(len(self.objective.slots)).split(self.batch_size):
            total += float(self.losses(trigger[None], chosen.tolist())) * len(chosen)
        return total / len(self.objective.slots)

    def _check(self, values: Tensor, what: str) -> None:
        if not bool(torch.isfinite(values).all()):
            dtype = str(dtype_of(self.model)).removeprefix("torch.")
            raise NonFiniteError(
                f"{what} is NaN or infinite; the model is in {dtype}: load it in float32 or bfloat16, or weaken the edit"
            )

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
