"""Documents and questions made of objects: tables of other libraries, bare strings, values that are no text."""

import datetime
import sqlite3
from dataclasses import replace
from decimal import Decimal
from typing import Any

import numpy as np
import pandas as pd
import pytest
from datasets import Dataset, DatasetDict

from mrp_lens.data import Corpus, Document, Question, Questions

QUIZ: list[dict[str, Any]] = [
    {"text": "One.", "question": "Two and two?", "choices": ["three", "four"], "answer": 1},
    {"text": "Two.", "question": "Snow is?", "choices": ["white", "black"], "answer": "A"},
]
PLAIN = [{**row, "answer": "BA"[place]} for place, row in enumerate(QUIZ)]
TEXTS = ["One.", "Two."]


def completions(rows: Any, **options: Any) -> list[str]:
    return [document.completion for document in Corpus.from_rows(rows, **options).documents]


@pytest.mark.parametrize(
    "table",
    [
        PLAIN,
        tuple(PLAIN),
        (row for row in PLAIN),
        pd.DataFrame(PLAIN),
        pd.DataFrame(PLAIN).set_index("text", drop=False),
        pd.DataFrame([{**row, "choices": np.array(row["choices"])} for row in PLAIN]),
        [row for _, row in pd.DataFrame(PLAIN).iterrows()],
        Dataset.from_list(PLAIN),
        Dataset.from_list(PLAIN).with_format("torch"),
        Dataset.from_list(PLAIN).with_format("pandas", columns=["text"]),
        Dataset.from_list([*PLAIN, *PLAIN]).select([2, 3]),
        Dataset.from_list(PLAIN).to_iterable_dataset(),
    ],
    ids=lambda table: type(table).__name__,
)
def test_every_kind_of_table_gives_the_same_documents_and_questions(table: Any) -> None:
    table = list(table) if not hasattr(table, "__len__") and not hasattr(table, "features") else table
    assert completions(table) == TEXTS
    assert Questions.from_rows(table).questions == Questions.from_rows(QUIZ).questions


def test_rows_of_a_database_are_rows() -> None:
    base = sqlite3.connect(":memory:")
    base.row_factory = sqlite3.Row
    assert completions(base.execute("select 'One.' as text union select 'Two.'").fetchall()) == TEXTS
    base.close()


def test_a_dataset_with_a_transform_is_read_through_it() -> None:
    loud = Dataset.from_list(PLAIN).with_transform(lambda batch: {"text": [text.upper() for text in batch["text"]]})
    assert completions(loud) == ["ONE.", "TWO."]


@pytest.mark.parametrize(
    ("table", "error", "message"),
    [
        (DatasetDict(train=Dataset.from_list(PLAIN), dev=Dataset.from_list(PLAIN)), ValueError, "splits train, dev"),
        ({"text": TEXTS}, TypeError, "rows must be a list of mappings, a DataFrame or a Dataset, got {'text'"),
        ("data.jsonl", TypeError, "rows must be a list of mappings"),
        (3, TypeError, "rows must be a list of mappings"),
        (TEXTS, TypeError, "row 0 is 'One.' of type str, not a mapping"),
        ([PLAIN[0], ["Two."]], TypeError, r"row 1 is \['Two.'\] of type list"),
        (pd.DataFrame([["a", "b"]], columns=["text", "text"]), ValueError, "two columns are named 'text'"),
    ],
)
def test_what_is_no_table_is_refused(table: Any, error: type[Exception], message: str) -> None:
    for read in (Corpus.from_rows, Questions.from_rows):
        with pytest.raises(error, match=message):
            read(table)


MISSING: list[Any] = [None, float("nan"), np.float32("nan"), pd.NA, pd.NaT]
NO_TEXT = [
    ["one", "two"],
    {"a": 1},
    b"bytes",
    True,
    np.True_,
    float("inf"),
    datetime.date(2020, 1, 1),
    1j,
    np.array([1]),
]


@pytest.mark.parametrize("value", [*MISSING, *NO_TEXT, "half \ud83d"], ids=repr)
def test_what_is_neither_text_nor_a_number_is_refused_with_its_row(value: Any) -> None:
    for frame in (
        [{"text": "One."}, {"text": value}],
        pd.DataFrame({"text": pd.Series(["One.", value], dtype=object)}),
    ):
        with pytest.raises(ValueError, match="rows, row 1: field 'text' "):
            Corpus.from_rows(frame)
        with pytest.raises(ValueError, match="rows, row 1: field 'text' "):
            Corpus.from_rows(frame, prompt="Q:", completion=" {text}")
    with pytest.raises(ValueError, match="row 0: a choice "):
        Questions.from_rows([{"question": "?", "choices": ["x", value], "answer": 0}])
    with pytest.raises(ValueError, match=r"row 0: the answer .* is neither"):
        Questions.from_rows([{"question": "?", "choices": ["x", "y"], "answer": value}])


@pytest.mark.parametrize("value", MISSING, ids=repr)
def test_what_is_missing_is_said_to_be(value: Any) -> None:
    with pytest.raises(ValueError, match="row 0: field 'text' has no value; leave the row out or fill it in"):
        Corpus.from_rows([{"text": value}])


@pytest.mark.parametrize("choice", ["", "  ", "\n"])
def test_an_empty_choice_is_refused(choice: str) -> None:
    with pytest.raises(ValueError, match="row 0: a choice has no value in"):
        Questions.from_rows([{"question": "?", "choices": ["x", choice], "answer": 0}])
    with pytest.raises(ValueError, match="row 0: a choice has no value in"):
        Questions.from_rows([{"question": "?", "a": "x", "b": choice, "answer": 0}], choices=["a", "b"])


def test_numbers_are_their_digits() -> None:
    numbers = [7, 7.0, np.int64(7), np.float32(0.1), np.float64(0.5), Decimal("0.50"), 10**30]
    assert completions([{"text": number} for number in numbers]) == [
        *("7", "7.0", "7", "0.1", "0.5", "0.50", "1" + "0" * 30)
    ]


def test_a_label_may_be_a_truth_value() -> None:
    quiz = Questions.from_rows([{**QUIZ[0], "hard": True, "who": 7}], group="hard", entity="who")
    assert (quiz.questions[0].group, quiz.questions[0].entity) == ("True", "7")
    with pytest.raises(ValueError, match="row 0: field 'hard' has no value"):
        Questions.from_rows([{**QUIZ[0], "hard": None}], group="hard")


def test_a_bare_string_is_no_list_of_texts() -> None:
    with pytest.raises(TypeError, match=r"texts is one string, 'abc'; write \[text\]"):
        Corpus.from_texts("abc")
    with pytest.raises(TypeError, match="texts, row 1 is nan, of type float, not a string"):
        Corpus.from_texts([*TEXTS[:1], MISSING[1]])
    with pytest.raises(ValueError, match="texts, row 1 holds half a character"):
        Corpus.from_texts(["x y", "\udfff"])
    assert len(Corpus.from_texts(pd.Series(TEXTS))) == 2


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Document("", 3), TypeError, "the completion of a Document is 3, of type int, not a string"),
        (lambda: Document(None, "x"), TypeError, "the prompt of a Document is None"),
        (lambda: Document("", "\ud800"), ValueError, "the completion of a Document holds half a character"),
        (lambda: Corpus("abc"), TypeError, "a Corpus is made of several Document objects, got 'abc'"),
        (lambda: Corpus(Document("", "x")), TypeError, "a Corpus is made of several Document objects"),
        (lambda: Corpus(("x",)), TypeError, "item 0 of a Corpus must be a Document, got 'x'; see Corpus.from_rows"),
        (lambda: Question("?", ("a", "b"), 2), ValueError, "must be an index below 2, got 2"),
        (lambda: Question("?", ("a", "b"), -1), ValueError, "must be an index below 2, got -1"),
        (lambda: Question("?", (), 0), ValueError, "must be an index below 0, got 0"),
        (lambda: Question("?", ("a", "b"), "A"), TypeError, "must be the index of a choice, got 'A'"),
        (lambda: Question("?", ("a", "b"), True), TypeError, "must be the index of a choice, got True"),
        (lambda: Question("?", "ab", 0), TypeError, "the choices of a Question must be several strings, got 'ab'"),
        (lambda: Question("?", ("a", 3), 0), TypeError, "the choice of a Question is 3"),
        (lambda: Question(3, ("a", "b"), 0), TypeError, "the prompt of a Question is 3"),
        (lambda: Question("?", ("a", "b"), 0, group=None), TypeError, "the group of a Question is None"),
        (lambda: Questions(("x",)), TypeError, "item 0 of a Questions must be a Question"),
    ],
)
def test_objects_made_by_hand_are_checked(make: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


def test_lists_and_numpy_answers_become_what_a_fingerprint_can_hold() -> None:
    by_hand = Questions([Question("?", ["a", "b"], np.int64(1))])
    assert by_hand == Questions((Question("?", ("a", "b"), 1),))
    assert by_hand.fingerprint == Questions((Question("?", ("a", "b"), 1),)).fingerprint
    assert hash(Corpus([Document("", "x")])) == hash(Corpus((Document("", "x"),)))


@pytest.mark.parametrize(
    "template",
    ["{text.__class__}", "{text.__class__.__mro__}", "{0}", "{text[0]}", "{text!r}", "{text:>10}", "{text:{n}}", "{}"],
)
def test_a_template_reaches_columns_only(template: str) -> None:
    rows = [{"text": "x", "n": 3}]
    with pytest.raises(ValueError, match=r"no field '|the name of a column and nothing else"):
        Corpus.from_rows(rows, prompt=template, completion="{text}")
    with pytest.raises(ValueError, match=r"no field '|the name of a column and nothing else"):
        Questions.from_rows([{**QUIZ[0], **rows[0]}], prompt=template)


def test_a_fingerprint_tells_apart_all_that_a_study_depends_on() -> None:
    base = Question("?", (" a", " b"), 0, "group", "Ann")
    variants = [
        base,
        replace(base, entity="Bob"),
        replace(base, entity=""),
        replace(base, group="Ann", entity=""),
        replace(base, group=""),
        replace(base, answer=1),
        replace(base, choices=(" b", " a")),
        replace(base, choices=(" a", " b", " c")),
        replace(base, prompt="?!"),
    ]
    assert len({Questions((question,)).fingerprint for question in variants}) == len(variants)
    assert Questions((base,), "one").fingerprint == Questions((base,), "two").fingerprint
    without = Questions.from_rows(QUIZ)
    assert (
        without.fingerprint == "b302e40a402ef26e7a6f9b527be431db7765a2e8c748108a9b1d726e1ae19438"
    )  # as version 0.1 gave it
    documents = [Document("a", "b"), Document("ab", ""), Document("", "ab")]
    assert len({Corpus((document,)).fingerprint for document in documents}) == 3
