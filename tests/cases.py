"""Pairs of model and scheme that must work, for the tests that go through all of them; models have 64 trained positions."""

import pytest


SHORT = [1.0 + 0.02 * i for i in range(8)]
LONG = [1.0 + 0.5 * i for i in range(8)]

SCALED = {
    "linear": {"factor": 4},
    "ntk": {"factor": 4},
    "ntk_by_parts": {"factor": 4},
    "yarn": {"factor": 4},
    "llama3": {"factor": 4},
    "longrope": {"factor": 4, "short_factor": SHORT, "long_factor": LONG},
    "dynamic": {"factor": 4},
    "dynamic_yarn": {"factor": 4},
}
PINNED = {name: SCALED[name] | {"cache": "pinned"} for name in ("longrope", "dynamic", "dynamic_yarn")}
PROMPT = {"dynamic": {"cache": "pinned"}}
OTHERS = {"rope": {}, "abf": {}, "partial": {}, "alibi": {}, "nope": {}, "sinusoidal": {}}

ALL = [*SCALED.items(), *PINNED.items(), *PROMPT.items(), *OTHERS.items()]
ON_ROTARY = [pair for pair in ALL if pair[0] != "rope"]  # which is what these models have
ON_GPT2 = [*ALL, *(("learned", {"target_length": 256, "init": init}) for init in ("copy", "interpolate", "tile"))]
ON_BLOOM = [
    *((name, parameters | ({"original_length": 64} if name in SCALED else {})) for name, parameters in ALL),
    ("alibi", {"factor": 4}),
]

BY_MODEL = {"llama": ON_ROTARY, "gpt2": ON_GPT2, "bloom": ON_BLOOM, "gemma3_text": ON_ROTARY}


def _name(model_type, scheme, parameters):
    shown = [parameters[key] for key in ("cache", "init") if key in parameters]
    if parameters.get("cache") == "pinned" and "factor" not in parameters:
        shown.append("prompt")
    if scheme == "alibi" and parameters:
        shown.append("factor")
    return "-".join([model_type, scheme, *shown])


def cases(*model_types):
    """`(model_type, scheme, parameters)` for `pytest.mark.parametrize`, of all models unless some are named."""
    return [
        pytest.param(model_type, scheme, parameters, id=_name(model_type, scheme, parameters))
        for model_type in model_types or BY_MODEL
        for scheme, parameters in BY_MODEL[model_type]
    ]
