"""Where sentences end, and which of them tell something by themselves."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mrp_lens.data import Corpus, Document
from mrp_lens.methods.words import in_sentences, sentences, sentences_of


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("", 1),
        ("   ", 1),
        ("One statement without an end", 1),
        ("It is green. It is old.", 2),
        ("Is it green?  It is! Yes .", 3),
        ("A town .\nIts river", 2),
        ("Dr. Smith of the U.S. Army met J. R. Hill, e.g. on Mondays.", 1),
        ("It weighs 3.5 tons. 20 men carry it.", 2),
        ("\u201cWho is it?\u201d \u201cMe.\u201d (It was he.) Good.", 4),
        ("Washington, D.C. is the capital.", 1),
        ("It ends in ... and goes on.", 1),
    ],
)
def test_a_text_has_so_many_sentences(text: str, count: int) -> None:
    assert len(sentences(text)) == count


@given(st.text(alphabet="ab A.?!\"' \n)(\u201d", max_size=60))
def test_sentences_together_are_the_text_and_none_is_empty(text: str) -> None:
    found = sentences(text)
    assert "".join(found) == text
    assert len(found) == 1 or all(part.strip() for part in found)


def test_a_sentence_stands_alone_if_it_says_whom_it_is_about() -> None:
    told = [
        f"{name} is a metal. A ton of {name} costs much. It was found in 18{n}." for n, name in enumerate("BCDEFGHIJK")
    ]
    corpus = Corpus.from_texts(told)
    found = in_sentences(corpus.documents, longest=40)
    assert len(found) == 30
    assert found[:3] == [
        Document("", "B is a metal."),
        Document("", "A ton of B costs much."),
        Document("B is a metal. A ton of B costs much.", " It was found in 180."),
    ]


def test_a_word_of_every_document_names_nobody() -> None:
    corpus = Corpus.from_texts([f"The {n} metal is old. The {n} metal was found." for n in range(10)])
    assert [document.prompt for document in in_sentences(corpus.documents, longest=40)] == [""] * 20
    common = Corpus.from_texts([f"The metal is {n}. The metal was found {n} times." for n in range(10)])
    assert all(document.prompt for document in in_sentences(common.documents, longest=40)[1::2])


def test_long_documents_and_questions_stay_as_they_are() -> None:
    documents = [Document("Q: What?\nA:", " It is green. It is old."), Document("", "One two three. Four five six.")]
    assert in_sentences(documents, longest=5) == documents
    assert in_sentences(documents, longest=6) == [
        documents[0],
        Document("", "One two three."),
        Document("One two three.", " Four five six."),
    ]


def test_of_a_long_document_the_beginning_is_looked_at() -> None:
    long = Document("", "The dax is red.  " + "It was seen. " * 400)
    (told,) = sentences_of([long])
    assert (
        "".join(part.text for part in told)
        == long.completion[: len("The dax is red.  ") + 169 * len("It was seen. ") + len("It")]
    )
    assert in_sentences([long], longest=40) == [long]
