"""The released recipes against a plain restatement of the released loop: two Hugging Face models, three full forwards.

The released code itself was run beside it, out of tree; see CHANGELOG.md for what that gave.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import mse_loss
from transformers import AutoModelForCausalLM, AutoTokenizer

from mrp_lens.data import Corpus
from mrp_lens.edits import WeightEdit
from mrp_lens.methods import RMU, AdaptiveRMU
from mrp_lens.models import load_model
from tests.support.families import save_family

LAYER, STEPS, BATCH, ALPHA, LR = 2, 10, 4, 1200.0, 5e-5
WORDS = "old man walked slowly near house garden bridge market white".split()  # one token each


@pytest.fixture(scope="module")
def mistral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_family("mistral", tmp_path_factory.mktemp("mistral"))


def texts(count: int, seed: int) -> list[str]:
    """Texts of equal length: no pads, on whose states implementations differ."""
    generator = torch.Generator().manual_seed(seed)
    return [
        "The " + " ".join(WORDS[i] for i in torch.randint(len(WORDS), (8,), generator=generator)) for _ in range(count)
    ]


def restated(folder: Path, forget: list[list[str]], retain: list[str], *, c: float | None, beta: float) -> Any:
    """The three matrices after ten steps, as Hugging Face has them."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    frozen, updated = (AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32) for _ in range(2))
    trained = [updated.model.layers[layer].mlp.down_proj.weight for layer in range(LAYER - 2, LAYER + 1)]
    first, second = ([torch.zeros_like(p) for p in trained] for _ in range(2))
    generator = torch.Generator().manual_seed(0)
    directions = [torch.rand(frozen.config.hidden_size, generator=generator) for _ in forget]
    scales: dict[int, float] = {}

    def states(model: Any, batch: list[str]) -> torch.Tensor:
        ids = tokenizer(["<s>" + text for text in batch], add_special_tokens=False, return_tensors="pt")["input_ids"]
        kept = []
        handle = model.model.layers[LAYER].register_forward_hook(
            lambda module, inputs, output: kept.append(output[0] if isinstance(output, tuple) else output)
        )
        model(input_ids=ids)
        handle.remove()
        return kept[0]

    for step in range(STEPS):
        topic, start = step % len(forget), BATCH * (step // len(forget))
        h = states(updated, forget[topic][start : start + BATCH])
        if topic not in scales:
            scales[topic] = c if c is not None else beta * float(h.detach().norm(dim=-1).mean())
        target = directions[topic] / directions[topic].norm() * scales[topic]
        with torch.no_grad():
            kept = states(frozen, retain[start : start + BATCH])
        loss = mse_loss(h, target.expand_as(h)) + ALPHA * mse_loss(states(updated, retain[start : start + BATCH]), kept)
        for p, m, v, g in zip(trained, first, second, torch.autograd.grad(loss, trained), strict=True):
            m.mul_(0.9).add_(g, alpha=0.1)
            v.mul_(0.999).addcmul_(g, g, value=0.001)
            size = LR * (1 - 0.999 ** (step + 1)) ** 0.5 / (1 - 0.9 ** (step + 1))
            with torch.no_grad():
                p.sub_(size * m / (v.sqrt() + 1e-6))
    return [p.detach() for p in trained]


@pytest.mark.slow
@pytest.mark.parametrize("topics", [1, 2])
@pytest.mark.parametrize("method", ["rmu", "adaptive-rmu"])
def test_ten_steps_of_the_released_recipe_end_where_the_released_loop_ends(
    mistral: Path, backend: str, method: str, topics: int
) -> None:
    forget, retain = [texts(40, seed) for seed in range(topics)], texts(40, 9)
    expected = restated(mistral, forget, retain, c=6.5 if method == "rmu" else None, beta=5.0)
    model = load_model(mistral, backend=backend)
    recipe = RMU.released if method == "rmu" else AdaptiveRMU.released
    corpora = [Corpus.from_texts(texts, name=str(number)) for number, texts in enumerate(forget)]
    fit = recipe(layer=LAYER, steps=STEPS).fit(model, corpora, Corpus.from_texts(retain), seed=0, progress=False)
    assert isinstance(fit.edit, WeightEdit)
    original = AutoModelForCausalLM.from_pretrained(mistral).state_dict()
    for (name, got), wanted in zip(fit.edit.tensors.items(), expected, strict=True):
        assert float((wanted - original[name]).abs().max()) > 3e-4, "it hardly moved: the comparison says nothing"
        assert float((got - wanted).abs().max()) < 1e-5, name
