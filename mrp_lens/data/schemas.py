"""How well-known data sets of the Hugging Face Hub are read, so that their name is all one has to give."""

import re
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mrp_lens.utils.validation import meant

HEADING = re.compile(r"\s*=\s.*\s=\s*")


@dataclass(frozen=True)
class DocumentColumns:
    """Where a row holds its document: a column of text, or templates of prompt and completion."""

    field: str | None = None
    prompt: str | None = None
    completion: str | None = None


@dataclass(frozen=True)
class QuestionColumns:
    """Where a row holds its question; the words are those of `Questions.from_rows`."""

    prompt: str = "{question}"
    choices: str | Sequence[str] = "choices"
    answer: str = "answer"
    group: str | None = None
    entity: str | None = None

    @property
    def needed(self) -> set[str]:
        """The columns that a row must have."""
        listed = [self.choices] if isinstance(self.choices, str) else list(self.choices)
        labels = [label for label in (self.group, self.entity) if label is not None]
        return {*template_fields(self.prompt), *listed, self.answer, *labels}


@dataclass(frozen=True, kw_only=True)
class Schema:
    """How one data set is read.

    Attributes:
        path: its name on the Hub today.
        config: the configuration that is read unless another is asked for.
        configs: the configurations there are, if one must be asked for.
        documents: its columns as a Corpus. None: the questions, each followed by its right choice.
        document_split: the split that a Corpus reads unless told.
        questions: its columns as Questions; of several, the first whose columns a data set has.
        question_split: the split that Questions read unless told.
        absent: rows that have a value in this column are left out.
        longer_than: a document counts only if its text has more characters than this.
        headings: lines such as ` = Title = ` count as documents.
    """

    path: str
    config: str | None = None
    configs: tuple[str, ...] = ()
    documents: DocumentColumns | None = None
    document_split: str = "train"
    questions: tuple[QuestionColumns, ...] = ()
    question_split: str = "test"
    absent: str | None = None
    longer_than: int = 0
    headings: bool = True

    def keeps_row(self, row: Mapping[str, Any]) -> bool:
        """Whether a row counts at all."""
        return self.absent is None or row.get(self.absent) is None

    def keeps_text(self, text: str) -> bool:
        """Whether a document is one to learn from."""
        return bool(text.strip()) and len(text) > self.longer_than and (self.headings or not HEADING.fullmatch(text))


_TOFU_PROMPT = "Question: {question}\nAnswer:"

_WIKITEXT = Schema(
    path="Salesforce/wikitext",
    config="wikitext-2-raw-v1",
    documents=DocumentColumns("text"),
    document_split="test",
    longer_than=50,  # what the released code of RMU keeps
    headings=False,
)

KNOWN: Mapping[str, Schema] = {
    "Salesforce/wikitext": _WIKITEXT,
    "cais/mmlu": Schema(
        path="cais/mmlu", config="all", document_split="test", questions=(QuestionColumns(group="subject"),)
    ),
    "cais/wmdp": Schema(
        path="cais/wmdp",
        configs=("wmdp-bio", "wmdp-cyber", "wmdp-chem"),
        document_split="test",
        questions=(QuestionColumns(),),
    ),
    "cais/wmdp-corpora": Schema(
        path="cais/wmdp-corpora",
        configs=("bio-retain-corpus", "cyber-forget-corpus", "cyber-retain-corpus"),
        documents=DocumentColumns("text"),
    ),
    "derek-thomas/ScienceQA": Schema(
        path="derek-thomas/ScienceQA", questions=(QuestionColumns(group="topic"),), absent="image"
    ),
    "locuslab/TOFU": Schema(
        path="locuslab/TOFU",
        configs=(
            *("full", "forget01", "forget05", "forget10", "retain90", "retain95", "retain99"),
            *("real_authors", "world_facts"),
            *("forget01_perturbed", "forget05_perturbed", "forget10_perturbed", "retain_perturbed"),
            *("real_authors_perturbed", "world_facts_perturbed"),
        ),
        documents=DocumentColumns(prompt=_TOFU_PROMPT, completion=" {answer}"),
        questions=(
            QuestionColumns(_TOFU_PROMPT, ("paraphrased_answer", "perturbed_answer"), "paraphrased_answer"),
            QuestionColumns(_TOFU_PROMPT, ("option1", "option2", "option3", "option4")),
            QuestionColumns(_TOFU_PROMPT, ("answer", "perturbed_answer")),
        ),
        question_split="train",
    ),
    "wikitext": _WIKITEXT,
}


def schema_named(schema: str | Schema | None) -> Schema | None:
    """The schema of a known data set; one that is a Schema already, or None, is returned as it is.

    Raises:
        ValueError: the name is not known (those that are get listed).
    """
    if schema is None or isinstance(schema, Schema):
        return schema
    if schema not in KNOWN:
        raise ValueError(
            f"unknown schema {schema!r}; {meant(schema, KNOWN)}known are {', '.join(KNOWN)}. For other data name the columns "
            "instead (field, prompt, choices, ...)"
        )
    return KNOWN[schema]


def check_names_column(template: str, what: str) -> None:
    """Refuse a template that gives every row the same text.

    Raises:
        ValueError: it names no column, or as `template_fields`.
    """
    if not template_fields(template):
        raise ValueError(
            f"{what} {template!r} names no column, so that all rows would say the same; braces name one, as in {{answer}}"
        )


def template_fields(template: str) -> list[str]:
    """The columns that a template names. What stands in braces is a name and nothing else: no attribute is looked up.

    Raises:
        ValueError: a brace has no partner or holds no name, or a conversion or format follows the name.
    """
    try:
        fields = []
        for _, field, form, conversion in string.Formatter().parse(template):
            if field is None:
                continue
            if not field or form or conversion:
                raise ValueError("braces hold the name of a column and nothing else, no index, !conversion or :format")
            fields.append(field)
        return fields
    except ValueError as error:
        raise ValueError(
            f"template {template!r}: {error}; a brace that is part of the text is written twice"
        ) from error
