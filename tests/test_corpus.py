import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from mrp_lens.batching import Encoder, endless, in_order
from mrp_lens.corpus import Corpus, Document, Questions
from mrp_lens.model import LensModel

ROWS: list[dict[str, Any]] = [
    {"question": "Two and two?", "choices": ["three", "four"], "answer": 1, "kind": "sum"},
    {"question": "Snow is?", "choices": ["white", "black"], "answer": "white", "kind": "colour"},
]


def test_templates_put_the_loss_on_the_completion() -> None:
    corpus = Corpus.from_rows([{"q": "Why?", "a": "Because."}], prompt="Question: {q}\nAnswer:", completion=" {a}")
    assert corpus.documents == (Document("Question: Why?\nAnswer:", " Because."),)
    with pytest.raises(ValueError, match="go together"):
        Corpus.from_rows([{"q": "Why?"}], prompt="{q}")


@pytest.mark.parametrize("ending", [".jsonl", ".json", ".csv", ".tsv", ".parquet", ".txt"])
def test_every_kind_of_file_gives_the_same_documents(tmp_path: Path, ending: str) -> None:
    frame, path = pd.DataFrame({"text": ["One, two.", "Three."]}), tmp_path / f"data{ending}"
    if ending in (".jsonl", ".json"):
        frame.to_json(path, orient="records", lines=ending == ".jsonl")
    elif ending in (".csv", ".tsv"):
        frame.to_csv(path, index=False, sep="," if ending == ".csv" else "\t")
    elif ending == ".parquet":
        frame.to_parquet(path)
    else:
        path.write_text("One, two.\n\nThree.\n")
    corpus = Corpus.from_file(path)
    assert [document.completion for document in corpus.documents] == ["One, two.", "Three."]
    assert corpus.name == "data"
    assert corpus.fingerprint == Corpus.from_texts(["One, two.", "Three."]).fingerprint


def test_bad_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none.jsonl"):
        Corpus.from_file(tmp_path / "none.jsonl")
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(ValueError, match="is empty"):
        Corpus.from_file(tmp_path / "empty.jsonl")
    (tmp_path / "data.docx").write_text("x")
    with pytest.raises(ValueError, match=r"unknown ending '.docx'"):
        Corpus.from_file(tmp_path / "data.docx")
    (tmp_path / "rows.jsonl").write_text(json.dumps({"body": "x", "id": 1}) + "\n")
    with pytest.raises(ValueError, match="row 0: no field 'text'; the row has 'body', 'id'"):
        Corpus.from_file(tmp_path / "rows.jsonl")
    with pytest.raises(ValueError, match="no field 'title'"):
        Corpus.from_file(tmp_path / "rows.jsonl", prompt="{title}", completion="{body}")


def test_answers_may_be_an_index_or_a_text() -> None:
    quiz = Questions.from_rows(ROWS, prompt="Q: {question} A:", group="kind")
    assert [q.answer for q in quiz.questions] == [1, 0]
    assert quiz.questions[0].choices == (" three", " four")
    assert quiz.groups == ("sum", "colour")
    columns = Questions.from_rows(
        [{"q": "x", "a": "1", "b": "2", "right": "2"}], prompt="{q}", choices=["a", "b"], answer="right"
    )
    assert columns.questions[0].answer == 1


def test_an_answer_that_is_no_choice_is_named_with_its_row() -> None:
    for answer in (2, -1, "grey", None, True):
        with pytest.raises(ValueError, match=r"row 1: the answer .* is neither an index"):
            Questions.from_rows([ROWS[0], {**ROWS[1], "answer": answer}])
    with pytest.raises(ValueError, match="at least 2"):
        Questions.from_rows([{**ROWS[0], "choices": ["one"]}])


def test_masks_mark_padding_bos_and_completion(model: LensModel) -> None:
    encoder = Encoder.for_model(model)
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
    plain = Encoder.for_model(model, prepend_bos=False, append_eos=True)
    batch = plain.collate(plain.encode(documents[1:]))
    assert batch.tokens[0, -1] == model.tokenizer.eos_token_id
    assert not batch.loss_mask[0, 0]
    assert batch.loss_mask[0, 1:].all()


def test_long_documents_are_cut_at_the_context_length(model: LensModel) -> None:
    encoder = Encoder.for_model(model)
    (row,) = encoder.encode([Document("", "The old man walked. " * 100)])
    assert len(row.ids) == model.cfg.n_ctx


def test_batches_cover_every_row_once_a_round(model: LensModel) -> None:
    import torch

    encoder = Encoder.for_model(model)
    rows = encoder.encode([Document("", "word " * (i + 1)) for i in range(7)])
    stream = endless(rows, 7, torch.Generator().manual_seed(0))
    for _ in range(3):
        assert sorted(len(row.ids) for row in next(stream)) == sorted(len(row.ids) for row in rows)
    assert len(next(endless(rows, 99, torch.Generator()))) == 7
    assert sorted(i for chosen, _ in in_order(encoder, rows, 3) for i in chosen) == list(range(7))
