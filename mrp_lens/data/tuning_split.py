"""The data of a search kept apart from those of its report: quizzes and held-out text in two parts that share nothing."""

import random
from dataclasses import replace

from mrp_lens.data.documents import Corpus
from mrp_lens.data.questions import Questions
from mrp_lens.data.task import UnlearningTask


def tuning_split(task: UnlearningTask, share: float = 0.5, *, seed: int = 0) -> tuple[UnlearningTask, UnlearningTask]:
    """(for tuning, for the report): the same texts to fit on, and what is measured in two parts.

    A quiz whose questions all name whom they are about is parted by these entities, else by its questions. Of the held-out
    text only documents count that no fit sees.

    Args:
        task: with both quizzes.
        share: of each quiz's entities (or questions) and of the held-out documents, for tuning.
        seed: of the draw.

    Raises:
        ValueError: a quiz is missing or cannot be parted, fewer than two held-out documents that no fit sees, or a share that is
            not between 0 and 1.
    """
    missing = [side for side, quiz in _quizzes(task).items() if quiz is None]
    if missing:
        raise ValueError(
            f"tuning needs a quiz on both sides; there is none for {', '.join(missing)}; give questions=... and "
            "retain_questions=..."
        )
    seen = {*task.retain.documents, *task.forget_texts.documents}
    unseen = tuple(document for document in task.held_out.documents if document not in seen)
    if len(unseen) < 2:
        raise ValueError(
            f"damage is measured on retain text that no fit sees, and {len(unseen)} held-out documents are such; give a retain set "
            "of at least 20 documents, of which a tenth is held out"
        )
    quizzes = {name: _parted(quiz, share, seed) for name, quiz in _quizzes(task).items() if quiz is not None}
    texts = _parted_texts(replace(task.held_out, documents=unseen), share, seed)
    tuning, reported = (
        replace(
            task,
            held_out=texts[part],
            questions=quizzes["forget"][part],
            retain_questions=quizzes["retain"][part],
            untaught_questions=None,
        )
        for part in (0, 1)
    )
    return tuning, reported


def _quizzes(task: UnlearningTask) -> dict[str, Questions | None]:
    return {"forget": task.questions, "retain": task.retain_questions}


def _parted(quiz: Questions, share: float, seed: int) -> tuple[Questions, Questions]:
    tuning, rest = quiz.parted(share, by=quiz.halved_by, seed=seed)
    asked = {(question.prompt, question.choices) for question in tuning.questions}
    # A question that stands in the quiz twice is one question.
    kept = tuple(question for question in rest.questions if (question.prompt, question.choices) not in asked)
    if not kept:
        raise ValueError(
            f"{quiz.name} holds the same questions again and again and cannot be parted; give different ones"
        )
    return tuning, replace(rest, questions=kept)


def _parted_texts(corpus: Corpus, share: float, seed: int) -> tuple[Corpus, Corpus]:
    documents = list(dict.fromkeys(corpus.documents))
    if len(documents) < 2:
        raise ValueError(f"{corpus.name} holds one document again and again and cannot be parted; give different ones")
    count = min(len(documents) - 1, max(1, int(share * len(documents))))
    chosen = set(random.Random(f"mrp_lens tuning texts {seed}").sample(range(len(documents)), count))
    parts = [tuple(d for place, d in enumerate(documents) if (place in chosen) == wanted) for wanted in (True, False)]
    return replace(corpus, documents=parts[0]), replace(corpus, documents=parts[1])
