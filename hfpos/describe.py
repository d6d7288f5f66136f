"""`describe`: what positions a live model has, read from the model and not from its config."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hfpos.attention.fixed_rotary import FixedRotation
from hfpos.attention.interface import backend_of, patched_backend
from hfpos.attention.layered import listed
from hfpos.families import REGISTRY, family_of
from hfpos.families._layers import layer_types
from hfpos.families._rotary_module import frequency_names, scaling_name
from hfpos.patching import language_model, record_of
from hfpos.positions import PositionHook
from hfpos.scheme import Bias
from hfpos.schemes.encoder_decoder import EncoderDecoder
from hfpos.schemes.per_layer import PerLayer


if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

    from hfpos.patching import Record
    from hfpos.scheme import Scheme


@dataclass(frozen=True)
class Description:
    """The positions of a live model; `str()` is a table.

    Attributes:
        model: the class of the model.
        family: how hfpos sees it (`hfpos.families()`), or why it fits none.
        scheme: the registry name of the scheme in force.
        parameters: of the scheme; of an unpatched model, its config's rope parameters.
        layers: which layers or stacks have what, where they differ; empty where all are alike.
        patched: whether hfpos put it there.
        proved: whether a probe showed that the patch moves the logits.
        trained_length: tokens of the pretraining, None where the model does not state it.
        patched_length: tokens the model is meant for now, None where unbounded or not stated.
        logit_multiplier: what every rotated logit is multiplied by (YaRN's temperature, squared).
        wavelengths: tokens for one turn of each dimension pair, fastest first; infinite where a pair stands still. Empty where nothing
            is rotated by fixed frequencies.
        seam: where the scheme acts.
        backend: the attention implementation in force.
        path: how a scheme that acts inside attention gets there, and why that way; empty for others.
        stock_loadable: whether stock Transformers loads a saved copy with equal logits.
        length_dependent: whether a token's logits depend on tokens behind it, through the length of the call.
        needs_training: whether the model was trained with positions of another kind, so that it talks nonsense until it is fine-tuned.
    """

    model: str
    family: str
    scheme: str
    parameters: dict[str, Any]
    layers: str
    patched: bool
    proved: bool
    trained_length: int | None
    patched_length: int | None
    logit_multiplier: float
    wavelengths: tuple[float, ...]
    seam: str
    backend: str
    path: str
    stock_loadable: bool
    length_dependent: bool
    needs_training: bool

    @property
    def table_length(self) -> int | None:
        """How many positions a learned table has, beyond which the model cannot be run; None without one."""
        return self.patched_length if self.scheme == "learned" else None

    def within_table(self, lengths: Sequence[int]) -> list[int]:
        """Those of some context lengths that the model can be run at."""
        return [length for length in lengths if self.table_length is None or length <= self.table_length]

    def __str__(self) -> str:
        given = ", ".join(f"{key}={value}" for key, value in self.parameters.items() if value is not None)
        state = "patched" + (", proved" if self.proved else ", not probed") if self.patched else "unpatched"
        rows = {
            "model": f"{self.model} ({self.family})",
            "scheme": f"{self.scheme} ({state})",
            **(
                {"layers": self.layers}
                if self.layers
                else {"parameters": given if len(given) <= 100 else given[:97] + "..."}
            ),
            "seam": self.seam,
            "trained length": _tokens(self.trained_length),
            "length now": _tokens(self.patched_length),
            "logit multiplier": f"{self.logit_multiplier:.6g}",
            "wavelengths": self._wavelength_summary(),
            "attention": self.backend,
            **({"path": self.path} if self.path else {}),
            "stock loadable": "yes" if self.stock_loadable else "no, load with hfpos.from_pretrained",
            "length dependent": "yes" if self.length_dependent else "no",
            "needs training": "yes, it was trained with positions of another kind" if self.needs_training else "no",
        }
        width = max(map(len, rows))
        return "\n".join(f"{key:<{width}}  {value}" for key, value in rows.items())

    def _wavelength_summary(self) -> str:
        if not self.wavelengths:
            return "none (no fixed rotation)"
        finite = [length for length in self.wavelengths if math.isfinite(length)]
        text = f"{len(self.wavelengths)} pairs"
        if finite:
            text += f", {finite[0]:.4g} ... {finite[-1]:.4g} tokens"
        if len(finite) < len(self.wavelengths):
            text += f", {len(self.wavelengths) - len(finite)} standing still"
        if self.trained_length and finite:
            text += f"; {sum(length > self.trained_length for length in finite)} longer than the trained length"
        return text


def describe(model: nn.Module) -> Description:
    """Describe the positions of a live model, patched or not.

    Args:
        model: a Transformers model or a wrapper around one.

    Raises:
        PatchError: there is no Transformers model in it, or its family is not known.

    >>> import hfpos, transformers
    >>> config = transformers.GPT2Config(n_embd=32, n_head=2, n_layer=1, vocab_size=64, n_positions=128)
    >>> hfpos.describe(transformers.GPT2LMHeadModel(config)).scheme
    'learned'
    """
    target = language_model(model)
    record = record_of(target)
    inv_freq, scale = _live_rotation(family_of(target).decoder)
    wavelengths = tuple(2 * math.pi / value if value else math.inf for value in inv_freq)
    backend = str(target.config._attn_implementation)
    if record is None:
        return _describe_unpatched(target, wavelengths, scale, backend)
    return Description(
        model=type(target).__name__,
        family=record.family,
        scheme=record.scheme.name,
        parameters=_in_force(target, record.scheme).parameters(),
        layers=_layers(target, record.scheme),
        patched=True,
        proved=record.proved,
        trained_length=record.geometry.trained_length,
        patched_length=record.scheme.patched_length(record.geometry),
        logit_multiplier=scale**2,
        wavelengths=wavelengths,
        seam=record.scheme.seam,
        backend=backend,
        path=_path(family_of(target).decoder, backend),
        stock_loadable=_stock_loadable(target, record),
        length_dependent=record.scheme.length_dependent,
        needs_training=not _same_kind(record),
    )


def _describe_unpatched(
    target: PreTrainedModel, wavelengths: tuple[float, ...], scale: float, backend: str
) -> Description:
    family = family_of(target)
    geometry = family.geometry()
    native = family.native()
    if native == "alibi":
        wavelengths, scale = (), 1.0  # Falcon has rotary frequencies even where it does not use them
    rope = getattr(target.config, "rope_parameters", None) or {}
    return Description(
        model=type(target).__name__,
        family=family.name,
        scheme=native,
        parameters=dict(rope),
        layers="",
        patched=False,
        proved=False,
        trained_length=geometry.trained_length,
        patched_length=geometry.allowed_length,
        logit_multiplier=scale**2,
        wavelengths=wavelengths,
        seam="bias" if native in ("alibi", "t5") else "freq" if wavelengths else "embed",
        backend=backend,
        path="",
        stock_loadable=True,
        length_dependent=family.length_dependent(),
        needs_training=False,
    )


def _same_kind(record: Record) -> bool:
    """Whether the scheme is of the kind that the model was pretrained with: a rotation, a linear bias, a learned table."""
    parts = record.scheme.distinct() if isinstance(record.scheme, (PerLayer, EncoderDecoder)) else [record.scheme]
    return all(isinstance(part, REGISTRY[record.family].trained_kind) for part in parts)


def _in_force(target: PreTrainedModel, scheme: Scheme) -> Scheme:
    """The scheme in the form that attention in both directions has given it."""
    family = family_of(target)
    return family.bias_scheme(scheme) if isinstance(scheme, Bias) and family.bidirectional() else scheme


def _layers(target: PreTrainedModel, scheme: Scheme) -> str:
    """`0-2: its own; 3: nope()` for a scheme of its own in each layer."""
    if isinstance(scheme, EncoderDecoder):
        return f"encoder: {scheme.encoder or 'its own'}; decoder: {scheme.decoder or 'its own'}"
    if not isinstance(scheme, PerLayer):
        return ""
    by_layer = scheme.of_layers(layer_types(family_of(target).config))
    found = sorted({by_layer.index(each) for each in by_layer})
    return "; ".join(
        f"{listed(i for i, each in enumerate(by_layer) if each == by_layer[first])}: {by_layer[first] or 'its own'}"
        for first in found
    )


def _stock_loadable(target: PreTrainedModel, record: Record) -> bool:
    block = getattr(target.config, "hfpos", None)
    return block is None or bool(block["stock"])  # a resized table needs no block


def _path(decoder: Any, backend: str) -> str:
    """How the seam that the decoder's hook hands on gets into attention; empty where there is none."""
    owners = (getattr(hook, "__self__", None) for hook in decoder._forward_pre_hooks.values())
    seam = next((owner.seam for owner in owners if isinstance(owner, PositionHook)), None)
    if seam is None:
        return ""
    stands_on = backend_of(patched_backend(backend, seam.backends))
    return seam.how(str(stands_on), next(decoder.parameters()).device)


def _live_rotation(decoder: nn.Module) -> tuple[list[float], float]:
    """Frequencies (radians per token) and the factor on cos and sin, from whatever in the model rotates; ([], 1) if nothing does."""
    for hook in decoder._forward_pre_hooks.values():
        owner = getattr(hook, "__self__", None)
        seam = getattr(owner, "seam", None)
        tables = seam.turn if isinstance(seam, FixedRotation) else getattr(owner, "rotation", None)
        if tables is not None:
            return tables.inv_freq.values.tolist(), tables.scale
    for module in decoder.children():
        names = frequency_names(module)
        name = next((name for name in names if name.startswith("full_attention")), names[0] if names else None)
        if name is None or getattr(module, name).is_meta:
            continue
        inv_freq = getattr(module, name).float().tolist()
        if any(inv_freq):
            return inv_freq, float(getattr(module, scaling_name(name)))
    return [], 1.0


def _tokens(length: int | None) -> str:
    return "not stated" if length is None else f"{length:,} tokens"
