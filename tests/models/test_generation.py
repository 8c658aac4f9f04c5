"""Texts that a model writes from prompts of its user's."""

import copy
import math
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mrp_lens.models import generation as module
from mrp_lens.models import load_model
from mrp_lens.models.finite import NonFiniteError
from mrp_lens.models.generation import can_start, continuations, start_token, written_after, written_texts
from tests.support.families import save_family

PROMPTS = ["The old man", "", "The colour of the house is", "The", "It is", "", "The man"]


def ids_of(model: Any, text: str) -> list[int]:
    return [model.tokenizer.bos_token_id, *model.tokenizer(text, add_special_tokens=False)["input_ids"]]


def test_every_text_begins_with_its_own_prompt(model: Any, untouched: None) -> None:
    texts = written_after(model, PROMPTS, max_new_tokens=4, seed=0, progress=False)
    assert len(texts) == len(PROMPTS)
    for prompt, text in zip(PROMPTS, texts, strict=True):
        assert text.startswith(prompt)
        assert len(ids_of(model, text)) >= len(ids_of(model, prompt))
    assert any(len(text) > len(prompt) for prompt, text in zip(PROMPTS, texts, strict=True))


def test_the_seed_alone_tells_what_is_written(model: Any, untouched: None) -> None:
    first, again, other = (written_after(model, PROMPTS, max_new_tokens=6, seed=s, progress=False) for s in (0, 0, 1))
    assert first == again != other


def test_prompts_of_one_length_are_what_the_models_own_generate_writes(model: Any) -> None:
    prompts = ["The old man"] * 3
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(5)
        tokens = torch.tensor([ids_of(model, prompt) for prompt in prompts])
        wanted = model.generate(
            tokens, max_new_tokens=5, do_sample=True, temperature=1.0, prepend_bos=False, verbose=False
        )
    expected = [model.tokenizer.decode(row, skip_special_tokens=True).strip() for row in wanted]
    assert written_after(model, prompts, max_new_tokens=5, seed=5, progress=False) == expected


def test_what_follows_has_the_models_own_probabilities(model: Any) -> None:
    """Four groups of next tokens are met as often as the softmax of the logits says, among prompts of three lengths."""
    prompt, many = "The old man", 1200
    texts = written_after(model, [prompt, "The", "It is"] * many, max_new_tokens=1, seed=0, progress=False)[::3]
    ids = ids_of(model, prompt)
    with torch.no_grad():
        share = model(torch.tensor([ids]))[0, -1].softmax(-1)
    wanted: Counter[int] = Counter()
    for token, probability in enumerate(share.tolist()):
        wanted[len(model.tokenizer.decode([*ids, token], skip_special_tokens=True).strip()) % 4] += probability  # type: ignore[assignment]
    met = Counter(len(text) % 4 for text in texts)
    assert len(texts) == many
    for group, probability in wanted.items():
        deviation = math.sqrt(probability * (1 - probability) / many)
        assert abs(met[group] / many - probability) < 4 * deviation


@pytest.mark.parametrize("at_once", [1, 2])
def test_prompts_go_side_by_side_by_length_and_never_padded(
    model: Any, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes: list[tuple[int, ...]] = []
    own = module._written

    def seen(model: Any, tokens: torch.Tensor, **how: Any) -> torch.Tensor:
        shapes.append(tuple(tokens.shape))
        return own(model, tokens, **how)

    monkeypatch.setattr(module, "AT_ONCE", at_once)
    monkeypatch.setattr(module, "_written", seen)
    texts = written_after(model, PROMPTS, max_new_tokens=2, seed=0, progress=False)
    assert all(text.startswith(prompt) for prompt, text in zip(PROMPTS, texts, strict=True))
    lengths = Counter(len(ids_of(model, prompt)) for prompt in PROMPTS)
    assert all(rows <= at_once for rows, _ in shapes)
    assert {length: sum(rows for rows, width in shapes if width == length) for length in lengths} == lengths


def test_no_text_goes_beyond_the_context(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    context = int(model.cfg.n_ctx)
    fits, over = "house " * (context - 12), "house " * (context + 10)
    lengths: list[tuple[int, int]] = []
    own = module._written

    def seen(model: Any, tokens: torch.Tensor, **how: Any) -> torch.Tensor:
        output = own(model, tokens, **how)
        lengths.append((tokens.shape[1], output.shape[1]))
        return output

    monkeypatch.setattr(module, "_written", seen)
    room = context - len(ids_of(model, fits))
    assert 0 < room < 50
    with pytest.warns(UserWarning, match=f"1 of 2 documents are longer than {context - 1} tokens"):
        first, second = written_after(model, [fits, over], max_new_tokens=50, seed=0, progress=False)
    assert lengths[0][0] == context - room
    assert lengths[0][1] <= context
    assert lengths[1] == (context - 1, context)
    assert first.startswith(fits.strip())
    assert second.startswith("house house")


def test_no_prompts_give_no_texts(model: Any, untouched: None) -> None:
    assert written_after(model, [], max_new_tokens=2, seed=0, progress=False) == []


def test_texts_from_nothing_are_those_of_empty_prompts(model: Any) -> None:
    texts = written_after(model, [""] * 12, max_new_tokens=6, seed=3, progress=False)
    assert written_texts(model, 12, max_new_tokens=6, seed=3, progress=False) == sorted(set(texts) - {""})


def test_logits_that_are_not_finite_are_refused(backend: str, tiny_folder: Path) -> None:
    model: Any = load_model(tiny_folder, backend=backend)  # type: ignore[arg-type]
    with torch.no_grad():
        next(model.embed.parameters())[ids_of(model, "The")[1]] = math.nan
    with pytest.raises(NonFiniteError, match="the logits of a text that is written"):
        written_after(model, ["It is", "The"], max_new_tokens=3, seed=0, progress=False)


@pytest.mark.parametrize(("bos", "eos"), [(None, None), (3, None), (None, 4), (0, 0)])
def test_a_text_can_start_behind_bos_or_eos(bos: int | None, eos: int | None) -> None:
    model: Any = SimpleNamespace(tokenizer=SimpleNamespace(bos_token_id=bos, eos_token_id=eos))
    assert can_start(model) == (bos is not None or eos is not None)
    if can_start(model):
        assert start_token(model) == (eos if bos is None else bos)


def test_without_bos_prompts_are_written_from_and_nothing_is_not(tmp_path: Path, model: Any, backend: str) -> None:
    tokenizer = copy.deepcopy(model.tokenizer)
    for kind in ("bos", "eos", "pad"):
        setattr(tokenizer, f"{kind}_token", None)
    bare: Any = load_model(save_family("llama", tmp_path, tokenizer=tokenizer), backend=backend)  # type: ignore[arg-type]
    (text,) = written_after(bare, ["The old man"], max_new_tokens=3, seed=0, progress=False)
    assert text.startswith("The old man")
    assert len(text) > len("The old man")
    with pytest.raises(ValueError, match="neither a BOS nor an EOS token"):
        written_after(bare, ["The old man", ""], max_new_tokens=3, seed=0, progress=False)
    assert continuations(bare, ["The old man"], max_new_tokens=1)
