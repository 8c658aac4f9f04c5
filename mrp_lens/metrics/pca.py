"""Principal directions of states before and after an edit: angles between them, and the plane that they span."""

import logging
from collections.abc import Sequence
from functools import cache
from itertools import combinations
from typing import Literal

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from mrp_lens.data import Corpus
from mrp_lens.data.tokenization import PaddingSide
from mrp_lens.edits import Edit
from mrp_lens.edits.subspace import Subspace
from mrp_lens.metrics.activations import StateReader, Texts, When, groups_of, hooks_at
from mrp_lens.metrics.geometry import Moments, read_moments, removed_at
from mrp_lens.metrics.registry import Measured, register
from mrp_lens.models import LensModel
from mrp_lens.models.hooks import Site
from mrp_lens.utils.torch_state import ordinary_torch
from mrp_lens.utils.validation import check_one_of, check_whole, generator_for, int_seed

logger = logging.getLogger(__name__)

Position = Literal["last", "all"]

REMOVED = "removed"
NULL_DRAWS = 20
POINTS = 100  # a side, of the plane on the report page
FLAT = 1e-6  # a singular value below this share of the points' spread is rounding noise, not an axis


class TooFewStatesError(ValueError):
    """States that span fewer directions than a picture of them needs."""


@ordinary_torch(gradients=False)
def principal_angles(
    model: LensModel,
    texts: Texts,
    edit: Edit | None = None,
    *,
    layers: Sequence[int] | None = None,
    rank: int = 8,
    site: Site = "resid_post",
    documents: int | None = 1000,
    seed: int = 0,
    batch_size: int = 32,
    max_length: int | None = None,
    padding: PaddingSide = "right",
    progress: bool = True,
) -> pd.DataFrame:
    """Angles between the subspaces in which groups' states lie, and between these and what the edit removes.

    A group's subspace is the span of the first `rank` principal directions of its states, uncentred (the mean counts,
    as in MRP's start). MRP wants to remove what forget states have and retain states have not: small angles to the
    first, large ones to the second. After a projection without gates, angles to what it removed are 90 degrees.

    Args:
        model, texts, edit, layers, site, documents: as in `geometry`.
        rank: number of principal directions of each group, from 1 to d_model - 1.
        seed: of the choice of documents, and of the random subspaces of the control.
        batch_size, max_length, padding, progress: as in `alignment`.

    Returns:
        One row a layer, `when` ("before", "after"), pair and angle: `layer`, `when`, `pair` ("forget-retain",
        "forget-removed", ...; those with "removed" only where the edit projects at the layer's hook), `number` of the
        angle (1 is the smallest; as many as the smaller subspace has dimensions), `degrees`, and the control
        `null_degrees`: the same angle between random subspaces of these ranks, mean of 20 draws.

    Raises:
        TypeError, ValueError: a rank out of range or above the number of directions that the states span, fewer than
            two subspaces to compare, a group named "removed", or as in `geometry`.

    Example:
        >>> frame = principal_angles(model, {"forget": forget, "retain": retain}, fit.edit, rank=4)
    """
    groups, hooks = groups_of(texts), hooks_at(model, layers, site)
    reader = StateReader(model, edit, documents, seed, batch_size, max_length, padding, progress)
    removed = removed_at(model, edit, hooks)
    d_model = int(model.cfg.d_model)
    if isinstance(rank, bool) or not isinstance(rank, int):
        raise TypeError(f"rank must be an int, got {rank!r}")
    if not 1 <= rank < d_model:
        raise ValueError(f"rank {rank} is out of range: the model's stream has room for 1 to {d_model - 1} directions")
    if REMOVED in groups:
        raise ValueError(f"a group cannot be named {REMOVED!r}, which stands for what the edit removes; rename it")
    if len(groups) == 1 and not removed:
        raise ValueError(
            "nothing to compare: give several corpora by name, or an edit with a projection at one of the hooks "
            f"{', '.join(hooks.values())}"
        )
    spans: dict[tuple[int, When], dict[str, Subspace]] = {}
    for group, corpus in groups.items():
        for when, by_layer in read_moments(reader, corpus, hooks).items():
            for layer, moments in by_layer.items():
                spans.setdefault((layer, when), {})[group] = _span(moments, rank, group, layer, when)
    null_angles = cache(lambda ranks: _null_angles(ranks, d_model, seed))
    rows = []
    for (layer, when), known in sorted(spans.items(), key=lambda entry: (entry[0][0], entry[0][1] == "after")):
        subspaces = known | ({REMOVED: removed[layer].to("cpu")} if layer in removed else {})
        for one, other in combinations(subspaces, 2):
            ranks = (subspaces[one].rank, subspaces[other].rank)
            null = null_angles(ranks)
            for number, angle in enumerate(_degrees(subspaces[one], subspaces[other])):
                about = {"layer": layer, "when": when, "pair": f"{one}-{other}", "number": number + 1}
                rows.append(about | {"degrees": angle, "null_degrees": null[number]})
    return pd.DataFrame(rows)


@ordinary_torch(gradients=False)
def principal_plane(
    model: LensModel,
    texts: Texts,
    edit: Edit | None = None,
    *,
    layer: int,
    dims: int = 2,
    points: int = 300,
    position: Position = "last",
    site: Site = "resid_post",
    seed: int = 0,
    batch_size: int = 32,
    max_length: int | None = None,
    padding: PaddingSide = "right",
    progress: bool = True,
) -> pd.DataFrame:
    """Some states of each group, before and after the edit, in the plane of the first principal directions.

    The axes are those of the *unedited* states of all groups together, centred at their mean: the plane stands still
    while the edit moves the states. It shows `share_x + share_y` of the variance; what happens outside is not seen.

    Args:
        model, texts, edit, site: as in `geometry`.
        layer: where to read.
        dims: 2, or 3 for a `z`.
        points: states of each group at most.
        position: "last": the state at the last token of each of `points` documents; "all": `points` of the states at all
            tokens (pads and BOS do not count) of these documents. Documents and states are chosen at random.
        seed: of the choice.
        batch_size, max_length, padding, progress: as in `alignment`.

    Returns:
        One row a group, `when` ("before", "after") and state: `group`, `when`, `document` (its place in the corpus),
        `position` (of the token among the document's, BOS not counted, from 0), `token` (the string at which the state
        is read), `x`, `y` (and `z`) in units of the stream, and, the same in all rows, `share_x`, `share_y` (and
        `share_z`): the axis's share of the unedited states' variance. An axis points where its largest loading is
        positive.

    Raises:
        TypeError, ValueError: dims other than 2 or 3, no point, an unknown position, or as in `geometry`.
        TooFewStatesError: the states lie on fewer axes.

    Example:
        >>> frame = principal_plane(model, {"forget": forget, "retain": retain}, fit.edit, layer=2)
    """
    if dims not in (2, 3):
        raise ValueError(f"dims must be 2 or 3, got {dims!r}")
    check_whole(points=points)
    check_one_of(Position, position=position)
    groups, hook = groups_of(texts), hooks_at(model, [layer], site)[layer]
    reader = StateReader(model, edit, points, seed, batch_size, max_length, padding, progress)
    found = {group: _read_points(reader, corpus, hook, position, points) for group, corpus in groups.items()}
    before = torch.cat([states["before"] for _, states in found.values()])
    centre = before.mean(dim=0)
    axes, shares = _axes(before - centre, dims)
    names = "xyz"[:dims]
    parts = []
    for group, (labels, states) in found.items():
        strings = [str(model.tokenizer.decode([token])) for token in labels["token"]]
        for when, chosen in states.items():
            places = pd.DataFrame(((chosen - centre) @ axes.T).numpy(), columns=list(names))
            parts.append(pd.concat([labels.assign(token=strings), places], axis=1).assign(group=group, when=when))
    frame = pd.concat(parts, ignore_index=True)
    return frame[["group", "when", *labels.columns, *names]].assign(
        **{f"share_{name}": share for name, share in zip(names, shares, strict=True)}
    )


@register(
    "principal-plane",
    summary="States of the last layer in the plane of their first principal directions, before and after the edit.",
    figures=["principal_plane"],
    compares=True,
)
def _of_last_layer(measured: Measured) -> pd.DataFrame | None:
    model, edit, seed = measured.model, measured.edit, measured.seed
    if edit is None:
        return None
    texts, last = measured.task.texts(limit=measured.documents), int(model.cfg.n_layers) - 1
    try:
        return principal_plane(model, texts, edit, layer=last, points=POINTS, seed=seed, progress=measured.progress)
    except TooFewStatesError as error:
        logger.warning("no picture of the states in a plane: %s", error)
        return None


def _span(moments: Moments, rank: int, group: str, layer: int, when: When) -> Subspace:
    try:
        return moments.top_directions(rank)
    except ValueError as error:
        raise ValueError(f"{group!r}, layer {layer}, {when} the edit: {error}; lower rank or give more text") from error


def _degrees(one: Subspace, other: Subspace) -> list[float]:
    return torch.rad2deg(one.principal_angles(other).double()).tolist()


def _null_angles(ranks: tuple[int, int], d_model: int, seed: int) -> list[float]:
    """Mean angles in degrees between random subspaces of these ranks."""
    seeds = torch.randint(2**62, (NULL_DRAWS, 2), generator=generator_for(seed)).tolist()
    draws = [
        _degrees(*(Subspace.random(rank, d_model, seed=of) for rank, of in zip(ranks, pair, strict=True)))
        for pair in seeds
    ]
    return np.mean(draws, axis=0).tolist()


def _read_points(
    reader: StateReader, corpus: Corpus, hook: str, position: Position, points: int
) -> tuple[pd.DataFrame, dict[When, Float[Tensor, "points d_model"]]]:
    """Document, position and token id of the chosen states, and the states in float64 on the CPU."""
    labels, states = pd.DataFrame(), dict[When, Tensor]()
    for batch in reader.read(corpus, [hook]):
        found = pd.DataFrame({"document": batch.rows.cpu().numpy(), "token": batch.tokens.cpu().numpy()})
        found.insert(1, "position", found.groupby("document").cumcount())
        found["order"] = 0.0
        if position == "last":
            found = found.groupby("document").tail(1)
        else:  # each document with random numbers of its own, so that the choice is the same in any batches
            documents, sizes = torch.unique_consecutive(batch.rows, return_counts=True)
            own = zip(documents.tolist(), sizes.tolist(), strict=True)
            found["order"] = np.concatenate(
                [np.random.default_rng([int_seed(reader.seed), n]).random(size) for n, size in own]
            )
        new = {when: by_hook[hook].double().cpu()[found.index.tolist()] for when, by_hook in batch.by_when.items()}
        states = {when: torch.cat([states[when], new[when]]) if states else new[when] for when in new}
        labels = pd.concat([labels, found], ignore_index=True) if len(labels) else found.reset_index(drop=True)
        chosen = labels.nsmallest(points, "order").sort_values(["document", "position"])
        states = {when: of_all[chosen.index.tolist()] for when, of_all in states.items()}
        labels = chosen.reset_index(drop=True)
    return labels.drop(columns="order"), states


def _axes(centred: Float[Tensor, "points d_model"], dims: int) -> tuple[Float[Tensor, "dims d_model"], list[float]]:
    """The first principal directions, each with its share of the variance; the largest loading is positive."""
    _, singular, right = torch.linalg.svd(centred, full_matrices=False)
    spanned = int((singular > FLAT * torch.linalg.vector_norm(singular)).sum())
    if spanned < dims:
        raise TooFewStatesError(
            f"{len(centred)} states that differ along {spanned} directions make no plot of {dims}; give more text"
        )
    axes = right[:dims]
    signs = axes.gather(1, axes.abs().argmax(dim=1, keepdim=True)).sign()
    return axes * signs, (singular.square() / singular.square().sum())[:dims].tolist()
