"""What a positional scheme is: `Scheme`, the `Geometry` of the model it meets, and the one exception, `PatchError`.

A scheme is a frozen dataclass of its paper's parameters. It acts at one *seam*, and its module in `hfpos/schemes/` holds
only the mathematics: tensors in, tensors out, no model.

| seam | what the scheme implements |
|---|---|
| `freq` | `frequencies(geometry)`, and `stock(geometry)` where Transformers has a `rope_type` for it |
| `score` | `frequencies_at(geometry, lengths)`: frequencies chosen by the current length; or `far_positions(geometry, positions)`: other positions for what is far; keys are cached unrotated |
| `bias` | `weights(geometry)`, `bias(q_positions, k_positions, weights)`, and `factors(...)` where the bias is separable |
| `embed` | `table(positions, width)`, or `resize(weight)` for a learned table |
| `none` | nothing: the model gets no position at all |
"""

from __future__ import annotations

import dataclasses
import difflib
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar


if TYPE_CHECKING:
    from collections.abc import Iterable

    import torch


class PatchError(RuntimeError):
    """The one exception of hfpos: says what was asked, what was found, what was expected and how to mend it."""


def did_you_mean(word: str, choices: Iterable[str]) -> str:
    """A hint for a misspelt `word`: the nearest of `choices`, then all of them.

    >>> did_you_mean("yarm", ["yarn", "ntk"])
    "did you mean 'yarn'? Available: ntk, yarn"
    """
    names = sorted(choices)
    close = difflib.get_close_matches(word, names, n=1)
    return (f"did you mean {close[0]!r}? " if close else "") + f"Available: {', '.join(names)}"


@dataclass(frozen=True)
class Geometry:
    """The numbers of a model that a scheme may depend on (lengths in tokens, sizes in elements).

    Attributes:
        heads: attention (query) heads of one layer.
        head_dim: width of one head.
        rotary_dim: how many of a head's dimensions are rotated; equals `head_dim` unless the model rotates a part.
        theta: base of the unscaled rotary frequencies `theta ** (-2 i / rotary_dim)`.
        trained_length: context length of the pretraining, None where the model does not state one.
        trained_length_stated: whether the config names it (`original_max_position_embeddings`) or it is read off
            `max_position_embeddings` of an unscaled model, which somebody may have raised.
        allowed_length: the longest input the model's config allows (`max_position_embeddings`), None if unbounded.
        length_problem: why `trained_length` cannot be told from the config, None if it can.
    """

    heads: int
    head_dim: int
    rotary_dim: int
    theta: float
    trained_length: int | None
    allowed_length: int | None
    trained_length_stated: bool = False
    length_problem: str | None = None


@dataclass(frozen=True, kw_only=True)
class Scheme:
    """Base of all schemes. Subclasses are frozen dataclasses whose fields are the paper's parameters."""

    name: ClassVar[str] = ""
    aliases: ClassVar[tuple[str, ...]] = ()
    paper: ClassVar[str] = ""
    summary: ClassVar[str] = ""

    @property
    def seam(self) -> str:
        """Where the scheme reaches a model: `freq`, `score`, `bias`, `embed` or `none`."""
        raise TypeError(f"{type(self).__name__} does not say at which seam it acts")

    def check(self, geometry: Geometry) -> None:
        """Raise `PatchError` where the scheme cannot work on a model of this geometry."""

    def patched_length(self, geometry: Geometry) -> int | None:
        """The context length in tokens the patched model is meant for; None where the scheme does not set one."""
        return geometry.allowed_length

    @property
    def length_dependent(self) -> bool:
        """Whether a token's output depends on tokens behind it, through the total length of the call."""
        return False

    def parameters(self) -> dict[str, Any]:
        """The fields as plain JSON values; `type(self)(**self.parameters())` equals `self`."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    @classmethod
    def create(cls, **parameters: Any) -> Scheme:
        """Build the scheme, turning an unknown parameter into a `PatchError` with a hint."""
        fields = {field.name for field in dataclasses.fields(cls)}
        for key in parameters:
            if key not in fields:
                known = f"{cls.name!r} takes no parameters" if not fields else did_you_mean(key, fields)
                raise PatchError(f"{cls.name!r} has no parameter {key!r}: {known}")
        missing = [
            field.name
            for field in dataclasses.fields(cls)
            if field.default is dataclasses.MISSING
            and field.default_factory is dataclasses.MISSING
            and field.name not in parameters
        ]
        if missing:
            raise PatchError(
                f"{cls.name!r} needs {' and '.join(missing)}, which {'was' if len(missing) == 1 else 'were'} not given"
            )
        return cls(**parameters)

    def __str__(self) -> str:
        given = [
            f"{field.name}={_short(getattr(self, field.name))}"
            for field in dataclasses.fields(self)
            if getattr(self, field.name) != field.default
        ]
        return f"{self.name}({', '.join(given)})"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."


def require_number(scheme: str, name: str, value: Any, *, least: float, strictly: bool = False) -> None:
    """Raise `PatchError` unless `value` is a finite real number `>= least` (`> least` if `strictly`)."""
    sign = ">" if strictly else ">="
    good = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not good or value < least or (strictly and value == least):
        raise PatchError(f"{scheme}: {name}={value!r} is not usable; expected a finite number {sign} {least:g}")


def require_length(scheme: str, name: str, value: Any) -> None:
    """Raise `PatchError` unless `value` is a whole number of tokens >= 1."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise PatchError(f"{scheme}: {name}={value!r} is not usable; expected a whole number of tokens >= 1")


def require_choice(scheme: str, name: str, value: Any, choices: tuple[str, ...]) -> None:
    """Raise `PatchError` unless `value` is one of `choices`."""
    if value not in choices:
        raise PatchError(f"{scheme}: {name}={value!r} is unknown: {did_you_mean(str(value), choices)}")


@dataclass(frozen=True, kw_only=True)
class Rope(Scheme):
    """Base of every scheme that rotates queries and keys.

    Attention sees `scale**2 * <R(i f) q, R(j f) k>` with `f` the frequencies in radians per token and `scale` the factor
    that cos and sin are multiplied by.
    """

    @property
    def seam(self) -> str:
        return "freq"

    def frequencies(self, geometry: Geometry) -> tuple[torch.Tensor, float]:
        """`(inv_freq, attention_scale)`: (rotary_dim / 2,) float64 radians per token, and the factor on cos and sin."""
        raise TypeError(f"{type(self).__name__} does not define its frequencies")

    def stock(self, geometry: Geometry) -> dict[str, Any] | None:
        """The same as a `rope_parameters` dict that Transformers itself understands; None if it has no such type."""
        return None

    def base_theta(self, geometry: Geometry) -> float:
        """The rotary base that the scheme starts from."""
        return geometry.theta


@dataclass(frozen=True, kw_only=True)
class RopeScaling(Rope):
    """Base of the RoPE scalings: how far to extend is `factor` or `target_length`, never both.

    Args:
        factor: the ratio of the target to the original length, >= 1.
        target_length: the context length wanted, in tokens.
        original_length: context length of the pretraining, in tokens; read from the model unless given.
    """

    factor: float | None = None
    target_length: int | None = None
    original_length: int | None = None

    def __post_init__(self) -> None:
        if self.factor is not None and self.target_length is not None:
            raise PatchError(
                f"{self.name}: both factor={self.factor!r} and target_length={self.target_length!r} were given; "
                "give one of them (target_length = factor * original_length)"
            )
        if self.factor is not None:
            require_number(self.name, "factor", self.factor, least=0, strictly=True)
            require_number(self.name, "factor", self.factor, least=1)
        if self.target_length is not None:
            require_length(self.name, "target_length", self.target_length)
        if self.original_length is not None:
            require_length(self.name, "original_length", self.original_length)

    def check(self, geometry: Geometry) -> None:
        if self.factor is None and self.target_length is None:
            raise PatchError(
                f"{self.name}: how far to extend is not given; pass factor= (e.g. 4) or target_length= (tokens)"
            )
        factor, original = self.resolved_factor(geometry), self.resolved_original(geometry)
        if factor < 1:
            raise PatchError(
                f"{self.name}: target_length={self.target_length} is shorter than the original length {original}; "
                "a scaling extends the context: pass a target_length above it"
            )

    def resolved_original(self, geometry: Geometry) -> int:
        """The pretraining length in tokens: `original_length`, else the model's own. A conflict raises."""
        given, trained, allowed = self.original_length, geometry.trained_length, geometry.allowed_length
        if given is None:
            if trained is None:
                why = geometry.length_problem or "the model's config does not state a context length"
                raise PatchError(
                    f"{self.name}: {why}; pass original_length= (the length it was pretrained at, in tokens)"
                )
            return trained
        stated = trained if geometry.trained_length_stated else None
        if (stated is not None and given != stated) or (allowed is not None and given > allowed):
            found = (
                f"original_max_position_embeddings={stated}"
                if stated is not None
                else f"max_position_embeddings={allowed}"
            )
            raise PatchError(
                f"{self.name}: original_length={given} conflicts with {found} of the model's config; leave original_length "
                "out to take the model's, or correct the config before the model is built"
            )
        return given

    def resolved_factor(self, geometry: Geometry) -> float:
        """The scale `s` = target length / original length."""
        if self.factor is not None:
            return float(self.factor)
        if self.target_length is None:
            return 1.0
        return self.target_length / self.resolved_original(geometry)

    def patched_length(self, geometry: Geometry) -> int:
        if self.target_length is not None:
            return self.target_length
        return round(self.resolved_factor(geometry) * self.resolved_original(geometry))


@dataclass(frozen=True, kw_only=True)
class Bias(Scheme):
    """Base of every scheme that adds a number to the logit of a query and a key, by the head and by where the two stand.

    Attributes:
        relative: the bias depends on the two positions through `i - j` alone.
        learned: its weights are parameters of the patched model, trained with it.
        shared: all layers have the same learned weights.
        reads_query: `bias` is also given the queries.

    Shapes: B batch (1 where all rows are alike), H heads, Q queries, K keys, D head_dim, F factors.
    """

    relative: ClassVar[bool] = True
    learned: ClassVar[bool] = False
    shared: ClassVar[bool] = False
    reads_query: ClassVar[bool] = False

    @property
    def seam(self) -> str:
        return "bias"

    @property
    def two_sided(self) -> bool:
        """Whether the bias means something for a key that stands behind its query."""
        return False

    def weights(self, geometry: Geometry) -> dict[str, torch.Tensor]:
        """The numbers that the bias is made of, float64: the fixed ones, or what the learned ones start from."""
        raise TypeError(f"{type(self).__name__} does not define its weights")

    def bias(
        self,
        q_positions: torch.Tensor,
        k_positions: torch.Tensor,
        weights: dict[str, torch.Tensor],
        query: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The bias (B, H, Q, K), in the dtype of the weights and differentiable in them.

        Args:
            q_positions, k_positions: (B, Q) and (B, K) int64.
            weights: as from `weights`, of any floating dtype.
            query: (B, H, Q, D), scaled as the logits are; only where the scheme `reads_query`.
        """
        raise TypeError(f"{type(self).__name__} does not define its bias")

    def factors(
        self, q_positions: torch.Tensor, k_positions: torch.Tensor, weights: dict[str, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        """`f` (B, H, Q or 1, F) and `g` (B, 1, K, F) whose product `f_i . g_j` is the bias plus anything that depends on i alone.

        None where the bias does not separate. Positions may be shifted by any number, the same for queries and keys.
        """
        return None
