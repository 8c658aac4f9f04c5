"""The tokenizer of a loaded model is the one that was given: its own tokens, its own BOS or none, and the caller's left alone."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import Metaspace
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from mrp_lens import metrics
from mrp_lens.data import Corpus, Document, Questions
from mrp_lens.data.tokenization import Encoder
from mrp_lens.evals.lm_eval import prepends_bos
from mrp_lens.models import encoder_for, load_model
from mrp_lens.models.generation import continuations, start_token
from tests.support.families import DEMO_FOLDER, save_family
from tests.support.reference import difference

TEXT = "The old man walked slowly near the house."


@pytest.fixture
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(DEMO_FOLDER)


def without(tokenizer: Any, *kinds: str) -> Any:
    for kind in kinds:
        setattr(tokenizer, f"{kind}_token", None)
    return tokenizer


def from_memory(tokenizer: Any) -> Any:
    """The same tokens, from no folder."""
    special = {f"{kind}_token": getattr(tokenizer, f"{kind}_token") for kind in ("bos", "eos", "pad")}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(tokenizer.backend_tokenizer.to_str()), **special)


def perplexity_by_hand(hf_model: Any, ids: list[int], first: int) -> float:
    """Of the tokens from `first` on, by plain transformers."""
    tokens = torch.tensor([ids])
    with torch.no_grad():
        log_probabilities = hf_model(input_ids=tokens).logits[0, :-1].log_softmax(-1)
    said = log_probabilities.gather(1, tokens[0, 1:, None])[first - 1 :]
    return float((-said.mean()).exp())


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("missing", [(), ("bos",), ("bos", "pad"), ("bos", "eos", "pad")], ids=str)
def test_without_bos_a_text_starts_with_its_own_first_token(
    missing: tuple[str, ...], side: str, tmp_path: Path, backend: str, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save_family("llama", tmp_path, tokenizer=without(tokenizer, *missing), eos_token_id=None)
    hf_model = AutoModelForCausalLM.from_pretrained(folder)
    model, plain = load_model(folder, backend=backend), AutoTokenizer.from_pretrained(folder)
    own = [] if missing else [plain.bos_token_id]
    ids = [*own, *plain(TEXT, add_special_tokens=False)["input_ids"]]
    (row,) = encoder_for(model).encode([Document("", TEXT)])
    assert list(row.ids) == ids
    assert row.content == tuple(i >= len(own) for i in range(len(ids)))
    assert model.to_tokens(TEXT)[0].tolist() == ids
    assert prepends_bos(hf_model, plain) == bool(own)
    real = Encoder.collate
    monkeypatch.setattr(Encoder, "collate", lambda self, rows, **_: real(self, rows, side=side))  # type: ignore[arg-type]
    short = Corpus.from_texts([TEXT, "The house."])
    expected = [
        perplexity_by_hand(hf_model, [*own, *plain(text, add_special_tokens=False)["input_ids"]], max(1, len(own)))
        for text in (TEXT, "The house.")
    ]
    got = [metrics.perplexity(model, Corpus.from_texts([text]))["perplexity"].iloc[0] for text in (TEXT, "The house.")]
    np.testing.assert_allclose(got, expected, rtol=1e-4)
    counts = [len(plain(text, add_special_tokens=False)["input_ids"]) - (not own) for text in (TEXT, "The house.")]
    together = float(np.exp(np.average(np.log(expected), weights=counts)))
    assert metrics.perplexity(model, short)["perplexity"].iloc[0] == pytest.approx(together, rel=1e-4)


def test_bos_that_is_eos_and_bos_that_the_tokenizer_adds_stay(tmp_path: Path, backend: str, tokenizer: Any) -> None:
    tokenizer.bos_token = tokenizer.eos_token  # as GPT-2 has it
    for adds in (False, True):
        tokenizer.add_bos_token = adds
        folder = save_family("gpt2", tmp_path / str(adds), tokenizer=tokenizer)
        model = load_model(folder, backend=backend, tokenizer=tokenizer)
        (row,) = encoder_for(model).encode([Document("", TEXT)])
        assert row.ids[0] == tokenizer.eos_token_id != row.ids[1]
        assert model.to_tokens(TEXT)[0].tolist() == list(row.ids)
        assert row.content == (False, *[True] * (len(row.ids) - 1))


def test_a_family_trained_without_bos_stays_without(tmp_path: Path, backend: str, tokenizer: Any) -> None:
    for adds in (False, True):
        tokenizer.add_bos_token = adds
        model = load_model(save_family("qwen2", tmp_path / str(adds), tokenizer=tokenizer), backend=backend)
        (row,) = encoder_for(model).encode([Document("", TEXT)])
        assert list(row.ids) == tokenizer(TEXT, add_special_tokens=False)["input_ids"]
        assert model.to_tokens(TEXT)[0].tolist() == list(row.ids)


def test_where_a_space_goes_before_a_text_bos_does_not_change_its_tokens(tmp_path: Path, backend: str) -> None:
    """Llama's and Mistral's tokenizers: "<s>a" as one text has other tokens than "a" behind BOS."""
    words = {"<s>": 0, "</s>": 1, "▁": 2, "a": 3, "b": 4, "▁a": 5, "▁b": 6}
    inner = Tokenizer(BPE(words, [("▁", "a"), ("▁", "b")]))
    inner.pre_tokenizer = Metaspace(prepend_scheme="first")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>")
    assert tokenizer("a b", add_special_tokens=False)["input_ids"] == [5, 6]
    assert tokenizer("<s>a b", add_special_tokens=False)["input_ids"] == [0, 3, 6]
    folder = save_family("llama", tmp_path, tokenizer=tokenizer, vocab_size=16, pad_token_id=None)
    model = load_model(folder, backend=backend)
    (row,) = encoder_for(model).encode([Document("", "a b")])
    assert list(row.ids) == [0, 5, 6] == model.to_tokens("a b")[0].tolist()


def test_the_callers_tokenizer_is_left_alone(tiny_folder: Path, backend: str, tokenizer: Any) -> None:
    without(tokenizer, "bos", "pad")
    before = copy.deepcopy(tokenizer.__dict__ | {"_tokenizer": tokenizer.backend_tokenizer.to_str()})
    model = load_model(AutoModelForCausalLM.from_pretrained(tiny_folder), tokenizer=tokenizer, backend=backend)
    assert model.tokenizer is not tokenizer
    model.to_tokens([TEXT, "The"])  # pads, with the copy's token
    assert (tokenizer.bos_token, tokenizer.pad_token) == (None, None)
    after = tokenizer.__dict__ | {"_tokenizer": tokenizer.backend_tokenizer.to_str()}
    assert {key: str(value) for key, value in after.items()} == {key: str(value) for key, value in before.items()}


def test_tokens_and_templates_added_in_memory_are_used(tiny_folder: Path, backend: str, tokenizer: Any) -> None:
    hf_model = AutoModelForCausalLM.from_pretrained(tiny_folder)
    tokenizer.add_tokens(["<new1>", "<new2>"])
    hf_model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    tokenizer.chat_template = "USER: {{ messages[0]['content'] }} ASSISTANT:"
    model = load_model(hf_model, tokenizer=tokenizer, backend=backend)
    (row,) = encoder_for(model).encode([Document("", "old <new1> man <new2>")])
    assert row.ids[1:] == tuple(tokenizer("old <new1> man <new2>", add_special_tokens=False)["input_ids"])
    assert row.ids[-1] == tokenizer.convert_tokens_to_ids("<new2>") == len(tokenizer) - 1
    chat = [{"role": "user", "content": "hi"}]
    assert model.tokenizer.apply_chat_template(chat, tokenize=False) == "USER: hi ASSISTANT:"
    assert difference(model, hf_model, torch.tensor([row.ids])) < 1e-4


def test_a_tokenizer_and_a_model_from_memory_load(backend: str, tokenizer: Any) -> None:
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
    )
    hf_model = LlamaForCausalLM(config)
    model = load_model(hf_model, tokenizer=from_memory(tokenizer), backend=backend)
    assert model.cfg.model_name == "LlamaForCausalLM"
    tokens = model.to_tokens(TEXT)
    assert tokens[0, 0] == tokenizer.bos_token_id
    assert difference(model, hf_model.eval(), tokens) < 1e-4


def test_padding_may_be_any_token_and_the_figures_stay(tmp_path: Path, backend: str, tokenizer: Any) -> None:
    corpus = Corpus.from_texts([TEXT, "The house.", "The old man."])
    quiz = Questions.from_rows([{"question": "It is", "choices": ["red", "a very old man"], "answer": 0}])
    rows = len(tokenizer)
    found = []
    for pad in ("<pad>", "[BEYOND]", None):
        own = copy.deepcopy(tokenizer)
        own.pad_token = None
        if pad is not None:
            own.add_special_tokens({"pad_token": pad})
        folder = save_family("llama", tmp_path / str(pad), tokenizer=own, vocab_size=rows, pad_token_id=None)
        model = load_model(folder, backend=backend)
        assert 0 <= model.tokenizer.pad_token_id < rows
        assert int(model.to_tokens([TEXT, "The"]).max()) < rows
        found.append([metrics.perplexity(model, corpus)["perplexity"].iloc[0], *metrics.choice_scores(model, quiz)[0]])
    np.testing.assert_allclose(found[1], found[0], rtol=1e-5)
    np.testing.assert_allclose(found[2], found[0], rtol=1e-5)


def test_a_token_beyond_the_embedding_is_named_wherever_it_comes_up(
    tmp_path: Path, backend: str, tokenizer: Any
) -> None:
    rows = len(tokenizer)
    added = copy.deepcopy(tokenizer)
    added.add_tokens(["red"])
    folder = save_family("llama", tmp_path / "added", tokenizer=added, vocab_size=rows)
    model = load_model(folder, backend=backend)
    wanted = rf"the token 'red' has id {rows}, and the model's embedding has {rows} rows \(0..{rows - 1}\).*resize_token_embeddings"
    with pytest.raises(ValueError, match=wanted):
        metrics.perplexity(model, Corpus.from_texts(["The house is red."]))
    with pytest.raises(ValueError, match=wanted):
        metrics.accuracy(model, Questions.from_rows([{"question": "It is", "choices": ["red", "blue"], "answer": 1}]))
    for kind in ("bos", "eos"):
        special = copy.deepcopy(tokenizer)
        special.add_special_tokens({f"{kind}_token": "[NEW]"})
        hf_model = AutoModelForCausalLM.from_pretrained(folder)
        with pytest.raises(ValueError, match=rf"{kind.upper()}, the token '\[NEW\]' has id {rows}, and .* {rows} rows"):
            load_model(hf_model, tokenizer=special, backend=backend)


class Negative:
    """A tokenizer whose unknown words have id -1."""

    is_fast, bos_token_id, eos_token_id, pad_token_id = False, None, None, -1

    def __call__(self, texts: list[str], **_: Any) -> dict[str, list[list[int]]]:
        return {"input_ids": [[-1 if word == "unknown" else 5 for word in text.split()] for text in texts]}


def test_a_negative_token_is_refused_and_padding_takes_a_row_that_there_is(model: Any) -> None:
    encoder = Encoder(Negative(), False, False, 64, int(model.cfg.d_vocab), torch.device("cpu"))
    with pytest.raises(ValueError, match=r"in the text 'one unknown word', the token '\?' has id -1"):
        encoder.encode([Document("one unknown", " word")])
    rows = encoder.encode([Document("", "one two"), Document("", "three")])
    assert encoder.collate(rows).tokens.tolist() == [[5, 5], [5, 0]]  # padded with a row that there is


def test_a_bos_or_eos_that_the_tokenizer_does_not_have_cannot_be_asked_for(tmp_path: Path, tokenizer: Any) -> None:
    folder = save_family("llama", tmp_path, tokenizer=without(tokenizer, "bos", "eos", "pad"))
    model = load_model(folder)
    with pytest.raises(ValueError, match="tokenizer has no BOS token"):
        encoder_for(model, prepend_bos=True)
    with pytest.raises(ValueError, match="tokenizer has no EOS token"):
        encoder_for(model, append_eos=True)
    with pytest.raises(ValueError, match="a prompt is empty, and this model's texts start without BOS"):
        continuations(model, ["The old man", ""])
    with pytest.raises(ValueError, match="neither a BOS nor an EOS token"):
        start_token(model)


def test_a_tokenizer_that_is_assigned_again_stays_what_it_is(tiny_folder: Path, backend: str) -> None:
    model: Any = load_model(tiny_folder, backend=backend)
    other = copy.deepcopy(model.tokenizer)
    other.chat_template = "{{ messages }}"
    if backend == "bridge":
        model.tokenizer = other  # TransformerLens looks at it
    else:
        model.set_tokenizer(other)
    assert model.tokenizer.chat_template == "{{ messages }}"


def test_something_else_than_a_tokenizer_is_named(tiny_folder: Path) -> None:
    with pytest.raises(TypeError, match=r"tokenizer must be one of transformers.* got str"):
        load_model(tiny_folder, tokenizer="gpt2")
