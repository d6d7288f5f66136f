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


__all__ = [
    "Document",
    "blocks",
    "read_documents",
    "split_documents",
    "standard_library",
    "tokenize",
    "train_tokenizer",
]
