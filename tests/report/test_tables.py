"""Markdown and CSV, to the letter."""

import csv
import io
import json

from hfpos.report.results import Results
from hfpos.report.tables import csv as perplexity_csv
from hfpos.report.tables import markdown, retrieval_csv
from tests.report.examples import NONE, YARN, comparison, full, retrieval, run, scores


def test_markdown():
    given = comparison(
        run("none", scores(NONE, stderr=None, bits=1.5), retrieval=(retrieval(10, 9, 1, 0),)),
        run("yarn", scores(YARN, bits=1.25), retrieval=(retrieval(10, 9, 8, 10),)),
        refused={"learned": "no table | here"},
        skipped=[("short.txt", "only <12> tokens")],
    )
    assert markdown(Results((given,))) == EXPECTED


EXPECTED = r"""## base

LlamaForCausalLM, 697,216 parameters, float32 on cpu, trained at 128 tokens. Protocol: stride=none (first tokens of each document), bos=every-window (id 0), aggregate=tokens, seed=0. Data: books, 10 documents, 5,120 tokens, sha256 abababababab.

- At 512 tokens (4 times the 128 it was trained at), yarn does best: a perplexity of 21.00, against 37.70 for the model as it was loaded (none) (-44.3 %).
- More context does no harm (perplexity within 1 % of the best at a shorter length) under yarn up to 512 tokens, the longest measured; none up to 128 tokens.
- Up to the trained 128 tokens, where the model needs no help, perplexity rises by 10.9 % under yarn (20.10 to 22.30 at 128).
- Retrieval (passkey) at 128 tokens: yarn finds 90 % and none finds 5 %; guessing finds 10 %.
- learned could not be applied to this model; the reasons are below.
- 1 document could not be used; the reasons are below.

**Perplexity by context length in tokens (lower is better)**

| scheme | 64 | 128 (trained) | 256 | 512 |
| --- | ---: | ---: | ---: | ---: |
| none | **21.30** | **20.10** | 26.70 | 37.70 |
| yarn | 23.10 ± 0.50 | 22.30 ± 0.50 | **21.90** ± 0.50 | **21.00** ± 0.50 |

± is the standard error over documents.

**Bits per byte of text (lower is better; can be compared between tokenizers)**

| scheme | 64 | 128 (trained) | 256 | 512 |
| --- | ---: | ---: | ---: | ---: |
| none | 1.5000 | 1.5000 | 1.5000 | 1.5000 |
| yarn | **1.2500** | **1.2500** | **1.2500** | **1.2500** |

**How far it holds, what it costs and what it gains**

| scheme | effective context | perplexity of the tokens beyond the trained length | worst change up to the trained length | change at 512 |
| --- | ---: | ---: | ---: | ---: |
| none | 128 | 37.70 | - | - |
| yarn | 512 | 21.00 | +10.9 % (at 128) | -44.3 % |

Effective context: the longest length whose perplexity stays within 1 % of the best at a shorter one. It says up to where more context does no harm, not how good the predictions are. The changes are against none: below zero is better, above zero is worse. Beyond the trained length: tokens with 128 tokens or more before them in windows of 512.

**Retrieval, passkey: found, by context length in tokens (higher is better)**

| scheme | 64 | 128 (trained) |
| --- | ---: | ---: |
| none | 95 % (19/20) | 5 % (1/20) |
| yarn | 95 % (19/20) | **90 %** (18/20) |

Over all depths. Guessing finds 10 %.

**Could not be applied**

- learned: no table \| here

**Documents left out**

- short.txt: only &lt;12> tokens
"""


def test_what_is_equal_is_not_best():
    assert "**10.00**" not in markdown(Results((comparison(run("none", (10.0,) * 4), run("ntk", (10.0,) * 4)),)))


def test_one_row_a_run_and_length():
    rows = list(csv.DictReader(io.StringIO(perplexity_csv(Results((full(), comparison(run("none", NONE))))))))
    assert len(rows) == 3 * 4 + 4
    assert rows[4] == {
        "comparison": "1",
        "model": "models/base",
        "label": "yarn(factor=4)",
        "scheme": "yarn",
        "parameters": "{}",
        "length": "64",
        "perplexity": "23.1",
        "stderr": "0.5",
        "nll": rows[4]["nll"],
        "bits_per_byte": "1.2",
        "tokens": "630",
        "documents": "10",
        "windows": "10",
    }
    assert [row["comparison"] for row in rows[-4:]] == ["2"] * 4
    assert rows[11]["perplexity"] == "inf"
    assert rows[-1]["bits_per_byte"] == ""


def test_parameters_are_json():
    given = comparison(run('y,"n', NONE, parameters={"factor": 4.0, "beta": [1, 2]}))
    row = next(csv.DictReader(io.StringIO(perplexity_csv(Results((given,))))))
    assert (row["label"], json.loads(row["parameters"])) == ('y,"n', {"factor": 4.0, "beta": [1, 2]})


def test_retrieval_rows():
    rows = list(csv.DictReader(io.StringIO(retrieval_csv(Results((full(),))))))
    assert len(rows) == 8
    assert (rows[1]["task"], rows[1]["length"], rows[1]["depth"], rows[1]["accuracy"]) == (
        "passkey",
        "64",
        "1.0",
        "0.9",
    )
    assert retrieval_csv(Results((comparison(run("none", NONE)),))) == ""
