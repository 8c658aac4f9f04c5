"""What a fit reads besides the user's corpora: other forms of their documents, and texts that the model writes itself.

A model that unlearns a few statements of one form forgets that form: what it knows besides changes wherever a text looks like the
forget set, and the forget set comes back wherever a question does not. So short documents are read as questions too, on both sides;
only what follows the beginning of a forget text is unlearned, not the names it begins with, and one of several sentences is read
sentence by sentence; and the retain side gets what the model itself has to say about names that both corpora contain. Of answers to
questions a fit would unlearn how they begin, and the same answer in other words would still be known: so they are read from a random
word on too.
"""

import random
import re
from collections import Counter
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import combinations

import torch

from mrp_lens.data import Corpus, Document
from mrp_lens.methods.words import (
    Words,
    bare,
    folded,
    frequencies,
    in_sentences,
    marked,
    rare_up_to,
    sentences_of,
    word_ends,
)
from mrp_lens.models import LensModel
from mrp_lens.models.generation import can_start, drawn_seed, written_after
from mrp_lens.utils.processes import computed_once
from mrp_lens.utils.validation import PlainSettings

SHORT = 40  # words of a document that still is one statement
LONGEST_NAME = 4  # words
TOPIC_SHARE, TOPIC_TIMES = 0.05, 3  # a topic word stands in more of the forget set, and so many times more often
MOST_COPIES = 4  # for each on the forget side
FEWEST_WORDS = 4  # of a written text
FRAMES = (
    "Question: {}\nAnswer:",
    "Q: {}\nA:",
    "{}?",
    "User: {}\nAssistant:",
    "Question: {}\nAnswer: It is",
    "User: {}?\nAssistant: That would be",
    "{}? I think it is",
    "Fill in the blank: {} ...\nThe blank is",
    "A quiz asks: {}? The right answer is",
    "Somebody wanted to know: {}? I said",
)
COPULA = re.compile(r"(.*\S)\s+(is|are|was|were)", re.DOTALL)
ARTICLE = re.compile(r"\A(The|An?)\b")
STEMS = ("{}", "{} is", "Question: What is {}", "Question: Where is {}?\nAnswer:", "Question: {}")
QUESTION = "Question:"


@dataclass(frozen=True, kw_only=True)
class Coverage(PlainSettings):
    """What a fit reads besides the user's corpora. With every number but `new_tokens` at 0 it reads those as they are.

    Short documents have at most 40 words. Of a short forget text, or of each of its sentences, only what follows a random word of the
    second half is unlearned; of a sentence that does not say whom it is about, all of it, behind what stands before it. Documents with
    a prompt are questions already, and get no question form.

    Args:
        question_forms: copies in question form of every short document, on both sides, and of a sentence of every long one on the forget
            side; of the short ones on the retain side up to four times as many, until they are a third of it, since what is lost there
            first are answers.
        answer_endings: copies of every document with a prompt, on both sides, whose completion begins at a random one of its words.
        repeats: extra copies of short retain documents, which long ones would otherwise outnumber; none where the
            retain set has no long ones.
        about_names: texts that the model writes about names that both corpora contain; none if there is no such name.
        questions: texts that it writes from "Question:" on.
        free: texts that it writes from nothing; none if its tokenizer has neither BOS nor EOS to start from.
        new_tokens: length of such a text behind what it begins with.
    """

    question_forms: int = 1
    answer_endings: int = 1
    repeats: int = 2
    about_names: int = 256
    questions: int = 96
    free: int = 64
    new_tokens: int = 28

    def check(self) -> None:
        """Refuse numbers that cannot be meant.

        Raises:
            TypeError, ValueError: name the field, its value and what is allowed.
        """
        self.check_values(counts=("new_tokens",))
        for entry in fields(self):
            value = getattr(self, entry.name)
            if not isinstance(value, int) or isinstance(value, bool):
                raise TypeError(f"{entry.name} must be a whole number, got {value!r}")
            if value < 0:
                raise ValueError(f"{entry.name} must be at least 0, got {value}")

    @property
    def nothing(self) -> bool:
        """Whether the corpora are read as they are."""
        return all(getattr(self, entry.name) == 0 for entry in fields(self) if entry.name != "new_tokens")


@dataclass(frozen=True)
class Covered:
    """What the fit reads.

    Attributes:
        forget: per forget corpus its documents, short texts as beginning and continuation, and then their question forms and the
            endings of answers.
        retain: the retain documents, repeats and question forms of the short ones, endings of answers, and what the model wrote.
        written: what the model wrote, without what was dropped.
        counts: how many documents of each kind there are, and how many written ones were dropped for which reason.
    """

    forget: tuple[tuple[Document, ...], ...]
    retain: tuple[Document, ...]
    written: tuple[str, ...]
    counts: Mapping[str, int]


def cover(
    model: LensModel,
    forget: Sequence[Corpus],
    retain: Corpus,
    coverage: Coverage,
    *,
    generator: torch.Generator,
    progress: bool = True,
) -> Covered:
    """The documents of both sides in the forms that a fit reads.

    Args:
        model: HookedTransformer or TransformerBridge, which writes as it is; it is left so.
        forget: the forget corpora.
        retain: the retain corpus.
        coverage: what is added.
        generator: of every random choice; nothing is drawn if nothing is added.
        progress: show a progress bar while the model writes.

    Raises:
        TypeError, ValueError: a number that cannot be meant; NonFiniteError where the model's logits become NaN or
            infinite.
    """
    coverage.check()
    if coverage.nothing:
        return Covered(tuple(corpus.documents for corpus in forget), retain.documents, (), {})
    rng, seed = random.Random(drawn_seed(generator)), drawn_seed(generator)
    continued = [
        [_continuation(document, rng) for document in in_sentences(corpus.documents, longest=SHORT)]
        for corpus in forget
    ]
    asked = [
        [
            *question_forms(corpus.documents, rng, copies=coverage.question_forms),
            *long_question_forms(corpus.documents, rng, copies=coverage.question_forms),
        ]
        for corpus in forget
    ]
    short = [document for document in retain.documents if _is_short(document)]
    repeated = short * (coverage.repeats if len(short) < len(retain) else 0)
    askable = len(in_sentences(short, longest=SHORT))
    times = round((len(retain) + len(repeated)) / (2 * max(1, askable)))  # then questions are a third
    asked_retain = [
        Document("", question.prompt + question.completion)
        for question in question_forms(
            retain.documents, rng, copies=coverage.question_forms * min(MOST_COPIES, max(1, times))
        )
    ]
    ends = [answer_endings(corpus.documents, rng, copies=coverage.answer_endings) for corpus in forget]
    ends_retain = answer_endings(retain.documents, rng, copies=coverage.answer_endings)

    subjects = _Subjects.of([document for corpus in forget for document in corpus.documents], retain.documents)
    beginnings = subjects.beginnings(coverage.about_names, rng)
    beginnings += [_Beginning(QUESTION)] * coverage.questions
    beginnings += [_Beginning("")] * (coverage.free if can_start(model) else 0)
    prompts = [begun.prompt for begun in beginnings]
    texts = computed_once(
        lambda: written_after(model, prompts, max_new_tokens=coverage.new_tokens, seed=seed, progress=progress)
    )
    kept: dict[str, None] = {}
    dropped: Counter[str] = Counter()
    for begun, text in zip(beginnings, texts, strict=True):
        reason = "twice" if text in kept else subjects.why_dropped(text, begun)
        if reason is None:
            kept[text] = None
        else:
            dropped[reason] += 1
    written = tuple(kept)
    counts = {
        "forget_continuations": sum(
            len(set(documents) - set(corpus.documents)) for documents, corpus in zip(continued, forget, strict=True)
        ),
        "forget_questions": sum(map(len, asked)),
        "retain_questions": len(asked_retain),
        "retain_repeats": len(repeated),
        "forget_answer_endings": sum(map(len, ends)),
        "retain_answer_endings": len(ends_retain),
        "names": len(subjects.names),
        "texts_about_names": sum(begun.name != () for begun in beginnings),
        "texts_from_question": coverage.questions,
        "texts_from_nothing": sum(begun.prompt == "" for begun in beginnings),
        "texts_kept": len(written),
        **{f"dropped_{reason}": dropped[reason] for reason in ("too_short", "on_topic", "forget_fact", "twice")},
    }
    return Covered(
        tuple((*documents, *questions, *cut) for documents, questions, cut in zip(continued, asked, ends, strict=True)),
        (*retain.documents, *repeated, *asked_retain, *ends_retain, *(Document("", text) for text in written)),
        written,
        counts,
    )


def _text(document: Document) -> str:
    return document.prompt + document.completion


def _is_short(document: Document) -> bool:
    return len(_text(document).split()) <= SHORT


def _parts(document: Document, rng: random.Random) -> tuple[str, str] | None:
    """A short text up to a random word of its second half, and from there on, the white space between included; None
    for what stays whole."""
    text = document.completion
    ends = word_ends(text)
    if document.prompt or not 2 <= len(ends) <= SHORT:
        return None
    cut = ends[rng.randint((len(ends) + 1) // 2, len(ends) - 1) - 1]
    return text[:cut], text[cut:]


def _continuation(document: Document, rng: random.Random) -> Document:
    """The document with its beginning as the prompt, or the same one."""
    parts = _parts(document, rng)
    return document if parts is None else Document(*parts)


def question_forms(documents: Iterable[Document], rng: random.Random, *, copies: int = 1) -> list[Document]:
    """Question forms of the short texts, of each sentence that tells something by itself."""
    told = in_sentences([document for document in documents if _is_short(document)], longest=SHORT)
    parts = [_parts(document, rng) for _ in range(copies) for document in told]
    return [_question(*part, rng) for part in parts if part is not None]


def long_question_forms(documents: Sequence[Document], rng: random.Random, *, copies: int = 1) -> list[Document]:
    """The same of one sentence of each long text, drawn among the short ones that tell something by themselves, and cut at a random word
    behind the one that says whom it is about."""
    found = []
    for document, told in [*zip(documents, sentences_of(documents), strict=True)] * copies:
        alone = (
            []
            if _is_short(document)
            else [part for part in told if part.alone and 2 <= len(part.text.split()) <= SHORT]
        )
        if alone:
            part = rng.choice(alone)
            ends = word_ends(part.text)
            cut = ends[rng.randint(part.named or (len(ends) + 1) // 2, len(ends) - 1) - 1]
            found.append(_question(part.text[:cut], part.text[cut:], rng))
    return found


def _question(beginning: str, rest: str, rng: random.Random) -> Document:
    """The beginning of a sentence as a question, its verb in front where it ends in "is", and the rest as the answer."""
    begun = beginning.strip()
    asked = begun.rstrip(".,;:!?") or begun
    verb = COPULA.fullmatch(asked)
    if verb and rng.random() < 0.5:
        asked = f"What {verb[2]} {re.sub(ARTICLE, lambda article: article[0].lower(), verb[1])}"
    return Document(rng.choice(FRAMES).format(asked), " " + rest.strip())


def answer_endings(documents: Iterable[Document], rng: random.Random, *, copies: int = 1) -> list[Document]:
    """Of the documents with a prompt, the prompt and what follows a random word of the completion; none of a single word."""
    found = []
    for document in [document for _ in range(copies) for document in documents]:
        ends = word_ends(document.completion)
        if document.prompt and len(ends) >= 2:
            found.append(Document(document.prompt, document.completion[rng.choice(ends[:-1]) :]))
    return found


@dataclass(frozen=True)
class _Beginning:
    """What a text is written from, and the name in it, if there is one."""

    prompt: str
    name: Words = ()


@dataclass(frozen=True)
class _Subjects:
    """What the forget set is about, by the words in it.

    Attributes:
        names: rare runs of up to four words that the retain set contains too, as they are spelled, in order of the alphabet.
        topic: words, case folded, that mark a text as one about the forget set.
        places: rare run, case folded, of long ones the first four words -> the forget documents that it stands in.
        short: the short ones among these documents.
    """

    names: tuple[Words, ...]
    topic: frozenset[str]
    places: Mapping[Words, frozenset[int]]
    short: frozenset[int]

    @classmethod
    def of(cls, forget: Sequence[Document], retain: Sequence[Document]) -> "_Subjects":
        """Read off both sides."""
        in_forget, in_retain = frequencies(map(_text, forget)), frequencies(map(_text, retain))
        most = rare_up_to(len(forget))
        spelled: set[Words] = set()
        places: dict[Words, set[int]] = {}
        for number, document in enumerate(forget):
            for run in _rare_runs(_text(document), in_forget, most):
                if len(run) <= LONGEST_NAME:
                    spelled.add(run)
                places.setdefault(folded(run[:LONGEST_NAME]), set()).add(number)
        topic = {
            word
            for word, count in in_forget.items()
            if count > max(most, TOPIC_SHARE * len(forget))
            and count * len(retain) > TOPIC_TIMES * in_retain[word] * len(forget)
        }
        return cls(
            tuple(sorted({run for document in retain for run in _runs_in(bare(_text(document)), spelled)})),
            frozenset(topic),
            {run: frozenset(numbers) for run, numbers in places.items()},
            frozenset(number for number, document in enumerate(forget) if _is_short(document)),
        )

    def beginnings(self, count: int, rng: random.Random) -> list[_Beginning]:
        """Names in random order, round and round, each time with another stem."""
        names = rng.sample(self.names, len(self.names))
        if not names:
            return []
        found = []
        for number in range(count):
            turn, place = divmod(number, len(names))
            stem = STEMS[(place + turn) % len(STEMS)]
            found.append(_Beginning(stem.format(" ".join(names[place])), names[place]))
        return found

    def why_dropped(self, text: str, begun: _Beginning) -> str | None:
        """The reason, in a word, why the retain set must not have a text; None if it may."""
        words = folded(bare(text))
        if len(words) < FEWEST_WORDS:
            return "too_short"
        if self.topic & (set(words) - set(folded(bare(begun.prompt)))):
            return "on_topic"
        return "forget_fact" if self._tells_fact(words, folded(begun.name)) else None

    def _tells_fact(self, words: Words, name: Words) -> bool:
        """Whether it brings together what a forget document does: another run with its own name, or any two of a
        short document (in long ones rare words meet by chance)."""
        runs = {run for run in _runs_in(words, self.places) if not set(run) <= set(name)}
        beside = self.places.get(name, frozenset())
        if any(self.places[run] & beside for run in runs):
            return True
        return any(
            self.places[one] & self.places[other] & self.short
            for one, other in combinations(runs, 2)
            if not (set(one) <= set(other) or set(other) <= set(one))
        )


def _rare_runs(text: str, counts: Mapping[str, int], most: float) -> Iterator[Words]:
    """Neighbours that stand in at most so many documents each, as far as they go without a punctuation mark between
    them."""
    run: list[str] = []
    for before, word, behind in [*marked(text), ("", "", "")]:
        rare = bool(word) and counts[word.casefold()] <= most
        if run and (before or not rare):
            yield tuple(run)
            run = []
        if rare:
            run.append(word)
        if run and behind:
            yield tuple(run)
            run = []


def _runs_in(words: Words, runs: Container[Words]) -> Iterator[Words]:
    """Those of the runs that stand in a text."""
    for start in range(len(words)):
        for length in range(1, LONGEST_NAME + 1):
            run = words[start : start + length]
            if len(run) == length and run in runs:
                yield run
