"""Documents and multiple-choice questions: reading them from files, folders, the Hub, rows or strings."""

from mrp_lens.data.documents import Corpus, Document
from mrp_lens.data.questions import Question, Questions
from mrp_lens.data.schemas import KNOWN, DocumentColumns, QuestionColumns, Schema

__all__ = ["KNOWN", "Corpus", "Document", "DocumentColumns", "Question", "QuestionColumns", "Questions", "Schema"]
