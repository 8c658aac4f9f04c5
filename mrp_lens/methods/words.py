"""Words and sentences of plain texts."""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from mrp_lens.data import Document

RARE_DOCUMENTS, RARE_SHARE = 3, 0.03  # a rare word stands in no more documents than the larger of the two
OPENING, CLOSING = "\"'([\u201c\u2018", "\"')]\u201d\u2019"  # quotation marks and brackets
READ = 512  # words of a document that are looked at
SENTENCE_ENDS = re.compile(rf"[.!?\u2026][{re.escape(CLOSING)}]*(?=\s+[{re.escape(OPENING)}]?[^\W_])")
ABBREVIATIONS = frozenset(
    "mr mrs ms dr prof st sr jr gen col capt lt sgt rev hon pres gov sen rep no vol fig eq sec ch pp ca cf vs etc al inc ltd co corp "
    "dept univ est approx jan feb mar apr jun jul aug sep sept oct nov dec".split()
)

Words = tuple[str, ...]


def word_ends(text: str) -> list[int]:
    """Where each of its words ends, in characters."""
    return [found.end() for found in re.finditer(r"\S+", text)]


def words_to_begin_with(count: int) -> int:
    """How many of a text's (first) words are its beginning: all but the last third."""
    return count - max(1, count // 3)


def marked(text: str) -> Iterator[tuple[str, str, str]]:
    """Each word, with the punctuation before and behind it."""
    for part in text.split():
        if part.isalnum():  # most are
            yield "", part, ""
            continue
        before, word, behind = re.fullmatch(r"(\W*)(.*?)(\W*)", part, re.DOTALL).groups()  # type: ignore[union-attr]
        if word:
            yield before, word, behind


def bare(text: str) -> Words:
    """Its words without the punctuation around them."""
    return tuple(word for _, word, _ in marked(text))


def folded(words: Words) -> Words:
    """Without the difference between capital and small letters."""
    return tuple(word.casefold() for word in words)


def frequencies(texts: Iterable[str]) -> Counter[str]:
    """In how many texts each word stands, case folded."""
    return Counter(word for text in texts for word in set(folded(bare(text))))


def rare_up_to(count: int) -> float:
    """In how many of so many texts a rare word stands at most."""
    return max(RARE_DOCUMENTS, RARE_SHARE * count)


def sentences(text: str) -> list[str]:
    """Its sentences, each with the white space before it, so that together they are the text.

    A mark ends one if what follows does not begin with a small letter, and if no abbreviation, initial ("J.") or letters with marks
    among them ("U.S.") stand before it.
    """
    found, start = [], 0
    for mark in SENTENCE_ENDS.finditer(text):
        word = (text[start : mark.start()].split() or [""])[-1].strip(OPENING)
        following = text[mark.end() :].lstrip().lstrip(OPENING)[:1]
        initial = len(word) == 1 and word.isupper()
        if following.islower() or initial or "." in word or word.casefold() in ABBREVIATIONS:
            continue
        found.append(text[start : mark.end()])
        start = mark.end()
    return [*found, text[start:]] if text[start:].strip() or not found else [*found[:-1], found[-1] + text[start:]]


@dataclass(frozen=True)
class Sentence:
    """One of a document's.

    Attributes:
        before: what stands before it.
        text: its own, with the white space before it.
        named: words of it up to the one that says whom it is about: a rare word of the document's first sentence, in its beginning;
            0 where there is none.
    """

    before: str
    text: str
    named: int

    @property
    def alone(self) -> bool:
        """Whether it tells something by itself: the first one does, and each that says whom it is about."""
        return not self.before or self.named > 0


def sentences_of(documents: Sequence[Document]) -> list[list[Sentence]]:
    """Of each of the documents without a prompt, of a long one those of its first 512 words; of one with a prompt none."""
    texts = [_beginning(document.prompt + document.completion) for document in documents]
    counts, most = frequencies(texts), rare_up_to(len(texts))
    found = []
    for document, text in zip(documents, texts, strict=True):
        parts = [] if document.prompt else sentences(text)
        names = {word for word in folded(bare(parts[0])) if counts[word] <= most} if parts else set()
        told, before = [], ""
        for part in parts:
            words = [folded(bare(word)) for word in part.split()]
            named = (
                place for place, word in enumerate(words[: words_to_begin_with(len(words))], 1) if names & set(word)
            )
            told.append(Sentence(before, part, next(named, 0)))
            before += part
        found.append(told)
    return found


def _beginning(text: str) -> str:
    """The first 512 words."""
    words = text.split(maxsplit=READ)
    return text if len(words) <= READ else text[: len(text) - len(words[READ])].rstrip()


def in_sentences(documents: Sequence[Document], *, longest: int) -> list[Document]:
    """Plain documents of several sentences, and of at most so many words, sentence by sentence; others as they are. A sentence that
    tells something by itself stands alone; of another one, what stands before it is the prompt."""
    found: list[Document] = []
    for document, told in zip(documents, sentences_of(documents), strict=True):
        if len(told) < 2 or len(document.completion.split()) > longest:
            found.append(document)
        else:
            found += [
                Document("", part.text.strip()) if part.alone else Document(part.before, part.text) for part in told
            ]
    return found
