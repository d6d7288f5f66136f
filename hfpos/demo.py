"""What `hfpos demo` runs: from no model at all to perplexity against context length, scheme by scheme, on real text.

A small LLaMA is trained at a short context (or the user's own model is loaded), measured up to `factor` times that
length under each scheme without any training, then fine-tuned a little under the best one and measured again.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from hfpos.report.plots import require_matplotlib
from hfpos.scheme import PatchError


UNPATCHED = "none"
SCALINGS = ("linear", "ntk", "yarn")
ALIBI = "alibi"


@dataclass(frozen=True)
class BaseRecipe:
    """The small LLaMA that is trained when no model is given. Lengths and batches in tokens."""

    vocab_size: int = 1024
    hidden_size: int = 128
    layers: int = 3
    head_dim: int = 32
    context: int = 128
    steps: int = 1800
    learning_rate: float = 3e-3


@dataclass(frozen=True)
class DemoOptions:
    """What to run.

    Args:
        model: folder of the user's own model and tokenizer; None trains the `base` recipe.
        text: file or folder of the user's own text (`hfpos.data.read_documents`); None takes the standard library's.
        out: folder for `results.json`, the plot, and the trained models, which a second run uses again.
        factor: how many times the trained length to go to, > 1.
        finetune: whether to fine-tune under the best scheme.
        finetune_steps: optimizer steps of that, `batch_tokens` each.
        batch_tokens: tokens in one optimizer step, rounded down to whole samples, but at least one.
        eval_tokens: held-out tokens to measure on.
        seed: of the file split, the initial weights and the order of the data.
        threads: CPU threads; None leaves PyTorch's choice.
        base: the model to train when `model` is None.
    """

    model: Path | None = None
    text: Path | None = None
    out: Path = Path("hfpos-demo")
    factor: float = 4.0
    finetune: bool = True
    finetune_steps: int = 150
    batch_tokens: int = 2048
    eval_tokens: int = 65_536
    seed: int = 0
    threads: int | None = None
    base: BaseRecipe = field(default_factory=BaseRecipe)


def run(options: DemoOptions) -> dict[str, Any]:
    """Run the demo, print as it goes, write `results.json` and `perplexity.png` to `options.out`, return the results.

    Raises:
        PatchError: no usable text or model, no scaling that fits the model, or no matplotlib.
    """
    require_matplotlib()
    if not options.factor > 1:
        raise PatchError(f"factor={options.factor}; expected a number above 1: how many times the trained length")
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    demo = _Demo(options, Console())
    return demo.run()


class _Demo:
    """One run: the options, where to print, and what has been found so far."""

    def __init__(self, options: DemoOptions, console: Console) -> None:
        self.options = options
        self.console = console
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.seconds: dict[str, float] = {}
