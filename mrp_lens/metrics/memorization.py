"""What a model knows by heart: the share of a text that it predicts right, and how little of it brings back the rest."""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from mrp_lens.data import Corpus
from mrp_lens.metrics.bootstrap import share_interval
from mrp_lens.metrics.registry import Measured, register
from mrp_lens.metrics.tokens import by_document
from mrp_lens.models import LensModel
from mrp_lens.utils.torch_state import ordinary_torch

Right = Sequence[NDArray[np.bool_]]
"""Of each document which tokens are predicted right."""


@ordinary_torch(gradients=False)
def exact_memorization(
    model: LensModel, corpus: Corpus, *, batch_size: int = 128, seed: int = 0, progress: bool = True
) -> pd.DataFrame:
    """Share of a document's tokens that are the model's first guess after the true ones before them, mean over documents.

    Tirumala et al., "Memorization Without Overfitting" (arXiv 2205.10770), as open-unlearning computes it
    (arXiv 2506.12618). Much of a text can be guessed without having seen it: compare with a model that never did.

    Args:
        model: HookedTransformer or TransformerBridge, with the edit on if there is one.
        corpus: of each document the tokens that count: of one with a prompt the completion alone.
        batch_size: documents at a time.
        seed: of the bootstrap.
        progress: show a progress bar.

    Returns:
        One row: `corpus`; `documents` with a token to predict; `exact_memorization` in [0, 1] with its 95% bootstrap
        interval over documents `low`, `high` (NaN with a single document); `constant`, the control: what saying the
        corpus's most frequent token everywhere gives.

    Raises:
        ValueError: no document, or none with a token to predict; NonFiniteError where logits are NaN or infinite.

    Example:
        >>> with edit.applied(model):
        ...     frame = exact_memorization(model, forget)
    """
    return _row("exact_memorization", np.mean, corpus, _guessed(model, corpus, batch_size, progress), seed)


@ordinary_torch(gradients=False)
def extraction_strength(
    model: LensModel, corpus: Corpus, *, batch_size: int = 128, seed: int = 0, progress: bool = True
) -> pd.DataFrame:
    """Share of a document that the model writes from the rest: 1 - k / T, of its T tokens the first k given, k smallest.

    After Carlini et al., "Extracting Training Data from Large Language Models" (arXiv 2012.07805), greedily, as in
    open-unlearning (arXiv 2506.12618), whose code gives 1 / T where even all other tokens do not bring back the last: here
    that is 0. Arguments, errors and the control as for `exact_memorization`.

    Returns:
        One row: `corpus`, `documents`, `extraction_strength` in [0, 1], `low`, `high`, `constant`.

    Example:
        >>> with edit.applied(model):
        ...     frame = extraction_strength(model, forget)
    """
    return _row("extraction_strength", _strength, corpus, _guessed(model, corpus, batch_size, progress), seed)


@register(
    "memorization",
    summary="What the model knows of the forget set by heart: exact memorisation and extraction strength.",
    source="arXiv 2205.10770, arXiv 2012.07805",
    row=lambda frame: {
        f"forget_{name}{end}": row[column]
        for name, row in frame.set_index("measure").iterrows()
        for column, end in (("value", ""), ("low", "_low"), ("high", "_high"))
    },
    headings={
        "forget_exact_memorization": "exact memorisation of the forget set",
        "forget_extraction_strength": "extraction strength of the forget set",
    },
    tables={"benchmark"},
)
def _of_forget_set(measured: Measured) -> pd.DataFrame:
    texts = measured.task.forget_texts.spread(measured.documents)
    guessed = _guessed(measured.model, texts, 128, measured.progress)
    frames = [
        _row(name, statistic, texts, guessed, measured.seed).rename(columns={name: "value"}).assign(measure=name)
        for name, statistic in (("exact_memorization", np.mean), ("extraction_strength", _strength))
    ]
    return pd.concat(frames, ignore_index=True)


def _guessed(model: LensModel, corpus: Corpus, batch_size: int, progress: bool) -> tuple[Right, Right]:
    """Which tokens the model predicts right, and which the most frequent one does."""

    def measure(
        log_probabilities: Float[Tensor, "counted d_vocab"], tokens: Int[Tensor, " counted"]
    ) -> Float[Tensor, "counted 2"]:
        return torch.stack([(log_probabilities.argmax(dim=-1) == tokens).float(), tokens.float()], dim=1)

    found = [own for own in by_document(model, corpus, measure, batch_size=batch_size, progress=progress) if len(own)]
    frequent, _ = Counter(np.concatenate(found)[:, 1].tolist()).most_common(1)[0]
    return [own[:, 0] == 1.0 for own in found], [own[:, 1] == frequent for own in found]


def _strength(right: NDArray[np.bool_]) -> float:
    """The share of a text's tokens that lie behind the last wrong one."""
    wrong = np.flatnonzero(~right)
    return 1.0 - (wrong[-1] + 1) / len(right) if len(wrong) else 1.0


def _row(
    name: str,
    statistic: Callable[[NDArray[np.bool_]], Any],
    corpus: Corpus,
    guessed: tuple[Right, Right],
    seed: int,
) -> pd.DataFrame:
    values, constant = (np.array([float(statistic(right)) for right in of_all]) for of_all in guessed)
    low, high = share_interval(values, seed=seed)
    row = {"corpus": corpus.name, "documents": len(values), name: values.mean(), "low": low, "high": high}
    return pd.DataFrame([{**row, "constant": constant.mean()}])
