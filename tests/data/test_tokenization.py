import copy
import dataclasses
from typing import Any

import numpy as np
import pytest
import torch

from mrp_lens import metrics
from mrp_lens.data import Corpus, Document, Questions, tokenization
from mrp_lens.data.tokenization import Batches, Encoded, Encoder, groups_within, in_order, parts_of
from mrp_lens.methods.base import prepare
from mrp_lens.models import LensModel, encoder_for
from mrp_lens.training.losses import predictions

DOCUMENTS = [
    Document("The colour of red is", " blue."),
    Document("", "The old man."),
    Document("The cra", "ft is carving wood."),
    Document("The craft", ""),
]


def test_masks_mark_padding_bos_and_completion(model: LensModel) -> None:
    encoder = encoder_for(model)
    documents = [Document("The colour of red is", " blue."), Document("", "The old man.")]
    for side in ("left", "right"):
        batch = encoder.collate(encoder.encode(documents), side=side)  # type: ignore[arg-type]
        for row, document in enumerate(documents):
            real = batch.tokens[row][batch.attention_mask[row]]
            assert real[0] == model.tokenizer.bos_token_id
            assert int(batch.content_mask[row].sum()) == len(real) - 1
            assert (
                model.tokenizer.decode(batch.tokens[row][batch.content_mask[row]])
                == document.prompt + document.completion
            )
            assert model.tokenizer.decode(batch.tokens[row][batch.loss_mask[row]]) == document.completion
    plain = encoder_for(model, prepend_bos=False, append_eos=True)
    batch = plain.collate(plain.encode(documents[1:]))
    assert batch.tokens[0, -1] == model.tokenizer.eos_token_id
    assert not batch.loss_mask[0, 0]
    assert batch.loss_mask[0, 1:].all()


def test_long_documents_are_cut_and_counted(model: LensModel) -> None:
    long, short = Document("", "The old man walked. " * 100), Document("", "The old man.")
    context = int(model.cfg.n_ctx)
    with pytest.warns(UserWarning, match=f"2 of 3 documents are longer than {context} tokens") as caught:
        rows = encoder_for(model).encode([long, short, long])
    assert len(caught) == 1
    assert [len(row.ids) for row in rows] == [context, len(rows[1].ids), context]
    with pytest.warns(UserWarning, match="1 of 2 documents are longer than 8 tokens"):
        cut = encoder_for(model, max_length=8).encode([long, short])
    assert cut[0].ids == rows[0].ids[:8]
    assert cut[1] == rows[1]
    exact = encoder_for(model, max_length=len(rows[1].ids))
    assert exact.encode([short]) == [rows[1]]  # no warning, which would be an error


def test_the_end_of_a_long_prompt_is_kept_where_choices_are_scored(model: LensModel) -> None:
    long = Document("The old man walked. " * 100 + "It is", " red.")
    encoder = encoder_for(model, max_length=7)
    with pytest.warns(UserWarning, match="only the end"):
        (row,) = encoder.encode([long], keep="end")
    assert row.ids[0] == model.tokenizer.bos_token_id
    assert len(row.ids) == 7
    assert model.tokenizer.decode(row.ids[1:]).endswith("It is red.")
    assert row.content == (False, *[True] * 6)
    assert model.tokenizer.decode([i for i, counts in zip(row.ids, row.in_loss, strict=True) if counts]) == " red."
    quiz = Questions.from_rows([{"question": long.prompt, "choices": ["red.", "blue."], "answer": 0}])
    with pytest.warns(UserWarning, match="2 of 2 documents"):
        (scores,) = metrics.choice_scores(model, quiz)
    assert np.isfinite(scores).all()


@pytest.mark.parametrize("length", [1, 0, -3, 65])
def test_an_impossible_max_length_is_refused(model: LensModel, length: int) -> None:
    with pytest.raises(ValueError, match=f"max_length {length} must be from 2 to the model's context length 64"):
        encoder_for(model, max_length=length)


def test_a_bos_that_the_text_has_already_is_not_doubled(model: LensModel) -> None:
    bos = model.tokenizer.bos_token
    for prepend in (True, False):
        encoder = encoder_for(model, prepend_bos=prepend)
        (plain,) = encoder_for(model, prepend_bos=True).encode([Document("It is", " red.")])
        assert encoder.encode([Document(f"{bos}It is", " red.")]) == [plain]
        (text,) = encoder.encode([Document("", f"{bos}It is red.")])
        assert text.ids == plain.ids
        assert not text.content[0]
        assert not text.in_loss[0]
        assert all(text.content[1:] + text.in_loss[1:])


class SlowTokenizer:
    """The tokenizer without what only fast ones can."""

    is_fast = False

    def __init__(self, fast: Any) -> None:
        self._fast = fast
        self.bos_token_id, self.eos_token_id = fast.bos_token_id, fast.eos_token_id
        self.pad_token_id = fast.pad_token_id

    def __call__(self, texts: list[str], *, add_special_tokens: bool) -> dict[str, list[list[int]]]:
        return {"input_ids": self._fast(texts, add_special_tokens=add_special_tokens)["input_ids"]}


@pytest.mark.parametrize("append_eos", [False, True])
def test_a_slow_tokenizer_gives_what_a_fast_one_gives(model: LensModel, append_eos: bool) -> None:
    fast = encoder_for(model, append_eos=append_eos)
    slow = dataclasses.replace(fast, tokenizer=SlowTokenizer(model.tokenizer))
    assert slow.encode(DOCUMENTS) == fast.encode(DOCUMENTS)
    assert slow.encode([]) == []


def test_a_tokenizer_written_in_python_is_read(model: LensModel) -> None:
    from transformers import ByT5Tokenizer

    tokenizer = ByT5Tokenizer()
    assert not tokenizer.is_fast
    encoder = dataclasses.replace(encoder_for(model, prepend_bos=False), tokenizer=tokenizer)
    (row,) = encoder.encode([Document("ab", "cd")])
    assert row.in_loss == (False, False, True, True)
    assert row.content == (True,) * 4


def test_no_pad_token_is_needed(model: LensModel) -> None:
    padded, tokenizer = copy.deepcopy(model.tokenizer), copy.deepcopy(model.tokenizer)
    padded.pad_token, tokenizer.pad_token = "</s>", None
    with_pad = dataclasses.replace(encoder_for(model), tokenizer=padded)
    without = dataclasses.replace(with_pad, tokenizer=tokenizer)
    rows = with_pad.encode(DOCUMENTS)
    assert without.encode(DOCUMENTS) == rows
    for side in ("left", "right"):
        expected, batch = with_pad.collate(rows, side=side), without.collate(rows, side=side)  # type: ignore[arg-type]
        assert not torch.equal(batch.tokens, expected.tokens)
        assert torch.equal(batch.tokens[batch.attention_mask], expected.tokens[expected.attention_mask])
        for mask in ("attention_mask", "content_mask", "loss_mask"):
            assert torch.equal(getattr(batch, mask), getattr(expected, mask))
        assert not (batch.content_mask | batch.loss_mask)[~batch.attention_mask].any()
        with torch.no_grad():
            torch.testing.assert_close(predictions(model, batch), predictions(model, expected), atol=1e-5, rtol=0)


def test_metrics_are_the_same_with_padding_on_either_side(model: LensModel, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus = Corpus(tuple(DOCUMENTS[:3]), "few")
    choices = [{"question": "It is", "choices": ["red", "a very old man"], "answer": 0}]
    quiz = Questions.from_rows([*choices, {**choices[0], "question": "The craft of the old man is"}])
    real, found, widths = Encoder.collate, [], set()

    def padded_on(forced: Any) -> Any:
        def collate(self: Encoder, rows: Any, *, side: Any) -> Any:
            widths.add(len({len(row.ids) for row in rows}))
            return real(self, rows, side=forced)

        return collate

    for forced in ("right", "left"):
        monkeypatch.setattr(Encoder, "collate", padded_on(forced))
        scores = np.concatenate(metrics.choice_scores(model, quiz))
        figures = [
            metrics.perplexity(model, corpus)["perplexity"],
            metrics.answer_probability(model, corpus)["probability"],
        ]
        found.append([*scores, *(float(figure.iloc[0]) for figure in figures)])
    assert max(widths) > 1  # something was padded
    np.testing.assert_allclose(found[1], found[0], rtol=1e-4)


def test_prepare_cuts_documents_and_warns_of_shared_ones(model: LensModel, texts: tuple[Corpus, Corpus]) -> None:
    forget, retain = texts
    with pytest.warns(UserWarning, match="longer than 4 tokens"):
        data = prepare(model, forget, retain, max_length=4)
    assert max(len(row.ids) for row in [*data.all_forget, *data.retain]) == 4
    with pytest.raises(ValueError, match="max_length 65 must be from 2 to the model's context length 64"):
        prepare(model, forget, retain, max_length=65)
    both = Corpus((*retain.documents, *forget.documents[:3]), "both")
    with pytest.warns(UserWarning, match="3 documents are in the forget and in the retain corpus"):
        prepare(model, forget, both)


def test_batches_cover_every_row_once_a_round(model: LensModel) -> None:
    encoder = encoder_for(model)
    rows = encoder.encode([Document("", "word " * (i + 1)) for i in range(7)])
    stream = Batches(rows, 7, torch.Generator().manual_seed(0))
    for _ in range(3):
        assert sorted(len(row.ids) for row in next(stream)) == sorted(len(row.ids) for row in rows)
    assert len(next(Batches(rows, 99, torch.Generator()))) == 7
    assert sorted(i for chosen, _ in in_order(encoder, rows, 3) for i in chosen) == list(range(7))


def test_a_batch_has_a_piece_of_a_longer_text(model: LensModel) -> None:
    encoder = encoder_for(model)
    long, short, asked = encoder.encode(
        [
            Document("", "one two three four five six seven"),
            Document("", "it"),
            Document("nine ten eleven", " twelve"),
        ]
    )
    pieces = long.pieces(4)
    bos = 0 if long.content[0] else 1
    assert len(short.ids) <= 4
    assert all(2 <= len(piece.ids) <= 4 or piece is pieces[-1] for piece in pieces)
    assert all(piece.ids[:bos] == long.ids[:bos] for piece in pieces)
    assert tuple(token for piece in pieces for token in piece.ids[bos:]) == long.ids[bos:]
    assert tuple(counts for piece in pieces for counts in piece.in_loss[bos:]) == long.in_loss[bos:]
    assert (short.pieces(4), asked.pieces(2)) == ([short], [asked])  # short, or with a prompt
    bare = Encoded(tuple(range(5)), (True,) * 5, (True,) * 5)  # without BOS
    assert [piece.ids for piece in bare.pieces(3)] == [(0, 1, 2), (3, 4)]
    assert [piece.ids for piece in bare.pieces(4)] == [(0, 1, 2, 3)]  # nothing would predict the last one
    stream = Batches([long, short], 2, torch.Generator().manual_seed(0), length=4)
    read = {row.ids for _ in range(40) for row in next(stream)}
    assert read == {piece.ids for piece in [*pieces, short]}


def test_a_batch_has_no_more_logits_than_memory_is_meant_for(model: LensModel, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = encoder_for(model)
    rows = encoder.encode([Document("", "word " * (i + 1)) for i in range(7)])
    counts = [sum(row.in_loss) for row in rows]
    monkeypatch.setattr(tokenization, "LOGITS", 9 * encoder.rows)
    batches = [chosen for chosen, _ in in_order(encoder, rows, 4, logits=True)]
    assert sorted(place for chosen in batches for place in chosen) == list(range(7))
    assert len(batches) > len(list(in_order(encoder, rows, 4)))
    for chosen in batches:
        assert len(chosen) == 1 or sum(counts[place] for place in chosen) <= 9
    batch = encoder.collate(rows)
    parts = list(parts_of(batch, None, d_vocab=encoder.rows))
    assert [len(part) for part in parts] == [1] * 7  # the longest counts more than half of nine tokens
    assert [len(part) for part in parts_of(batch, 3, d_vocab=encoder.rows)] == [3, 3, 1]
    assert [len(part) for part in parts_of(batch, None)] == [7]
    assert [range(5)[part] for part in groups_within([1, 1, 1, 1, 1], 2)] == [range(2), range(2, 4), range(4, 5)]
