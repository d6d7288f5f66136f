"""The pairs of tiny model and scheme that the tests of positions, caches and attention run on.

The models were "trained" at `ORIGINAL` tokens, so that a text of some fifty crosses every boundary; their sliding windows are 12.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

import hfpos
from hfpos.attention.learned import LEARNED
from tests.tiny import tiny


if TYPE_CHECKING:
    from transformers import PreTrainedModel

ORIGINAL = 32
VOCABULARY = 128
# The rotary families: grouped heads; sliding windows; parameters nested by type of layer; a quarter of each head rotated.
ROTARY = {"llama": 8, "mistral": 8, "gemma3_text": 8, "gpt_neox": 2}  # and how many frequencies each has
OWN_ATTENTION = ("bloom", "falcon", "mpt")  # which do not use Transformers' attention interface until they are patched
# Remappings that go by where tokens stand, not only by how far apart they are.
ABSOLUTE = ("dual_chunk", "lm_infinite", "streaming_llm")
_LENGTHS = {
    "gpt2": {"n_positions": ORIGINAL},
    "bloom": {"seq_length": ORIGINAL},
    "falcon": {"max_position_embeddings": ORIGINAL, "alibi": True},
    "mpt": {"max_seq_len": ORIGINAL, "use_cache": True},
}
_NO_DROPOUT = {"gpt2": dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.0)}


@dataclass(frozen=True)
class Pair:
    """A model type and a scheme with its parameters."""

    model_type: str
    scheme: str
    parameters: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        values = [
            f"{key}={value}"
            for key, value in self.parameters.items()
            if not isinstance(value, (list, dict)) and key != "original_length"
        ]
        return "-".join((self.model_type, self.scheme, *values))

    def model(self, **overrides: Any) -> PreTrainedModel:
        """A patched model, built anew; the weights that its scheme learns are random."""
        return trained(hfpos.patch(self.unpatched(**overrides), self.scheme, **self.parameters))

    def unpatched(self, **overrides: Any) -> PreTrainedModel:
        """The model that `model` patches."""
        return unpatched(self.model_type, **overrides)

    @property
    def pins_prompt(self) -> bool:
        """Whether the length of the first call decides for all later ones."""
        return self.parameters.get("cache") == "pinned" and "factor" not in self.parameters

    @property
    def inside_attention(self) -> bool:
        """Whether attention is told the positions of cached keys, which are then kept with the cache."""
        return hfpos.schemes()[self.scheme].create(**self.parameters).seam in ("bias", "score")

    @property
    def hides(self) -> bool:
        """Whether some earlier tokens are not seen at all."""
        return self.scheme in ("lm_infinite", "streaming_llm")

    @property
    def relative(self) -> bool:
        """Whether only the distances between tokens matter, up to the original length at least. Groups are counted from position 0."""
        return self.scheme not in ("sinusoidal", "learned", "self_extend", "fire", *ABSOLUTE)


def unpatched(model_type: str, **overrides: Any) -> PreTrainedModel:
    """A tiny model of `ORIGINAL` positions, without dropout."""
    lengths = _LENGTHS.get(model_type, {"max_position_embeddings": ORIGINAL})
    return tiny(model_type, **(lengths | _NO_DROPOUT.get(model_type, {}) | overrides))


def trained(model: PreTrainedModel, seed: int = 0) -> PreTrainedModel:
    """The model with other learned weights of its scheme, if it has any: what they start from is zero, or the same for all heads."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if f"{LEARNED}." in name and not weight.is_meta:
                weight += 0.5 * torch.randn(weight.shape, generator=generator).to(weight)
    return model


def _scalings(pairs: int, **common: Any) -> list[tuple[str, dict[str, Any]]]:
    """Every scaling of rotary embeddings, for heads with `pairs` rotated pairs of dimensions."""
    divisors = {
        "short_factor": [1.0 + 0.1 * i for i in range(pairs)],
        "long_factor": [1.5 + 0.5 * i for i in range(pairs)],
        "attention_factor": 1.1,
    }
    factor = {"factor": 4.0} | common
    static = [(name, factor) for name in ("linear", "ntk", "ntk_by_parts", "yarn", "llama3")]
    aware = [("dynamic", {}), ("dynamic_yarn", {}), ("longrope", divisors)]
    exact = [(name, factor | own) for name, own in aware]
    pinned = [(name, factor | own | {"cache": "pinned"}) for name, own in aware]
    to_prompt = [(name, common | own | {"cache": "pinned"}) for name, own in aware]
    return [*static, *exact, *pinned, *to_prompt]


def _ways_of_scaling(pairs: int, **common: Any) -> list[tuple[str, dict[str, Any]]]:
    """One scaling for every way in which one gets into a model; what differs in numbers only is tried on a LLaMA."""
    *static, dynamic, _, longrope, _, _, pinned_longrope, dynamic_to_prompt, _, _ = _scalings(pairs, **common)
    yarn = next(scaling for scaling in static if scaling[0] == "yarn")
    return [yarn, dynamic, longrope, pinned_longrope, dynamic_to_prompt]


_REMAPPINGS: list[tuple[str, dict[str, Any]]] = [  # every boundary is within reach of a short text
    ("rerope", {"window": 7}),
    ("rerope", {"window": 7, "factor": 2.5}),
    ("dual_chunk", {"chunk_size": 11, "local": 4}),
    ("lm_infinite", {"window": 9, "sinks": 3}),
    ("streaming_llm", {"window": 9, "sinks": 3}),
    ("xpos", {"scale_base": 20}),
]
_ONE_REMAPPING_EACH = {"mistral": _REMAPPINGS[1:2], "gemma3_text": _REMAPPINGS[5:], "gpt_neox": _REMAPPINGS[2:3]}
_OTHERS: list[tuple[str, dict[str, Any]]] = [("alibi", {}), ("nope", {}), ("sinusoidal", {})]
_BIASES: list[tuple[str, dict[str, Any]]] = [  # fire's threshold is within reach; t5 knows keys behind a query
    ("kerple", {}),
    ("kerple", {"kind": "power"}),
    ("sandwich", {}),
    ("fire", {"threshold": 6.0}),
    ("t5", {"num_buckets": 16, "max_distance": 40, "bidirectional": True}),
    ("shaw", {}),
]
# What each has that the others have not: windows, layers of two types, heads that are rotated in part. The bias is the same there.
_ONE_BIAS_EACH = {"mistral": [_BIASES[0]], "gemma3_text": [_BIASES[5]], "gpt_neox": [_BIASES[3]]}
PAIRS = [
    *(
        Pair(model_type, scheme, parameters)
        for model_type, pairs in ROTARY.items()
        for scheme, parameters in [
            ("rope", {"theta": 300.0}),
            *([("abf", {}), ("partial", {}), *_scalings(pairs)] if model_type == "llama" else _ways_of_scaling(pairs)),
            ("self_extend", {"factor": 4.0}),
            *_ONE_REMAPPING_EACH.get(model_type, _REMAPPINGS),
            *_OTHERS,
            *_ONE_BIAS_EACH.get(model_type, _BIASES),
        ]
    ),
    Pair("llama", "per_layer", {"schemes": {"full_attention": "yarn(factor=4)"}}),
    *(
        Pair("gpt2", scheme, parameters)
        for scheme, parameters in [
            ("rope", {"theta": 300.0}),
            *_ways_of_scaling(8)[:-1],
            *_OTHERS,
            *(_BIASES[0], _BIASES[3]),
            *(("learned", {"target_length": 128, "init": init}) for init in ("copy", "interpolate", "tile")),
        ]
    ),
    *(
        Pair("bloom", scheme, parameters)
        for scheme, parameters in [
            ("rope", {"theta": 300.0}),
            *_ways_of_scaling(8, original_length=ORIGINAL),
            ("alibi", {}),
            ("alibi", {"factor": 4.0}),
            ("nope", {}),
            ("sinusoidal", {}),
            *(_BIASES[0], _BIASES[5]),
        ]
    ),
    *(
        Pair(model_type, scheme, parameters)
        for model_type in ("falcon", "mpt")
        for scheme, parameters in [
            ("rope", {"theta": 300.0}),
            ("yarn", {"factor": 4.0}),
            ("alibi", {}),
            ("alibi", {"factor": 4.0}),
            ("sinusoidal", {}),
        ]
    ),
]
# One scheme for every way in which a scheme reaches a model.
_WAYS = {"rope", "yarn", "dynamic", "longrope", "self_extend", "alibi", "kerple", "nope", "sinusoidal", "learned"}
WAYS = [
    pair
    for pair in PAIRS
    if (pair.scheme in _WAYS or str(pair).startswith(("llama-fire", "llama-shaw")))
    and pair.parameters.get("init") in (None, "copy")
    and pair.parameters.get("kind") is None
]


def tokens(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    """Random token ids (rows, length), none of them a special one."""
    return torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """The largest difference of two tensors of one shape."""
    if a.shape != b.shape:
        raise ValueError(f"shapes {tuple(a.shape)} and {tuple(b.shape)}")
    return (a - b).abs().max().item()


def checkpointing(model: PreTrainedModel) -> PreTrainedModel:
    """The model in training mode with gradient checkpointing switched on."""
    newer = getattr(model, "activation_checkpointing_enable", None)
    (newer or model.gradient_checkpointing_enable)()
    return model.train()


def use_backend(model: PreTrainedModel, backend: str) -> PreTrainedModel:
    """What a user does who wants another attention implementation after patching."""
    if model.config.model_type in OWN_ATTENTION:  # whose class Transformers takes to know no other
        model.config._attn_implementation = backend
    else:
        model.set_attn_implementation(backend)
    return model
