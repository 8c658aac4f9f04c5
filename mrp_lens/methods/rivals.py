"""The rivals that MRP is compared with: gradient ascent, gradient difference, preference optimisation, direction ablation."""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor
from typing_extensions import override

from mrp_lens.checkpoints import EVERY
from mrp_lens.checks import PlainSettings, generator_for, given, one_of, positive
from mrp_lens.corpus import Corpus
from mrp_lens.edit import Edit, ProjectionEdit
from mrp_lens.methods.base import Fit, Forget, fitting, prepare, provenance, request_provenance
from mrp_lens.methods.start import states_at
from mrp_lens.methods.tuning import Tuning, Unit, sums_of
from mrp_lens.model import LensModel, check_layers, check_lens_model
from mrp_lens.stream import Site, hook_name
from mrp_lens.subspace import Subspace
from mrp_lens.torch_state import ordinary_torch


@dataclass(frozen=True, kw_only=True)
class GradientAscent(Tuning):
    """Ascend the loss of what must go (arXiv 2210.01504): L = log p(forget), per token; nothing holds the rest in place.

    The arguments are those of `Tuning`; the loss has no bound, so the number of steps decides.
    """

    steps: int = 30

    name = "gradient-ascent"

    @override
    def _forgetting(
        self,
        text: Float[Tensor, " counted"],
        rows: Int[Tensor, " counted"],
        reference: Float[Tensor, " documents"],
    ) -> Float[Tensor, " units"]:
        return -text


@dataclass(frozen=True, kw_only=True)
class GradientDifference(GradientAscent):
    """Gradient ascent on what must go and descent on what must stay (arXiv 2203.12817):
    L = log p(forget) + retain_weight * CE(retain), each per token.

    The arguments are those of `Tuning`.
    """

    steps: int = 200
    retain_weight: float = 10.0

    name = "gradient-difference"


@dataclass(frozen=True, kw_only=True)
class NPO(Tuning):
    """Negative preference optimisation (arXiv 2404.05868), with descent on what must stay:
    L = 2 / beta * mean over documents of log(1 + (p / p_before)^beta) + retain_weight * CE(retain).

    p is the probability of a document's counted tokens. As p falls below what the unedited model gives, its gradient
    vanishes, where gradient ascent's goes on.

    Args:
        beta: how soon it vanishes; small values come near to gradient ascent.

    The other arguments are those of `Tuning`.
    """

    beta: float = 0.1
    retain_weight: float = 1.0

    name = "npo"
    unit: Unit = "document"

    @override
    def _check(self) -> None:
        super()._check()
        positive(beta=self.beta)

    @override
    def _forgetting(
        self,
        text: Float[Tensor, " counted"],
        rows: Int[Tensor, " counted"],
        reference: Float[Tensor, " documents"],
    ) -> Float[Tensor, " units"]:
        now = -sums_of(text, rows, len(reference))
        return 2 / self.beta * torch.nn.functional.softplus(self.beta * (now - reference))


@dataclass(frozen=True, kw_only=True)
class DirectionAblation(PlainSettings):
    """One direction a layer projected out: the mean of the forget states less that of the retain states (the difference of
    means of arXiv 2406.11717). Nothing is trained.

    Args:
        layers: where. None: all.
        site: of the hooks.
        max_length: tokens at which documents are cut. None: 512, or the context if that is shorter.
    """

    layers: Sequence[int] | None = None
    site: Site = "resid_post"
    max_length: int | None = None

    name = "direction-ablation"

    @ordinary_torch(gradients=False)
    def fit(
        self,
        model: LensModel,
        forget: Forget,
        retain: Corpus,
        *,
        seed: int = 0,
        after: Edit | None = None,
        request: str | None = None,
        progress: bool = True,
        checkpoint: str | Path | None = None,
        every: int = EVERY,
    ) -> Fit:
        """Read the states; the model itself is left as it is.

        Args:
            model: HookedTransformer or TransformerBridge.
            forget: what must go; several corpora are taken as one.
            retain: what must stay.
            seed: of the documents that are read, about 4,096 tokens of each side.
            after: an earlier edit, on while states are read; the result holds both.
            request: name of this request. None: the names of the forget corpora.
            progress, checkpoint, every: of no use here, where one pass over the texts is the whole fit.

        Raises:
            ValueError: a layer that does not exist, an empty corpus, or states whose means do not differ.
        """
        one_of(Site, site=self.site)
        generator = generator_for(seed)
        check_lens_model(model)
        layers = check_layers(model, given(self.layers, range(model.cfg.n_layers)))
        hooks = [hook_name(layer, self.site) for layer in layers]
        data = prepare(model, forget, retain, max_length=self.max_length)
        started = time.perf_counter()
        with fitting(model, after):
            lost, kept = (
                states_at(model, data.encoder, rows, hooks, generator) for rows in (data.all_forget, data.retain)
            )
        subspaces = {hook: Subspace.spanned_by((lost[hook].mean(0) - kept[hook].mean(0))[None].cpu()) for hook in hooks}
        settings = asdict(replace(self, layers=layers))
        label = given(request, "+".join(data.names))
        record = {**provenance(model, self.name, settings, data, seed=seed), "steps_done": 0}
        edit: Edit = ProjectionEdit(subspaces, request=label, provenance=request_provenance(label, record))
        log = pd.DataFrame([{"step": 0, "loss": float("nan"), "seconds": time.perf_counter() - started}])
        return Fit(edit if after is None else after + edit, log, settings)
