"""The sentences follow the numbers, whatever these are."""

import math

import pytest

from hfpos.report.summary import summary
from tests.report.examples import NONE, NTK, YARN, comparison, retrieval, run, scores


def text_of(*runs, **changes):
    return "\n".join(summary(comparison(*runs, **changes)))


def test_a_scheme_helps():
    lines = summary(comparison(run("none", NONE), run("ntk", NTK), run("yarn", YARN)))
    assert lines == [
        "At 512 tokens (4 times the 128 it was trained at), yarn does best: a perplexity of 21.00, against 37.70 for the model as "
        "it was loaded (none) (-44.3 %).",
        "More context does no harm (perplexity within 1 % of the best at a shorter length) under yarn up to 512 tokens, the longest "
        "measured; ntk up to 256 tokens; none up to 128 tokens.",
        "Up to the trained 128 tokens, where the model needs no help, perplexity rises by 3.0 % under ntk (20.10 to 20.70 at 128) "
        "and rises by 10.9 % under yarn (20.10 to 22.30 at 128).",
    ]


def test_no_scheme_helps():
    found = text_of(
        run("none", (9.0, 8.0, 7.0, 6.0)), run("ntk", (9.0, 8.0, 7.5, 7.2)), run("yarn", (9.0, 8.0, 7.5, 9.0))
    )
    assert "no scheme helps: the model as it was loaded (none) does best, with a perplexity of 6.000" in found
    assert "The nearest scheme is ntk with 7.200 (+20.0 %)" in found
    assert "ntk and yarn cost nothing." in found


def test_all_refused():
    found = text_of(run("none", NONE), refused={"yarn": "no rotary embedding"})
    assert found.startswith("No scheme could be applied. At 512 tokens")
    assert "does best" not in found


def test_only_one_length():
    result = scores((20.0,), lengths=(256,))
    found = text_of(run("none", result), run("yarn", scores((10.0,), lengths=(256,))), trained=256)
    assert "At 256 tokens (as trained), yarn does best" in found
    assert "Only one length was measured, 256 tokens, so nothing can be said about how far a scheme holds." in found


def test_only_lengths_beyond_the_trained_one():
    found = text_of(run("none", scores((20.0,), lengths=(256,))), run("yarn", scores((10.0,), lengths=(256,))))
    assert "no length up to the trained 128 tokens was measured (the shortest: 256)" in found


def test_no_trained_length():
    found = text_of(run("none", NONE), run("yarn", YARN), trained=None)
    assert found.startswith("At 512 tokens, yarn does best")
    assert "base does not state its trained length" in found


def test_one_document():
    one, many = (scores(NONE, stderr=stderr, documents=n) for stderr, n in ((None, 1), (0.5, 3)))
    assert "measured on a single document" in text_of(run("none", one))
    assert "measured on a single document" not in text_of(run("none", many))


def test_fewer_long_documents():
    result = scores(NONE)
    result.by_length[512] = scores((37.7,), lengths=(512,), documents=3).by_length[512]
    assert "(10 documents at 64 tokens, 3 at 512)" in text_of(run("none", result))


def test_too_close_to_tell():
    near = text_of(run("none", NONE), run("ntk", (*NTK[:3], 21.5)), run("yarn", YARN))
    assert "yarn and ntk are less than their standard errors apart there (21.00 and 21.50)" in near
    assert "standard errors apart" not in text_of(run("none", NONE), run("ntk", NTK), run("yarn", YARN))


def test_retrieval_only():
    given = [
        run(label, None, retrieval=(retrieval(*found),))
        for label, found in {"none": (10, 9, 1, 0), "yarn": (10, 9, 8, 10)}.items()
    ]
    assert summary(comparison(*given)) == [
        "No perplexity was measured.",
        "Retrieval (passkey) at 128 tokens: yarn finds 90 % and none finds 5 %; guessing finds 10 %.",
    ]
    assert "None is surely better than guessing." in text_of(given[0])


def test_overflow_and_untrained():
    found = text_of(run("none", NONE), run("alibi", (1e3, 1e5, 1e5, math.inf), needs_training=True))
    assert "no scheme helps" in found
    assert "is 4,975 times as high under alibi" in found
    assert "alibi replaces the positions that the model was trained with" in found
    nothing = text_of(run("none", (9.0, 9.0, math.inf, math.inf)), run("yarn", (9.0, 9.0, math.inf, math.inf)))
    assert "nothing works there" in nothing


def test_many_schemes_are_told_short():
    runs = [run(f"yarn(beta_fast={i})", (21.3, 20.1 + i, 20.0, 20.0)) for i in range(1, 9)]
    found = text_of(run("none", NONE), *runs)
    assert (
        "perplexity rises by 5.0 % under yarn(beta_fast=1) (20.10 to 21.10 at 128) at the least, and rises by 39.8 % under"
        in found
    )
    assert "beta_fast=4) (20.10" not in found


@pytest.mark.parametrize("first", ["yarn", "none"])
def test_the_first_run_is_the_reference(first):
    found = text_of(run(first, NONE), run("ntk", NTK))
    assert ("for the model as it was loaded (none)" if first == "none" else "37.70 for yarn") in found


def test_skipped_and_refused():
    found = text_of(
        run("none", NONE), run("yarn", YARN), refused={"learned": "x"}, skipped=[("a", "short"), ("b", "short")]
    )
    assert "learned could not be applied to this model" in found
    assert "2 documents could not be used" in found
