"""Small results with chosen numbers."""

import math
from typing import Any

from hfpos.evaluate.result import Bucket, LengthScore, PerplexityResult, Skipped
from hfpos.evaluate.retrieval import RetrievalCell, RetrievalResult, wilson
from hfpos.report.results import Comparison, Data, ModelInfo, Pattern, Protocol, Run


LENGTHS = (64, 128, 256, 512)
NONE, NTK, YARN = (21.3, 20.1, 26.7, 37.7), (21.7, 20.7, 20.2, 28.2), (23.1, 22.3, 21.9, 21.0)


def scores(values, lengths=LENGTHS, stderr=0.5, bits=None, documents=10):
    return PerplexityResult(
        {
            length: LengthScore(
                perplexity=value,
                nll=math.log(value) if math.isfinite(value) else math.inf,
                tokens=(length - 1) * documents,
                documents=documents,
                windows=documents,
                stderr=stderr,
                bits_per_byte=bits,
                curve=(Bucket(1, length // 4, 4.0, 10), Bucket(length // 4, length, math.log(min(value, 1e9)), 10)),
            )
            for length, value in zip(lengths, values, strict=True)
        }
    )


def retrieval(*correct, trials=10, task="passkey", chance=0.1):
    """`correct` at the start and at the end of 64 tokens, then of 128."""
    cells = [
        RetrievalCell(length, depth, count, trials, *wilson(count, trials))
        for (length, depth), count in zip([(64, 0.0), (64, 1.0), (128, 0.0), (128, 1.0)], correct, strict=True)
    ]
    return RetrievalResult(task, chance, {"seed": 0}, tuple(cells))


def run(label, values: Any = None, **changes):
    perplexity = scores(values) if isinstance(values, tuple) else values
    scheme = label.partition("(")[0]
    return Run(
        **(
            {"label": label, "scheme": scheme, "parameters": {}, "needs_training": False, "perplexity": perplexity}
            | changes
        )
    )


def comparison(
    *runs,
    trained=128,
    path="models/base",
    stride=None,
    bos="every-window",
    refused=None,
    skipped=(),
    sha="ab" * 32,
    **protocol,
):
    return Comparison(
        ModelInfo(path, "LlamaForCausalLM", "rotary", "rope", 697216, "float32", "cpu", trained, "f00d"),
        Protocol(
            **(
                {
                    "lengths": LENGTHS,
                    "stride": stride,
                    "bos": bos,
                    "bos_token_id": 0,
                    "aggregate": "tokens",
                    "tolerance": 0.01,
                    "seed": 0,
                }
                | protocol
            )
        ),
        Data("books", sha, 10, 5120, {"min_tokens": 512}, tuple(Skipped(*each) for each in skipped)),
        tuple(runs),
        refused or {},
        {"date": "2026-01-01", "versions": {"torch": "2.11"}, "command": ["hfpos", "compare", "my model"]},
    )


def rotation(label, values, wavelengths, **changes):
    pattern = Pattern("rotation", (0, 1, 2, 600), (1.0, 0.9, 0.5, 0.1), (1.0, 0.9, 0.5, 0.1), (1.0, 0.9, 0.5, 0.1))
    return run(label, values, wavelengths=wavelengths, pattern=pattern, **changes)


def full():
    """Everything that a comparison can hold."""
    bias = Pattern("bias", (0, 1, 600), (0.0, -0.5, -300.0), (0.0, -0.1, -60.0), (0.0, 0.0, -math.inf))
    return comparison(
        rotation("none", scores(NONE, bits=1.1), (6.3, 60.0, 600.0, None), retrieval=(retrieval(10, 9, 1, 0),)),
        rotation(
            "yarn(factor=4)", scores(YARN, bits=1.2), (6.3, 90.0, 2400.0, None), retrieval=(retrieval(9, 9, 8, 10),)
        ),
        run("alibi", (900.0, 1e5, 2e5, math.inf), needs_training=True, pattern=bias),
        refused={"learned": "no table | here"},
        skipped=[("short.txt", "only <12> tokens")],
    )
