"""Pictures of results. They need the `plot` extra (matplotlib); nothing else in hfpos does.

Every picture is a function that returns a matplotlib `Figure`, or None where there is nothing to draw.
"""

from hfpos.report.plots.pattern import pattern_figure
from hfpos.report.plots.perplexity import joint_figure, perplexity_figure, plot_perplexity
from hfpos.report.plots.position import position_figure
from hfpos.report.plots.profile import heads_figure, profile_figure
from hfpos.report.plots.retrieval import retrieval_figure
from hfpos.report.plots.style import require_matplotlib, save_figure, svg
from hfpos.report.plots.wavelengths import plot_wavelengths, wavelength_figure, wavelengths_figure


__all__ = [
    "heads_figure",
    "joint_figure",
    "pattern_figure",
    "perplexity_figure",
    "plot_perplexity",
    "plot_wavelengths",
    "position_figure",
    "profile_figure",
    "require_matplotlib",
    "retrieval_figure",
    "save_figure",
    "svg",
    "wavelength_figure",
    "wavelengths_figure",
]
