"""Texts that a model writes from prompts of its user's."""

import copy
import json
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
from mrp_lens.models.generation import (
    can_start,
    continuations,
    continued,
    end_tokens,
    start_token,
    written_after,
    written_texts,
)
from tests.support.families import save_family
from tests.support.plain import plain_logits

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


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_bos_that_is_the_pad_token_too_is_read(
    family: str, side: str, tmp_path: Path, model: Any, backend: str
) -> None:
    """HookedTransformer's own `generate` asks the tokenizer which tokens are pads, and would mask it."""
    tokenizer = copy.deepcopy(model.tokenizer)
    for kind in ("eos", "pad"):
        setattr(tokenizer, f"{kind}_token", tokenizer.bos_token)
    own: Any = load_model(save_family(family, tmp_path, tokenizer=tokenizer), backend=backend)  # type: ignore[arg-type]
    own.tokenizer.padding_side = side
    before = own.tokenizer
    for prompt in ("The old man", ""):
        (answer,) = continued(own, [prompt], max_new_tokens=4)
        ids = list(answer.prompt)
        for _ in answer.ids:
            ids.append(int(torch.tensor(plain_logits(own, ids)).argmax()))
        assert answer.ids == tuple(ids[len(answer.prompt) :])
    assert own.tokenizer is before


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


@pytest.fixture
def ending(backend: str, tmp_path: Path, model: Any) -> tuple[Any, int, list[int]]:
    """The tiny model as a checkpoint whose generation config alone names an end, that token, and what it writes up to it."""
    (plain,) = continued(model, ["The old man"], max_new_tokens=8)
    end = plain.ids[3]
    listed = [end, int(model.tokenizer.eos_token_id), 10**6]  # and one that the embedding has no row for
    file = save_family("llama", tmp_path) / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"eos_token_id": listed}))
    return load_model(tmp_path, backend=backend), end, [*plain.ids[: plain.ids.index(end)], end]  # type: ignore[arg-type]


def test_an_answer_ends_where_the_generation_config_says(ending: tuple[Any, int, list[int]]) -> None:
    model, end, ids = ending
    assert set(end_tokens(model)) == {end, model.tokenizer.eos_token_id}
    prompts = ["The old man", "The old house", "It", "The old man"]
    answers = continued(model, prompts, max_new_tokens=8)
    assert list(answers[0].ids) == list(answers[3].ids) == ids
    assert answers[0].text == model.tokenizer.decode(ids[:-1], skip_special_tokens=True).strip()
    assert answers == [continued(model, [prompt], max_new_tokens=8)[0] for prompt in prompts]
    for text in written_after(model, [*prompts, *[""] * 60], max_new_tokens=30, seed=0, progress=False)[4:]:
        assert end not in ids_of(model, text)


def test_one_end_may_be_named_as_a_number(ending: tuple[Any, int, list[int]]) -> None:
    model, end, _ = ending
    model.generation_config.eos_token_id = end
    assert end_tokens(model) == (model.tokenizer.eos_token_id, end)
    model.generation_config.eos_token_id = None
    assert end_tokens(model) == (model.tokenizer.eos_token_id,)


def test_a_model_in_memory_keeps_its_ends(backend: str, tiny_folder: Path, model: Any) -> None:
    from transformers import AutoModelForCausalLM

    hf_model = AutoModelForCausalLM.from_pretrained(tiny_folder)
    hf_model.generation_config.eos_token_id = [7, 9]
    loaded = load_model(hf_model, tokenizer=model.tokenizer, backend=backend)  # type: ignore[arg-type]
    assert end_tokens(loaded) == (model.tokenizer.eos_token_id, 7, 9)


def test_ids_of_an_answer_that_ends_before_others_hold_its_end_once(backend: str) -> None:
    demo: Any = load_model("demo", backend=backend)  # type: ignore[arg-type]
    prompts = ["The craft is", "The old", "The colour of", "A longer prompt", "The sage said that"]
    together = continued(demo, prompts, max_new_tokens=20)
    assert together == [continued(demo, [prompt], max_new_tokens=20)[0] for prompt in prompts]
    assert all(answer.ids.count(demo.tokenizer.eos_token_id) <= 1 for answer in together)


def test_of_a_long_prompt_the_end_is_read_and_the_answer_has_its_room(model: Any, untouched: None) -> None:
    context, new = int(model.cfg.n_ctx), 10
    prompts = ["The old man walked slowly. " * 20 + "The colour of", "The old", "house " * (context - 6)]
    with pytest.warns(
        UserWarning, match=f"2 of 3 documents are longer than {context - new} tokens; only the end"
    ) as told:
        answers = continued(model, prompts, max_new_tokens=new)
    assert len(told) == 1
    for prompt, answer in zip(prompts, answers, strict=True):
        whole = ids_of(model, prompt)
        ids = whole if len(whole) <= context - new else [whole[0], *whole[-(context - new - 1) :]]
        assert list(answer.prompt) == ids
        for token in answer.ids:
            assert token == int(max(range(len(logits := plain_logits(model, ids))), key=logits.__getitem__))
            ids = [*ids, token]
        assert len(answer.ids) == new or answer.ids[-1] == model.tokenizer.eos_token_id


def test_an_answer_has_to_leave_room_for_a_prompt(model: Any, untouched: None) -> None:
    context = int(model.cfg.n_ctx)
    with pytest.raises(ValueError, match=rf"max_new_tokens {context - 1} leaves no room .* give at most {context - 2}"):
        continuations(model, ["The old man"], max_new_tokens=context - 1)
    with pytest.warns(UserWarning, match="1 of 1 documents are longer than 2 tokens"):
        (answer,) = continued(model, ["The old man"], max_new_tokens=context - 2)
    assert list(answer.prompt) == [model.tokenizer.bos_token_id, ids_of(model, "The old man")[-1]]
