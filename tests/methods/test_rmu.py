"""RMU's and Adaptive RMU's losses on a model with an attention sink, against their formulas one document at a time."""

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from typing_extensions import override

from mrp_lens.data import Corpus
from mrp_lens.methods import RMU, AdaptiveRMU, Fit
from mrp_lens.methods.rmu import default_layer
from mrp_lens.models import LensModel, encoder_for, load_model
from mrp_lens.models.hooks import captured, hook_name
from mrp_lens.training import Callback, TrainingState
from tests.support.edits import logits
from tests.support.families import save_family

LAYER, ROOMY = 2, 64  # more than there are documents: each step sees all of them
PLAIN: dict[str, Any] = {"budget": None, "coverage": None}  # the corpora as they are, and all of them
FIT: dict[str, Any] = {"seed": 0, "progress": False}
SINK = "The"  # every text begins with it
States = list[torch.Tensor]


@pytest.fixture(scope="module")
def sinking(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama, with one token's embedding a thousand times as long."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = save_family("llama", tmp_path_factory.mktemp("sinking"))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    (token,) = AutoTokenizer.from_pretrained(folder)(SINK, add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        model.get_input_embeddings().weight[token] *= 1000.0
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def sunk(sinking: Path, backend: str) -> Any:
    return load_model(sinking, backend=backend)


def states_of(model: LensModel, corpus: Corpus) -> States:
    """Of the content tokens of each document, at the layer."""
    encoder, found = encoder_for(model), []
    for row in encoder.encode(corpus.documents):
        with captured(model, [hook_name(LAYER)]) as store:
            logits(model, torch.tensor([row.ids]))
        found.append(store[hook_name(LAYER)][0][torch.tensor(row.content)].double())
    return found


def by_hand(method: Any, u: torch.Tensor, z: Mapping[str, States], h: Mapping[str, States]) -> tuple[float, float]:
    """The forget and the retain term, from the frozen states z and the trained ones h."""
    relative = method.errors == "relative"
    norms = {side: [states.norm(dim=-1) for states in z[side]] for side in z}
    every = torch.cat(norms["forget"])
    norm = every.sort().values[(len(every) - 1) // 2] if relative else every.mean()
    counts = {side: [n <= 4 * norm if relative else n > 0 for n in norms[side]] for side in z}
    first = torch.cat([n[kept] for n, kept in zip(norms["forget"], counts["forget"], strict=True)]).mean()
    beta = method.beta if isinstance(method, AdaptiveRMU) else 2.0
    terms = {}
    for side in z:
        total = tokens = 0.0
        for frozen, now, n, kept in zip(z[side], h[side], norms[side], counts[side], strict=True):
            c = {"token": n, "sample": n[kept].mean(), "first_batch": first}.get(
                getattr(method, "coefficient", ""), norm
            )
            target = (beta * c).expand(len(n))[:, None] * u if side == "forget" else frozen
            errors = (now - target).square().sum(-1)
            unit = beta if side == "forget" else 1.0
            errors = errors / (unit * n) ** 2 if relative else errors / frozen.shape[-1]
            total, tokens = total + float(errors[kept].sum()), tokens + len(n)
        terms[side] = total / tokens
    return terms["forget"], terms["retain"]


@pytest.mark.parametrize("errors", ["relative", "absolute"])
@pytest.mark.parametrize("coefficient", [None, "token", "sample", "first_batch"])
def test_the_losses_are_those_of_the_formulas_with_and_without_attention_sinks(
    sunk: Any, texts: tuple[Corpus, Corpus], errors: Any, coefficient: Any
) -> None:
    def fitted(steps: int) -> tuple[Any, Fit]:
        shared: dict[str, Any] = {
            "layer": LAYER,
            "steps": steps,
            "batch_size": ROOMY,
            "errors": errors,
            "micro_batch": 5,
            **PLAIN,
        }
        method = RMU(**shared) if coefficient is None else AdaptiveRMU(coefficient=coefficient, beta=5.0, **shared)
        return method, method.fit(sunk, *texts, **FIT)

    (method, one), (_, two) = fitted(1), fitted(2)
    sides = dict(zip(("forget", "retain"), texts, strict=True))
    frozen = {side: states_of(sunk, corpus) for side, corpus in sides.items()}
    with one.edit.applied(sunk):
        now = {side: states_of(sunk, corpus) for side, corpus in sides.items()}
    norms = torch.cat([states.norm(dim=-1) for states in frozen["forget"]])
    assert norms.max() > 100 * norms.median(), "no sink was planted"
    norm = float(norms.median() if errors == "relative" else norms.mean())
    beta = 2.0 if coefficient is None else 5.0
    alpha = 4.0 if errors == "relative" else 4.0 * beta**2
    assert two.settings["norm"] == pytest.approx(norm, rel=1e-4)
    assert two.settings["alpha"] == pytest.approx(alpha)
    assert two.settings.get("steering_coeff", 2 * norm) == pytest.approx(2 * norm, rel=1e-4)
    for row, states in enumerate((frozen, now)):
        forget, retain = by_hand(method, one.direction.double(), frozen, states)
        assert two.log["forget"][row] == pytest.approx(forget, rel=1e-3)
        assert two.log["retain"][row] == pytest.approx(retain, rel=1e-2, abs=1e-12)
        assert two.log["loss"][row] == pytest.approx(forget + alpha * retain, rel=1e-2)
        assert (retain > 0) == (row == 1)


@pytest.mark.slow
def test_a_micro_batch_of_attention_sinks_alone_has_no_share(sunk: Any, texts: tuple[Corpus, Corpus]) -> None:
    forget = Corpus.from_texts([f"{SINK}{SINK}", *(row.completion for row in texts[0].documents)], name="forget")
    (sinks,) = states_of(sunk, Corpus.from_texts([f"{SINK}{SINK}"]))
    assert len(sinks) == 2
    for coefficient in ("token", "sample"):
        fits = [
            AdaptiveRMU(coefficient=coefficient, layer=LAYER, steps=3, batch_size=ROOMY, micro_batch=size).fit(
                sunk, forget, texts[1], **FIT
            )  # type: ignore[arg-type]
            for size in (None, 1)
        ]
        assert sinks.norm(dim=-1).min() > 4 * fits[0].settings["norm"]
        logs = [torch.tensor(fit.log[["loss", "forget", "retain"]].to_numpy()) for fit in fits]
        torch.testing.assert_close(*logs, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(("errors", "first", "last"), [("relative", 0.1, 0.5), ("absolute", 1.0, 1.0)])
def test_the_learning_rate_rises_at_first_and_falls_over_the_second_half_with_relative_errors(
    model: LensModel, texts: tuple[Corpus, Corpus], errors: Any, first: float, last: float, untouched: None
) -> None:
    class Rates(Callback):
        @override
        def on_start(self, state: TrainingState) -> None:
            self.state, self.seen = state, list[float]()

        @override
        def on_step(self, step: int, row: Mapping[str, float]) -> None:
            self.seen.append(self.state.optimizer.param_groups[0]["lr"])

    rates = Rates()
    RMU(errors=errors, lr=1e-3, steps=4, batch_size=4).fit(model, *texts, callbacks=[rates], **FIT)
    assert rates.seen == pytest.approx([first * 1e-3, 1e-3, 1e-3, last * 1e-3])


@pytest.mark.parametrize(("depth", "layer"), [(1, 0), (2, 1), (4, 2), (8, 2), (12, 4), (30, 9), (32, 10)])
def test_it_steers_at_three_tenths_of_the_depth(depth: int, layer: int) -> None:
    model: Any = SimpleNamespace(cfg=SimpleNamespace(n_layers=depth))
    assert default_layer(model) == layer
