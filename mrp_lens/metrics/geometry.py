"""The geometry of states before and after an edit: how large and how spread they are, what is removed, what comes back."""

from collections import defaultdict
from collections.abc import Mapping, Sequence

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from mrp_lens.data import Corpus
from mrp_lens.data.tokenization import PaddingSide
from mrp_lens.edits import Edit, ProjectionEdit, projection_in
from mrp_lens.edits.subspace import Subspace
from mrp_lens.metrics.activations import StateReader, Texts, When, groups_of, hooks_at
from mrp_lens.metrics.registry import Measured, register
from mrp_lens.models import LensModel
from mrp_lens.models.hooks import Site, layer_of
from mrp_lens.utils.torch_state import ordinary_torch

WHENS: tuple[When, ...] = ("before", "after")
USABLE = 1e-12  # an eigenvalue below this share of their sum is rounding noise of float32 states, not a direction


class Moments:
    """Sums over states, in float64 on the CPU: their number, their first and second moments, how far an edit moved them.

    Args:
        d_model: how wide they are.
        spread: sum up the products of their entries, too, which takes d_model times as long as all else.
    """

    def __init__(self, d_model: int, *, spread: bool = True) -> None:
        self.documents = 0
        self.tokens = 0
        self.moved = 0.0  # sum of squared distances to the unedited states
        self.energy = 0.0  # sum of squared norms
        self._length = 0.0
        self._total = torch.zeros(d_model, dtype=torch.float64)
        self._products = torch.zeros(d_model, d_model, dtype=torch.float64) if spread else None

    def add(
        self,
        states: Float[Tensor, "tokens d_model"],
        documents: int,
        unedited: Float[Tensor, "tokens d_model"] | None = None,
    ) -> None:
        """States of so many documents; `unedited` are those of the same tokens without the edit."""
        wide = states.double()
        self.documents += documents
        self.tokens += len(wide)
        norms = wide.norm(dim=-1)
        self._length += float(norms.sum())
        self.energy += float(norms.square().sum())
        self._total += wide.sum(dim=0).cpu()
        if self._products is not None:
            self._products += (wide.T @ wide).cpu()
        if unedited is not None:
            self.moved += float((wide - unedited.double()).square().sum())

    @property
    def norm(self) -> float:
        """Mean L2 norm."""
        return self._length / self.tokens

    @property
    def effective_rank(self) -> float:
        """exp of the entropy of the covariance's normalised eigenvalues (Roy and Vetterli 2007); NaN without variance, or where
        no products were summed up."""
        if self._products is None:
            return float("nan")
        mean = self._total / self.tokens
        covariance = self._products / self.tokens - torch.outer(mean, mean)
        values = torch.linalg.eigvalsh(covariance).clamp(min=0.0)
        if float(values.sum()) <= USABLE * self.energy / self.tokens:
            return float("nan")
        return float(torch.special.entr(values / values.sum()).sum().exp())

    def energy_share(self, subspace: Subspace) -> float:
        """Share of the states' squared norm inside the subspace; NaN if all states are 0, or no products were summed up."""
        if self._products is None:
            return float("nan")
        basis = subspace.basis.double().cpu()
        inside = max(float(((basis @ self._products) * basis).sum()), 0.0)
        return inside / self.energy if self.energy else float("nan")

    def top_directions(self, rank: int) -> Subspace:
        """The span of the `rank` first principal directions, uncentred as MRP's initialization takes them.

        Raises:
            ValueError: the states span fewer.
        """
        assert self._products is not None, "of moments without products nothing is known about directions"
        values, vectors = torch.linalg.eigh(self._products)
        usable = int((values > USABLE * self.energy).sum())
        if usable < rank:
            raise ValueError(f"rank {rank} is above the {usable} directions that {self.tokens} states span")
        return Subspace(vectors[:, -rank:].T.float())


def read_moments(
    reader: StateReader, corpus: Corpus, hooks: Mapping[int, str], *, spread: bool = True
) -> dict[When, dict[int, Moments]]:
    """ "before" and, with an edit, "after" -> layer -> moments of the states at the layer's hook; `spread`: as `Moments`."""
    d_model = int(reader.model.cfg.d_model)
    whens = WHENS[:1] if reader.edit is None else WHENS
    moments = {when: {layer: Moments(d_model, spread=spread) for layer in hooks} for when in whens}
    for batch in reader.read(corpus, list(hooks.values())):
        for when, states in batch.by_when.items():
            for layer, hook in hooks.items():
                unedited = batch.states[hook] if when == "after" else None
                moments[when][layer].add(states[hook], batch.documents, unedited)
    return moments


@ordinary_torch(gradients=False)
def geometry(
    model: LensModel,
    texts: Texts,
    edit: Edit | None = None,
    *,
    layers: Sequence[int] | None = None,
    site: Site = "resid_post",
    documents: int | None = 1000,
    spread: bool = True,
    seed: int = 0,
    batch_size: int = 32,
    max_length: int | None = None,
    padding: PaddingSide = "right",
    progress: bool = True,
) -> pd.DataFrame:
    """Size and spread of the states per layer, how far the edit moves them, and how much of them its projection removes.

    A projection off a random subspace of rank k removes k / d_model of the energy of *any* states on average: what a
    fitted one removes is to be compared with that, and what it removes of the forget states with what it removes of
    the retain states. States have a large mean, so shares of energy are not shares of variance. Of a projection behind
    gates the subspace is what would go if all of them were open; how far they are tells `gate`.

    Args:
        model: HookedTransformer or TransformerBridge, without the edit: it is put on and taken off batch by batch. Of
            an edit that draws noise, each batch has noise of its own.
        texts: a corpus, or several by name: {"forget": ..., "retain": ...}. Pads and BOS do not count.
        edit: of any kind. None: only "before" rows.
        layers: where to read. None: all. Memory is 16 d_model^2 bytes a layer, however many documents there are.
        site: of the hook points.
        documents: read at most so many of each corpus, chosen at random by `seed`. None: all. The effective rank of few
            states is too low: give many times d_model tokens.
        spread: False: without effective rank and removed energy, which are NaN then, and take most of the time.
        seed: of that choice.
        batch_size, max_length, padding, progress: as in `alignment`.

    Returns:
        One row a group, `when` ("before", "after") and layer: `group`, `when`, `layer`, `documents`, `tokens`; `norm`,
        mean L2 norm of the states; `effective_rank` of their covariance, the exponential of the entropy of its
        normalised eigenvalues (Roy and Vetterli 2007), from 1 to d_model, NaN if all states are the same;
        `removed_rank`, of the projection that the edit makes at this hook, 0 if none; `removed_energy`, share of the
        states' squared norm inside the removed subspace ("before": what will go; "after": what is left), with its
        control `removed_energy_null`, rank / d_model (both NaN where nothing is removed); `displacement`, root mean
        square distance of the states with the edit from those without, over the latter's root mean square norm (0
        in "before" rows; NaN where all states are 0).

    Raises:
        TypeError, ValueError: no texts, no token, a layer or site that does not exist, an edit of another model.

    Example:
        >>> frame = geometry(model, {"forget": forget, "retain": retain}, fit.edit)
    """
    groups, hooks = groups_of(texts), hooks_at(model, layers, site)
    reader = StateReader(model, edit, documents, seed, batch_size, max_length, padding, progress)
    removed = removed_at(model, edit, hooks)
    rows = []
    for group, corpus in groups.items():
        moments = read_moments(reader, corpus, hooks, spread=spread)
        for when, by_layer in moments.items():
            for layer, now in by_layer.items():
                about = {"group": group, "when": when, "layer": layer, "documents": now.documents, "tokens": now.tokens}
                found = {"norm": now.norm, "effective_rank": now.effective_rank, **_removal(now, removed.get(layer))}
                energy = moments["before"][layer].energy
                displacement = (now.moved / energy) ** 0.5 if energy else float("nan")
                rows.append(about | found | {"displacement": displacement})
    return pd.DataFrame(rows)


@ordinary_torch(gradients=False)
def propagation(
    model: LensModel,
    texts: Texts,
    edit: Edit,
    *,
    site: Site = "resid_post",
    documents: int | None = 1000,
    seed: int = 0,
    batch_size: int = 32,
    max_length: int | None = None,
    padding: PaddingSide = "right",
    progress: bool = True,
) -> pd.DataFrame:
    """Does what a projection removes at one layer come back at later ones, and where?

    A projection is irreversible where it stands; nothing keeps later layers from writing along the removed directions
    again. Each removed subspace is followed through the layers, with the whole edit on: where an edit projects at
    several hooks, a later projection removes its own subspace, not the one that is followed.

    Args:
        model: HookedTransformer or TransformerBridge, without the edit.
        texts: a corpus, or several by name.
        edit: one that holds a projection, alone or among others.
        site: where later layers are read; the source layer is read at the projection's own hook.
        documents, seed, batch_size, max_length, padding, progress: as in `geometry`.

    Returns:
        One row a group, hook of the projection and layer from the hook's own on: `group`, `source` (layer of the hook),
        `hook` (its name), `layer`, `documents`, `tokens`; `before` and `after`, share of the states' squared norm inside
        the subspace removed at the source, without and with the edit; the control `null`, rank / d_model, the share
        in a random subspace on average. What has come back is `after`, next to what was there, `before`.

    Raises:
        TypeError, ValueError: the edit holds no projection or is of another model, no texts, no token, an unknown site.

    Example:
        >>> frame = propagation(model, {"forget": forget, "retain": retain}, fit.edit)
    """
    groups, later = groups_of(texts), hooks_at(model, None, site)
    reader = StateReader(model, edit, documents, seed, batch_size, max_length, padding, progress)
    followed = _projection_of(edit).subspaces()
    read_at = {
        source: {layer_of(source): source} | {layer: later[layer] for layer in later if layer > layer_of(source)}
        for source in sorted(followed, key=layer_of)
    }
    hooks = list(dict.fromkeys(hook for by_layer in read_at.values() for hook in by_layer.values()))
    rows = []
    for group, corpus in groups.items():
        inside: dict[tuple[When, str, int], float] = defaultdict(float)
        energy: dict[tuple[When, str], float] = defaultdict(float)
        document_count = token_count = 0
        for batch in reader.read(corpus, hooks):
            document_count, token_count = document_count + batch.documents, token_count + len(batch.rows)
            for when, states in batch.by_when.items():
                for hook in hooks:
                    energy[when, hook] += _energy(states[hook])
                for source, by_layer in read_at.items():
                    for layer, hook in by_layer.items():
                        inside[when, source, layer] += _energy(states[hook], followed[source])
        for source, by_layer in read_at.items():
            for layer, hook in by_layer.items():
                about = {"group": group, "source": layer_of(source), "hook": source, "layer": layer}
                read = {"documents": document_count, "tokens": token_count}
                found = {when: _share(inside[when, source, layer], energy[when, hook]) for when in WHENS}
                rows.append(about | read | found | {"null": followed[source].rank / followed[source].d_model})
    return pd.DataFrame(rows)


@register(
    "geometry",
    summary="How far the edit moves the states at each layer.",
    figures=["displacement"],
    compares=True,
)
def _of_states(measured: Measured) -> pd.DataFrame | None:
    if measured.edit is None:
        return None
    texts = measured.task.texts(limit=measured.documents)
    return geometry(measured.model, texts, measured.edit, spread=False, seed=measured.seed, progress=measured.progress)


@register(
    "propagation",
    summary="How much of what a projection removes comes back at later layers.",
    figures=["propagation"],
    compares=True,
)
def _of_removed(measured: Measured) -> pd.DataFrame | None:
    if measured.edit is None or projection_in(measured.edit) is None:
        return None
    texts = measured.task.texts(limit=measured.documents)
    return propagation(measured.model, texts, measured.edit, seed=measured.seed, progress=measured.progress)


def removed_at(model: LensModel, edit: Edit | None, hooks: Mapping[int, str]) -> dict[int, Subspace]:
    """Layer -> what the edit's projection removes at the layer's hook, where it does."""
    projection = projection_in(edit)
    if projection is None:
        return {}
    points = model.hook_dict  # the Bridge has several names for one point
    return {
        layer: subspace
        for layer, hook in hooks.items()
        for name, subspace in projection.subspaces().items()
        if points[name] is points[hook]
    }


def _projection_of(edit: Edit) -> ProjectionEdit:
    projection = projection_in(edit)
    if projection is None:
        raise ValueError(
            f"the edit holds no projection whose subspace could be followed, got {type(edit).__name__}; MRP fits one, and "
            "ProjectionEdit({'blocks.3.hook_resid_post': Subspace(Q)}) makes one by hand"
        )
    return projection


def _removal(moments: Moments, subspace: Subspace | None) -> dict[str, int | float]:
    if subspace is None:
        return {"removed_rank": 0, "removed_energy": float("nan"), "removed_energy_null": float("nan")}
    return {
        "removed_rank": subspace.rank,
        "removed_energy": moments.energy_share(subspace),
        "removed_energy_null": subspace.rank / subspace.d_model,
    }


def _energy(states: Float[Tensor, "tokens d_model"], subspace: Subspace | None = None) -> float:
    """Squared norm, of the part inside a subspace if one is given, summed over the states."""
    wide = states.double()
    return float((wide if subspace is None else wide @ subspace.basis.to(wide).T).square().sum())


def _share(part: float, whole: float) -> float:
    return part / whole if whole else float("nan")
