"""Callbacks of a run: its evaluations as lines to read, and new positions in each epoch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback


if TYPE_CHECKING:
    from rich.console import Console

    from hfpos.train.measure import Measure


class Report(TrainerCallback):
    """Prints each evaluation, the perplexities before patching beside it, and keeps them all.

    Args:
        console: where to.
        measure: the recipe's measurement, None where it has none.
        results: gets the list `evaluations`.
    """

    def __init__(self, console: Console, measure: Measure | None, results: dict[str, Any]) -> None:
        self.console = console
        self.measure = measure
        self.results = results
        self.results.setdefault("evaluations", [])

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Print the perplexities of the unpatched model; forget evaluations behind the checkpoint that is gone on from."""
        kept = [each for each in self.results["evaluations"] if each["step"] <= state.global_step]
        self.results["evaluations"][:] = kept
        if self.measure is not None and self.measure.baseline:
            self.show(
                "before patching", {f"perplexity_at_{length}": each for length, each in self.measure.baseline.items()}
            )

    def on_evaluate(
        self, args: Any, state: Any, control: Any, metrics: dict[str, float] | None = None, **kwargs: Any
    ) -> None:
        """Print one evaluation."""
        # Trainer has put the epoch among them
        found = {
            name.removeprefix("eval_"): value for name, value in (metrics or {}).items() if name.startswith("eval_")
        }
        self.results["evaluations"].append({"step": state.global_step, **found})
        self.show(f"step {state.global_step}", found)

    def show(self, name: str, found: dict[str, float]) -> None:
        """Print metrics: `step 20: perplexity 21.3 at 512, 18.4 at 2,048; key_value 0.50 at 2,048`."""
        tests: dict[str, list[str]] = {}
        for key, value in found.items():
            test, _, length = key.partition("_at_")
            if length:
                tests.setdefault(test, []).append(f"{value:.4g} at {int(length):,}")
        text = "; ".join(f"{test} {', '.join(values)}" for test, values in tests.items())
        if "regression" in found:
            text += f"; within the trained length {100 * found['regression']:+.1f} %"
        self.console.print(f"{name}: {text}")


class NewPositions(TrainerCallback):
    """Tells a collator that draws positions which epoch it is, so that each epoch has others.

    Args:
        collator: the one of the run.
    """

    def __init__(self, collator: Any) -> None:
        self.collator = collator

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Before the first batch of the epoch is made."""
        self.collator.set_epoch(int(state.epoch or 0))
