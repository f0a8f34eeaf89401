"""Texts and conversations as training data: rows from files, tokens of rows, samples of tokens."""

from engram_llm.data.documents import Documents, read_documents, split_documents, tokenize_rows
from engram_llm.data.rows import Row, read_rows
from engram_llm.data.samples import Collator, Samples, pack_documents, truncate_documents

__all__ = [
    "Collator",
    "Documents",
    "Row",
    "Samples",
    "pack_documents",
    "read_documents",
    "read_rows",
    "split_documents",
    "tokenize_rows",
    "truncate_documents",
]
