"""The page and the folder it stands in."""

import dataclasses
import re
from collections import Counter
from html.parser import HTMLParser

import pytest

from hfpos import PatchError
from hfpos.report import page as page_module
from hfpos.report.page import page, require_report
from hfpos.report.results import Results, load
from hfpos.report.write import write_report
from tests.report.examples import NONE, YARN, comparison, full, retrieval, run


VOID = {"meta", "br", "hr", "img", "input", "link", "path", "use", "rect", "circle"}
EVIL = "<script>alert('x')</script>&\"|"


class Page(HTMLParser):
    """Checks that tags nest, and collects ids, references, tags and text."""

    def __init__(self, text):
        super().__init__()
        self.open, self.ids, self.references, self.tags, self.text = [], [], [], Counter(), ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags[tag] += 1
        for name, value in attributes:
            if name == "id":
                self.ids.append(value)
            if name in {"href", "xlink:href"}:
                self.references.append(value)
            self.references += re.findall(r"url\(([^)]*)\)", value or "")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    other = comparison(
        run("none", NONE, retrieval=(retrieval(1, 2, 3, 4, task="key/value"),)), run("yarn", YARN), path="models/other"
    )
    results = Results((full(), other))
    path = tmp_path_factory.mktemp("report") / "new"
    return results, path, write_report(results, path)


@pytest.fixture(scope="module")
def html(folder):
    return folder[2]["html"].read_text(encoding="utf-8")


def test_everything_is_written(folder):
    results, path, paths = folder
    assert sorted(paths.values()) == sorted(path.iterdir())
    assert load(paths["json"]) == results
    assert {"json", "csv", "retrieval_csv", "markdown", "html"} <= paths.keys()
    assert {
        "joint-perplexity.svg",
        "1-perplexity.png",
        "1-wavelengths.svg",
        "1-attention.png",
        "2-retrieval-key-value.svg",
    } <= paths.keys()
    assert paths["1-positions.png"].read_bytes().startswith(b"\x89PNG")


def test_well_formed_with_unique_ids(html):
    found = Page(html)
    assert [each for each, count in Counter(found.ids).items() if count > 1] == []
    assert {each.strip("'\"") for each in found.references} <= {f"#{each}" for each in found.ids}
    assert found.tags["svg"] == 1 + 5 + 3


def test_self_contained(html):
    assert not re.search(r"https?://|@import|src=|<script|<link|<iframe", html)


def test_tells_what_has_to_be_known(html):
    text = " ".join(Page(html).text.replace("\u00a0", " ").split())
    for words in (
        "yarn(factor=4) does best",
        "All comparisons were measured on the same text in the same way",
        "Needs training first: alibi.",
        "learned: no table | here",
        "short.txt: only <12> tokens",
        "each weighing the same",
        "Every window begins with a start-of-text token (BOS, id 0)",
        "hfpos compare 'my model'",
        "torch 2.11",
        "NTK-by-parts frequencies",
        "guessing finds 10 %",
    ):
        assert words in text


def test_text_from_files_is_escaped():
    bad = comparison(
        run(EVIL, NONE, scheme=EVIL, parameters={EVIL: EVIL}, needs_training=True),
        run("yarn", YARN),
        path=f"models/{EVIL}",
        refused={EVIL: EVIL},
        skipped=[(EVIL, EVIL)],
        sha=EVIL,
        bos=EVIL,
    )
    bad = dataclasses.replace(bad, provenance={EVIL: EVIL, "command": EVIL})
    found = page(Results((bad,)))
    assert "<script" not in found
    assert Page(found).text.count(EVIL) > 8


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"sha": "cd" * 32}, "the text (as token ids)"),
        ({"stride": 256, "bos": "none"}, "the stride (none / 256) and the BOS mode (every-window / none)"),
        ({"lengths": (64, 128)}, "the context lengths (64 128 256 512 / 64 128)"),
    ],
)
def test_what_must_not_be_compared(changes, named):
    found = Page(page(Results((comparison(run("none", NONE)), comparison(run("none", NONE), **changes))))).text
    assert "must not be compared number by number" in found
    assert f"What differs: {named}." in " ".join(found.split())
    assert "All runs together" not in found


def test_retrieval_only_and_nothing_else():
    found = Page(page(Results((comparison(run("none", None, retrieval=(retrieval(1, 2, 3, 4),))),))))
    assert "No perplexity was measured." in found.text
    assert found.tags["svg"] == 1
    assert found.tags["nav"] == 0


def test_nothing_to_report():
    with pytest.raises(PatchError, match="no comparison"):
        page(Results(()))


def test_missing_packages_are_told_before_the_run(monkeypatch):
    monkeypatch.setattr(page_module, "find_spec", lambda name: None)
    with pytest.raises(PatchError, match=r"jinja2, which is not installed; pip install 'hfpos\[plot\]'"):
        require_report()
    monkeypatch.setattr("hfpos.report.plots.style.find_spec", lambda name: None)
    with pytest.raises(PatchError, match="matplotlib"):
        require_report()
