"""Can it be told that a model was trained on a text? Membership inference by what it predicts."""

import sys
import zlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from mrp_lens.data import Corpus
from mrp_lens.metrics.auc import Values, auc
from mrp_lens.metrics.registry import Measured, register
from mrp_lens.metrics.tokens import by_document
from mrp_lens.models import LensModel, encoder_for
from mrp_lens.utils.torch_state import ordinary_torch

LEAST_VARIANCE = 1e-6  # of log-probabilities over the vocabulary


def _loss(figures: Values, text: str, share: float) -> float:
    return float(figures[:, 0].mean())


def _zlib(figures: Values, text: str, share: float) -> float:
    return float(figures[:, 0].mean()) / len(zlib.compress(text.encode()))


def _min_k(figures: Values, text: str, share: float) -> float:
    return _lowest(figures[:, 0], share)


def _min_k_plus_plus(figures: Values, text: str, share: float) -> float:
    return _lowest(figures[:, 1], share)


ATTACKS: Mapping[str, Callable[[Values, str, float], float]] = {
    "loss": _loss,
    "zlib": _zlib,
    "min_k": _min_k,
    "min_k++": _min_k_plus_plus,
}
"""Name -> the score of a text, which is higher for texts that the model was trained on."""


@ordinary_torch(gradients=False)
def membership(
    model: LensModel,
    members: Corpus,
    non_members: Corpus,
    *,
    reference: LensModel | None = None,
    share: float = 0.2,
    batch_size: int = 128,
    seed: int = 0,
    progress: bool = True,
) -> pd.DataFrame:
    """How well texts that the model was taught are told from texts that it never saw, by four scores of a text.

    `loss`: mean log-probability of its tokens (Yeom et al., arXiv 1709.01604). `zlib`: that, divided by the bytes of the
    text when compressed, as far as it is read (Carlini et al., arXiv 2012.07805). `min_k`: mean over the `share` of
    tokens that are least likely (Shi et al., arXiv 2310.16789). `min_k++`: the same, each token's log-probability first taken relative to
    mean and standard deviation over the vocabulary (Zhang et al., arXiv 2404.02936).

    Where the two corpora differ in more than membership the AUC is not .5 even of a model that saw neither: only beside
    such a reference does it speak of forgetting.

    Args:
        model: HookedTransformer or TransformerBridge, with the edit on if there is one.
        members: the forget set; of each document the tokens that count.
        non_members: text like it that neither the model nor the reference was taught.
        reference: a model that never saw the members. None: the columns that compare with it are left out.
        share: of a text's tokens, for `min_k` and `min_k++`; at least one token.
        batch_size: documents at a time.
        seed: of the bootstrap.
        progress: show a progress bar.

    Returns:
        One row an attack. Columns: `attack`; `members` and `non_members`, how many have a token to predict; `auc` in
        [0, 1] with its 95% bootstrap interval over the documents of both `low`, `high` (NaN with a single document on a
        side); `null`, the control: .5, chance. With a reference also `reference_auc` and `privacy_leakage`, MUSE's
        PrivLeak as a share (arXiv 2407.06460): (a - a_ref) / a_ref with a = 1 - AUC. 0 is as if never taught, below 0
        there is left what tells members, above 0 they stand out as what was pushed down.

    Raises:
        ValueError: a corpus without a document that has a token to predict, or a share that is not in (0, 1];
            NonFiniteError where logits are NaN or infinite.

    Example:
        >>> with edit.applied(model):
        ...     frame = membership(model, forget, retain)
    """
    if not 0.0 < share <= 1.0:
        raise ValueError(f"share must be above 0 and at most 1, got {share}")
    models = {"": model} | ({} if reference is None else {"reference_": reference})
    found = {
        prefix: [_scores(of, corpus, share, batch_size, progress) for corpus in (members, non_members)]
        for prefix, of in models.items()
    }
    rows = []
    for attack in ATTACKS:
        own, other = (list(scores[attack][:, None]) for scores in found[""])
        area, low, high = auc(own, other, seed=seed)
        row: dict[str, Any] = {"attack": attack, "members": len(own), "non_members": len(other), "auc": area}
        row |= {"low": low, "high": high, "null": 0.5}
        if reference is not None:
            row["reference_auc"] = auc(*(list(scores[attack][:, None]) for scores in found["reference_"]), seed=seed)[0]
            row["privacy_leakage"] = leakage(row["auc"], row["reference_auc"])
        rows.append(row)
    return pd.DataFrame(rows)


@register(
    "membership",
    summary="Whether it can be told that the model was trained on the forget set, beside text that it never saw.",
    source="arXiv 2404.02936, arXiv 2407.06460",
    row=lambda frame: {
        f"{key}_{row['attack'].replace('++', '_plus_plus')}": row[key]
        for row in frame.to_dict("records")
        for key in ("auc", "privacy_leakage")
        if key in row
    },
    headings={
        "auc_loss": "membership: AUC of the loss",
        "auc_zlib": "membership: AUC of zlib",
        "auc_min_k": "membership: AUC of min-k",
        "auc_min_k_plus_plus": "membership: AUC of min-k++",
    },
    tables={"benchmark"},
)
def _of_forget_set(measured: Measured) -> pd.DataFrame | None:
    if measured.unseen is None:
        return None
    return membership(
        measured.model,
        measured.task.forget_texts.spread(measured.documents),
        measured.unseen.spread(measured.documents),
        reference=measured.reference,
        seed=measured.seed,
        progress=measured.progress,
    )


def leakage(auc: float, reference_auc: float) -> float:
    """MUSE's PrivLeak as a share; NaN where the reference tells every member from every other text."""
    expected = 1.0 - reference_auc
    return (1.0 - auc - expected) / expected if expected else float("nan")


def _scores(model: LensModel, corpus: Corpus, share: float, batch_size: int, progress: bool) -> dict[str, Values]:
    """Of each attack, the scores of the documents that have a token to predict."""

    def measure(
        log_probabilities: Float[Tensor, "counted d_vocab"], tokens: Int[Tensor, " counted"]
    ) -> Float[Tensor, "counted 2"]:
        own = log_probabilities.gather(-1, tokens[:, None])[:, 0]
        weights = log_probabilities.exp()
        finite = log_probabilities.masked_fill(weights == 0, 0.0)  # what cannot follow has no part in mean and spread
        mean = (weights * finite).sum(-1)
        variance = (weights * (finite - mean[:, None]) ** 2).sum(-1).clamp(min=LEAST_VARIANCE)
        return torch.stack([own, (own - mean) / variance.sqrt()], dim=1)

    found = by_document(model, corpus, measure, batch_size=batch_size, progress=progress)
    texts = [(own, text) for own, text in zip(found, _texts_read(model, corpus), strict=True) if len(own)]
    return {name: np.array([score(own, text, share) for own, text in texts]) for name, score in ATTACKS.items()}


def _texts_read(model: LensModel, corpus: Corpus) -> list[str]:
    """What the model reads of each completion: all of it, or what its tokens spell up to where the context ends."""
    encoder = encoder_for(model)
    texts = [document.completion for document in corpus.documents]
    for place, row in enumerate(replace(encoder, max_length=sys.maxsize).encode(corpus.documents)):
        if len(row.ids) > encoder.max_length:
            pairs = zip(row.ids[: encoder.max_length], row.in_loss, strict=False)
            texts[place] = str(encoder.tokenizer.decode([token for token, counts in pairs if counts]))
    return texts


def _lowest(values: Values, share: float) -> float:
    return float(np.sort(values)[: max(1, int(len(values) * share))].mean())
