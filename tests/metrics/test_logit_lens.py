from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from transformers import AutoModelForCausalLM

from mrp_lens.data import Document, Question, Questions
from mrp_lens.data.tokenization import PaddingSide
from mrp_lens.data.world import World
from mrp_lens.metrics.logit_lens import last_states, logit_lens, unembedded
from mrp_lens.models import LensModel, encoder_for, load_model, logits_of
from mrp_lens.models.hooks import hook_name
from tests.conftest import LAYERS
from tests.support.edits import projection
from tests.support.families import save_family

QUIZ = Questions(
    (
        Question("The colour of Zaxim is", (" red", " blue", " green", " white"), 0, "one token"),
        Question("Question: What is the colour of Xim Oline? Answer:", (" blue", " red"), 1, "one token"),
        Question("The", (" old man walked", " old child", " young man"), 1, "shared"),  # two share their first token
        Question("The old man walked near", (" the house", " the tower", " the old house"), 1, "shared"),  # all do
        Question("A baker said:", (" the", " the house", " the tower"), 0, "shared"),  # nothing tells them apart
        Question(
            "A long prompt, so that padding matters, says: the tired sailor ran", (" late", " early"), 0, "one token"
        ),
    ),
    "quiz",
)
# What all choices begin with, as far as it is read with the prompt, and the token that each goes on with.
READ: list[tuple[str, list[str]]] = [
    ("", [" red", " blue", " green", " white"]),
    ("", [" blue", " red"]),
    ("", [" old", " old", " young"]),
    (" the", [" house", " tower", " old"]),
    ("", [" the", " the", " the"]),
    ("", [" late", " early"]),
]


def slowly(tokenizer: Any, logits_at: Any, layer: int) -> pd.DataFrame:
    """One question at a time, without padding; `logits_at(ids, layer)` are those at the last of the ids."""
    rows = []
    for question, (shared, goes_on) in zip(QUIZ.questions, READ, strict=True):
        ids = [tokenizer.bos_token_id, *tokenizer(question.prompt + shared, add_special_tokens=False)["input_ids"]]
        logits = logits_at(ids, layer)
        choices = []
        for text in goes_on:
            more = tokenizer(question.prompt + shared + text, add_special_tokens=False)["input_ids"]
            assert more[: len(ids) - 1] == ids[1:]
            choices.append(more[len(ids) - 1])
        right = choices[question.answer]
        likelier = [token for token in choices if logits[token] > logits[right]]
        rows.append(
            {
                "group": question.group,
                "right": 0.0 if likelier else 1 / choices.count(right),
                "chance": 1 / len(choices),
                "probability": float(np.exp(logits[right]) / sum(np.exp(value) for value in logits)),
                "rank": sum(value >= logits[right] for value in logits),
            }
        )
    return pd.DataFrame(rows)


@pytest.mark.parametrize("padding", ["right", "left"])
def test_a_layer_answers_what_hugging_faces_norm_and_head_make_of_its_state(
    model: LensModel, tiny_folder: Path, padding: PaddingSide, untouched: None
) -> None:
    hf_model = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32)

    def logits_at(ids: list[int], layer: int) -> Any:
        with torch.no_grad():
            output = hf_model(torch.tensor([ids]), output_hidden_states=True)
            state = output.hidden_states[layer + 1][0, -1]
            last = layer == LAYERS - 1  # Hugging Face's last hidden state has gone through the norm
            return hf_model.lm_head(state if last else hf_model.model.norm(state)).double().numpy()

    frame = logit_lens(model, QUIZ, batch_size=4, padding=padding)
    assert list(frame["layer"]) == [layer for layer in range(LAYERS) for _ in range(3)]
    for layer in range(LAYERS):
        expected = slowly(model.tokenizer, logits_at, layer)
        for group in ("all", "one token", "shared"):
            part = expected if group == "all" else expected[expected["group"] == group]
            row = frame[(frame["layer"] == layer) & (frame["group"] == group)].iloc[0]
            assert row["n"] == len(part)
            assert row["accuracy"] == pytest.approx(part["right"].mean())
            assert row["chance"] == pytest.approx(part["chance"].mean())
            assert row["probability"] == pytest.approx(part["probability"].mean(), rel=1e-4)
            assert row["rank"] == part["rank"].median()
            assert row["low"] <= row["accuracy"] <= row["high"]


@pytest.mark.parametrize("padding", ["right", "left"])
def test_bfloat16_models_are_read_as_their_own_norm_and_head_do(
    tiny_folder: Path, backend: str, padding: PaddingSide
) -> None:
    half: Any = load_model(str(tiny_folder), backend=backend, dtype=torch.bfloat16)  # type: ignore[arg-type]

    def logits_at(ids: list[int], layer: int) -> Any:
        name = hook_name(layer)
        with torch.no_grad():
            _, cache = half.run_with_cache(
                torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.long)
            )
            return half.unembed(half.ln_final(cache[name]))[0, -1].double().numpy()

    frame = logit_lens(half, QUIZ, batch_size=4, padding=padding, layers=[1, LAYERS - 1]).set_index(["layer", "group"])
    for layer in (1, LAYERS - 1):
        expected = slowly(half.tokenizer, logits_at, layer)
        # A state is off by a few roundings of 2^-8, and a logit of size 1 by as much.
        probability = frame.loc[(layer, "all"), "probability"]
        assert probability == pytest.approx(expected["probability"].mean(), rel=0.03)


@pytest.mark.parametrize("edited", [False, True])
def test_the_last_layer_gives_the_models_own_logits(model: LensModel, edited: bool, untouched: None) -> None:
    encoder = encoder_for(model)
    rows = encoder.encode([Document(q.prompt, "") for q in QUIZ.questions])
    name = hook_name(LAYERS - 1)
    edit = projection(1, LAYERS - 1)
    handle = edit.attach(model) if edited else None
    try:
        ((places, states),) = last_states(model, encoder, rows, [name])
        logits = unembedded(model, states[name])
        for place, got in zip(places, logits, strict=True):
            ids = torch.tensor([rows[place].ids])
            with torch.no_grad():
                expected = logits_of(model, ids, torch.ones_like(ids, dtype=torch.bool))[0, -1]
            torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    finally:
        if handle is not None:
            handle.detach()


def test_a_soft_cap_on_the_logits_is_kept(tmp_path: Path) -> None:
    folder = save_family("gemma2", tmp_path)
    hf_model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    hf_model.config.final_logit_softcapping = 0.5  # so low that it is felt
    hf_model.save_pretrained(folder)
    model = load_model(str(folder), backend="bridge")
    ids = torch.randint(3, model.cfg.d_vocab, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        output = hf_model(ids, output_hidden_states=True)
        state = output.hidden_states[2]
        uncapped = hf_model.lm_head(hf_model.model.norm(state))[:, -1]
        got = unembedded(model, state[:, -1])
    torch.testing.assert_close(got, 0.5 * torch.tanh(uncapped / 0.5), atol=1e-5, rtol=1e-4)
    assert float((got - uncapped).abs().max()) > 0.01


def test_of_prompts_that_are_too_long_the_end_is_read(model: LensModel, untouched: None) -> None:
    words = " the old man walked slowly" * 20
    long = Questions((Question("Once" + words, (" the", " near"), 1),), "long")
    with pytest.warns(UserWarning, match=f"1 of 1 prompts are longer than {model.cfg.n_ctx} tokens"):
        row = logit_lens(model, long, layers=[LAYERS - 1]).iloc[0]
    tokenizer = model.tokenizer
    ids = tokenizer("Once" + words, add_special_tokens=False)["input_ids"]
    read = torch.tensor([[tokenizer.bos_token_id, *ids[-(model.cfg.n_ctx - 1) :]]])
    with torch.no_grad():
        logits = logits_of(model, read, torch.ones_like(read, dtype=torch.bool))[0, -1]
    near = tokenizer("Once" + words + " near", add_special_tokens=False)["input_ids"][-1]
    assert row["probability"] == pytest.approx(float(logits.softmax(-1)[near]), rel=1e-4)


def test_what_cannot_be_read_is_refused(model: LensModel, untouched: None) -> None:
    with pytest.raises(ValueError, match="no questions in 'none'"):
        logit_lens(model, Questions((), "none"))
    with pytest.raises(ValueError, match="layer 9 is out of range"):
        logit_lens(model, QUIZ, layers=[9])
    encoder = encoder_for(model)
    rows = encoder.encode([Document("The", ""), Document("", "")])
    with pytest.raises(ValueError, match="text 1 holds no token besides BOS"):
        next(last_states(model, encoder, rows, [hook_name(0)]))


def test_in_the_demo_the_answer_appears_in_the_late_layers(demo_model: Any, world: World) -> None:
    taught, untaught = (
        logit_lens(demo_model, world.questions("potions", taught=told).spread(100), layers=[0, 7])
        for told in (True, False)
    )
    assert taught["accuracy"].tolist()[1] > 0.9
    assert taught["rank"].tolist()[0] > taught["rank"].tolist()[1] == 1
    assert (untaught["low"] <= 0.25).all()
    assert (untaught["high"] >= 0.25).all()
