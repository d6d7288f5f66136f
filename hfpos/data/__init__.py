"""Text to token ids to blocks of one length."""

from hfpos.data.corpus import (
    Document,
    blocks,
    read_documents,
    split_documents,
    standard_library,
    tokenize,
    train_tokenizer,
)
from hfpos.data.documents import DocumentSet, TokenizedDocument, load_documents


__all__ = [
    "Document",
    "DocumentSet",
    "TokenizedDocument",
    "blocks",
    "load_documents",
    "read_documents",
    "split_documents",
    "standard_library",
    "tokenize",
    "train_tokenizer",
]
