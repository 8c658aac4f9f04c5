"""What each method goes through in a fit, part by part: what it holds in memory, and how much it computes.

A method of your own says so with `@needs.register` on a function of itself and the `Setup`; those that derive from one that is known
here are known too.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import singledispatch
from typing import Any

from mrp_lens.data.tokenization import rows_with_logits
from mrp_lens.methods import MRP, UNDIAL, DirectionAblation, FitTemplate, IdkPreference
from mrp_lens.methods.base import HELD_OUT, STATES, STATES_BATCH
from mrp_lens.methods.baselines import GradientMethod
from mrp_lens.methods.budget import BATCH as LOOK_BATCH
from mrp_lens.methods.budget import EVERY, LOOK, NUMBERS, counted_tokens
from mrp_lens.methods.control import BATCH as CONTROL_BATCH
from mrp_lens.methods.control import CHOICES, FORMS, QUESTIONS
from mrp_lens.methods.coverage import STEMS, Coverage
from mrp_lens.methods.mrp.alternatives import MOST
from mrp_lens.methods.mrp.gates import STATES as GATE_STATES
from mrp_lens.methods.mrp.gates import hooks_together
from mrp_lens.methods.rmu import MEASURED_DOCUMENTS, Misdirection
from mrp_lens.models.generation import AT_ONCE
from mrp_lens.models.kept_states import BYTES
from mrp_lens.runs.plan.memory import (
    FLOAT32,
    Phase,
    Setup,
    passing_block,
    reading,
    saved_by_block,
    stream,
    vocabulary,
    widest,
)
from mrp_lens.utils.validation import or_default

FLOAT64 = 8
CONTROL_TOKENS, CONTROL_ENDING = 52, 14  # of a control question of 30 words and its frame; of its ending
PROMPT_TOKENS = 4  # of what the model writes from
REFUSAL_TOKENS = 10
ADAM = 2 * FLOAT32  # bytes of the moments of a number
ALTERNATIVE = 34  # bytes of an alternative of a token: its id, share, mask, log-probability, and four products
REGRESSION = 14  # sets of states that the regression of one gate holds


@dataclass(frozen=True)
class Needs:
    """What a fit needs.

    Attributes:
        phases: its parts.
        rows: texts of its largest pass with gradient; 0: it has none.
        operations: floating-point operations of all of it, a multiplication and an addition counted as two.
    """

    phases: tuple[Phase, ...]
    rows: int
    operations: float

    @property
    def peak(self) -> Phase:
        """The part that holds most."""
        return max(self.phases, key=lambda phase: phase.total)


class NotPlannedError(ValueError):
    """What a fit needs cannot be said: the method cannot be fitted to such a model, or nobody said what it needs."""


@singledispatch
def needs(method: Any, setup: Setup) -> Needs:
    """What a fit of a method needs; `method` is one with its settings.

    Raises:
        NotPlannedError: nobody has said what this method needs, or it cannot be fitted to such a model.
    """
    raise NotPlannedError(
        f"nothing is known of what {type(method).__name__} needs; a method of your own says so with mrp_lens.runs.plan.needs.register"
    )


@needs.register
def _of_mrp(method: MRP, setup: Setup) -> Needs:
    """MRP: a pass of each side with the rows on, with gradients above the first of them."""
    if method.distillation is not None:
        raise NotPlannedError(f"what the distillation of {method.name} needs is not known; plan without it")
    sizes = setup.sizes
    layers = method._layers(sizes.stand_in)
    most = min(method.batch_size, setup.documents, rows_with_logits(setup.length - 1, sizes.d_vocab))
    rows, depth = method.micro_batch or most, sizes.n_layers - min(layers) - 1
    read = setup.of_length(or_default(method.retain_length, setup.length))  # retain documents in an update
    counted = rows * (setup.length - 1)
    passes = method.steps * method.batch_size / setup.documents
    compares = method.retain_loss == "kl"
    kept = kept_states(setup, min(layers), sides=2, passes=passes)
    last = kept_states(setup, sizes.n_layers, sides=int(compares) + (method.forget_loss == "odds"), passes=passes)
    trained = len(layers) * method._rank(sizes.stand_in) * sizes.d_model
    standing = Phase("", caches=kept + last + references(method, setup), optimizer=trained * (FLOAT32 + ADAM))
    alternatives = counted * min(MOST, sizes.d_vocab) * ALTERNATIVE if method.forget_loss == "alternatives" else 0.0
    # predicted, and for its gradient two scattered ones and their sum, or two with the softmax of the reference
    forget = 4 * vocabulary(setup, counted) + alternatives
    # KL divergence: reference, predicted, and its gradient in parts and as a whole
    retain = 4 * vocabulary(read, rows * (read.length - 1))
    steps = []
    for name, wide, side in (("forget step", forget, setup), ("retain step", retain, read)):
        graph = depth * saved_by_block(side, rows) + len(layers) * _hook(method, side, rows * side.length)
        # while the reference is computed, and when the gradient has come to the last block, predicted alone
        once = vocabulary(side, rows * (side.length - 1))
        held = replace(standing, activations=graph, spread=graph)
        steps.append(widest(name, held, logits=wide, inside=passing_block(side, rows), beside=once))
    forgotten, kept_texts = setup.length * method.batch_size, read.length * method.batch_size
    blocks = 2 * depth + (1 if kept else min(layers) + 1)  # forward and backward
    reference = 0.0 if last else _blocks(read, kept_texts, sizes.n_layers)
    step = _blocks(setup, forgotten, blocks) + _blocks(read, kept_texts, blocks) + reference
    step += _unembedding(setup, 2 * forgotten + (3 if compares else 2) * kept_texts)
    begun = (bool(kept) + bool(last)) * _blocks(setup, 2 * setup.documents * setup.length, sizes.n_layers)
    return Needs(
        (
            *_starting(method, setup, len(layers)),
            *_before_training(method, setup),
            *steps,
            *_looks(method, setup, standing),
        ),
        rows,
        method.steps * step + begun + _around(method, setup),
    )


def _hook(method: MRP, setup: Setup, tokens: float) -> float:
    """Of a projection, in float32: the part that is removed and what is left, with a gate the states of length 1; in half precision
    the states in float32 too."""
    return stream(setup, tokens) * (2 + method.conditional + setup.is_half)


def _starting(method: MRP, setup: Setup, hooks: int) -> list[Phase]:
    """The states that rows and gates start from, of all hooks, and what is computed of them at one."""
    sizes = setup.sizes
    there = setup.documents * setup.length
    states, of_gates = (min(count + setup.length, there) for count in (STATES, GATE_STATES))
    gram = 3 * sizes.d_model**2 * FLOAT64  # the matrix, its eigenvectors, and room to find them
    first = 2 * hooks * stream(setup, states) + stream(setup, states, FLOAT64) * 2 + gram
    phases = [Phase("start of the rows", activations=first)] if method.init != "random" else []
    if method.conditional:
        at_once = min(hooks, hooks_together(sizes.d_model))
        phases.append(Phase("start of the gates", activations=(3 * at_once + REGRESSION) * stream(setup, of_gates)))
    texts = min(STATES_BATCH, setup.documents)
    return [*phases, Phase("states before training", activations=passing_block(setup, texts))]


@needs.register
def _of_misdirection(method: Misdirection, setup: Setup) -> Needs:  # type: ignore[type-arg]
    """RMU and Adaptive RMU: a pass to the layer without gradient, and from the first trained matrix on again with."""
    refuse_mixture(method, setup)
    sizes, e = setup.sizes, setup.itemsize
    layer, trained = method._layers(sizes.stand_in)
    rows = method.micro_batch or min(method.batch_size, setup.documents)
    tokens, again = rows * setup.length, layer - min(trained) + 1
    passes = method.steps * method.batch_size / setup.documents
    counts = method.positions == "content" and method.padding == "right"
    kept = kept_states(setup, min(trained), sides=2, passes=passes) if counts else 0.0
    numbers = len(trained) * sizes.d_model * sizes.d_mlp
    # the matrix as it was, the one in training, its gradient and moments; in half precision the model's copy of it
    optimizer = numbers * (e + FLOAT32 + FLOAT32 + ADAM + (e if setup.is_half else 0))
    standing = Phase("", caches=kept + references(method, setup), optimizer=optimizer)
    # the blocks' inputs, frozen and trained states, the error, its square and weight; what trained matrices are multiplied by
    states = stream(setup, tokens, e) * again + 5 * stream(setup, tokens)
    products = (len(trained) + 1) * tokens * sizes.d_mlp * e
    step = replace(standing, name="step", activations=(again - 1) * saved_by_block(setup, rows) + states + products)
    first = 0 if kept else min(trained)
    blocks = (layer + 1 - first) + 2 * again  # frozen states; trained ones and their gradient
    kept_length = or_default(method.retain_length if method.shuffle else None, setup.length)
    operations = 0.0
    for side in (setup, setup.of_length(kept_length)):
        read = side.length * method.batch_size
        operations += method.steps * (_blocks(side, read, blocks) + 2 * numbers * read)
    measured = Phase("norm of the states", activations=passing_block(setup, min(MEASURED_DOCUMENTS, setup.documents)))
    return Needs(
        (measured, *_before_training(method, setup), step, *_looks(method, setup, standing)),
        rows,
        operations + _around(method, setup),
    )


@needs.register
def _of_gradients(method: GradientMethod, setup: Setup) -> Needs:
    """Gradient ascent, gradient difference, NPO, SimNPO: one pass for both sides, with gradients from the first trained matrix on."""
    return _trained_on_predictions(method, setup)


@needs.register
def _of_undial(method: UNDIAL, setup: Setup) -> Needs:
    """The same, and a pass of the forget side through the matrices as they were, which are kept: what it gives stays in the step."""
    return _trained_on_predictions(method, setup, unedited=1)


@needs.register
def _of_idk(method: IdkPreference, setup: Setup) -> Needs:
    """The same, and in each step the prompts of the forget side with refusals, taken to be as long as the documents."""
    return _trained_on_predictions(method, setup, replies=1)


def _trained_on_predictions(method: GradientMethod, setup: Setup, *, unedited: int = 0, replies: int = 0) -> Needs:
    """What a method needs that trains MLP output matrices on what the model predicts.

    Args:
        method: with its settings.
        setup: what is planned for.
        unedited: passes of the forget side without gradient, of which probabilities stay.
        replies: passes with gradient, beside that of both sides, of texts for each forget document.
    """
    refuse_mixture(method, setup)
    sizes, e = setup.sizes, setup.itemsize
    layers = method._layers(sizes.stand_in)
    sides = 2 if method.retain_weight > 0.0 else 1
    batch = sides * min(method.batch_size, setup.documents)
    rows = min(method.micro_batch or rows_with_logits(setup.length - 1, sizes.d_vocab), batch)
    tokens, counted = rows * setup.length, rows * (setup.length - 1)
    depth = sizes.n_layers - min(layers) - 1
    numbers = len(layers) * sizes.d_model * sizes.d_mlp
    # gradient, moments and the values to restore; in half precision the matrix in training and its gradient
    optimizer = numbers * (FLOAT32 + ADAM + e * (1 + unedited) + (FLOAT32 + e if setup.is_half else 0))
    standing = Phase("", caches=references(method, setup), optimizer=optimizer)
    graph = (1 + replies) * (depth * saved_by_block(setup, rows) + len(layers) * tokens * sizes.d_mlp * e)
    # predicted, its scattered gradient, that of the logits, and their sum; of refusals what is predicted
    logits = (4 + unedited) * vocabulary(setup, counted) + replies * vocabulary(setup, rows * REFUSAL_TOKENS)
    step = replace(
        standing,
        name="step",
        activations=graph,
        spread=graph,
        logits=logits,
    )
    texts = setup.length * method.batch_size
    side = (sides + replies) * texts
    blocks = sizes.n_layers + depth + 1
    step_operations = _blocks(setup, side, blocks) + 2 * _unembedding(setup, side) + 2 * numbers * side
    step_operations += unedited * (_blocks(setup, texts, sizes.n_layers) + _unembedding(setup, texts))
    operations = method.steps * step_operations
    return Needs(
        (*_before_training(method, setup), step, *_looks(method, setup, standing)),
        rows,
        operations + _around(method, setup),
    )


@needs.register
def _of_ablation(method: DirectionAblation, setup: Setup) -> Needs:
    """Direction ablation: one look at the states of both sides at every layer."""
    layers = method._layers(setup.sizes.stand_in)
    states = min(STATES + setup.length, setup.documents * setup.length)
    texts = min(STATES_BATCH, setup.documents)
    seen = Phase("states", caches=2 * len(layers) * stream(setup, states), activations=passing_block(setup, texts))
    return Needs((seen,), 0, 2 * _blocks(setup, states, max(layers) + 1))


def of_accuracy(setup: Setup, *, texts: int, answer: float) -> Needs:
    """`metrics.accuracy`: passes of so many texts, of which `answer` tokens each are scored, beside what the pass before gave."""
    copies = 3 if setup.documents > texts else 2
    seen = reading("scoring choices", setup, texts, texts * answer, Phase(""), copies=copies)
    tokens = setup.documents * setup.length
    operations = _blocks(setup, tokens, setup.sizes.n_layers) + _unembedding(setup, setup.documents * answer)
    return Needs((seen,), 0, operations)


def refuse_mixture(method: Any, setup: Setup) -> None:
    """Refuse methods that train the MLP's output matrix where there is no such matrix.

    Raises:
        NotPlannedError: names the method.
    """
    if setup.sizes.is_mixture:
        raise NotPlannedError(
            f"{method.name} trains MLP output matrices, and a mixture of experts has no single one a layer"
        )


def kept_states(setup: Setup, layer: int, *, sides: int, passes: float) -> float:
    """What enters a layer, of every text of as many of the sides as 2^30 bytes hold, if a fit reads it at least once."""
    side = stream(setup, setup.documents * setup.length, setup.itemsize)
    return min(sides, BYTES // side) * side if layer and passes >= 1.0 else 0.0


def looked_at(setup: Setup) -> tuple[int, int]:
    """Retain documents that the damage is measured on, a tenth, at most 64, and as many as their log-probabilities fit; and tokens of each
    that count."""
    held, fitting, tokens = (
        min(HELD_OUT, max(1, setup.documents // 10)),
        NUMBERS // setup.sizes.d_vocab,
        setup.length - 1,
    )
    if held * tokens > fitting:
        tokens = min(tokens, counted_tokens(fitting))
    return min(held, max(1, fitting // tokens)), tokens


def references(method: FitTemplate[Any], setup: Setup) -> float:
    """Log-probabilities of the unedited model on these documents."""
    if method.budget is None:
        return 0.0
    documents, tokens = looked_at(setup)
    return vocabulary(setup, documents * tokens)


def _looks(method: FitTemplate[Any], setup: Setup, standing: Phase) -> Sequence[Phase]:
    """At the damage, of which four copies are made beside the reference, and at the control questions."""
    if method.budget is None:
        return ()
    d_vocab = setup.sizes.d_vocab
    documents, tokens = looked_at(setup)
    rows = min(LOOK_BATCH, documents, rows_with_logits(tokens, d_vocab))
    damage = reading("damage", setup, rows, rows * tokens, standing, copies=4)
    asked = setup.of_length(CONTROL_TOKENS)
    ending = min(CONTROL_ENDING, asked.length - 1)
    texts = min(CONTROL_BATCH, CHOICES * min(QUESTIONS, setup.documents), rows_with_logits(ending, d_vocab))
    return damage, reading("control questions", asked, texts, texts * ending, standing)


def _before_training(method: FitTemplate[Any], setup: Setup) -> Sequence[Phase]:
    """What the model writes: keys and values of texts side by side, and logits, probabilities and samples."""
    coverage: Coverage | None = method.coverage
    texts = 0 if coverage is None else _side_by_side(coverage)
    if coverage is None or not texts:
        return ()
    sizes = setup.sizes
    length = PROMPT_TOKENS + coverage.new_tokens
    keys = 2 * sizes.n_layers * texts * length * sizes.n_kv_heads * sizes.d_head * setup.itemsize
    standing = Phase("", caches=keys + references(method, setup))
    return (reading("writing", setup.of_length(PROMPT_TOKENS), texts, texts * PROMPT_TOKENS, standing),)


def _side_by_side(coverage: Coverage) -> int:
    """Texts with prompts of one length: those about a name begin in one of five ways."""
    return min(AT_ONCE, max(coverage.questions, coverage.free, math.ceil(coverage.about_names / len(STEMS))))


def _blocks(setup: Setup, tokens: float, blocks: float) -> float:
    """Operations of a pass of so many tokens through so many blocks: two for each number that a token is multiplied by, and four for
    each pair of tokens and number of a head in attention."""
    sizes = setup.sizes
    attention = 4 * setup.length * sizes.n_heads * sizes.d_head
    return tokens * blocks * (2 * sizes.active_block_parameters + attention)


def _unembedding(setup: Setup, tokens: float) -> float:
    return 2.0 * tokens * setup.sizes.d_model * setup.sizes.d_vocab


def _around(method: FitTemplate[Any], setup: Setup) -> float:
    """Operations of what the model writes, and of the looks at damage and control questions."""
    sizes, total = setup.sizes, 0.0
    depth = sizes.n_layers
    if method.coverage is not None:
        coverage = method.coverage
        texts = coverage.about_names + coverage.questions + coverage.free
        written = texts * (PROMPT_TOKENS + coverage.new_tokens)
        total += _blocks(setup, written, depth) + _unembedding(setup, written)
    if method.budget is not None:
        steps = int(getattr(method, "steps", 0))
        documents, tokens = looked_at(setup)
        read = (2 + steps // EVERY) * documents
        asked = CHOICES * min(QUESTIONS, setup.documents) * len(FORMS) * (2 + steps // LOOK)
        total += _blocks(setup, read * setup.length, depth) + _unembedding(setup, read * tokens)
        total += _blocks(setup, asked * CONTROL_TOKENS, depth) + _unembedding(setup, asked * CONTROL_ENDING)
    return total
