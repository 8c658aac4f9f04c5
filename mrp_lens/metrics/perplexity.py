"""How well a model predicts text."""

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from mrp_lens.data import Corpus
from mrp_lens.metrics.bootstrap import bootstrap_interval
from mrp_lens.metrics.registry import Measured, register
from mrp_lens.metrics.tokens import by_document
from mrp_lens.models import LensModel
from mrp_lens.utils.torch_state import ordinary_torch


@ordinary_torch(gradients=False)
def perplexity(
    model: LensModel, corpus: Corpus, *, batch_size: int = 128, seed: int = 0, progress: bool = True
) -> pd.DataFrame:
    """exp of the mean cross-entropy (nats) per predicted token, with a bootstrap interval over documents.

    Args:
        model: HookedTransformer or TransformerBridge, with the edit on if there is one.
        corpus: of each document the tokens that count: of one with a prompt the completion alone.
        batch_size: documents at a time.
        seed: of the bootstrap.
        progress: show a progress bar.

    Returns:
        One row: `corpus`; `documents` and `tokens`, how many were predicted (a document of one token has none to predict);
        `perplexity`, infinite where the model rules a token of the text out; `low`, `high` (NaN with a single document);
        `uniform`, the control: the perplexity of guessing uniformly over the vocabulary.

    Raises:
        ValueError: no document, or none with a token to predict; NonFiniteError where logits are NaN or infinite.
    """
    sums = _sums(model, corpus, batch_size=batch_size, progress=progress)
    value, low, high = perplexity_of(sums, seed=seed)
    row = {"corpus": corpus.name, "documents": len(sums), "tokens": int(sums[:, 1].sum()), "perplexity": value}
    return pd.DataFrame([{**row, "low": low, "high": high, "uniform": float(model.cfg.d_vocab)}])


@ordinary_torch(gradients=False)
def answer_probability(
    model: LensModel, corpus: Corpus, *, batch_size: int = 128, seed: int = 0, progress: bool = True
) -> pd.DataFrame:
    """Mean over documents of the completion's probability per token (geometric mean over its tokens).

    Arguments as for `perplexity`.

    Returns:
        One row: `corpus`; `documents`, how many have a token to predict; `probability`, `low`, `high` (NaN with a single
        document); `uniform`, the control: 1 / d_vocab.

    Raises:
        ValueError: as `perplexity`.
    """
    sums = _sums(model, corpus, batch_size=batch_size, progress=progress)
    values = np.exp(sums[:, 0] / sums[:, 1])
    low, high = bootstrap_interval(values, seed=seed)
    row = {"corpus": corpus.name, "documents": len(values), "probability": float(values.mean())}
    return pd.DataFrame([{**row, "low": low, "high": high, "uniform": 1 / float(model.cfg.d_vocab)}])


@register(
    "answer-probability",
    summary="Probability per token of the forget set's completions.",
    row=lambda frame: {
        f"forget_probability{end}": frame[column].iloc[0]
        for column, end in (("probability", ""), ("low", "_low"), ("high", "_high"))
    },
    headings={"forget_probability": "probability of the forget set's tokens"},
    tables={"unlearn", "benchmark"},
)
def _of_forget_set(measured: Measured) -> pd.DataFrame:
    texts = measured.task.forget_texts.spread(measured.documents)
    return answer_probability(measured.model, texts, seed=measured.seed, progress=measured.progress)


@register(
    "perplexity",
    summary="Perplexity of retain text that no fit saw.",
    row=lambda frame: {"text_perplexity": frame["perplexity"].iloc[0]},
    headings={"text_perplexity_ratio": "perplexity of text, after / before"},
    tables={"unlearn"},
)
def _of_held_out_text(measured: Measured) -> pd.DataFrame:
    texts = measured.task.held_out.spread(measured.documents)
    return perplexity(measured.model, texts, seed=measured.seed, progress=measured.progress)


def perplexity_of(sums: NDArray[np.float64], *, seed: int) -> tuple[float, float, float]:
    """The perplexity of documents, with its interval.

    Args:
        sums: [documents, 2]: sum of log-probabilities (nats), and of how many tokens.
        seed: of the bootstrap.
    """

    def statistic(resampled: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.exp(-resampled[:, :, 0].sum(axis=1) / resampled[:, :, 1].sum(axis=1))

    with np.errstate(over="ignore"):  # above e^709 it is infinite
        return float(statistic(sums[None])[0]), *bootstrap_interval(sums, statistic, seed=seed)


def _sums(model: LensModel, corpus: Corpus, *, batch_size: int, progress: bool) -> NDArray[np.float64]:
    """[documents, 2]: sum of log-probabilities of the tokens that count, and their number, where there are any."""
    found = by_document(model, corpus, batch_size=batch_size, progress=progress)
    return np.array([[values.sum(), len(values)] for values in found if len(values)])
