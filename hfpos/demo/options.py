"""The settings of the demo."""

import math
from dataclasses import dataclass, field
from pathlib import Path

from hfpos.scheme import PatchError


@dataclass(frozen=True)
class BaseRecipe:
    """The small LLaMA that is trained when no model is given; `context` in tokens."""

    vocab_size: int = 1024
    hidden_size: int = 128
    layers: int = 3
    head_dim: int = 32
    context: int = 128
    steps: int = 1500
    learning_rate: float = 3e-3


@dataclass(frozen=True)
class DemoOptions:
    """What to run.

    Args:
        model: folder of the user's own model and tokenizer; None trains the `base` recipe.
        text: file or folder of the user's own text (`hfpos.data.read_documents`); None takes the standard library's.
        out: folder for `results.json`, the plot, and the trained models, which a second run uses again.
        factor: how many times the trained length to go to, > 1.
        finetune: whether to fine-tune, under the best scheme and for comparison without one.
        finetune_steps: optimizer steps of each.
        recall_steps: optimizer steps in which the small LLaMA learns to copy, so that its recall can be measured.
        batch_tokens: tokens in one optimizer step, rounded down to whole samples, but at least one.
        eval_tokens: held-out tokens to measure on, rounded down likewise.
        seed: of the split into files, the initial weights and the order of the data.
        threads: CPU threads; None leaves PyTorch's choice.
        base: what to train when `model` is None.

    Raises:
        PatchError: a number out of its range.
    """

    model: Path | None = None
    text: Path | None = None
    out: Path = Path("hfpos-demo")
    factor: float = 4.0
    finetune: bool = True
    finetune_steps: int = 150
    recall_steps: int = 300
    batch_tokens: int = 2048
    eval_tokens: int = 65_536
    seed: int = 0
    threads: int | None = None
    base: BaseRecipe = field(default_factory=BaseRecipe)

    def __post_init__(self) -> None:
        if not (math.isfinite(self.factor) and self.factor > 1):
            raise PatchError(f"factor={self.factor}; expected a number above 1: how many times the trained length")
        for name in ("finetune_steps", "recall_steps", "batch_tokens", "eval_tokens", "threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise PatchError(f"{name}={value}; expected 1 or more")
