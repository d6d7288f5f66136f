"""All pictures of a report, each with a caption for a reader who has not seen such a picture before."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from hfpos.report.plots import (
    joint_figure,
    pattern_figure,
    perplexity_figure,
    position_figure,
    retrieval_figure,
    wavelengths_figure,
)
from hfpos.report.words import differences


if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from hfpos.evaluate.result import PerplexityResult
    from hfpos.report.results import Comparison, Results

_PERPLEXITY = (
    "Each line is one scheme; lower is better. Look at what happens to the right of the dashed line, beyond the length that the "
    "model was trained at: a line that rises there fails at long context, one that stays flat or falls makes use of it. To its "
    "left, a line above the others shows what its scheme costs where the model needed no help. An arrow at the upper edge is a value far beyond it."
)
_POSITION = (
    "The loss of a token against how many tokens stand before it in its window, at the longest length. A model that uses its "
    "context predicts later tokens better, so a good line falls and then stays low. A line that bends upwards shows from which "
    "position on the model is lost; an arrow at the upper edge is a loss beyond it."
)
_RETRIEVAL = (
    "Each cell says how often the model gave back a fact that was hidden in its context: columns are context lengths, rows how deep "
    "in the context the fact stood. Dark is good. Look for the column from which on a panel turns pale: beyond it the scheme does "
    "not bring facts back, even if its perplexity still looks fine."
)
_WAVELENGTHS = (
    "Rotary positions turn each pair of dimensions at its own speed; a dot is how many tokens one turn takes. Pairs above the "
    "dashed line never made a full turn in training, so angles beyond the trained length are new to them. Shaded pairs are those "
    "that the scheme changes: dots above the grey line are slowed down, which keeps their angles at long context within what they "
    "were trained on."
)
_PATTERN = (
    "What the scheme alone does to attention, for a query and a key that would match perfectly. Under a rotation the match fades and "
    "swings with distance; a bias takes the more away the further back a token is, by another amount in each head. Compare the "
    "curves beyond the dashed line: one that stays within what it reached before it shows the model nothing new."
)


@dataclass(frozen=True)
class Picture:
    """A figure, the stem of its files, what it shows and how to read it."""

    stem: str
    figure: Figure
    title: str
    caption: str


def pictures(comparison: Comparison, prefix: str = "") -> list[Picture]:
    """All pictures that the comparison has the numbers for; `prefix` is put before their stems."""
    tasks = dict.fromkeys(each.task for run in comparison.runs for each in run.retrieval)
    found = [
        ("perplexity", perplexity_figure(comparison), "Perplexity against context length", _PERPLEXITY),
        ("positions", position_figure(comparison), "Loss by position in the window", _POSITION),
        *(
            (f"retrieval-{_file_name(task)}", retrieval_figure(comparison, task), f"Retrieval: {task}", _RETRIEVAL)
            for task in tasks
        ),
        ("wavelengths", wavelengths_figure(comparison), "Rotary wavelengths", _WAVELENGTHS),
        ("attention", pattern_figure(comparison), "Attention by distance", _PATTERN),
    ]
    return [Picture(prefix + stem, figure, title, text) for stem, figure, title, text in found if figure]


def joint_scores(results: Results) -> dict[str, PerplexityResult]:
    """The perplexity of all runs by `comparison: label`, where all comparisons were measured alike; else none."""
    if len(results.comparisons) < 2 or differences(results.comparisons):
        return {}
    names = [comparison.name for comparison in results.comparisons]
    names = [name if names.count(name) == 1 else f"{number} {name}" for number, name in enumerate(names, 1)]
    return {
        f"{name}: {label}": result
        for name, comparison in zip(names, results.comparisons, strict=True)
        for label, result in comparison.scores.items()
    }


def joint_picture(results: Results) -> Picture | None:
    """Perplexity of all runs of all comparisons; None where they cannot be compared."""
    scores = joint_scores(results)
    if not scores:
        return None
    figure = joint_figure(scores, joint_trained_length(results), title="Perplexity of all runs against context length")
    return Picture("joint-perplexity", figure, "All runs together", _PERPLEXITY)


def joint_trained_length(results: Results) -> int | None:
    """The trained length that all comparisons share, if they do."""
    found = {comparison.model.trained_length for comparison in results.comparisons}
    return found.pop() if len(found) == 1 else None


def all_pictures(results: Results) -> list[list[Picture]]:
    """The joint picture if there is one, then those of each comparison: one list more than there are comparisons."""
    joint = joint_picture(results)
    several = len(results.comparisons) > 1
    return [
        [joint] if joint else [],
        *(pictures(each, f"{number}-" if several else "") for number, each in enumerate(results.comparisons, 1)),
    ]


def _file_name(text: str) -> str:
    return "".join(letter if letter.isascii() and letter.isalnum() else "-" for letter in text)
