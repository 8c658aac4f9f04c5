"""What an edit costs: how far it moves predictions on text that the model is to keep."""

import numpy as np
import pandas as pd
import torch

from mrp_lens.data import Corpus
from mrp_lens.data.kinds import check_corpus
from mrp_lens.data.tokenization import in_order
from mrp_lens.edits import Edit
from mrp_lens.metrics.bootstrap import bootstrap_interval
from mrp_lens.metrics.registry import Measured, register
from mrp_lens.models import LensModel, encoder_for
from mrp_lens.models.finite import NonFiniteError
from mrp_lens.models.hooks import frozen
from mrp_lens.training.losses import kl, predictions
from mrp_lens.utils.progress import progress_bar
from mrp_lens.utils.torch_state import ordinary_torch


@ordinary_torch(gradients=False)
def damage(
    model: LensModel, edit: Edit, corpus: Corpus, *, batch_size: int = 32, seed: int = 0, progress: bool = True
) -> pd.DataFrame:
    """KL(unedited || edited) in nats per predicted token, with a bootstrap interval over documents.

    The logits of one batch are held at a time, before and after, and the edit is put on and off for each.

    Args:
        model: HookedTransformer or TransformerBridge, without the edit; left as it is.
        edit: the one to look at.
        corpus: retain text, best such that no fit saw; of each document the tokens that count, as for `perplexity`.
        batch_size: documents at a time.
        seed: of the bootstrap.
        progress: show a progress bar.

    Returns:
        One row: `corpus`; `documents` and `tokens`, how many were predicted; `damage`, 0 where nothing moved; `low`, `high`
        (NaN with a single document); `uniform`, the control: the damage of guessing uniformly over the vocabulary.

    Raises:
        TypeError: no edit, or no Corpus.
        ValueError: no document, or none with a token to predict; NonFiniteError where logits are NaN or infinite, or the
            edited model rules out what the unedited one does not.
    """
    if not isinstance(edit, Edit):
        raise TypeError(f"edit must be an Edit, got {type(edit).__name__}; damage is that of an edit")
    check_corpus(corpus=corpus)
    if not len(corpus):
        raise ValueError(f"no documents in {corpus.name!r}; give text that the model is to keep")
    encoder = encoder_for(model)
    encoded = encoder.encode(corpus.documents)
    sums = np.zeros((len(encoded), 3))  # of each document: divergence, that of a uniform guess, tokens
    bar = progress_bar(total=len(encoded), desc="measuring damage", progress=progress)
    with frozen(model), torch.no_grad(), bar:
        for chosen, batch in in_order(encoder, encoded, batch_size, logits=True):
            bar.update(len(chosen))
            before = predictions(model, batch)
            with edit.applied(model):
                after = predictions(model, batch)
            rows = batch.loss_mask[:, 1:].nonzero()[:, 0].cpu()
            flat = torch.full_like(before[:1], -float(np.log(before.shape[-1]))).expand_as(before)
            for column, values in ((0, kl(before, after)), (1, kl(before, flat))):
                totals = torch.zeros(len(chosen), dtype=torch.float64).index_add(0, rows, values.double().cpu())
                sums[chosen, column] = totals.numpy()
            sums[chosen, 2] = batch.loss_mask.sum(dim=1).cpu().numpy()
    kept = sums[sums[:, 2] > 0]
    if not len(kept):
        raise ValueError(f"{corpus.name!r} holds no token to predict: every document is empty or a single token")
    if not np.isfinite(kept).all():
        raise NonFiniteError(
            f"the damage on {corpus.name!r} is infinite: the edited model gives probability 0 to what the unedited one "
            "says; take a weaker edit"
        )
    total, uniform, count = kept.sum(axis=0)
    low, high = bootstrap_interval(kept, lambda r: r[:, :, 0].sum(axis=1) / r[:, :, 2].sum(axis=1), seed=seed)
    row = {"corpus": corpus.name, "documents": len(kept), "tokens": int(count), "damage": total / count}
    return pd.DataFrame([{**row, "low": low, "high": high, "uniform": uniform / count}])


@register(
    "damage",
    summary="KL(unedited || edited) a token of text that is to be kept and that no fit saw.",
    row=lambda frame: {
        f"damage{end}": frame[column].iloc[0] for column, end in (("damage", ""), ("low", "_low"), ("high", "_high"))
    },
    headings={"damage": "damage, nats a token"},
    tables={"unlearn", "leaderboard", "benchmark"},
    compares=True,
)
def _of_held_out_text(measured: Measured) -> pd.DataFrame | None:
    if measured.edit is None:
        return None
    texts = measured.task.held_out.spread(measured.documents)
    return damage(measured.model, measured.edit, texts, seed=measured.seed, progress=measured.progress)
