"""What is read: documents and multiple-choice questions, from files, folders, the Hub, rows or strings, and the task they make up."""

from mrp_lens.data.documents import Corpus, Document
from mrp_lens.data.question_rows import Question
from mrp_lens.data.questions import Questions
from mrp_lens.data.schemas import KNOWN, DocumentColumns, QuestionColumns, Schema
from mrp_lens.data.task import TaskConfig, UnlearningTask, task_for

__all__ = [
    "KNOWN",
    "Corpus",
    "Document",
    "DocumentColumns",
    "Question",
    "QuestionColumns",
    "Questions",
    "Schema",
    "TaskConfig",
    "UnlearningTask",
    "task_for",
]
