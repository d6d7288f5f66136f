"""One HTML page for people: everything in one file, no script, nothing fetched."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from hfpos.report.grids import grids, perplexity_grid
from hfpos.report.joint import joint_scores, joint_trained_length
from hfpos.report.numbers import plain, share
from hfpos.report.pictures import Picture, all_pictures
from hfpos.report.plots import require_matplotlib, svg
from hfpos.report.summary import summary
from hfpos.report.words import command, differences, in_one_line, listed, protocol_in_words, provenance_rows
from hfpos.scheme import PatchError
from hfpos.schemes import REGISTRY


if TYPE_CHECKING:
    from collections.abc import Sequence

    from hfpos.report.results import Comparison, Results, Run


def require_report() -> None:
    """Raise `PatchError` if matplotlib or jinja2 is missing, so that a long run can fail at its start."""
    require_matplotlib()
    if find_spec("jinja2") is None:
        raise PatchError("the report needs jinja2, which is not installed; pip install 'hfpos[plot]'")


def page(results: Results, drawn: Sequence[Sequence[Picture]] | None = None) -> str:
    """The report as one self-contained HTML page.

    Args:
        results: at least one comparison.
        drawn: what `all_pictures(results)` returned, to draw them only once.

    Raises:
        PatchError: no comparison, or matplotlib or jinja2 is missing.
    """
    require_report()
    from jinja2 import Environment, PackageLoader, StrictUndefined

    if not results.comparisons:
        raise PatchError("these results hold no comparison, so there is nothing to report; expected at least one")
    joint, *each = all_pictures(results) if drawn is None else drawn
    environment = Environment(
        loader=PackageLoader("hfpos", "report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["nobreak"] = _nobreak
    several = len(results.comparisons) > 1
    return environment.get_template("page.html.j2").render(
        title=_title(results.comparisons),
        several=several,
        differences=listed(differences(results.comparisons)) if several else "",
        joint=_joint(results, joint),
        sections=[
            _section(number, comparison, pictures)
            for number, (comparison, pictures) in enumerate(zip(results.comparisons, each, strict=True), 1)
        ],
    )


def _nobreak(text: str) -> str:
    """Keep a number and its sign on one line."""
    return text.replace(" %", "\u00a0%").replace("± ", "±\u00a0")


def _title(comparisons: Sequence[Comparison]) -> str:
    return f"Long context: {listed(list(dict.fromkeys(comparison.name for comparison in comparisons)))}"


def _joint(results: Results, pictures: Sequence[Picture]) -> dict[str, Any] | None:
    scores = joint_scores(results)
    if not scores:
        return None
    return {
        "grids": [perplexity_grid(scores, joint_trained_length(results))],
        "pictures": [_picture(picture, "joint") for picture in pictures],
    }


def _section(number: int, comparison: Comparison, pictures: Sequence[Picture]) -> dict[str, Any]:
    model, protocol = comparison.model, comparison.protocol
    return {
        "id": f"comparison-{number}",
        "name": comparison.name,
        "line": in_one_line(comparison),
        "summary": summary(comparison),
        "grids": grids(comparison),
        "pictures": [_picture(picture, f"c{number}") for picture in pictures],
        "schemes": [_scheme(run) for run in comparison.runs],
        "untrained": [run.label for run in comparison.runs if run.needs_training],
        "protocol": protocol_in_words(protocol),
        "model": [
            ("path", model.path),
            ("class", f"{model.class_name} (family {model.family}, positions as loaded: {model.native_scheme})"),
            ("parameters", f"{model.parameters:,}, {model.dtype} on {model.device}"),
            ("trained length", f"{model.trained_length:,} tokens" if model.trained_length else "not stated"),
            ("fingerprint", model.fingerprint),
        ],
        "settings": [
            ("context lengths", ", ".join(f"{length:,}" for length in protocol.lengths) or "none"),
            ("effective context", f"within {share(protocol.tolerance)} of the best at a shorter length"),
            ("seed", str(protocol.seed)),
        ],
        "data": [
            ("source", comparison.data.source),
            ("size", f"{comparison.data.documents:,} documents, {comparison.data.tokens:,} tokens"),
            ("sha256", comparison.data.sha256),
            *((key.replace("_", " "), plain(value)) for key, value in comparison.data.preparation.items()),
        ],
        "refused": comparison.refused,
        "skipped": comparison.skipped,
        "provenance": provenance_rows(comparison),
        "command": command(comparison),
    }


def _picture(picture: Picture, section: str) -> dict[str, str]:
    return {
        "title": picture.title,
        "caption": picture.caption,
        "svg": svg(picture.figure, f"{section}-{picture.stem}", picture.title),
    }


def _scheme(run: Run) -> dict[str, str]:
    """What a run is, for a reader who does not know the scheme."""
    given = ", ".join(f"{key}={plain(value)}" for key, value in run.parameters.items() if value is not None)
    known = REGISTRY.as_dict().get(run.scheme)
    does = "the model as it was loaded, nothing changed" if run.scheme == "none" else known.summary if known else ""
    return {"label": run.label, "does": does, "paper": known.paper if known else "", "parameters": given}
