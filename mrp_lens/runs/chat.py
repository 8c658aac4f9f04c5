"""A model beside the same model with an edit on: what both answer, and what the edit does to each token of it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pandas as pd

from mrp_lens.data.documents import in_chat
from mrp_lens.data.rows import fill
from mrp_lens.data.schemas import template_fields
from mrp_lens.edits import Direction, Edit, EditStack, at_strength, edit_on, edits_on, projection_in
from mrp_lens.metrics.token_effects import token_effects
from mrp_lens.models import LensModel
from mrp_lens.models.generation import Continuation, continued

QUESTION = "question"  # what stands in braces where a template takes the question
MEASURES = {  # columns of `metrics.token_effects`: what they are called, and what that is
    "share": ("gate", "how far it is open"),
    "own_displacement": ("own step", "how far the edit itself moves the state here, over the state's length"),
    "displacement": ("displacement", "how far the state is from the unedited one by now, over that one's length"),
}


@dataclass(frozen=True)
class Switches:
    """How much of an edit is on.

    Attributes:
        on: whether it is on at all.
        strength: as `at_strength` has it: 0 is the unedited model, 1 the edit.
        only: of the directions of its projection this one alone, by its place in `edit.directions`, from 0.
        without: all of them but this one.
    """

    on: bool = True
    strength: float = 1.0
    only: int | None = None
    without: int | None = None


@dataclass(frozen=True)
class Answer:
    """What both say to a prompt.

    Attributes:
        prompt: as the model read it.
        before: what the unedited model writes.
        after: what it writes with as much of the edit on as was asked; the same as `before` where that is nothing.
        tokens: `metrics.token_effects` of the prompt and `after`; None where the edit is off.
    """

    prompt: str
    before: str
    after: str
    tokens: pd.DataFrame | None


@dataclass
class Chat:
    """Ask a model and the same model with an edit on. Each question is asked by itself, without those before it.

    Args:
        model: HookedTransformer or TransformerBridge, without the edit.
        edit: of any kind.
        max_new_tokens: of an answer, at most.
        temperature: of the sampling; 0: greedy.
        seed: of the sampling.
        question_prompt: template of a question, such as "Question: {question}\\nAnswer:". None: as it is typed.
        chat_template: make each question a turn of the tokenizer's chat template.
        system: a system message before it.

    Raises:
        TypeError: the edit is not an Edit.
        ValueError: it does not fit the model; a template without {question}; a chat template or a system message that the
            tokenizer has not.

    Example:
        >>> chat = Chat(model, edit)
        >>> answer = chat.ask("The colour of", Switches(strength=0.5))
        >>> answer.before, answer.after  # doctest: +SKIP
    """

    model: LensModel
    edit: Edit
    max_new_tokens: int = 40
    temperature: float = 0.0
    seed: int = 0
    question_prompt: str | None = None
    chat_template: bool = False
    system: str | None = None
    _unedited: tuple[Any, Continuation] | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        if not isinstance(self.edit, Edit):
            raise TypeError(f"edit must be an Edit, such as fit.edit, got {type(self.edit).__name__}")
        if self.question_prompt is not None and QUESTION not in template_fields(self.question_prompt):
            raise ValueError(
                f"question_prompt must say where the question stands: 'Question: {{question}}', got {self.question_prompt!r}"
            )
        if self.system is not None and not self.chat_template:
            raise ValueError(
                "a system message is part of a chat template; give chat_template=True, or leave system out"
            )
        self.read("a question")
        with edit_on(self.model, self.edit):
            pass  # refuse an edit of another model before anybody has typed a question

    @property
    def directions(self) -> tuple[Direction, ...]:
        """The directions that the edit's projection removes; none without a projection."""
        projection = projection_in(self.edit)
        return () if projection is None else projection.directions

    def read(self, question: str) -> str:
        """The question as the model reads it."""
        asked = question
        if self.question_prompt is not None:
            asked = fill(self.question_prompt, {QUESTION: question}, 0, "the question")
        if self.chat_template:
            asked, _ = in_chat(asked, [], self.model.tokenizer, self.system)
        return asked

    def chosen(self, switches: Switches) -> Edit | None:
        """As much of the edit as is on; None: nothing.

        Raises:
            ValueError: a strength that the edit cannot have, or a direction that it has not; both `only` and `without`.
        """
        # Also where it is off: what is typed then has to be possible once it is on.
        edit = at_strength(self.model, self._of_directions(switches), switches.strength)
        return edit if switches.on else None

    def ask(self, question: str, switches: Switches | None = None) -> Answer:
        """What both say.

        Args:
            question: what they go on from.
            switches: how much of the edit is on. None: all of it.

        Raises:
            ValueError: as `chosen`, or an empty question where texts start without BOS; NonFiniteError where logits become
                NaN or infinite.
        """
        prompt, edit = self.read(question), self.chosen(Switches() if switches is None else switches)
        key = (prompt, self.max_new_tokens, self.temperature, self.seed, edits_on(self.model))
        if self._unedited is None or self._unedited[0] != key:  # a strength is tried at one question, many times
            self._unedited = (key, self._continued(prompt))
        before = self._unedited[1]
        if edit is None:
            return Answer(prompt, before.text, before.text, None)
        with edit.applied(self.model):
            after = self._continued(prompt)
        tokens = token_effects(self.model, edit, (*after.prompt, *after.ids), prompt=len(after.prompt))
        return Answer(prompt, before.text, after.text, tokens)

    def _continued(self, prompt: str) -> Continuation:
        (found,) = continued(
            self.model,
            [prompt],
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            seed=self.seed,
            progress=True,
        )
        return found

    def _of_directions(self, switches: Switches) -> Edit:
        only, without = switches.only, switches.without
        if only is None and without is None:
            return self.edit
        if only is not None and without is not None:
            raise ValueError(f"choose one direction alone or leave one out, not both: only={only}, without={without}")
        projection = projection_in(self.edit)
        if projection is None:
            raise ValueError(f"this edit projects nothing, so it has no directions to choose from: {self.edit!r}")
        number = only if only is not None else without
        known = projection.directions
        if not isinstance(number, int) or not 0 <= number < len(known):
            raise ValueError(f"no direction {number}; this edit has 0 to {len(known) - 1}")
        chosen = [each for place, each in enumerate(known) if (place == number) == (only is not None)]
        fewer = projection.with_directions(chosen)
        parts = [fewer if part is projection else part for part in self.edit.parts]
        return parts[0] if len(parts) == 1 else EditStack(parts)


def measures_of(frame: pd.DataFrame) -> list[str]:
    """The measures of which there is any figure: of an edit without gates, or without hooks, not all are."""
    return [measure for measure in MEASURES if frame[measure].notna().any()]


def hook_to_show(frame: pd.DataFrame) -> str:
    """Where there is most to see: the edit's hook that moves states furthest; of an edit without hooks, where they are
    furthest from the unedited ones."""
    measure = "own_displacement" if "own_displacement" in measures_of(frame) else "displacement"
    return str(frame.groupby("hook", sort=False)[measure].mean().idxmax())


def said_of(row: Mapping[str, Any]) -> str:
    """The figures of a row in words, those that it has."""
    return ", ".join(
        f"{name} {row[measure]:.3f}" for measure, (name, _) in MEASURES.items() if not pd.isna(row[measure])
    )
