"""How well a model predicts text."""

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from mrp_lens.data import Corpus
from mrp_lens.data.tokenization import in_order
from mrp_lens.metrics.bootstrap import bootstrap_interval
from mrp_lens.metrics.registry import Measured, register
from mrp_lens.models import LensModel, encoder_for
from mrp_lens.models.hooks import frozen
from mrp_lens.training.losses import predictions, targets
from mrp_lens.utils.progress import progress_bar
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
    sums = _document_log_probabilities(model, corpus, batch_size=batch_size, progress=progress)
    total, count = sums.sum(axis=0)
    with np.errstate(over="ignore"):  # above e^709 it is infinite
        low, high = bootstrap_interval(
            sums, lambda r: np.exp(-r[:, :, 0].sum(axis=1) / r[:, :, 1].sum(axis=1)), seed=seed
        )
        value = float(np.exp(-total / count))
    row = {"corpus": corpus.name, "documents": len(sums), "tokens": int(count), "perplexity": value}
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
    sums = _document_log_probabilities(model, corpus, batch_size=batch_size, progress=progress)
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
    tables={"unlearn"},
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


def _document_log_probabilities(
    model: LensModel, corpus: Corpus, *, batch_size: int, progress: bool
) -> NDArray[np.float64]:
    """[documents, 2]: sum of log-probabilities of the tokens that count, and their number."""
    if not len(corpus):
        raise ValueError(f"no documents in {corpus.name!r}")
    encoder = encoder_for(model)
    encoded = encoder.encode(corpus.documents)
    sums = np.zeros((len(encoded), 2))
    bar = progress_bar(total=len(encoded), desc="scoring text", progress=progress)
    with frozen(model), torch.no_grad(), bar:
        for chosen, batch in in_order(encoder, encoded, batch_size, logits=True):
            own = predictions(model, batch).gather(-1, targets(batch)[:, None])[:, 0].double().cpu()
            row = batch.loss_mask[:, 1:].nonzero()[:, 0].cpu()
            sums[chosen, 0] = torch.zeros(len(chosen), dtype=torch.float64).index_add(0, row, own).numpy()
            sums[chosen, 1] = batch.loss_mask.sum(dim=1).cpu().numpy()
            bar.update(len(chosen))
    kept = sums[sums[:, 1] > 0]
    if not len(kept):
        raise ValueError(f"{corpus.name!r} holds no token to predict: every document is empty or a single token")
    return kept
