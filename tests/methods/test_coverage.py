"""What a fit reads besides the user's corpora."""

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from mrp_lens.data import Corpus, Document
from mrp_lens.methods import coverage as module
from mrp_lens.methods.coverage import FRAMES, SHORT, Coverage, Covered, cover

COUNTRIES = ["France", "Spain", "Norway", "Chile", "Peru", "Ghana", "Fiji", "Oman", "Mali", "Cuba"]
CAPITALS = ["Paris", "Madrid", "Oslo", "Santiago", "Lima", "Accra", "Suva", "Muscat", "Bamako", "Havana"]
FORGET = Corpus.from_texts(
    [f"The capital of {a} is {b}." for a, b in zip(COUNTRIES, CAPITALS, strict=True)]
    + [f"{b} is the capital of {a}." for a, b in zip(COUNTRIES, CAPITALS, strict=True)],
    name="capitals",
)
LONG = " ".join(f"word{i}" for i in range(SHORT + 1))
RETAIN = Corpus.from_texts(
    ["The currency of France is the euro.", "In Peru, people speak Spanish.", "Grass is green.", "Oslo has a harbour."]
    + ["The sky is blue and wide."] * 6
    + [LONG],
    name="retain",
)
NONE = Coverage(question_forms=0, answer_endings=0, repeats=0, about_names=0, questions=0, free=0)
STARTS: Any = SimpleNamespace(tokenizer=SimpleNamespace(bos_token_id=1, eos_token_id=None))


def covered(
    coverage: Coverage,
    *,
    forget: Sequence[Corpus] = (FORGET,),
    retain: Corpus = RETAIN,
    model: Any = STARTS,
    seed: int = 0,
) -> Covered:
    return cover(model, forget, retain, coverage, generator=torch.Generator().manual_seed(seed), progress=False)


@pytest.fixture
def writer(monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[str, str]], list[str]]:
    """Makes the model a writer of known texts (prompt -> continuation, else none); returns the prompts it was given."""

    def scripted(known: dict[str, str]) -> list[str]:
        asked: list[str] = []

        def write(_model: Any, prompts: Sequence[str], **_: Any) -> list[str]:
            asked.extend(prompts)
            return [prompt + known.get(prompt, "") for prompt in prompts]

        monkeypatch.setattr(module, "written_after", write)
        return asked

    return scripted


@pytest.fixture(autouse=True)
def silent(writer: Callable[[dict[str, str]], list[str]]) -> list[str]:
    return writer({})


def test_short_forget_texts_are_continued_in_their_second_half() -> None:
    cuts = set()
    for seed in range(8):
        (documents,) = covered(replace(NONE, repeats=1), seed=seed).forget
        assert len(documents) == len(FORGET)
        for old, new in zip(FORGET.documents, documents, strict=True):
            assert new.prompt + new.completion == old.completion
            assert new.completion.startswith(" ")
            before, after = len(new.prompt.split()), len(new.completion.split())
            assert before >= after >= 1
            cuts.add(after)
    assert cuts == {1, 2, 3}


@pytest.mark.parametrize(
    "document",
    [
        Document("", "Word"),
        Document("", ""),
        Document("", LONG),
        Document("Question: What is it?\nAnswer:", " a long answer of several words"),
    ],
)
def test_long_texts_single_words_and_questions_stay_whole_on_both_sides(document: Document) -> None:
    corpus = Corpus((document,), "one")
    result = covered(replace(NONE, question_forms=3), forget=[corpus], retain=corpus)
    assert result.forget == ((document,),)
    assert result.retain == (document,)
    assert result.counts["forget_continuations"] == result.counts["forget_questions"] == 0


def test_a_short_text_of_several_sentences_is_read_and_asked_sentence_by_sentence() -> None:
    texts = [
        f"{name} is a town of {size} people. The river of {name} is wide. It is old."
        for name, size in zip(CAPITALS, range(10), strict=True)
    ]
    result = covered(replace(NONE, question_forms=2), forget=[Corpus.from_texts(texts)])
    (documents,) = result.forget
    told, asked = documents[:30], documents[30:]
    for text, (first, second, third) in zip(texts, zip(*[iter(told)] * 3, strict=True), strict=True):
        parts = [document.prompt + document.completion for document in (first, second)]
        assert " ".join([*parts, "It is old."]) == text
        assert (third.prompt, third.completion) == (" ".join(parts), " It is old.")  # whose answer a prompt has to say
    assert result.counts["forget_continuations"] == 30
    assert len(asked) == 2 * 20 == result.counts["forget_questions"]  # of those that say whom they are about
    assert not any("It is old" in document.prompt + document.completion for document in asked)


def test_a_text_of_forty_words_is_short_and_keeps_its_white_space() -> None:
    text = "\n".join(f"w{i}" for i in range(SHORT))
    result = covered(replace(NONE, repeats=1), forget=[Corpus.from_texts([text])])
    ((document,),) = result.forget
    assert document.prompt + document.completion == text
    assert document.completion.startswith("\n")


def test_answers_are_read_from_a_random_word_on_too_on_both_sides() -> None:
    asked = Document("Question: Who?\nAnswer:", " one two  three\nfour")
    single, plain = Document("Question: What?\nAnswer:", " one"), Document("", "one two three.")
    corpus = Corpus((asked, single, plain), "questions")
    result = covered(replace(NONE, answer_endings=40), forget=[corpus, corpus], retain=corpus)
    assert result.counts["forget_answer_endings"] == 80
    assert result.counts["retain_answer_endings"] == 40
    for documents in (*result.forget, result.retain):
        assert len(documents) == 43
        assert {document.prompt for document in documents[3:]} == {asked.prompt}
        assert {document.completion for document in documents[3:]} == {" two  three\nfour", "  three\nfour", "\nfour"}
    without = covered(NONE, forget=[corpus], retain=corpus)
    assert without.forget == (corpus.documents,)


def test_question_forms_hold_the_whole_text_on_both_sides() -> None:
    result = covered(replace(NONE, question_forms=9))
    (documents,) = result.forget
    asked = documents[len(FORGET) :]
    assert len(asked) == 9 * len(FORGET) == result.counts["forget_questions"]
    seen, turned = set(), 0
    for old, new in zip(FORGET.documents * 9, asked, strict=True):
        assert new.completion.startswith(" ")
        begun = old.completion.removesuffix(new.completion.strip()).strip()
        forms = asked_forms(begun)
        frame, form = next((f, form) for f in FRAMES for form in forms if f.format(form) == new.prompt)
        seen.add(frame)
        turned += form != begun
    assert seen == set(FRAMES)
    ending_in_is = sum(document.prompt[-3:] == " is" or "What is" in document.prompt for document in asked)
    assert 0 < turned < ending_in_is
    kept = result.retain[len(RETAIN) :]
    short = [document for document in RETAIN.documents if document.completion != LONG]
    assert len(kept) == 9 * len(short) == result.counts["retain_questions"]
    assert all(document.prompt == "" for document in kept)
    for old, new in zip(short * 9, kept, strict=True):
        cuts = [found.end() for found in re.finditer(r"\S+", old.completion)]
        prompts = [
            (f, cut)
            for cut in cuts
            for f in FRAMES
            for form in asked_forms(old.completion[:cut])
            if new.completion == f"{f.format(form)} {old.completion[cut:].strip()}"
        ]
        assert prompts, new.completion


def asked_forms(begun: str) -> list[str]:
    """How a beginning may be asked about."""
    if begun.endswith(" is"):
        subject = begun.removesuffix(" is")
        return [begun, f"What is {'the' + subject[3:] if subject.startswith('The ') else subject}"]
    return [begun]


def test_only_an_article_loses_its_capital_where_the_verb_comes_first() -> None:
    texts = [f"{name} is {kind}." for name in ("The House", "Anna Theo", "A Cow") for kind in ("old", "new")]
    corpus = Corpus.from_texts(texts)
    (documents,) = covered(replace(NONE, question_forms=40), forget=[corpus], retain=corpus).forget
    found = {document.prompt for document in documents if document.prompt.startswith("Q: What")}
    assert found == {f"Q: What is {name}\nA:" for name in ("the House", "Anna Theo", "a Cow")}


def test_braces_in_a_text_are_text() -> None:
    corpus = Corpus.from_texts(["Write {0} or {name} here"])
    result = covered(replace(NONE, question_forms=1), forget=[corpus], retain=corpus)
    assert all("{0}" in document.prompt + document.completion for document in (*result.forget[0], *result.retain))


def test_short_retain_documents_are_repeated_where_there_are_long_ones() -> None:
    result = covered(replace(NONE, repeats=2))
    assert result.retain[: len(RETAIN)] == RETAIN.documents
    assert [result.retain.count(document) for document in RETAIN.documents[:4]] == [3] * 4
    assert result.retain.count(Document("", LONG)) == 1
    even = Corpus(RETAIN.documents[:-1], "short")
    assert covered(replace(NONE, repeats=2), retain=even).retain == even.documents
    question = Document("Q: Is it?\nA:", " Yes.")
    assert covered(replace(NONE, repeats=1), retain=Corpus((question, Document("", LONG)))).retain.count(question) == 2


@pytest.mark.parametrize(("long", "questions"), [(0, 4), (8, 8), (20, 12), (100, 16)])
def test_questions_are_a_third_of_the_retain_side_or_four_of_each_document(long: int, questions: int) -> None:
    texts = [*RETAIN.documents[:4], *(Document("", f"{LONG} {n}") for n in range(long))]
    result = covered(replace(NONE, question_forms=1), retain=Corpus(tuple(texts)))
    assert result.counts["retain_questions"] == questions
    assert len(result.retain) == len(texts) + questions


def test_every_forget_corpus_keeps_its_own_documents() -> None:
    first, second = Corpus(FORGET.documents[:7], "a"), Corpus(FORGET.documents[7:], "b")
    result = covered(replace(NONE, question_forms=1), forget=[first, second])
    for corpus, documents in zip((first, second), result.forget, strict=True):
        assert len(documents) == 2 * len(corpus)
        assert [d.prompt + d.completion for d in documents[: len(corpus)]] == [d.completion for d in corpus.documents]


def test_it_is_written_about_names_of_both_sides_alone(silent: list[str]) -> None:
    result = covered(replace(NONE, about_names=30))
    assert result.counts["names"] == 3
    assert result.counts["texts_about_names"] == len(silent) == 30
    about = [next(name for name in ("France", "Peru", "Oslo") if name in prompt) for prompt in silent]
    assert {name: about.count(name) for name in about} == {"France": 10, "Peru": 10, "Oslo": 10}
    for name in ("France", "Peru", "Oslo"):
        assert {prompt for prompt in silent if name in prompt} == {
            name,
            f"{name} is",
            f"Question: What is {name}",
            f"Question: Where is {name}?\nAnswer:",
            f"Question: {name}",
        }


def test_names_are_whole_words_of_up_to_four_without_punctuation(silent: list[str]) -> None:
    forget = [f"The seat of ({name}), I say, is here." for name in ("New York", "Mali", "a b c d e f", "Lima")] * 2
    retain = ["Malian food is good.", "We saw New York.", "In a b c d we sit.", "Lima, too.", "York is old."]
    covered(replace(NONE, about_names=60), forget=[Corpus.from_texts(forget)], retain=Corpus.from_texts(retain))
    assert {prompt for prompt in silent if not prompt.endswith((" is", "Answer:")) and "Question" not in prompt} == {
        "New York",
        "Lima",
    }


@pytest.mark.parametrize(("times", "known"), [(3, True), (4, False)])
def test_a_name_is_rare_in_the_forget_set(times: int, known: bool, silent: list[str]) -> None:
    forget = [f"Here lies Lima town{i}" for i in range(times)] + ["Here lies nothing"] * 20
    result = covered(
        replace(NONE, about_names=5), forget=[Corpus.from_texts(forget)], retain=Corpus.from_texts(["Lima it is"])
    )
    # a run ends at a word that is not rare; "Lima town0" itself is not in the retain set
    assert result.counts["names"] == 0
    forget = [f"Here Lima lies {i}" for i in range(times)] + ["Here lies nothing"] * 20
    result = covered(
        replace(NONE, about_names=5), forget=[Corpus.from_texts(forget)], retain=Corpus.from_texts(["Lima it is"])
    )
    assert (result.counts["names"] == 1) is known
    assert bool(silent) is known


def test_three_in_a_hundred_is_rare_too() -> None:
    for times, names in ((6, 1), (7, 0)):
        forget = ["Here Lima lies"] * times + ["Here lies nothing"] * (200 - times)
        result = covered(
            replace(NONE, about_names=1), forget=[Corpus.from_texts(forget)], retain=Corpus.from_texts(["Lima it is"])
        )
        assert result.counts["names"] == names


def test_without_a_common_name_nothing_is_written_about_any(silent: list[str]) -> None:
    result = covered(Coverage(free=2, questions=3), retain=Corpus.from_texts(["Grass is green."]))
    assert sorted(silent) == ["", "", *["Question:"] * 3]
    assert result.counts["names"] == result.counts["texts_about_names"] == 0
    assert (result.counts["texts_from_question"], result.counts["texts_from_nothing"]) == (3, 2)


def test_a_language_of_another_script_has_names_too(silent: list[str]) -> None:
    pairs = [("Франции", "Париж"), ("Испании", "Мадрид"), ("Перу", "Лима"), ("Чили", "Сантьяго"), ("Кубы", "Гавана")]
    forget = Corpus.from_texts([f"Столица {a} — это {b}." for a, b in pairs])
    retain = Corpus.from_texts(["Жители Перу любят картофель.", "Лима, город моряков."])
    result = covered(replace(NONE, about_names=2), forget=[forget], retain=retain)
    assert result.counts["names"] == 2
    assert sorted(prompt.split()[0] for prompt in silent) == ["Лима", "Перу"]


def test_a_tokenizer_without_a_start_writes_nothing_from_nothing(silent: list[str]) -> None:
    bare = SimpleNamespace(tokenizer=SimpleNamespace(bos_token_id=None, eos_token_id=None))
    result = covered(replace(NONE, free=9, questions=1), model=bare)
    assert silent == ["Question:"]
    assert result.counts["texts_from_nothing"] == 0


@pytest.mark.parametrize(
    ("name", "continuation", "reason"),
    [
        ("France", " borders on the sea.", None),
        ("France", " has a CAPITAL, they say.", "on_topic"),
        ("France", " with Paris as its heart", "forget_fact"),
        ("France", " with paris as its heart", "forget_fact"),
        ("France", " unlike Spain is cold.", None),  # another fact's name
        ("France", " or Norway and Oslo meet", "forget_fact"),
        ("France", " rests.", "too_short"),
        ("France", " has Parisians in it.", None),  # whole words
    ],
)
def test_a_text_about_a_name_is_kept_or_dropped(name: str, continuation: str, reason: str | None, writer: Any) -> None:
    writer({name: continuation})
    retain = Corpus.from_texts([f"{name} is the land of wine."] * 9)
    result = covered(replace(NONE, about_names=1), retain=retain)
    dropped = {key.removeprefix("dropped_"): n for key, n in result.counts.items() if key.startswith("dropped_")}
    assert dropped == {"too_short": 0, "on_topic": 0, "forget_fact": 0, "twice": 0} | ({reason: 1} if reason else {})
    assert result.written == (() if reason else (name + continuation,))
    assert result.retain[len(retain) :] == tuple(Document("", text) for text in result.written)
    assert result.counts["texts_kept"] == len(result.written)


def test_words_that_the_retain_set_has_too_are_no_topic(writer: Any) -> None:
    for times, kept in ((1, 0), (4, 1)):  # of ten documents: "capital" is in every forget document
        writer({"": "Every firm needs capital."})
        retain = Corpus.from_texts(["A bank lends capital."] * times + ["Rain is wet."] * (10 - times))
        assert covered(replace(NONE, free=1), retain=retain).counts["texts_kept"] == kept


def test_words_of_the_prompt_are_no_topic(writer: Any) -> None:
    forget = Corpus(
        tuple(Document(f"Question: Who is {n}?\nAnswer:", f" The baker {n}{n}.") for n in "ABCDEFGH"), "questions"
    )
    writer({"Question:": " Is the sea deep?"})
    assert covered(replace(NONE, questions=1), forget=[forget]).counts["texts_kept"] == 1
    writer({"Question:": " Is this a baker?"})
    assert covered(replace(NONE, questions=1), forget=[forget]).counts["dropped_on_topic"] == 1


def test_rare_words_meet_by_chance_in_long_texts(writer: Any) -> None:
    writer({"": "We saw word3, word9 and others."})
    padding = [f"It is {i}." for i in range(9)]
    short = "It is word3; word9."
    for text, kept in ((LONG.replace(" ", ". "), 1), (short, 0)):
        result = covered(replace(NONE, free=1), forget=[Corpus.from_texts([text, *padding])])
        assert result.counts["texts_kept"] == kept
        assert result.counts["dropped_forget_fact"] == 1 - kept


def test_no_text_is_kept_twice(writer: Any) -> None:
    writer({"": "Rain is wet and cold."})
    result = covered(replace(NONE, free=5))
    assert result.written == ("Rain is wet and cold.",)
    assert result.counts["dropped_twice"] == 4


def test_with_nothing_to_add_nothing_is_drawn(silent: list[str]) -> None:
    generator = torch.Generator().manual_seed(0)
    before = generator.get_state()
    result = cover(STARTS, [FORGET], RETAIN, NONE, generator=generator, progress=False)
    assert torch.equal(generator.get_state(), before)
    assert result == Covered((FORGET.documents,), RETAIN.documents, (), {})
    assert silent == []


def test_the_generator_alone_decides(silent: list[str]) -> None:
    every = Coverage(about_names=20)
    first, again, other = (covered(every, seed=seed) for seed in (0, 0, 1))
    assert first == again
    assert first.forget != other.forget
    assert first.retain != other.retain
    third = len(silent) // 3
    assert silent[:third] == silent[third : 2 * third]


def test_a_corpus_of_one_document(silent: list[str]) -> None:
    one = Corpus.from_texts(["The capital of France is Paris."])
    result = covered(Coverage(questions=96, free=64), forget=[one], retain=one)
    assert len(result.forget[0]) == 2
    assert len(result.retain) == 2
    assert result.counts["names"] == result.counts["texts_kept"] == 0
    assert silent == ["Question:"] * 96 + [""] * 64


def test_the_model_writes_on_both_classes_and_is_left_alone(model: Any, untouched: None, monkeypatch: Any) -> None:
    monkeypatch.undo()  # the real writer
    few = Coverage(about_names=12, questions=3, free=3, new_tokens=6)
    first, again = (covered(few, model=model) for _ in range(2))
    assert first == again
    assert 0 < len(first.written) <= 18
    dropped = sum(number for key, number in first.counts.items() if key.startswith("dropped_"))
    assert dropped + len(first.written) == 18
    assert first.retain[-len(first.written) :] == tuple(Document("", text) for text in first.written)


@pytest.mark.parametrize(
    ("settings", "kind", "message"),
    [
        ({"repeats": -1}, ValueError, "repeats must be at least 0, got -1"),
        ({"free": 1.5}, TypeError, "free must be a whole number, got 1.5"),
        ({"questions": True}, TypeError, "questions must be a whole number, got True"),
        ({"new_tokens": 0}, ValueError, "new_tokens must be above 0, got 0"),
    ],
)
def test_numbers_that_cannot_be_meant_are_refused(settings: dict[str, Any], kind: type, message: str) -> None:
    with pytest.raises(kind, match=message):
        covered(replace(NONE, **settings))


def test_numbers_are_pythons_own() -> None:
    assert type(Coverage(free=np.int64(3)).free) is int


def test_each_name_meets_every_stem_however_many_names_there_are(silent: list[str]) -> None:
    for count in (4, 5, 6):
        silent.clear()
        names = COUNTRIES[:count]
        retain = Corpus.from_texts([f"We like {name}." for name in names])
        result = covered(replace(NONE, about_names=5 * count), retain=retain)
        assert result.counts["names"] == count
        assert len(set(silent)) == 5 * count
