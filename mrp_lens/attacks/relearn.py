"""Retraining on T (RTT, arXiv 2410.08827): teach an edited model some of what it lost, and ask for the rest."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pandas as pd

from mrp_lens.attacks.evaluation import UNKNOWN, Counted, Exam, counted, recovery
from mrp_lens.attacks.finetuning import LORA_RANK, Attacker, Form, Parameters
from mrp_lens.data import Corpus, Questions
from mrp_lens.edits import Edit
from mrp_lens.models import LensModel
from mrp_lens.models.finite import NonFiniteError
from mrp_lens.utils.torch_state import ordinary_torch

MARKS = (0, 5, 20, 40, 100)
"""Updates after which an attack is scored, besides its last."""
TAUGHT = 0.95
"""An attack counts only if its own training questions come to be answered this often."""


@ordinary_torch(gradients=True)
def relearn(
    model: LensModel,
    edit: Edit | None,
    *,
    train: Questions | Corpus,
    held_out: Questions,
    untaught: Questions | None = None,
    new: Questions | None = None,
    steps: int = 100,
    lr: float | Sequence[float] | None = None,
    samples: int | None = None,
    batch_size: int = 32,
    form: Form = "kept",
    parameters: Parameters = "all",
    lora_rank: int = LORA_RANK,
    marks: Sequence[int] = MARKS,
    seed: int = 0,
    progress: bool = True,
) -> pd.DataFrame:
    """Retrain on some of the forgotten facts and score on others: what comes back was never removed.

    `train` says nothing about the facts of `held_out`, so accuracy that comes back on these was still in the model
    (arXiv 2410.08827). Recovery = (accuracy after - floor) / (ceiling - floor): the floor is the accuracy, after the same
    attack, on facts that were never taught; the ceiling that of the unedited model on `held_out`.

    Args:
        model: HookedTransformer or TransformerBridge without the edit; it is left exactly as it was.
        edit: what to attack; None: the unedited model.
        train: T. Questions are trained on as prompts with their right answers. Of a Corpus, "accuracy" is the share of
            its counted tokens that the model would say.
        held_out: V, which shares nothing with T but what they are about; `questions.halves()` splits.
        untaught: never-taught questions, like those of V: a random half of them is the floor, the other half the
            control, whose own recovery ought to be 0. None: the floor is what guessing gives.
        new: facts that the model does not know, as many as in T: another run with the same budget is taught these, for
            a model that cannot be trained is not one that has unlearned.
        steps: updates.
        lr: rate, or the attacker's grid of rates. None: three around 0.128 / d_model (ten times that for "lora").
        samples: at most this many documents of T, evenly spread; None: all.
        batch_size, form, parameters, lora_rank, seed: see `Attacker`.
        marks: updates after which to score; the last is scored always.
        progress: show progress bars.

    Returns:
        A row a rate and mark: `attack`, `form`, `parameters`, `samples`, `lr`, `step`, `train_accuracy` (on at
        most 100 documents of T), `held_out_accuracy`, `n`; on `held_out` without attack `accuracy_before` (unedited)
        and `accuracy_edited`; `floor`, `n_floor`, `ceiling`; `recovery`, `recovery_low`, `recovery_high` (95%), for the never-taught control
        `control_recovery`, `control_recovery_low`, `control_recovery_high`; `new_accuracy`; `counts`: whether T
        reaches 0.95 at this rate; `seconds`. A rate that makes the loss infinite has its rows until then; so has all
        after Ctrl-C, which `frame.attrs["interrupted"]` tells.

    Raises:
        TypeError: train or held_out of another kind.
        ValueError: T and V overlap, a budget of 0, a form that the edit does not have, a model that was loaded in
            inference mode; NonFiniteError where its logits are NaN or infinite before any update.

    Example:
        >>> taught, asked = ml.World().questions("potions").halves(by="entity")  # doctest: +SKIP
        >>> ml.attacks.relearn(model, fit.edit, train=taught, held_out=asked, steps=100)  # doctest: +SKIP
    """
    attacker = Attacker(
        steps=steps, batch_size=batch_size, form=form, parameters=parameters, lora_rank=lora_rank, seed=seed
    )
    rates = attacker.rates(model, lr)
    exam = Exam.of(model, edit, limited(train, samples), held_out, untaught, seed=seed)
    points = sorted({mark for mark in marks if 0 <= mark <= steps} | {steps})
    rows: list[dict[str, Any]] = []
    for rate in rates:
        begun = time.perf_counter()
        scored: dict[int, dict[str, Any]] = {}
        learned: dict[int, float] = {}

        def score(step: int, scored: dict[int, dict[str, Any]] = scored, begun: float = begun) -> None:
            scored[step] = exam.marked(model) | {"seconds": time.perf_counter() - begun}

        with attacker.retrained(
            model, edit, documents_of(exam.taught), lr=rate, score=score, marks=points, progress=progress
        ) as outcome:
            pass
        if new is not None and outcome == "finished":

            def score_new(step: int, learned: dict[int, float] = learned, new: Questions = new) -> None:
                learned[step] = counted(model, new).accuracy

            with attacker.retrained(
                model, edit, new.right_answers(), lr=rate, score=score_new, marks=points, progress=progress
            ) as outcome:
                pass
        counts = any(row["train_accuracy"] >= TAUGHT for row in scored.values())
        described = {"attack": "relearn", "form": form, "parameters": parameters, "samples": len(exam.taught)}
        rows += [
            described | {"lr": rate, "step": step, **row, "new_accuracy": learned.get(step, UNKNOWN), "counts": counts}
            for step, row in scored.items()
        ]
        if outcome == "interrupted":
            break
    frame = pd.DataFrame(rows)
    frame.attrs["interrupted"] = outcome == "interrupted"
    return frame


@contextmanager
def relearned(
    model: LensModel,
    edit: Edit | None,
    *,
    train: Questions | Corpus,
    steps: int = 100,
    lr: float | None = None,
    samples: int | None = None,
    batch_size: int = 32,
    form: Form = "kept",
    parameters: Parameters = "all",
    lora_rank: int = LORA_RANK,
    seed: int = 0,
    progress: bool = True,
) -> Iterator[LensModel]:
    """The model as `relearn` leaves it at one rate, to look at; exactly as it was on exit.

    Arguments as for `relearn`; lr None: 0.128 / d_model. After Ctrl-C it is the model as far as it was retrained.

    Raises:
        TypeError, ValueError: as `relearn`; NonFiniteError where the rate makes the loss infinite.

    Example:
        >>> with ml.attacks.relearned(model, fit.edit, train=taught, steps=20):  # doctest: +SKIP
        ...     ml.metrics.accuracy(model, asked)
    """
    attacker = Attacker(
        steps=steps, batch_size=batch_size, form=form, parameters=parameters, lora_rank=lora_rank, seed=seed
    )
    rates = attacker.rates(model, lr)
    taught = documents_of(limited(train, samples))
    rate = rates[len(rates) // 2]
    with attacker.retrained(model, edit, taught, lr=rate, progress=progress) as outcome:
        if outcome == "diverged":
            raise NonFiniteError(f"retraining at lr {rate:.2g} made the loss NaN or infinite; give a lower lr")
        yield model


def best(curves: pd.DataFrame) -> pd.DataFrame:
    """The attacker's best rate after each number of updates: the row with the highest accuracy on V, among rates at
    which the attack counts where there are any."""
    keys = [key for key in ("method", "seed", "form", "parameters", "samples", "step") if key in curves]
    order = curves.sort_values(["counts", "held_out_accuracy"], ascending=False, kind="stable")
    return order.drop_duplicates(keys).sort_index().reset_index(drop=True)


def with_floor(curves: pd.DataFrame, reference: pd.DataFrame, *, seed: int = 0) -> pd.DataFrame:
    """The curves with another floor: a model that never saw what was forgotten, under the same attack.

    Args:
        curves: of `relearn`.
        reference: of `relearn` on that model, with the same data, rates and marks.
        seed: of the bootstrap.

    Raises:
        ValueError: a rate and mark of the curves that the reference lacks.
    """
    known = reference.set_index(["lr", "step"])[["held_out_accuracy", "n"]]
    rows = []
    for row in curves.to_dict("records"):
        place = (row["lr"], row["step"])
        if place not in known.index:
            raise ValueError(f"the reference has no row for lr {place[0]:.2g} and step {place[1]}; attack it likewise")
        accuracy, n = known.loc[place]
        floor = Counted(accuracy * n, int(n))
        after, ceiling = (Counted(row[name] * row["n"], row["n"]) for name in ("held_out_accuracy", "ceiling"))
        found = recovery(after, floor, ceiling, seed=seed).columns()
        rows.append(row | {"floor": floor.accuracy, "n_floor": floor.n} | found)
    return pd.DataFrame(rows)


def limited(train: Questions | Corpus, samples: int | None) -> Questions | Corpus:
    """At most `samples` documents of T.

    Raises:
        TypeError: neither Questions nor a Corpus.
        ValueError: samples below 1.
    """
    if not isinstance(train, Questions | Corpus):
        raise TypeError(f"train must be Questions or a Corpus, got {type(train).__name__}")
    if samples is not None and samples < 1:
        raise ValueError(f"samples must be at least 1, got {samples}")
    return train.spread(samples)


def documents_of(train: Questions | Corpus) -> Corpus:
    """T as documents."""
    return train.right_answers() if isinstance(train, Questions) else train
