"""Can a linear detector tell the forget set's states from others, by one token's state or by all of a document's?

What a conditional projection (MRP) can tell apart, it can remove here and leave there. Its gate sees one state at a time.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize

from mrp_lens.data import Corpus
from mrp_lens.metrics.activations import StateReader, groups_of, hooks_at
from mrp_lens.metrics.auc import Values, auc
from mrp_lens.models import LensModel
from mrp_lens.models.hooks import Site
from mrp_lens.utils.logistic import logistic_regression
from mrp_lens.utils.torch_state import ordinary_torch
from mrp_lens.utils.validation import generator_for

STATES = 4096  # of each side, that a detector learns from
FEWEST = 4  # documents a side: two to learn from, two to tell

Detector = tuple[Float[Tensor, " d_model"], Float[Tensor, ""]]
Sample = dict[str, list[Float[Tensor, "tokens d_model"]]]  # at each hook, of each document


@ordinary_torch(gradients=False)
def separability(
    model: LensModel,
    forget: Corpus,
    retain: Corpus,
    *,
    layers: Sequence[int] | None = None,
    site: Site = "resid_post",
    seed: int = 0,
    batch_size: int = 32,
    max_length: int | None = None,
    progress: bool = True,
) -> pd.DataFrame:
    """How well a linear detector tells forget from retain documents that it has not seen, at each layer.

    The detector is the one that MRP's gates start from: a logistic regression on states brought to length 1. It learns from
    every second document, drawn at random, and is asked of the others; a text that comes several times is taken once. Where a
    document is told but its tokens are not, what the text is about does not stand in each state, and no gate that sees one state
    at a time can go by it.

    Args:
        model: HookedTransformer or TransformerBridge, with the edit on if there is one.
        forget: at least four different documents with a token; pads and BOS do not count.
        retain: likewise.
        layers: where to read. None: all.
        site: of the hook points.
        seed: of the halves, of the states that are learned from (4,096 a side at most), and of the bootstrap.
        batch_size: documents in a forward pass.
        max_length: tokens at which documents are cut. None: the model's context length.
        progress: show a progress bar.

    Returns:
        Two rows a layer: `layer`; `unit`, "token" (each state by itself) or "document" (the mean logit over its tokens); `auc`, how
        often something of the forget set scores above something of the retain set, with its 95% bootstrap interval over documents
        `low`, `high`; `null`, the control: the same of a detector that learned from documents whose sides were mixed at random;
        `forget_documents`, `retain_documents`, those asked about.

    Raises:
        TypeError, ValueError: under four different documents with a token on a side, a layer or site that does not exist; NonFiniteError where
            states are NaN or infinite.

    Example:
        >>> frame = ml.metrics.separability(model, forget, retain, layers=[1, 3])
    """
    sides = groups_of({"forget": forget, "retain": retain})
    hooks = hooks_at(model, layers, site)
    generator = generator_for(seed)
    reader = StateReader(model, None, None, seed, batch_size, max_length, "right", progress)
    known, asked = {}, {}
    for side, given in sides.items():
        # A copy in the other half would be a text that the detector has seen.
        corpus = Corpus(tuple(dict.fromkeys(given.documents)), given.name)
        order = torch.randperm(len(corpus), generator=generator).tolist()
        if len(order) < FEWEST:
            raise ValueError(
                f"{side}: {len(order)} different documents are too few to learn from half of them; give at least {FEWEST}"
            )
        parts = (sorted(order[0::2]), sorted(order[1::2]))
        known[side], asked[side] = (Corpus(tuple(corpus.documents[i] for i in part), corpus.name) for part in parts)
    learned = {side: _sample(reader, corpus, list(hooks.values()), generator) for side, corpus in known.items()}
    detectors = {
        layer: _detectors(learned["forget"][hook], learned["retain"][hook], generator) for layer, hook in hooks.items()
    }
    scores = {side: _scores(reader, corpus, hooks, detectors) for side, corpus in asked.items()}
    rows = []
    for layer in hooks:
        by_token, mixed_by_token = ([scores[side][layer][which] for side in sides] for which in (0, 1))
        for unit in ("token", "document"):
            own, mixed = (
                [each if unit == "token" else [np.array([one.mean()]) for one in each] for each in both]
                for both in (by_token, mixed_by_token)
            )
            area, low, high = auc(*own, seed=seed)
            rows.append(
                {"layer": layer, "unit": unit, "auc": area, "low": low, "high": high, "null": auc(*mixed, seed=seed)[0]}
                | {f"{side}_documents": len(scores[side][layer][0]) for side in sides}
            )
    return pd.DataFrame(rows)


def _sample(reader: StateReader, corpus: Corpus, hooks: Sequence[str], generator: torch.Generator) -> Sample:
    """States of each document at each hook, brought to length 1; of long ones some tokens, drawn at random."""
    most = max(1, STATES // len(corpus))
    found: Sample = {hook: [] for hook in hooks}
    for batch in reader.read(corpus, hooks):
        sizes = batch.sizes
        chosen = [torch.randperm(size, generator=generator)[:most].to(batch.rows.device) for size in sizes]
        for hook in hooks:
            parts = batch.states[hook].split(sizes)
            found[hook] += [normalize(part[places].float(), dim=-1) for part, places in zip(parts, chosen, strict=True)]
    return found


def _detectors(forget: list[Tensor], retain: list[Tensor], generator: torch.Generator) -> tuple[Detector, Detector]:
    """The detector, and one that learned from the same documents mixed at random."""
    both = [*forget, *retain]
    mixed = torch.randperm(len(both), generator=generator).tolist()
    inside, outside = ([both[i] for i in part] for part in (mixed[: len(forget)], mixed[len(forget) :]))
    return (
        logistic_regression(torch.cat(forget), torch.cat(retain)),
        logistic_regression(torch.cat(inside), torch.cat(outside)),
    )


def _scores(
    reader: StateReader, corpus: Corpus, hooks: Mapping[int, str], detectors: Mapping[int, Sequence[Detector]]
) -> dict[int, tuple[list[Values], ...]]:
    """At each layer, of each of its detectors: the logit of every token, document by document."""
    found: dict[int, tuple[list[Values], ...]] = {layer: ([], []) for layer in hooks}
    for batch in reader.read(corpus, list(hooks.values())):
        sizes = batch.sizes
        for layer, hook in hooks.items():
            states = normalize(batch.states[hook].float(), dim=-1)
            for (weights, offset), kept in zip(detectors[layer], found[layer], strict=True):
                logits = states @ weights.to(states.device) + offset.to(states.device)
                kept += [part.double().cpu().numpy() for part in logits.split(sizes)]
    return found
