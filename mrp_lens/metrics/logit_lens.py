"""What would the model answer if it stopped here? The logit lens, and the states at the end of a text that it reads."""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Float32
from torch import Tensor

from mrp_lens.data import Document, Question, Questions
from mrp_lens.data.kinds import check_questions
from mrp_lens.data.tokenization import Encoded, Encoder, PaddingSide, in_order
from mrp_lens.metrics.activations import hooks_at, states_of
from mrp_lens.metrics.multiple_choice import accuracy_row, by_group
from mrp_lens.models import LensModel, encoder_for, logits_of
from mrp_lens.models.finite import non_finite
from mrp_lens.models.hooks import Site, frozen, hook_name, hooked
from mrp_lens.utils.progress import progress_bar
from mrp_lens.utils.torch_state import ordinary_torch


@ordinary_torch(gradients=False)
def logit_lens(
    model: LensModel,
    questions: Questions,
    *,
    layers: Sequence[int] | None = None,
    site: Site = "resid_post",
    batch_size: int = 128,
    padding: PaddingSide = "right",
    seed: int = 0,
    progress: bool = True,
) -> pd.DataFrame:
    """What each layer's state would answer: the model's own final norm and unembedding put right behind it.

    After nostalgebraist, "interpreting GPT: the logit lens" (2020). It shows an answer that the model holds in the form
    in which it speaks; one held in another form needs a probe (`attacks.probe`).

    The state is read at the end of the prompt, where the first token of the answer is predicted. Where all choices of a
    question begin with the same tokens, these are read as part of the prompt, so that what is predicted is the first
    token by which they differ. Choices of which only some share that token cannot be told apart by it: if it has the
    largest logit, the question counts as 1 / (how many share it) right, as for a guess among these.

    Args:
        model: HookedTransformer or TransformerBridge, with the edit on if there is one.
        questions: each with its choices.
        layers: where to read. None: all. resid_post of the last one gives the model's own logits.
        site: of the hook points.
        batch_size: questions at a time; the logits of one batch, [batch_size, d_vocab], are what takes memory.
        padding: "right" or "left"; of no effect beyond rounding.
        seed: of the bootstrap.
        progress: show a progress bar.

    Returns:
        One row a layer and group, the groups as in `metrics.accuracy`. Columns: `layer`, `group`, `n`; `accuracy` in
        [0, 1] among the choices, by their tokens' logits, with its 95% interval `low`, `high`, as of
        `metrics.accuracy`; `chance`, the control: what blind guessing gives; `probability` of the right choice's token among the whole
        vocabulary, mean over questions; `rank` of that token in the vocabulary, median over questions (1: first).

    Raises:
        TypeError, ValueError: no questions, or a layer or site that does not exist; NonFiniteError where states or logits
            are NaN or infinite.

    Example:
        >>> with fit.edit.applied(model):
        ...     frame = logit_lens(model, questions)
    """
    check_questions(questions=questions)
    if not len(questions):
        raise ValueError(f"no questions in {questions.name!r}")
    hooks = hooks_at(model, layers, site)
    encoder = encoder_for(model)
    contexts, tokens = _contexts(encoder, questions.questions)
    measured = []
    batches = last_states(
        model, encoder, contexts, list(hooks.values()), batch_size=batch_size, padding=padding, progress=progress
    )
    for places, states in batches:
        for layer, hook in hooks.items():
            asked = [(questions.questions[place], tokens[place]) for place in places]
            seen = _seen(unembedded(model, states[hook]), asked)
            measured += [{"layer": layer, "place": place, **row} for place, row in zip(places, seen, strict=True)]
    table = pd.DataFrame(measured).sort_values(["layer", "place"])
    table["entity"] = np.array(questions.entities)[table["place"]]
    rows = []
    for layer in hooks:
        for name, part in by_group(table[table["layer"] == layer]):
            of_answer = {"probability": part["probability"].mean(), "rank": part["rank"].median()}
            rows.append({"layer": layer, **accuracy_row(name, part, seed=seed), **of_answer})
    return pd.DataFrame(rows)


def unembedded(model: LensModel, states: Float[Tensor, "texts d_model"]) -> Float32[Tensor, "texts d_vocab"]:
    """Logits of states, by all that the model does behind its last block (norm, unembedding, soft cap, scale).

    The model itself computes them, on texts of one token whose state at the end of the last block is replaced: what a
    family does there besides norm and unembedding need not be known.

    Raises:
        NonFiniteError: logits that are NaN or infinite.
    """
    tokens = torch.zeros(len(states), 1, dtype=torch.long, device=states.device)

    def put(activation: Tensor, hook: Any) -> Tensor:
        return states[:, None].to(activation.device)

    last = hook_name(int(model.cfg.n_layers) - 1)
    real = torch.ones_like(tokens, dtype=torch.bool)
    with frozen(model), torch.no_grad(), hooked(model, [(last, put)]):
        logits = logits_of(model, tokens, real)[:, 0].float()
        if not bool(logits.amax(dim=-1).isfinite().all()):  # -infinity beside finite ones rules a token out
            raise non_finite(model, tokens, real, "the logits of a layer's states")
    return logits


def last_states(
    model: LensModel,
    encoder: Encoder,
    rows: Sequence[Encoded],
    hooks: Sequence[str],
    *,
    batch_size: int = 128,
    padding: PaddingSide = "right",
    progress: bool = True,
) -> Iterator[tuple[list[int], Mapping[str, Float[Tensor, "texts d_model"]]]]:
    """States at the last token of each text, batch by batch, each with the places of its texts in `rows`.

    Args:
        model: with the edit on, if there is one.
        encoder: the model's.
        rows: the texts.
        hooks: names of hook points.
        batch_size: texts at a time.
        padding: "right" or "left"; of no effect beyond rounding.
        progress: show a progress bar.

    Raises:
        ValueError: a text without a token besides BOS; NonFiniteError where states hold NaN or infinity.
    """
    empty = next((place for place, row in enumerate(rows) if not any(row.content)), None)
    if empty is not None:
        raise ValueError(f"text {empty} holds no token besides BOS; give each question a prompt")
    with progress_bar(total=len(rows), desc="reading states", progress=progress) as bar:
        for places, batch in in_order(encoder, rows, batch_size, side=padding):
            states = states_of(model, batch, hooks)
            ends = batch.content_mask.sum(dim=1).cumsum(0) - 1  # content tokens lie one text after the other
            yield places, {name: of_hook[ends] for name, of_hook in states.items()}
            bar.update(len(places))


def _contexts(encoder: Encoder, questions: Sequence[Question]) -> tuple[list[Encoded], list[list[int]]]:
    """For each question, the tokens that prompt + choice begin with whatever the choice, and what follows them by choice."""
    whole = replace(encoder, max_length=2**62)  # cut here: cut one by one, the choices of a question begin differently
    encoded = iter(whole.encode([Document(q.prompt, choice) for q in questions for choice in q.choices]))
    contexts, tokens, cut = [], [], 0
    for question in questions:
        rows = [next(encoded) for _ in question.choices]
        longest = min(len(row.ids) for row in rows) - 1  # a token of each choice is left
        same = next((i for i in range(longest) if len({row.ids[i] for row in rows}) > 1), longest)
        tokens.append([row.ids[same] for row in rows])
        first = rows[0]
        begin = max(0, same - encoder.max_length)
        cut += begin > 0
        head = int(begin > 0 and not first.content[0])  # a BOS stays where it is
        contexts.append(first.at([*range(head), *range(begin + head, same)]))
    if cut:
        warnings.warn(
            f"{cut} of {len(contexts)} prompts are longer than {encoder.max_length} tokens; only the end of them is read",
            stacklevel=3,
        )
    return contexts, tokens


def _seen(
    logits: Float32[Tensor, "texts d_vocab"], asked: Sequence[tuple[Question, list[int]]]
) -> Iterator[dict[str, float | str]]:
    """How each question fares under its logits, given the token of each of its choices."""
    answers = torch.tensor([tokens[question.answer] for question, tokens in asked], device=logits.device)
    right = logits.gather(1, answers[:, None])
    probability = (right[:, 0] - logits.logsumexp(dim=1)).exp().tolist()
    above, level = (logits > right).sum(dim=1), (logits == right).sum(dim=1)
    rank = (above + (1 + level) / 2).tolist()  # the middle of those with the same logit
    for place, (question, tokens) in enumerate(asked):
        of_choices = logits[place, tokens]
        first = (of_choices == of_choices.max()).tolist()
        yield {
            "group": question.group,
            "right": first[question.answer] / sum(first),
            "chance": 1 / len(tokens),
            "probability": probability[place],
            "rank": rank[place],
        }
