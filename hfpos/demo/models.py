"""The demo's text and models: read, trained and fine-tuned once, then found again by a hash of all that went in."""

import hashlib
import json
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from hfpos.data import Document, blocks, read_documents, split_documents, standard_library, tokenize, train_tokenizer
from hfpos.demo.loop import train
from hfpos.demo.measure import UNPATCHED
from hfpos.demo.options import DemoOptions
from hfpos.evaluate.key_value import copying
from hfpos.evaluate.load import load_model, require_tokenizer
from hfpos.evaluate.processes import device
from hfpos.train.folder import RunFolder
from hfpos.train.recipe import Recipe
from hfpos.train.run import run as train_by_recipe
from hfpos.version import __version__


TRAIN, HELD_OUT = "train.jsonl", "held-out.jsonl"


@dataclass(frozen=True)
class Corpus:
    """What to train on and, from other files, what to measure on; `digest` is a hash of it all."""

    train: list[Document]
    held_out: list[Document]
    digest: str


def read_corpus(options: DemoOptions) -> Corpus:
    """The user's text or the standard library's, split by file."""
    documents = read_documents(options.text) if options.text else standard_library()
    train_documents, held_out = split_documents(documents, seed=options.seed)
    digest = hashlib.sha256()
    for document in documents:
        digest.update(f"{document.name}\0{document.text}\0".encode(errors="surrogatepass"))
    return Corpus(train_documents, held_out, digest.hexdigest())


def write_corpus(corpus: Corpus, folder: Path) -> None:
    """Leave both parts of the text as JSON lines, for recipes and comparisons."""
    for name, documents in ((TRAIN, corpus.train), (HELD_OUT, corpus.held_out)):
        rows = "".join(json.dumps({"name": each.name, "text": each.text}) + "\n" for each in documents)
        path = folder / name
        # a file that stays as it is is found again among the tokenised ones
        if not path.exists() or path.read_text(encoding="utf-8") != rows:
            path.write_text(rows, encoding="utf-8")


def base_model(options: DemoOptions, corpus: Corpus) -> Path:
    """The folder of the small LLaMA, trained now unless an earlier run has done the same."""

    def build(folder: Path) -> None:
        recipe = options.base
        tokenizer = train_tokenizer((document.text for document in corpus.train), recipe.vocab_size)
        torch.manual_seed(options.seed)
        config = LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=recipe.hidden_size,
            intermediate_size=recipe.hidden_size * 5 // 2,
            num_hidden_layers=recipe.layers,
            num_attention_heads=recipe.hidden_size // recipe.head_dim,
            head_dim=recipe.head_dim,
            max_position_embeddings=recipe.context,
            tie_word_embeddings=True,
            initializer_range=0.7 * recipe.hidden_size**-0.5,  # the usual 0.02 is for widths around a thousand
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
        tokenizer.model_max_length = recipe.context
        with device():
            model = LlamaForCausalLM(config)
        train(
            model,
            blocks(tokenize(tokenizer, corpus.train), recipe.context),
            steps=recipe.steps,
            batch_size=max(1, options.batch_tokens // recipe.context),
            learning_rate=recipe.learning_rate,
            seed=options.seed,
            label=f"training {model.num_parameters():,} parameters at {recipe.context} tokens",
        )
        _save(model, tokenizer, folder)

    return _built_once(
        options.out / f"base-{_key(options.base, options.batch_tokens, options.seed, corpus.digest)}", build
    )


def recall_model(options: DemoOptions, corpus: Corpus, base: Path) -> Path:
    """The folder of the small LLaMA after it has also learned to copy, without which it recalls nothing at any length."""

    def build(folder: Path) -> None:
        model, tokenizer = load(base)
        length = options.base.context
        text = blocks(tokenize(tokenizer, corpus.train), length)
        rows = options.recall_steps * max(1, options.batch_tokens // length) // 2
        words = range(len(tokenizer.all_special_ids), len(tokenizer))
        train(
            model,
            random.Random(options.seed).sample(text, min(rows, len(text)))
            + copying(rows, length, words, seed=options.seed),
            steps=options.recall_steps,
            batch_size=max(1, options.batch_tokens // length),
            learning_rate=options.base.learning_rate * 2 / 3,
            seed=options.seed,
            label=f"learning to copy, at {length} tokens",
        )
        _save(model, tokenizer, folder)

    settings = (options.base, options.recall_steps, options.batch_tokens, options.seed, corpus.digest)
    return _built_once(options.out / f"recall-{_key(*settings)}", build)


def finetuned_model(options: DemoOptions, corpus: Corpus, base: Path, scheme: str, length: int) -> Path:
    """The folder of the base model after fine-tuning under `scheme` (or "none"), done now by a recipe unless it was before."""
    files = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in sorted(base.iterdir())]
    settings = (scheme, options.factor, options.finetune_steps, options.batch_tokens, options.seed, __version__)
    run = RunFolder(options.out / f"{scheme}-{_key(settings, files, corpus.digest)}")
    if not run.model.exists():
        recipe = Recipe.parse(
            {
                "model": {"path": str(base), "dtype": "float32"},
                "scheme": scheme if scheme == UNPATCHED else {"name": scheme, "factor": options.factor},
                "data": {
                    "sources": str(options.out / TRAIN),
                    "length": length,
                    "packing": "blocks",
                    "seed": options.seed,
                },
                "training": {
                    "output_dir": str(run.path),
                    "max_steps": options.finetune_steps,
                    "per_device_train_batch_size": max(1, options.batch_tokens // length),
                    # Steps must shrink with width: this is 8e-4 for the small model and 2e-5 at width 4,096.
                    "learning_rate": 0.1 / _width(base),
                    "warmup_steps": max(1, options.finetune_steps // 30),
                    "adam_beta2": 0.95,
                    "weight_decay": 0.1,
                    "logging_steps": 50,
                    "save_strategy": "no",
                    "report_to": "none",
                },
            }
        )
        train_by_recipe(recipe)
    return run.model


def _width(folder: Path) -> int:
    return AutoConfig.from_pretrained(folder).get_text_config().hidden_size


def _built_once(folder: Path, build: Callable[[Path], None]) -> Path:
    """Build `folder` unless it is there; a build that breaks off leaves none behind."""
    if not folder.exists():
        partial = folder.with_name(f"{folder.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        build(partial)
        partial.rename(folder)
    return folder


def _key(*settings: Any) -> str:
    return hashlib.sha256(repr(settings).encode()).hexdigest()[:12]


def load(folder: Path) -> tuple[Any, PreTrainedTokenizerBase]:
    """The model of a folder, in float32 and ready to be measured, and its tokenizer."""
    model, tokenizer = load_model(str(folder), "float32")
    require_tokenizer(tokenizer, folder)
    return model, tokenizer


def _save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
