"""The folder that a report is: numbers for programs, tables and pictures for papers, a page for people."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hfpos.report.page import page, require_report
from hfpos.report.pictures import all_pictures
from hfpos.report.plots import save_figure
from hfpos.report.results import save
from hfpos.report.tables import csv, markdown, retrieval_csv


if TYPE_CHECKING:
    from pathlib import Path

    from hfpos.report.results import Results


def write_report(results: Results, folder: Path) -> dict[str, Path]:
    """Write the whole report into `folder`, which is made if need be.

    Returns:
        The files by kind: `json`, `csv`, `markdown`, `html`, `retrieval_csv` if retrieval was measured, and each picture under its
        file name, e.g. `perplexity.svg`.

    Raises:
        PatchError: no comparison in `results`, or matplotlib or jinja2 is missing.
    """
    require_report()
    drawn = all_pictures(results)
    texts = {"csv": ("results.csv", csv(results)), "markdown": ("results.md", markdown(results))}
    texts["html"] = ("index.html", page(results, drawn))
    if found := retrieval_csv(results):
        texts["retrieval_csv"] = ("retrieval.csv", found)

    folder.mkdir(parents=True, exist_ok=True)
    paths = {"json": folder / "results.json"}
    save(results, paths["json"])
    for kind, (name, text) in texts.items():
        paths[kind] = folder / name
        paths[kind].write_text(text, encoding="utf-8")
    for picture in (picture for group in drawn for picture in group):
        paths |= {path.name: path for path in save_figure(picture.figure, folder, picture.stem)}
    return paths
