"""Whether an argument is the kind of data that it has to be."""

from typing import Any

from mrp_lens.data.documents import Corpus
from mrp_lens.data.questions import Questions


def check_questions(**given: Any) -> None:
    """Each of the arguments, by its name, has to be Questions.

    Raises:
        TypeError: says what it is instead, and where questions come from.
    """
    for name, value in given.items():
        if not isinstance(value, Questions):
            raise TypeError(
                f"{name} must be Questions, got {type(value).__name__}; make them with Questions.from_rows(...) or Questions.from_file(...)"
            )


def check_corpus(**given: Any) -> None:
    """Each of the arguments, by its name, has to be a Corpus.

    Raises:
        TypeError: says what it is instead, and how it becomes one.
    """
    for name, value in given.items():
        if not isinstance(value, Corpus):
            how = (
                f"{name}.right_answers() is one"
                if isinstance(value, Questions)
                else "make one with Corpus.from_texts(...)"
            )
            raise TypeError(f"{name} must be a Corpus, got {type(value).__name__}; {how}")
