"""A small language that is learned in seconds and needs context: words come back, and the model has to find where they stood."""

import random

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hfpos.demo.loop import train


TRAINED, TARGET = 32, 128
WORDS = 24


def language(rows, length, seed):
    """Token ids: strings of 2 to 6 tokens, each said two or three times in a row."""
    draw = random.Random(seed)
    found = []
    for _ in range(rows):
        row = []
        while len(row) < length:
            row += [draw.randrange(WORDS) for _ in range(draw.randint(2, 6))] * draw.randint(2, 3)
        found.append(row[:length])
    return found


def trained_model():
    """A LLaMA of two layers and eight frequencies, trained at 32 tokens, in eval mode."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=WORDS,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=TRAINED,
        tie_word_embeddings=True,
        initializer_range=0.12,
        pad_token_id=None,
    )
    model = LlamaForCausalLM(config)
    train(model, language(2000, TRAINED, seed=0), steps=150, batch_size=32, learning_rate=1e-2)
    return model
