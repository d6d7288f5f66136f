"""Text to token ids to samples of one length."""

from hfpos.data.collators import Collator, PoseCollator, RandomPositionCollator
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
from hfpos.data.mixture import Source
from hfpos.data.training_set import TrainingSet, training_set


__all__ = [
    "Collator",
    "Document",
    "DocumentSet",
    "PoseCollator",
    "RandomPositionCollator",
    "Source",
    "TokenizedDocument",
    "TrainingSet",
    "blocks",
    "load_documents",
    "read_documents",
    "split_documents",
    "standard_library",
    "tokenize",
    "train_tokenizer",
    "training_set",
]
