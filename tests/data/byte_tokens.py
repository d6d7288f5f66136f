"""A tokenizer whose ids can be told by hand, and how often it was asked."""

import pytest

from hfpos.data import train_tokenizer


BYTES = train_tokenizer([], vocab_size=258)  # one token a byte
END = BYTES.eos_token_id


def ids(text):
    """The token ids of a text."""
    return BYTES(text, add_special_tokens=False).input_ids


@pytest.fixture
def calls(monkeypatch):
    """The texts that tokenizers were asked for in batches, as `ids` does not."""
    asked = []
    original = type(BYTES)._encode_plus

    def counting(self, text, *args, **kwargs):
        asked.extend(text if isinstance(text, list) else [])
        return original(self, text, *args, **kwargs)

    monkeypatch.setattr(type(BYTES), "_encode_plus", counting)
    return asked
