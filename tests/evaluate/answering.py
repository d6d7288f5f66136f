"""A model for the retrieval tests in language: it answers what a function makes of the text of the prompt."""

from importlib import import_module

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hfpos.data.corpus import train_tokenizer


def tokenizer_for(text="", vocab_size=400):
    """One that has seen the wording of the tests, so that its tokens are words as well as letters."""
    modules = [import_module(f"hfpos.evaluate.{name}") for name in ("passkey", "needle")]
    texts = [
        value
        for module in modules
        for name, value in vars(module).items()
        if name.isupper() and isinstance(value, str)
    ]
    return train_tokenizer([*texts, text], vocab_size=vocab_size)


class Answering(LlamaForCausalLM):
    """Says `answer(text of the prompt)` after each prompt, which it keeps."""

    def generate(self, input_ids, generation_config, **_):
        text = self.tokenizer.decode(input_ids[0].tolist())
        self.prompts.append((input_ids[0].tolist(), text))
        said = self.tokenizer(self.answer(text), add_special_tokens=False).input_ids[
            : generation_config.max_new_tokens
        ]
        return torch.cat([input_ids, torch.tensor([said], dtype=torch.long)], dim=1)


def answering(tokenizer, answer):
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 1}
    model = Answering(LlamaConfig(vocab_size=len(tokenizer), **sizes))
    model.tokenizer, model.answer, model.prompts = tokenizer, answer, []
    return model
