"""The same questions put otherwise: behind a neutral sentence, behind solved ones, or with a word of the forget set."""

import random
import re
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace

from mrp_lens.data import Corpus, Question, Questions
from mrp_lens.metrics.open_ended import UNSPACED
from mrp_lens.models import LensModel, encoder_for

SHOTS = 4
COMMON = 0.01
"""A word in this share of the retain documents, and in two at least, is an everyday one: sharing it says nothing about a fact."""


def few_shot(
    model: LensModel, questions: Questions, shots: Questions, *, k: int = SHOTS, separator: str = "\n", seed: int = 0
) -> Questions:
    """Each question behind k solved ones (prompt and right answer), drawn for it from its own group where `shots` has it.

    Args:
        model: whose tokenizer and context length say what fits.
        questions: to be asked.
        shots: to be shown solved.
        k: how many, at most; fewer where the group has fewer or the context ends.
        separator: after each of them.
        seed: of the draw.

    Raises:
        ValueError: there are no shots.

    Warns:
        UserWarning: some questions got fewer than k, because more would not fit the model's context.
    """
    if not len(shots):
        raise ValueError(f"no solved questions in {shots.name!r}")
    fits, bos = _fits(model), _bos(model)
    rng = random.Random(f"mrp_lens few-shot {seed}")
    by_group = {group: [q for q in shots.questions if q.group == group] for group in shots.groups}
    behind, short = [], 0
    for question in questions.questions:
        pool = by_group.get(question.group, list(shots.questions))
        solved = [q.prompt + q.choices[q.answer] for q in rng.sample(pool, min(k, len(pool)))]
        wanted = len(solved)
        while solved and not fits(_behind(question, solved, separator, bos)):
            solved.pop()
        short += len(solved) < wanted
        behind.append(_behind(question, solved, separator, bos))
    if short:
        warnings.warn(
            f"{short} of {len(questions)} questions are shown with fewer than {k} solved ones: more do not fit the model's context of "
            f"{model.cfg.n_ctx} tokens",
            stacklevel=2,
        )
    return replace(questions, questions=tuple(behind))


def in_context(
    model: LensModel, questions: Questions, retain: Corpus, *, separator: str = " ", seed: int = 0
) -> Questions:
    """Each question behind a document of `retain` that says nothing about it.

    That is one that shares no word with its prompt and choices but everyday ones (in 1% of the retain documents,
    and two at least), nor holds a choice in a script without blanks, and leaves room for them in the model's context.

    Args:
        model: whose tokenizer and context length say what fits.
        questions: to be asked.
        retain: documents to draw from.
        separator: between document and prompt.
        seed: of the draw.

    Warns:
        UserWarning: for some questions `retain` holds no such document; these stay as they are.
    """
    fits, bos = _fits(model), _bos(model)
    texts = [document.prompt + document.completion for document in retain.documents]
    random.Random(f"mrp_lens context {seed}").shuffle(texts)
    words = [_words(text) for text in texts]
    frequency = Counter(word for of_text in words for word in of_text)
    everyday = {word for word, count in frequency.items() if count >= max(2, COMMON * len(texts))}
    behind: list[Question] = []
    start, bare = 0, 0
    for question in questions.questions:
        telling = _words(" ".join([question.prompt, *question.choices])) - everyday
        places = ((start + step) % len(texts) for step in range(len(texts)))
        named = [choice.strip().lower() for choice in question.choices if UNSPACED.search(choice)]
        silent = (p for p in places if not words[p] & telling and not any(name in texts[p].lower() for name in named))
        candidates = ((p, _behind(question, [texts[p]], separator, bos)) for p in silent)
        place, wrapped = next(((p, longer) for p, longer in candidates if fits(longer)), (start, question))
        start = place + 1
        bare += wrapped is question
        behind.append(wrapped)
    if bare:
        warnings.warn(
            f"{bare} of {len(questions)} questions stand without a document before them: none in {retain.name!r} both mentions none of "
            f"their words and leaves room for them in the model's context of {model.cfg.n_ctx} tokens",
            stacklevel=2,
        )
    return replace(questions, questions=tuple(behind))


def forget_token(model: LensModel, forget: Corpus, retain: Corpus) -> str:
    """The token with the largest (1 + occurrences in forget) / (1 + occurrences in retain); made of letters, two at least.

    Raises:
        ValueError: `forget` holds no such token.
    """
    encoder = encoder_for(model)
    counts = {}
    for name, corpus in {"forget": forget, "retain": retain}.items():
        rows = encoder.encode(corpus.documents)
        counts[name] = Counter(i for row in rows for i, counted in zip(row.ids, row.content, strict=True) if counted)
    text = {token: encoder.tokenizer.decode([token]) for token in counts["forget"]}
    words = sorted(token for token in text if len(text[token].strip()) > 1 and text[token].strip().isalpha())
    if not words:
        raise ValueError(f"no token of {forget.name!r} is made of letters")
    best = max(words, key=lambda token: (1 + counts["forget"][token]) / (1 + counts["retain"][token]))
    return str(text[best])


def with_token(model: LensModel, questions: Questions, token: str) -> Questions:
    """Each prompt behind the token."""
    bos = _bos(model)
    return replace(questions, questions=tuple(_behind(q, [token], " ", bos) for q in questions.questions))


def check_same_facts(held_out: Questions, paraphrased: Questions) -> None:
    """Refuse paraphrases that do not ask for the held-out facts one by one, in the same order.

    Raises:
        ValueError: their number, or the choices or right answer of a pair differ.
    """
    if len(paraphrased) != len(held_out):
        raise ValueError(
            f"paraphrased has {len(paraphrased)} questions and held_out {len(held_out)}; give one for each, in the same order"
        )
    for number, (plain, other) in enumerate(zip(held_out.questions, paraphrased.questions, strict=True)):
        same = set(plain.choices) == set(other.choices) and plain.choices[plain.answer] == other.choices[other.answer]
        if not same:
            raise ValueError(
                f"question {number} of paraphrased ({other.prompt!r}) has other choices or another right answer than that of held_out "
                f"({plain.prompt!r}); give the same facts in the same order"
            )


def _behind(question: Question, texts: Sequence[str], separator: str, bos: str) -> Question:
    """The question behind texts. The BOS that a chat template begins prompts with stands before all of them, and nowhere else."""
    first = bos if question.prompt.startswith(bos) else ""
    return replace(
        question, prompt=first + separator.join(text.removeprefix(first) for text in (*texts, question.prompt))
    )


def _bos(model: LensModel) -> str:
    return str(getattr(model.tokenizer, "bos_token", None) or "")


def _fits(model: LensModel) -> Callable[[Question], bool]:
    """Whether prompt and each choice are within the model's context."""
    encoder = encoder_for(model)

    def fits(question: Question) -> bool:
        rows = encoder.tokenizer([question.prompt + choice for choice in question.choices], add_special_tokens=False)
        return max(map(len, rows["input_ids"])) + encoder.prepend_bos <= encoder.max_length

    return fits


def _words(text: str) -> set[str]:
    return set(re.findall(r"\w+", text.lower()))
