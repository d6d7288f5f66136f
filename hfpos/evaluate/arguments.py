"""What `perplexity` is given, checked before anything runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from numbers import Integral
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hfpos.data.documents import DocumentSet, TokenizedDocument, load_documents
from hfpos.describe import describe
from hfpos.evaluate.result import Skipped
from hfpos.patching import language_model
from hfpos.scheme import PatchError, require_choice


def check_choices(batch_size: Any, chunk: Any, bos: str, bos_token_id: int | None, aggregate: str) -> None:
    """Raise `PatchError` where one of them is not what it can be."""
    for name, value, word in (("batch_size", batch_size, "auto"), ("chunk", chunk, None)):
        if value != word and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise PatchError(f"{name}={value!r}: expected a whole number of 1 or more, or {word!r}")
    require_choice("perplexity", "bos", bos, ("every-window", "first", "none"))
    require_choice("perplexity", "aggregate", aggregate, ("tokens", "windows"))
    if bos == "none" and bos_token_id is not None:
        raise PatchError(
            f'bos_token_id={bos_token_id} with bos="none": no BOS would be used; pass bos="every-window" or bos="first"'
        )


def check_lengths(lengths: Sequence[int]) -> list[int]:
    """The lengths, shortest first, each once."""
    numbers = list(lengths)
    if not numbers or any(isinstance(each, bool) or not isinstance(each, Integral) or each < 2 for each in numbers):
        raise PatchError(
            f"lengths={lengths!r}: expected whole numbers of 2 tokens or more, e.g. lengths=[2048, 4096]."
        )
    return sorted({int(each) for each in numbers})


def strides(stride: Any, lengths: list[int]) -> dict[int, int] | None:
    """The stride of each length in tokens; None for the truncated protocol."""
    if stride is None:
        return None
    if stride == "window":
        return {length: length for length in lengths}
    if isinstance(stride, bool) or not isinstance(stride, int) or not 1 <= stride <= lengths[0]:
        raise PatchError(
            f"stride={stride!r}: expected 1 to {lengths[0]} tokens, the shortest length (a longer stride would leave tokens out), "
            '"window" for disjoint windows, or None for the first tokens of each document only'
        )
    return dict.fromkeys(lengths, stride)


def bos_id(model: nn.Module, bos: str, given: int | None) -> int | None:
    """The BOS token to put in front, None for `bos="none"`."""
    if bos == "none":
        return None
    config = language_model(model).config.get_text_config()
    found = config.bos_token_id if given is None else given
    if isinstance(found, (list, tuple)):
        found = found[0]
    if found is None:
        raise PatchError(
            f'bos="{bos}", but the config of the model has no bos_token_id; pass bos_token_id=... or bos="none"'
        )
    if not 0 <= found < config.vocab_size:
        raise PatchError(f"bos_token_id={found}: expected 0 to {config.vocab_size - 1}, the model's vocabulary")
    return found


def check_documents(
    documents: Any, tokenizer: Any, vocabulary: int, skip_bad: bool
) -> tuple[list[TokenizedDocument], list[Skipped]]:
    """Documents with ids that the model has; bad ones are skipped with `skip_bad`, else they raise."""
    skipped: list[Skipped] = []
    if isinstance(documents, Iterator):
        documents = list(documents)
    if _is_text(documents):
        documents = load_documents(documents, tokenizer, skip_bad=skip_bad)
    if isinstance(documents, DocumentSet):
        skipped += documents.skipped
        documents = documents.documents
    good = []
    for index, document in enumerate(documents):
        try:
            good.append(_checked(index, document, vocabulary))
        except PatchError as error:
            if not skip_bad:
                raise
            skipped.append(Skipped(getattr(document, "name", f"document {index}"), str(error)))
    if not good:
        raise PatchError(
            "no documents; expected at least one list of token ids"
            + (f" ({len(skipped)} were skipped, the first: {skipped[0].reason})" if skipped else "")
        )
    return good, skipped


def _is_text(documents: Any) -> bool:
    """Whether `documents` has to be read and tokenised: a path or name, a data set, its text column, a list of texts."""
    if isinstance(documents, (str, Path)) or not hasattr(documents, "__getitem__"):
        return not isinstance(documents, DocumentSet)
    rows = [] if isinstance(documents, torch.Tensor) else documents
    first = next(iter(rows), None)
    return isinstance(first, (str, dict)) or isinstance(documents, dict)


def _checked(index: int, document: Any, vocabulary: int) -> TokenizedDocument:
    if not isinstance(document, TokenizedDocument):
        if isinstance(document, (str, int)):
            raise PatchError(
                f"document {index} is a {type(document).__name__}: expected a list of token ids for each document. "
                "Tokenise text first, or pass tokenizer=, and put a single document into a list."
            )
        ids = torch.as_tensor(document).cpu()
        if ids.ndim != 1 or (ids.is_floating_point() and len(ids)):
            raise PatchError(f"document {index} is a {ids.dtype} of shape {tuple(ids.shape)}: expected 1-D integers.")
        document = TokenizedDocument(f"document {index}", ids.long(), None)
    ids = document.ids
    if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < vocabulary:
        raise PatchError(
            f"{document.name} has ids from {int(ids.min())} to {int(ids.max())}: expected 0 to {vocabulary - 1}, "
            "the model's vocabulary. Was it tokenised with another model's tokenizer?"
        )
    return document


def check_reach(
    documents: list[TokenizedDocument], lengths: list[int], bos_token: int | None, skip_bad: bool
) -> tuple[list[TokenizedDocument], list[Skipped]]:
    """Documents that reach the shortest length; `bos_token` is put in front of those that do not begin with it, unless it is None."""
    sizes = [size_with_bos(document, bos_token) for document in documents]
    if lengths[-1] > max(sizes):
        raise PatchError(
            f"no document reaches length {lengths[-1]}: the longest has {max(sizes)} tokens. Ask for {max(sizes)} at most, "
            "or give longer documents."
        )
    kept, skipped = [], []
    for document, size in zip(documents, sizes, strict=True):
        if size >= lengths[0]:
            kept.append(document)
            continue
        reason = f"it has {size} tokens, the shortest length is {lengths[0]}"
        if not skip_bad:
            raise PatchError(
                f"{document.name}: {reason}; leave it out (skip_bad=True does), or ask for a shorter length"
            )
        skipped.append(Skipped(document.name, reason))
    return kept, skipped


def size_with_bos(document: TokenizedDocument, bos_token: int | None) -> int:
    """The tokens of a document, the BOS that is put in front included."""
    return len(document.ids) + (bos_token is not None and not begins_with(document, bos_token))


def begins_with(document: TokenizedDocument, token: int | None) -> bool:
    """Whether `token` is the first of a document."""
    return document.ids[:1].tolist() == [token]


def depends_on_length(model: nn.Module, longest: int) -> bool:
    """Whether the model's positions depend on the total length. Raises `PatchError` where it has fewer positions than `longest`."""
    try:
        found = describe(model)
    except PatchError:
        _check_tables(model, longest)
        return True  # not a family hfpos knows: one run per length is right for any model
    if not found.within_table([longest]):
        raise PatchError(
            f"{found.model} has {found.table_length} learned positions, {longest} were asked for; patch it to a longer "
            f'table first: hfpos.patch(model, "learned", target_length={longest})'
        )
    return found.length_dependent


def _check_tables(model: nn.Module, longest: int) -> None:
    """A table of positions that is too short ends in an IndexError, or on a GPU in a crash of the whole process."""
    for name, module in model.named_modules():
        positions = isinstance(module, nn.Embedding) and ("position" in name.lower() or name.endswith("wpe"))
        if positions and module.num_embeddings < longest:
            raise PatchError(
                f"{type(language_model(model)).__name__} has {module.num_embeddings} learned positions ({name}), {longest} were asked "
                f"for; ask for {module.num_embeddings} at most"
            )
