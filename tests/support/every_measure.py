"""A short call of every public metric and attack, for what has to hold of all of them."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import torch

from mrp_lens import attacks, metrics
from mrp_lens.data import Corpus
from mrp_lens.data.task import UnlearningTask
from mrp_lens.edits import ConditionalProjectionEdit, Gate, ProjectionEdit
from mrp_lens.edits.subspace import Subspace
from mrp_lens.models import is_bridge
from tests.conftest import D_MODEL
from tests.support.quizzes import quiz

SENTENCES = [
    "The old man walked slowly.",
    "A house stood near the garden.",
    "The baker slept.",
    "A tired child ran late.",
]
TEXTS = Corpus.from_texts(SENTENCES, name="texts")
GROUPS = {"forget": Corpus.from_texts([f"The colour of Zaxim{i} is red." for i in range(4)], name="f"), "retain": TEXTS}
QUIZ, TRAIN, HELD_OUT, UNTAUGHT = (
    quiz(first, n, name=name) for name, first, n in (("quiz", 0, 4), ("t", 0, 8), ("v", 100, 20), ("u", 200, 20))
)
U = torch.rand(D_MODEL, generator=torch.Generator().manual_seed(3))
PROJECTION = ProjectionEdit({"blocks.1.hook_resid_post": Subspace.random(2, D_MODEL, seed=1)})
LAST = "blocks.3.hook_resid_post"
GATED = ConditionalProjectionEdit({LAST: Subspace.random(2, D_MODEL, seed=1)}, {LAST: Gate(U, 0.0)})
CURVES = pd.DataFrame(
    {
        "lr": [1e-3] * 2,
        "step": [0, 2],
        "counts": True,
        "held_out_accuracy": [0.4, 0.6],
        "ceiling": 0.9,
        "n": 20,
        "n_floor": 20,
    }
)
LEARN: dict[str, Any] = {"train": TRAIN, "steps": 2, "batch_size": 4, "progress": False}
FACTS: dict[str, Any] = {"held_out": HELD_OUT, "untaught": UNTAUGHT, "progress": False}


def relearned(model: Any) -> Any:
    with attacks.relearned(model, PROJECTION, lr=1e-2, **LEARN) as retrained:
        return metrics.choice_scores(retrained, QUIZ)


def relearn(model: Any) -> Any:
    """With low-rank updates too, where the class has them."""
    frames = [
        attacks.relearn(
            model, PROJECTION, lr=1e-2, parameters=parameters, marks=(0,), held_out=HELD_OUT, untaught=UNTAUGHT, **LEARN
        )  # type: ignore[arg-type]
        for parameters in (("all", "lora") if is_bridge(model) else ("all",))
    ]
    return pd.concat(frames).drop(columns="seconds")


def jailbreak(model: Any) -> Any:
    search = {"length": 2, "steps": 1, "candidates": 2, "top": 4, "batch": 4}
    losses = ("answer", "representation")
    found = [attacks.jailbreak(model, PROJECTION, train=TRAIN, loss=loss, **search, **FACTS) for loss in losses]  # type: ignore[arg-type]
    return pd.concat(found)


def measured(model: Any) -> metrics.Measured:
    return metrics.Measured(
        model=model, task=UnlearningTask((GROUPS["forget"],), TEXTS, TEXTS, QUIZ, TRAIN), edit=PROJECTION
    )


NO_FIGURES = {
    *(
        "ATTACKS",
        "Attack",
        "Bypass",
        "FactSplit",
        "Jailbreak",
        "Probe",
        "Relearn",
        "Setting",
        "SuiteConfig",
        "register",
    ),
    *("METRICS", "Measured", "Metric", "headings", "rows_and_frames_for"),
    *("labelled", "notes_of", "rows_of_attacks", "run_suite", "worst_attack"),
}
"""Public names that are no call, or a call made of the others."""
WITHOUT_MODEL: dict[str, Callable[[], Any]] = {
    "value": lambda: metrics.value(pd.DataFrame({"accuracy": [0.5], "low": [0.0], "high": [1.0]})),
    "bootstrap_interval": lambda: metrics.bootstrap_interval(np.arange(5.0)),
    "best": lambda: attacks.best(CURVES),
    "with_floor": lambda: attacks.with_floor(CURVES, CURVES.assign(held_out_accuracy=0.2)),
}
OF_A_MODEL: dict[str, Callable[[Any], Any]] = {
    "accuracy": lambda model: metrics.accuracy(model, QUIZ),
    "alignment": lambda model: metrics.alignment(model, TEXTS, U),
    "answer_probability": lambda model: metrics.answer_probability(model, TEXTS),
    "choice_scores": lambda model: metrics.choice_scores(model, QUIZ),
    "confidence": lambda model: metrics.confidence(model, QUIZ, mode="forced"),
    "damage": lambda model: metrics.damage(model, PROJECTION, TEXTS),
    "depth": lambda model: metrics.depth(model, PROJECTION, GROUPS["forget"], reference=model, layers=[2]),
    "exact_memorization": lambda model: metrics.exact_memorization(model, TEXTS),
    "extraction_strength": lambda model: metrics.extraction_strength(model, TEXTS),
    "fluency": lambda model: metrics.fluency(model, PROJECTION, SENTENCES[:2], max_new_tokens=3, orders=2),
    "forget_quality": lambda model: metrics.forget_quality(model, QUIZ, reference=model),
    "frames_for": lambda model: metrics.frames_for(measured(model))["alignment_by_layer"],
    "gate": lambda model: metrics.gate(model, GATED, GROUPS["forget"], TEXTS),
    "gate_tokens": lambda model: metrics.gate_tokens(model, GATED, TEXTS),
    "geometry": lambda model: metrics.geometry(model, TEXTS, PROJECTION),
    "logit_lens": lambda model: metrics.logit_lens(model, QUIZ),
    "membership": lambda model: metrics.membership(model, GROUPS["forget"], TEXTS, reference=model),
    "model_utility": lambda model: metrics.model_utility(model, quizzes={"quiz": QUIZ}, max_new_tokens=2),
    "noise_sensitivity": lambda model: metrics.noise_sensitivity(model, TEXTS),
    "open_ended": lambda model: metrics.open_ended(model, QUIZ, max_new_tokens=2),
    "perplexity": lambda model: metrics.perplexity(model, TEXTS),
    "predicted_coefficient": lambda model: metrics.predicted_coefficient(model, TEXTS, U),
    "principal_angles": lambda model: metrics.principal_angles(model, GROUPS, PROJECTION, rank=2),
    "principal_plane": lambda model: metrics.principal_plane(model, GROUPS, PROJECTION, layer=2),
    "propagation": lambda model: metrics.propagation(model, TEXTS, PROJECTION),
    "proposition_1": lambda model: metrics.proposition_1(
        model, SENTENCES[:1], U, layer=3, coefficient=2.0, noise=[0.01], samples=8
    ),
    "rows_for": lambda model: pd.DataFrame([metrics.rows_for("unlearn", measured(model))]),
    "separability": lambda model: metrics.separability(model, GROUPS["forget"], TEXTS, layers=[2]),
    "token_confidence": lambda model: metrics.token_confidence(model, QUIZ, tokens=2),
    "token_effects": lambda model: metrics.token_effects(model, GATED, [1, *range(5, 12)], prompt=4),
    "truth_ratio": lambda model: metrics.truth_ratio(model, QUIZ),
    "variance_by_coefficient": lambda model: metrics.variance_by_coefficient(
        model, SENTENCES[:1], U, layer=3, coefficients=[2.0], noise=0.01, samples=8
    ),
    "bypass": lambda model: attacks.bypass(
        model, PROJECTION, shots=TRAIN, kinds=["direction ablated", "noise", "weights rounded"], **FACTS
    ),
    "input_gradients": lambda model: attacks.input_gradients(model, PROJECTION, QUIZ),
    "jailbreak": jailbreak,
    "probe": lambda model: attacks.probe(
        model, PROJECTION, train=TRAIN, target="choice", layers=[2], held_out=HELD_OUT, progress=False
    ),
    "relearn": relearn,
    "relearned": relearned,
}
"""Name -> a call on a model without any edit."""
