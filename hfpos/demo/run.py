"""The demo from start to end.

A small LLaMA is trained at a short context (or the user's own model is loaded), measured up to `factor` times that
length under each scheme without any training, then fine-tuned a little under the best one and measured again.
"""

import contextlib
import dataclasses
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from hfpos.data import tokenize
from hfpos.demo.findings import finetuned_findings, recall_table, table, tuned, untrained_findings
from hfpos.demo.measure import (
    SCALINGS,
    UNPATCHED,
    best_scaling,
    context_lengths,
    curve,
    held_out_pieces,
    measure,
    measure_recall,
    measure_schemes,
)
from hfpos.demo.models import (
    HELD_OUT,
    Corpus,
    base_model,
    finetuned_model,
    load,
    read_corpus,
    recall_model,
    write_corpus,
)
from hfpos.demo.options import DemoOptions
from hfpos.describe import describe
from hfpos.evaluate import RetrievalResult
from hfpos.evaluate.load import without_loading_bars
from hfpos.report.plots import plot_perplexity, require_matplotlib
from hfpos.report.provenance import provenance
from hfpos.scheme import PatchError


def run(options: DemoOptions) -> dict[str, Any]:
    """Run the demo, print as it goes, write `results.json` and `perplexity.png` to `options.out`, return the results.

    Raises:
        PatchError: no usable text or model, no scaling that fits the model, or no matplotlib.
    """
    require_matplotlib()
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    options.out.mkdir(parents=True, exist_ok=True)
    console = Console()
    seconds: dict[str, float] = {}
    with _timed(seconds, "total"), without_loading_bars():
        corpus = read_corpus(options)
        console.print(f"Text: {len(corpus.train)} documents to train on, {len(corpus.held_out)} others to measure on.")
        write_corpus(corpus, options.out)
        with _timed(seconds, "base model"):
            folder = options.model or _named(options, base_model(options, corpus))
        model, tokenizer = load(folder)
        trained = describe(model).trained_length
        if trained is None:
            raise PatchError(f"the config in {folder} does not say at what context length the model was trained")
        lengths = context_lengths(trained, options.factor)
        pieces = held_out_pieces(options, tokenize(tokenizer, corpus.held_out), lengths[-1])
        console.print(f"Model: {folder}, {model.num_parameters():,} parameters, trained at {trained} tokens.")

        with _timed(seconds, "measure"):
            scores, refused = measure_schemes(model, pieces, lengths, options.factor)
        best = best_scaling(scores, refused)
        console.print("\nPerplexity by context length, no scheme trained:")
        console.print(table(scores, trained))
        _print_lines(console, untrained_findings(scores, refused, trained, best))

        with _timed(seconds, "recall"):
            recall = _recall(
                console, options, corpus, folder, [name for name in (UNPATCHED, *SCALINGS) if name in scores]
            )

        tuned_folders = {}
        if options.finetune:
            with _timed(seconds, "fine-tune"):
                for name in (UNPATCHED, best):  # without a scheme too: what is longer training alone worth?
                    tuned_folders[name] = finetuned_model(options, corpus, folder, name, lengths[-1])
                    scores[tuned(name)] = measure(load(tuned_folders[name])[0], pieces, lengths)
            shown = (UNPATCHED, best, tuned(UNPATCHED), tuned(best))
            console.print(f"\nPerplexity after fine-tuning at {lengths[-1]} tokens:")
            console.print(table({name: scores[name] for name in shown}, trained))
            _print_lines(console, finetuned_findings(scores, trained, best))

    results = {
        **provenance(),
        "options": dataclasses.asdict(options),
        "model": {"folder": folder, "parameters": model.num_parameters(), "trained_length": trained},
        "text": {
            "sha256": corpus.digest,
            "train_documents": len(corpus.train),
            "held_out": [document.name for document in corpus.held_out],
        },
        "scores": {name: dataclasses.asdict(score)["by_length"] for name, score in scores.items()},
        "recall": {name: dataclasses.asdict(result) for name, result in recall.items()},
        "refused": refused,
        "best": best,
        "finetuned": tuned_folders,
        "seconds": seconds,
    }
    plot_perplexity(
        {name: curve(result) for name, result in scores.items()},
        trained,
        options.out / "perplexity.png",
        title=f"One model, trained at {trained} tokens, used up to {lengths[-1]}",
        emphasised=tuned(best),
    )
    text = json.dumps(results, indent=2, default=str)
    (options.out / "results.json").write_text(text + "\n", encoding="utf-8")
    console.print(f"\n{seconds['total']:.0f} s in all. What to read next:")
    _print_lines(console, _next_steps(options, folder, tuned_folders.get(best, folder), lengths))
    return json.loads(text)


def _named(options: DemoOptions, folder: Path) -> Path:
    """The folder under a name that does not change, `base`, where `recipes/tiny/demo.yaml` looks for it."""
    link = options.out / "base"
    link.unlink(missing_ok=True)
    link.symlink_to(folder.name)
    return link


def _recall(
    console: Console, options: DemoOptions, corpus: Corpus, folder: Path, names: list[str]
) -> dict[str, RetrievalResult]:
    """Measure recall under each scheme and print it. The demo's own model has to learn to copy first, or it recalls nothing."""
    if not (options.model or options.finetune):
        return {}
    model, _ = load(options.model or recall_model(options, corpus, folder))
    trained = describe(model).trained_length or 0
    recall = measure_recall(options, model, context_lengths(trained, options.factor), names)
    if recall:
        taught = "" if options.model else ", after the model has learned to copy"
        chance = next(iter(recall.values())).chance
        console.print(f"\nKey-value pairs recalled{taught} (guessing: {100 * chance:.0f} %):", highlight=False)
        console.print(recall_table(recall, trained))
    return recall


def _next_steps(options: DemoOptions, base: Path, tuned_folder: Path, lengths: list[int]) -> list[str]:
    out = options.out
    return [
        f"{out / 'perplexity.png'}: the plot; {out / 'results.json'}: every number, with versions, hardware and settings",
        f"`hfpos compare {base} --schemes none,linear,ntk,yarn,self_extend --factor {options.factor:g} --lengths "
        f"{','.join(map(str, lengths))} --data {out / HELD_OUT} --blocks`: the schemes side by side as a page to read, with standard "
        "errors, the loss by position, and what each scheme costs",
        "`hfpos train recipes/tiny/demo.yaml`: fine-tuning by a recipe of your own",
        f"`hfpos describe {tuned_folder}`: what that model's positions are now",
        "`hfpos demo --model FOLDER --text FILE`: the same with a model and a text of your own",
        "`hfpos schemes`, and the catalogue in README.md: every scheme, its paper, and where it works",
    ]


def _print_lines(console: Console, lines: Sequence[str]) -> None:
    for line in lines:
        console.print(f"- {line}", markup=False, highlight=False)


@contextlib.contextmanager
def _timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[name] = round(time.perf_counter() - start, 1)
