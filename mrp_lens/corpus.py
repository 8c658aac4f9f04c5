"""Documents and multiple-choice questions: reading them from files, the Hub, rows or strings."""

import hashlib
import json
import string
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Row = Mapping[str, Any]

_LOADERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".tsv": "csv", ".txt": "text", ".parquet": "parquet"}


@dataclass(frozen=True)
class Document:
    """A text of which only `completion` counts in a loss; `prompt` is the context it follows."""

    prompt: str
    completion: str


@dataclass(frozen=True)
class Corpus:
    """An ordered set of documents with a name for logs and provenance.

    Example:
        >>> Corpus.from_texts(["Rain is wet.", "Snow is cold."], name="weather").documents[0].completion
        'Rain is wet.'
    """

    documents: tuple[Document, ...]
    name: str = "corpus"

    @classmethod
    def from_texts(cls, texts: Iterable[str], *, name: str = "texts") -> "Corpus":
        """Every string is one document and counts in the loss from its first to its last token."""
        return cls(tuple(Document("", text) for text in texts), name)

    @classmethod
    def from_rows(
        cls,
        rows: Iterable[Row],
        *,
        field: str = "text",
        prompt: str | None = None,
        completion: str | None = None,
        name: str = "rows",
    ) -> "Corpus":
        """One document a row: the column `field`, or templates such as `prompt="Q: {question}\\nA:"`,
        `completion=" {answer}"` whose braces name columns; the loss is then on the completion alone.

        Raises:
            ValueError: a column is missing (the columns there are get listed), or only one template is given.
        """
        if (prompt is None) != (completion is None):
            raise ValueError("prompt and completion go together: give both templates, or neither and `field`")
        documents = []
        for number, row in enumerate(rows):
            if prompt is not None and completion is not None:
                document = Document(_fill(prompt, row, number, name), _fill(completion, row, number, name))
            else:
                document = Document("", str(_column(row, field, number, name)))
            documents.append(document)
        return cls(tuple(documents), name)

    @classmethod
    def from_file(
        cls, path: str | Path, *, field: str = "text", prompt: str | None = None, completion: str | None = None
    ) -> "Corpus":
        """Read .jsonl, .json, .csv, .tsv, .parquet or .txt (one document a line); arguments as `from_rows`.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the ending is unknown, or as `from_rows`.
        """
        return cls.from_rows(_read(path), field=field, prompt=prompt, completion=completion, name=Path(path).stem)

    @classmethod
    def from_hub(
        cls,
        path: str,
        *,
        config: str | None = None,
        split: str = "train",
        field: str = "text",
        prompt: str | None = None,
        completion: str | None = None,
    ) -> "Corpus":
        """Read a data set of the Hugging Face Hub with `datasets.load_dataset`; arguments as `from_rows`."""
        return cls.from_rows(_hub(path, config, split), field=field, prompt=prompt, completion=completion, name=path)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the documents, for provenance; the texts themselves are never stored in an edit."""
        return _digest([[document.prompt, document.completion] for document in self.documents])

    def __len__(self) -> int:
        return len(self.documents)


@dataclass(frozen=True)
class Question:
    """One multiple-choice question; `answer` is the index of the right choice."""

    prompt: str
    choices: tuple[str, ...]
    answer: int
    group: str = ""


@dataclass(frozen=True)
class Questions:
    """An ordered set of multiple-choice questions; each choice is scored as the text that follows the prompt."""

    questions: tuple[Question, ...]
    name: str = "questions"

    @classmethod
    def from_rows(
        cls,
        rows: Iterable[Row],
        *,
        prompt: str = "{question}",
        choices: str | Sequence[str] = "choices",
        answer: str = "answer",
        group: str | None = None,
        name: str = "rows",
    ) -> "Questions":
        """One question a row.

        Args:
            rows: mappings from column to value.
            prompt: template whose braces name columns.
            choices: a column holding a list, or several columns holding one choice each. A choice is joined to
                the prompt by one space unless it starts with white space already.
            answer: column with the index of the right choice, or its text.
            group: column by which `metrics.accuracy` reports separately, such as a topic.
            name: for logs and provenance.

        Raises:
            ValueError: a column is missing, fewer than two choices, or an answer that is not among them
                (with the row's number).
        """
        return cls(
            tuple(_question(row, number, prompt, choices, answer, group, name) for number, row in enumerate(rows)), name
        )

    @classmethod
    def from_file(
        cls,
        path: str | Path,
        *,
        prompt: str = "{question}",
        choices: str | Sequence[str] = "choices",
        answer: str = "answer",
        group: str | None = None,
    ) -> "Questions":
        """Read the kinds of file that `Corpus.from_file` reads; the other arguments as `from_rows`."""
        return cls.from_rows(
            _read(path), prompt=prompt, choices=choices, answer=answer, group=group, name=Path(path).stem
        )

    @classmethod
    def from_hub(
        cls,
        path: str,
        *,
        config: str | None = None,
        split: str = "test",
        prompt: str = "{question}",
        choices: str | Sequence[str] = "choices",
        answer: str = "answer",
        group: str | None = None,
    ) -> "Questions":
        """Read a data set of the Hugging Face Hub with `datasets.load_dataset`; arguments as `from_rows`."""
        rows = _hub(path, config, split)
        return cls.from_rows(rows, prompt=prompt, choices=choices, answer=answer, group=group, name=path)

    @property
    def groups(self) -> tuple[str, ...]:
        """The groups that occur, in order of appearance."""
        return tuple(dict.fromkeys(question.group for question in self.questions))

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the questions, for provenance."""
        return _digest([[q.prompt, list(q.choices), q.answer, q.group] for q in self.questions])

    def __len__(self) -> int:
        return len(self.questions)


def _question(
    row: Row, number: int, prompt: str, choices: str | Sequence[str], answer: str, group: str | None, name: str
) -> Question:
    listed = (
        _column(row, choices, number, name)
        if isinstance(choices, str)
        else [_column(row, c, number, name) for c in choices]
    )
    if isinstance(listed, str) or not isinstance(listed, Sequence) or len(listed) < 2:
        raise ValueError(f"{name}, row {number}: choices must be a list of at least 2, got {listed!r}")
    options = [str(choice) for choice in listed]
    given = _column(row, answer, number, name)
    if isinstance(given, int) and not isinstance(given, bool) and 0 <= given < len(options):
        index = given
    elif isinstance(given, str) and given in options:
        index = options.index(given)
    else:
        raise ValueError(
            f"{name}, row {number}: the answer {given!r} is neither an index in 0..{len(options) - 1} nor one of the choices {options}"
        )
    spaced = tuple(option if option[:1].isspace() else f" {option}" for option in options)
    label = str(_column(row, group, number, name)) if group is not None else ""
    return Question(_fill(prompt, row, number, name), spaced, index, label)


def _read(path: str | Path) -> list[dict[str, Any]]:
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"no file at {file}; for a data set of the Hub use from_hub")
    if file.suffix not in _LOADERS:
        raise ValueError(f"{file.name}: unknown ending {file.suffix!r}; known are {', '.join(_LOADERS)}")
    if file.stat().st_size == 0:
        raise ValueError(f"{file} is empty; it must hold at least one document or question")
    if file.suffix == ".txt":
        return [{"text": line} for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    if file.suffix == ".jsonl":
        return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    import tempfile

    from datasets import load_dataset

    options = {"sep": "\t"} if file.suffix == ".tsv" else {}
    with tempfile.TemporaryDirectory() as cache:
        rows = load_dataset(
            _LOADERS[file.suffix], data_files=str(file), split="train", cache_dir=cache, keep_in_memory=True, **options
        )
        return list(rows)


def _hub(path: str, config: str | None, split: str) -> Iterable[Row]:
    from datasets import load_dataset

    rows: Iterable[Row] = load_dataset(path, config, split=split)
    return rows


def _column(row: Row, field: str, number: int, name: str) -> Any:
    if field not in row:
        raise ValueError(f"{name}, row {number}: no field {field!r}; the row has {', '.join(map(repr, row))}")
    return row[field]


def _fill(template: str, row: Row, number: int, name: str) -> str:
    fields = [field for _, field, _, _ in string.Formatter().parse(template) if field is not None]
    values = {field: _column(row, field, number, name) for field in fields}
    return template.format(**values)


def _digest(content: object) -> str:
    return hashlib.sha256(json.dumps(content, ensure_ascii=False).encode()).hexdigest()
