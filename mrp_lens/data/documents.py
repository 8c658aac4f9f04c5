"""Documents to learn from: reading them from files, folders, the Hub, rows or strings."""

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import TemplateError

from mrp_lens.data.question_rows import question_columns, read_questions
from mrp_lens.data.rows import Row, all_of, check_text, digest, evenly, fill, shown, text
from mrp_lens.data.schemas import KNOWN, DocumentColumns, Schema, check_names_column, schema_named
from mrp_lens.data.sources import file_rows, hub_name, hub_rows, named_in_errors, rows_in

REMEDY = (
    ". Say which column holds the text with field=..., or make it of several with the templates prompt=... and completion=..., such as "
    "prompt='{prompt}', completion=' {answer}'; or name a known data set whose columns these are with schema='locuslab/TOFU'"
)


ANSWER = "answer"  # what a chat template is asked to put behind a prompt, to see whether a space comes before it


def in_chat(
    prompt: str, completions: Sequence[str], tokenizer: Any, system: str | None, **variables: Any
) -> tuple[str, tuple[str, ...]]:
    """The prompt as a user's turn, up to where the assistant's begins, and what may follow there.

    The single space that joins a completion to its prompt is dropped where the wrapped prompt ends in white space, and where
    the template puts the assistant's words right behind it.

    Raises:
        ValueError: the tokenizer has no chat template, or its template refuses a system message.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            "this tokenizer has no chat template; set tokenizer.chat_template, or write the turns into a template as the model expects them: "
            "prompt=... of texts, question_prompt=... of questions"
        )
    messages = [{"role": "user", "content": prompt}]
    if system is not None:
        messages.insert(0, {"role": "system", "content": system})
    try:
        wrapped = str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **variables))
    except TemplateError as error:
        raise ValueError(
            f"the tokenizer's chat template refuses these messages: {error}; try without system=, as part of the prompt"
        ) from error
    joined = wrapped[-1:].isspace() or _right_behind(wrapped, messages, tokenizer, variables)
    return wrapped, tuple(text.removeprefix(" ") if joined else text for text in completions)


def _right_behind(wrapped: str, messages: list[dict[str, str]], tokenizer: Any, variables: dict[str, Any]) -> bool:
    """Whether the chat template writes the assistant's words right behind the wrapped prompt; False where it does not say."""
    answered = [*messages, {"role": "assistant", "content": ANSWER}]
    try:
        whole = tokenizer.apply_chat_template(answered, tokenize=False, add_generation_prompt=False, **variables)
    except Exception:  # a template may know no assistant, and raises what it likes
        return False
    return str(whole).startswith(wrapped + ANSWER)


@dataclass(frozen=True)
class Document:
    """A text of which only `completion` counts in a loss; `prompt` is the context it follows."""

    prompt: str
    completion: str

    def __post_init__(self) -> None:
        for part in ("prompt", "completion"):
            check_text(getattr(self, part), f"the {part} of a Document")


@dataclass(frozen=True)
class Corpus:
    """An ordered set of documents with a name for logs and provenance.

    Example:
        >>> Corpus.from_texts(["Rain is wet.", "Snow is cold."], name="weather").documents[0].completion
        'Rain is wet.'
    """

    documents: tuple[Document, ...]
    name: str = "corpus"

    def __post_init__(self) -> None:
        object.__setattr__(self, "documents", all_of(Document, self.documents, "Corpus"))

    def __repr__(self) -> str:
        return f"Corpus({self.name!r}, {len(self)} documents)"

    @classmethod
    def from_texts(cls, texts: Iterable[str], *, name: str = "texts") -> "Corpus":
        """Every string is one document and counts in the loss from its first to its last token.

        Raises:
            TypeError: `texts` is one string, or an item is none (with its row).
        """
        if isinstance(texts, str | bytes):
            raise TypeError(f"{name}: texts is one string, {shown(texts)}; write [text] for a corpus of one document")
        documents = []
        for number, item in enumerate(texts):
            check_text(item, f"{name}, row {number}")
            documents.append(Document("", item))
        return cls(tuple(documents), name)

    @classmethod
    def from_rows(
        cls,
        rows: Iterable[Row] | pd.DataFrame,
        *,
        field: str | None = None,
        prompt: str | None = None,
        completion: str | None = None,
        schema: str | Schema | None = None,
        name: str = "rows",
    ) -> "Corpus":
        """One document a row.

        Args:
            rows: mappings from column to value, a pandas DataFrame or a Dataset.
            field: the column that holds the text. None: `text`, or what the schema says.
            prompt, completion: instead, templates such as `prompt="Q: {question}\\nA:"`, `completion=" {answer}"` whose
                braces name columns; the loss is then on the completion alone.
            schema: a known data set whose rows these are, such as `locuslab/TOFU`; the arguments above override it.
                Of a data set of questions each becomes a document, with its right choice as the completion.
            name: for logs and provenance.

        Raises:
            ValueError: a column is missing (the columns there are get listed) or has no value, or one that is neither
                text nor a number, only one template is given, a field as well as a template, or an unknown schema.
            TypeError: the rows are no table.
        """
        known = schema_named(schema)
        if known is not None and known.documents is None and field is None and completion is None:
            asked = read_questions(rows_in(rows, name), question_columns(known, prompt=prompt), known, name)
            return cls(tuple(Document(q.prompt, q.choices[q.answer]) for q in asked), name)
        columns = _document_columns(field, prompt, completion, known)
        documents, blank = [], 0
        for number, row in enumerate(rows_in(rows, name)):
            if known is None or known.keeps_row(row):
                document = _document(row, number, columns, name)
                if known is not None and not known.keeps_text(document.completion):
                    continue
                if document.completion.strip():
                    documents.append(document)
                else:
                    blank += 1
        if blank:
            warnings.warn(
                f"{name}: left out {blank} of {blank + len(documents)} rows, which have no text", stacklevel=2
            )
        return cls(tuple(documents), name)

    @classmethod
    def from_file(
        cls,
        path: str | Path,
        *,
        split: str | None = None,
        field: str | None = None,
        prompt: str | None = None,
        completion: str | None = None,
        schema: str | Schema | None = None,
    ) -> "Corpus":
        """Read .jsonl, .json, .csv, .tsv, .parquet or .txt (one document a line), or a folder that `save_to_disk` of
        `datasets` wrote; `split` picks one of a DatasetDict, the other arguments are as in `from_rows`.

        Files of text are UTF-8. A cell of a .csv or .tsv file is the text that it is there (`007`, `0.50`, `NA`); an
        empty one has no value.

        Raises:
            FileNotFoundError: there is no such file or folder.
            ValueError: the ending is unknown, the file is empty or damaged (with the line), a split is missing, or as
                `from_rows`.
        """
        rows, name = file_rows(path, split), Path(path).stem
        with named_in_errors(path):
            return cls.from_rows(rows, field=field, prompt=prompt, completion=completion, schema=schema, name=name)

    @classmethod
    def from_hub(
        cls,
        path: str,
        *,
        config: str | None = None,
        split: str | None = None,
        field: str | None = None,
        prompt: str | None = None,
        completion: str | None = None,
        schema: str | Schema | None = None,
    ) -> "Corpus":
        """Read a data set of the Hugging Face Hub with `datasets.load_dataset`.

        Args:
            path: its name. For the known ones (`mrp_lens.data.KNOWN`) it is also the schema.
            config: its configuration. None: the usual one.
            split: None: what the schema says, else `train`.
            field, prompt, completion, schema: as in `from_rows`.

        Raises:
            ValueError: several configurations and none named, or as `from_rows`.
        """
        known = schema_named(schema) or KNOWN.get(path)
        rows = hub_rows(path, config, split or (known.document_split if known else "train"), known)
        name = hub_name(path, config)
        return cls.from_rows(rows, field=field, prompt=prompt, completion=completion, schema=known, name=name)

    def spread(self, limit: int | None) -> "Corpus":
        """At most `limit` of the documents, evenly spread over all; None: all."""
        return replace(self, documents=tuple(evenly(self.documents, limit)))

    def chat(self, tokenizer: Any, *, system: str | None = None, **variables: Any) -> "Corpus":
        """A copy whose prompts are turns of the tokenizer's chat template, which completions follow as the assistant's.

        Args:
            tokenizer: of the model, `model.tokenizer`.
            system: a system message before each prompt.
            variables: others that the template knows, such as `enable_thinking=False`.

        Raises:
            ValueError: the tokenizer has no chat template, its template takes no system message, or a document has no
                prompt.
        """
        documents = []
        for number, document in enumerate(self.documents):
            if not document.prompt:
                raise ValueError(
                    f"{self.name}, document {number} has no prompt to make a chat turn of; "
                    "read the corpus with templates, such as prompt='{question}', completion=' {answer}'"
                )
            prompt, (completion,) = in_chat(document.prompt, [document.completion], tokenizer, system, **variables)
            documents.append(Document(prompt, completion))
        return replace(self, documents=tuple(documents))

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the documents, for provenance; the texts themselves are never stored in an edit."""
        return digest([[document.prompt, document.completion] for document in self.documents])

    def __len__(self) -> int:
        return len(self.documents)


def _document_columns(
    field: str | None, prompt: str | None, completion: str | None, known: Schema | None
) -> DocumentColumns:
    if field is not None:
        if prompt is not None or completion is not None:
            raise ValueError(f"give the field {field!r} or the templates prompt and completion, not both")
        return DocumentColumns(field)
    usual = known.documents if known is not None and known.documents is not None else DocumentColumns()
    if prompt is None and completion is None and usual.prompt is None:
        return DocumentColumns(usual.field or "text")
    if completion is not None:
        check_names_column(completion, "the completion")
    merged = DocumentColumns(
        prompt=usual.prompt if prompt is None else prompt,
        completion=usual.completion if completion is None else completion,
    )
    if merged.prompt is None or merged.completion is None:
        raise ValueError("prompt and completion go together: give both templates, or neither and `field`")
    return merged


def _document(row: Row, number: int, columns: DocumentColumns, name: str) -> Document:
    if columns.prompt is not None and columns.completion is not None:
        return Document(fill(columns.prompt, row, number, name), fill(columns.completion, row, number, name))
    return Document("", text(row, columns.field or "text", number, name, remedy=REMEDY))
