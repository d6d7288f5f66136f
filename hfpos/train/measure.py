"""What a run measures before, during and after training: perplexity by context length, retrieval, the cost at short context."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from hfpos.describe import describe
from hfpos.evaluate import key_value, passkey, perplexity
from hfpos.evaluate.load import load_text
from hfpos.scheme import PatchError
from hfpos.train.arguments import SCORE


if TYPE_CHECKING:
    from torch import nn

    from hfpos.train.sections import Evaluation

Perplexities = dict[int, float]


class Measure:
    """The measurement that a recipe asks for.

    Args:
        section: the recipe's.
        tokenizer: the model's.
        model: what the recipe calls the model, for errors.

    Attributes:
        baseline: perplexities of the model before it was patched; empty where they were not measured.
        trained_length: tokens of the pretraining, None where the model does not say.
    """

    def __init__(self, section: Evaluation, tokenizer: Any, model: str) -> None:
        self.section = section
        self.tokenizer = tokenizer
        self.baseline: Perplexities = {}
        self.trained_length: int | None = None
        self.documents = load_text(
            section.data,
            tokenizer,
            model,
            split=section.split,
            text_column=section.text_column,
            min_tokens=section.min_tokens,
            block_tokens=max(section.lengths) - (section.bos != "none") if section.blocks else None,
            max_documents=section.max_documents,
        )

    def perplexities(self, model: nn.Module, lengths: Sequence[int] | None = None) -> Perplexities:
        """Perplexity at each length; at all of the section's unless `lengths` are given."""
        wanted = sorted(set(lengths or self.section.lengths))
        result = perplexity(model, self.documents, wanted, self.section.stride, bos=self.section.bos)
        return {length: score.perplexity for length, score in result.by_length.items()}

    def measure_baseline(self, model: nn.Module, known: Perplexities) -> None:
        """Of the unpatched model, unless they are `known`; a table of positions can be measured no further than it reaches."""
        found = describe(model)
        self.trained_length = found.trained_length
        lengths = found.within_table(self.section.lengths)
        self.baseline = known or (self.perplexities(model, lengths) if lengths else {})
        self._require_short()

    def metrics(self, model: nn.Module) -> dict[str, float]:
        """Everything at once, by name: `perplexity_at_4096`, `passkey_at_4096`, `regression`, `score`."""
        found = self.perplexities(model)
        metrics = {f"perplexity_at_{length}": value for length, value in found.items()}
        lengths, trials = self.section.lengths, self.section.trials
        for test in self.section.retrieval:
            if test == "passkey":
                result = passkey(model, self.tokenizer, lengths, trials=trials)
            else:
                result = key_value(model, lengths, trials=trials)
            metrics |= {f"{test}_at_{length}": result.accuracy_at(length) for length in lengths}
        regression = self.regression(found)
        if regression is not None:
            metrics["regression"] = regression
        metrics[SCORE] = found[max(found)] if self.passes(found) else math.inf
        return metrics

    def regression(self, found: Perplexities) -> float | None:
        """By what share the perplexity within the trained length is worse than the unpatched model's, at the worst length."""
        short = [length for length in self._short() if length in found]
        return max((found[length] / self.baseline[length] - 1 for length in short), default=None)

    def passes(self, found: Perplexities) -> bool:
        """Whether the short-context gate, if there is one, lets these perplexities pass."""
        regression, allowed = self.regression(found), self.section.max_regression
        return allowed is None or (regression is not None and regression <= allowed)

    def _short(self) -> list[int]:
        return [
            length for length in self.baseline if self.trained_length is not None and length <= self.trained_length
        ]

    def _require_short(self) -> None:
        if self.section.max_regression is not None and not self._short():
            raise PatchError(
                f"evaluation.max_regression compares lengths within the trained one ({self.trained_length}), and evaluation.lengths "
                f"{list(self.section.lengths)} has none; add one"
            )
