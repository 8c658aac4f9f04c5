"""Do states point along a direction? cos(u, h) against unrelated directions of the same law."""

from collections.abc import Sequence

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from mrp_lens.data.tokenization import PaddingSide
from mrp_lens.edits.subspace import Law, random_units
from mrp_lens.metrics.activations import StateReader, Texts, direction_for, groups_of, hooks_at
from mrp_lens.metrics.bootstrap import CONFIDENCE, TokenMean
from mrp_lens.metrics.registry import Measured, register
from mrp_lens.models import LensModel
from mrp_lens.models.hooks import Site
from mrp_lens.utils.torch_state import ordinary_torch
from mrp_lens.utils.validation import generator_for

NULL_DRAWS = 1000


@ordinary_torch(gradients=False)
def alignment(
    model: LensModel,
    texts: Texts,
    direction: Float[Tensor, " _width"],
    *,
    layers: Sequence[int] | None = None,
    site: Site = "resid_post",
    law: Law | None = None,
    seed: int = 0,
    batch_size: int = 32,
    max_length: int | None = None,
    padding: PaddingSide = "right",
    progress: bool = True,
) -> pd.DataFrame:
    """Cosine of the states with a direction u, and their norm, per layer (arXiv 2408.06223, section on alignment).

    RMU drives forget states towards c u, so their cosine with u should rise and their norm approach c. A direction
    with entries from U[0, 1) has cosine 0.75 with any other of its kind, and states have a mean of their own, so
    that a cosine alone says nothing: it is to be compared with unrelated directions drawn by the same law.

    Args:
        model: HookedTransformer or TransformerBridge, with the edit on if there is one.
        texts: a corpus, or several by name: {"forget": ..., "retain": ...}. Pads and BOS do not count.
        direction: u, [d_model], of any length but 0; `fit.direction` of an RMU fit.
        layers: where to read. None: all.
        site: of the hook points.
        law: how u was drawn, hence the null: "uniform" (RMU's default) or "gaussian". None: uniform where no entry of u is below 0,
            as of U[0, 1).
        seed: of the 1,000 directions of the null.
        batch_size: documents in a forward pass; nothing else is held, so memory does not grow with their number.
        max_length: tokens at which documents are cut. None: the model's context length.
        padding: "right" or "left".
        progress: show a progress bar.

    Returns:
        One row a group and layer: `group`, `layer`, `documents`, `tokens`; `cosine`, mean over tokens (0 for a state that
        is 0), with its 95% interval over documents `low`, `high` (NaN with a single document), and its spread over tokens
        `cosine_std`; the control `null_mean`, `null_low`, `null_high` (95% of the unrelated directions), `null_std`;
        `norm`, mean L2 norm of the states in units of the stream (what c is measured in), `norm_std`.

    Raises:
        TypeError, ValueError: no texts, no token, a layer that does not exist, a direction of the wrong size or zero;
            NonFiniteError where states are NaN or infinite.

    Example:
        >>> fit = ml.RMU(steps=2).fit(model, forget, retain)
        >>> with fit.edit.applied(model):
        ...     frame = alignment(model, {"forget": forget, "retain": retain}, fit.direction)
    """
    u = direction_for(model, direction)
    groups, hooks = groups_of(texts), hooks_at(model, layers, site)
    reader = StateReader(model, None, None, seed, batch_size, max_length, padding, progress)
    drawn: Law = law or ("uniform" if bool((u >= 0.0).all()) else "gaussian")
    null = random_units(NULL_DRAWS, len(u), drawn, generator_for(seed)).double()
    rows = []
    for group, corpus in groups.items():
        cosines, norms = {layer: TokenMean() for layer in hooks}, {layer: TokenMean() for layer in hooks}
        units = {layer: torch.zeros(len(u), dtype=torch.float64) for layer in hooks}  # sum of h / |h|
        for batch in reader.read(corpus, list(hooks.values())):
            for layer, hook in hooks.items():
                states = batch.states[hook].float()
                length = states.norm(dim=-1)
                unit_states = states / length.clamp(min=torch.finfo(torch.float32).tiny)[:, None]
                cosines[layer].add(unit_states @ u, batch.rows)
                norms[layer].add(length, batch.rows)
                units[layer] += unit_states.double().sum(dim=0).cpu()
        for layer in hooks:
            of_null = null @ (units[layer] / cosines[layer].tokens)
            tail = (1 - CONFIDENCE) / 2
            low, high = torch.quantile(of_null, torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
            cosine, norm = cosines[layer], norms[layer]
            rows.append(
                {"group": group, "layer": layer, "documents": cosine.documents, "tokens": int(cosine.tokens)}
                | {"cosine": cosine.mean}
                | dict(zip(("low", "high"), cosine.interval(least=-1.0, most=1.0), strict=True))
                | {"cosine_std": cosine.std, "null_mean": float(of_null.mean()), "null_low": low, "null_high": high}
                | {"null_std": float(of_null.std()), "norm": norm.mean, "norm_std": norm.std}
            )
    return pd.DataFrame(rows)


@register(
    "alignment",
    summary="Cosine of the states with the direction u at each layer, and their norm.",
    source="arXiv 2408.06223, alignment with the random direction",
    figures=["alignment_by_layer", "norms"],
)
def _of_texts(measured: Measured) -> pd.DataFrame:
    model, u = measured.model, measured.direction
    if u is None:
        u = random_units(1, model.cfg.d_model, "uniform", generator_for(measured.seed))[0]
    texts = measured.task.texts(limit=measured.documents)
    return alignment(model, texts, u, seed=measured.seed, progress=measured.progress)
