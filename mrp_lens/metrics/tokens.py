"""What a model says of each token that counts, document by document: what metrics of texts are made of."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from mrp_lens.data import Corpus, Document
from mrp_lens.data.kinds import check_corpus
from mrp_lens.data.tokenization import Encoded, Kept, in_order
from mrp_lens.models import LensModel, encoder_for
from mrp_lens.models.hooks import frozen
from mrp_lens.training.losses import predictions, targets
from mrp_lens.utils.progress import progress_bar

TokenMeasure = Callable[[Float[Tensor, "counted d_vocab"], Int[Tensor, " counted"]], Float[Tensor, "counted figures"]]
"""From log-probabilities of the vocabulary, and the token that the text has there, to some figures of it."""


def own_log_probability(
    log_probabilities: Float[Tensor, "counted d_vocab"], tokens: Int[Tensor, " counted"]
) -> Float[Tensor, "counted 1"]:
    """log p of the text's own tokens, in nats."""
    return log_probabilities.gather(-1, tokens[:, None])


def by_document(
    model: LensModel,
    corpus: Corpus,
    measure: TokenMeasure = own_log_probability,
    *,
    batch_size: int = 128,
    desc: str = "scoring text",
    keep: Kept = "start",
    warn: bool = True,
    progress: bool = True,
) -> list[NDArray[np.float64]]:
    """[tokens, figures] of each document, in the corpus's order: of the tokens that are predicted, none for a text without.

    Args:
        model: with the edit on, if there is one.
        corpus: of each document the tokens that count: of one with a prompt the completion alone.
        measure: what is kept of the predictions, so that no document's logits need be.
        batch_size: documents at a time.
        desc: what the progress bar says.
        keep: of a document that is longer than the context, the start or the end.
        warn: tell how many documents were cut; False for such as are not the user's.
        progress: show it.

    Raises:
        TypeError: no Corpus.
        ValueError: no document, or none with a token to predict; NonFiniteError where logits are NaN or infinite.
    """
    check_corpus(corpus=corpus)
    if not len(corpus):
        raise ValueError(f"no documents in {corpus.name!r}")
    encoded = encoder_for(model).encode(corpus.documents, keep=keep, warn=warn)
    found = by_row(model, encoded, measure, batch_size=batch_size, desc=desc, progress=progress)
    if not any(len(figures) for figures in found):
        raise ValueError(f"{corpus.name!r} holds no token to predict: every document is empty or a single token")
    return found


def reads_alike(model: LensModel, other: LensModel, documents: Sequence[Document]) -> bool:
    """Whether texts are the same tokens to both."""
    ids, others = ([row.ids for row in encoder_for(it).encode(documents, warn=False)] for it in (model, other))
    return ids == others


def by_row(
    model: LensModel,
    rows: Sequence[Encoded],
    measure: TokenMeasure = own_log_probability,
    *,
    batch_size: int = 128,
    desc: str = "scoring text",
    progress: bool = True,
) -> list[NDArray[np.float64]]:
    """`by_document` of texts that are tokens already; none need have a token to predict.

    Raises:
        NonFiniteError: logits are NaN or infinite.
    """
    encoder = encoder_for(model)
    found: list[NDArray[np.float64]] = [np.zeros((0, 1))] * len(rows)
    bar = progress_bar(total=len(rows), desc=desc, progress=progress)
    with frozen(model), torch.no_grad(), bar:
        for places, batch in in_order(encoder, rows, batch_size, logits=True):
            figures = measure(predictions(model, batch), targets(batch)).double().cpu().numpy()
            counts = batch.loss_mask[:, 1:].sum(dim=1).tolist()
            for place, own in zip(places, np.split(figures, np.cumsum(counts)[:-1]), strict=True):
                found[place] = own
            bar.update(len(places))
    return found
