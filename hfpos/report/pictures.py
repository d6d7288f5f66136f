"""All pictures of a report, each with a caption for a reader who has not seen such a picture before."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from hfpos.report.joint import joint_profiles, joint_scores, joint_trained_length
from hfpos.report.plots import (
    heads_figure,
    joint_figure,
    pattern_figure,
    perplexity_figure,
    position_figure,
    profile_figure,
    retrieval_figure,
    wavelengths_figure,
)


if TYPE_CHECKING:
    from collections.abc import Mapping

    from matplotlib.figure import Figure

    from hfpos.evaluate.attention_profile import AttentionProfile
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
_PROFILE = (
    "Measured on the text, with all that the model has learned: the mean weight that a token gives to one token at a distance, over all "
    "heads. A line that goes on smoothly beyond the dashed line looks at far tokens as it learned to; one that bends or jumps there does not."
)
_HEADS = (
    "The same for each head by itself: a row is a head, the first layer at the top and a line between layers; columns are distances, and "
    "bright is much weight. Rows alike mean that the scheme leaves little to choose; edges at the dashed line, that attention breaks there."
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
        *_looks(comparison.profiles, comparison.model.trained_length),
    ]
    return [Picture(prefix + stem, figure, title, text) for stem, figure, title, text in found if figure]


def joint_pictures(results: Results) -> list[Picture]:
    """Perplexity of all runs of all comparisons, and where their attention looks; none where they cannot be compared."""
    scores, trained = joint_scores(results), joint_trained_length(results)
    if not scores:
        return []
    perplexity = joint_figure(scores, trained, title="Perplexity of all runs against context length")
    found = [("perplexity", perplexity, "All runs together", _PERPLEXITY), *_looks(joint_profiles(results), trained)]
    return [Picture(f"joint-{stem}", figure, title, text) for stem, figure, title, text in found if figure]


def _looks(profiles: Mapping[str, AttentionProfile], trained: int | None) -> list[tuple[str, Figure | None, str, str]]:
    return [
        ("looks", profile_figure(profiles, trained), "Where attention looks", _PROFILE),
        ("heads", heads_figure(profiles, trained), "Where each head looks", _HEADS),
    ]


def all_pictures(results: Results) -> list[list[Picture]]:
    """The joint pictures, then those of each comparison: one list more than there are comparisons."""
    several = len(results.comparisons) > 1
    return [
        joint_pictures(results),
        *(pictures(each, f"{number}-" if several else "") for number, each in enumerate(results.comparisons, 1)),
    ]


def _file_name(text: str) -> str:
    return "".join(letter if letter.isascii() and letter.isalnum() else "-" for letter in text)
