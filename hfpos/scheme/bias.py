"""The base of the schemes that add a number to the logits."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

import torch

from hfpos.scheme.alone import check_batch, check_floats, check_positions, check_weights, unknown_model
from hfpos.scheme.base import Scheme
from hfpos.scheme.errors import PatchError, require_count
from hfpos.scheme.geometry import Geometry


if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True, kw_only=True)
class Bias(Scheme):
    """Base of every scheme that adds a number to the logit of a query and a key, by the head and by where the two stand.

    Args:
        num_heads: how many heads there are, for use without a model: `Alibi(8).bias(q_positions, k_positions)`.

    Attributes:
        relative: the bias depends on the two positions through `i - j` alone.
        learned: its weights are parameters of the patched model, trained with it.
        shared: all layers have the same learned weights.
        reads_query: `formula` is also given the queries.

    Shapes: B batch (1 where all rows are alike), H heads, Q queries, K keys, D head_dim, F factors.
    """

    relative: ClassVar[bool] = True
    learned: ClassVar[bool] = False
    shared: ClassVar[bool] = False
    reads_query: ClassVar[bool] = False

    num_heads: int | None = field(default=None, kw_only=False, compare=False)

    @property
    def seam(self) -> str:
        return "bias"

    @property
    def two_sided(self) -> bool:
        """Whether the bias means something for a key that stands behind its query."""
        return False

    @property
    def needs_both_ways(self) -> bool:
        """Whether the bias has no meaning under a causal mask."""
        return False

    def check(self, geometry: Geometry) -> None:
        if self.num_heads not in (None, geometry.heads):
            raise PatchError(
                f"{self.name}: it was made for num_heads={self.num_heads}, the model has {geometry.heads} attention heads; leave num_heads out"
            )

    def weights(self, geometry: Geometry) -> dict[str, torch.Tensor]:
        """The numbers that the bias is made of, float64: the fixed ones, or what the learned ones start from."""
        raise TypeError(f"{type(self).__name__} does not define its weights")

    def formula(
        self,
        q_positions: torch.Tensor,
        k_positions: torch.Tensor,
        weights: dict[str, torch.Tensor],
        query: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The bias (B, H, Q, K), as `bias`, of tensors that have been checked: positions (B, Q) and (B, K) int64, query (B, H, Q, D)."""
        raise TypeError(f"{type(self).__name__} does not define its formula")

    def factors(
        self, q_positions: torch.Tensor, k_positions: torch.Tensor, weights: dict[str, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        """`f` (B, H, Q or 1, F) and `g` (B, 1, K, F) whose product `f_i . g_j` is the bias plus anything that depends on i alone.

        None where the bias does not separate. Positions may be shifted by any number, the same for queries and keys.
        """
        return None

    def bias(
        self,
        q_positions: torch.Tensor,
        k_positions: torch.Tensor,
        weights: dict[str, torch.Tensor] | None = None,
        query: torch.Tensor | None = None,
        *,
        dtype: torch.dtype | None = None,
    ) -> torch.Tensor:
        """What is added to the logits, differentiable in the weights.

        Args:
            q_positions, k_positions: (Q,) and (K,) whole numbers, in tokens, or a batch of them: (B, Q) and (B, K).
            weights: as from `weights`, of any floating dtype, in which the bias is computed; unless given, these for `num_heads` heads:
                the fixed ones, or what the learned ones start from (`module` makes a torch module that trains them).
            query: (H, Q, D) or (B, H, Q, D), scaled as the logits are; where the scheme `reads_query`, and only there.
            dtype: of the bias; unless given, that of the weights, or float32. Without weights it is computed in float32 or wider.

        Returns:
            (H, Q, K), or (B, H, Q, K) where anything is given with a batch. Add a mask of your own: a bias hides no key.

        Raises:
            PatchError: shapes or dtypes that do not fit, or neither weights nor `num_heads`.

        >>> import torch
        >>> from hfpos.schemes import Alibi
        >>> Alibi(2).bias(torch.tensor([2]), torch.arange(3))  # the slopes are 1/16 and 1/256
        tensor([[[-0.1250, -0.0625,  0.0000]],
        <BLANKLINE>
                [[-0.0078, -0.0039,  0.0000]]])
        """
        check_positions(self.name, "q_positions", q_positions)
        check_positions(self.name, "k_positions", k_positions)
        if dtype is not None and not dtype.is_floating_point:
            raise PatchError(f"{self.name}: dtype={dtype} is not usable; expected a floating dtype")
        if query is not None:
            check_floats(self.name, "query", query)
        batched = q_positions.ndim == 2 or k_positions.ndim == 2 or (query is not None and query.ndim == 4)
        q_rows, k_rows = (x if x.ndim == 2 else x[None] for x in (q_positions.long(), k_positions.long()))
        rows = {"q_positions": q_rows.shape[0], "k_positions": k_rows.shape[0]}
        if query is not None and query.ndim == 3:
            query = query[None]
        self._check_query(query, q_rows.shape[1])
        check_batch(self.name, **rows, **({} if query is None else {"query": query.shape[0]}))
        head_dim = None if query is None else query.shape[-1]
        if weights is None:
            wide = torch.promote_types(dtype or torch.float32, torch.float32)
            exact = self.weights(self.alone(head_dim))
            weights = {name: value.to(q_positions.device, wide) for name, value in exact.items()}
        elif not torch.compiler.is_compiling():
            check_weights(self, weights, head_dim)
        found = self.formula(q_rows, k_rows, weights, query)
        found = found if dtype is None else found.to(dtype)
        return found if batched else found[0]

    def module(self) -> nn.Module:
        """The bias as a torch module whose weights are learned, for one layer of a model of your own.

        Its parameters are float32, also after `.bfloat16()`, and lie in a submodule `hfpos_bias`: by the "bias" in their names Trainer
        keeps them out of the weight decay. Called with `(q_positions, k_positions)`, and the queries where the scheme reads them, it
        gives what `bias` gives.

        Raises:
            PatchError: nothing is learned, or `num_heads` was not given.

        >>> import torch
        >>> from hfpos.schemes import Kerple
        >>> module = Kerple(8).module()
        >>> module(torch.arange(3), torch.arange(5)).shape, [name for name, _ in module.named_parameters()]
        (torch.Size([8, 3, 5]), ['hfpos_bias.raw_r1', 'hfpos_bias.raw_r2'])
        """
        from hfpos.attention.learned import BiasModule  # attention imports schemes

        if not self.learned:
            raise PatchError(f"{self.name}: nothing is learned here; call bias(q_positions, k_positions)")
        return BiasModule(self, self.weights(self.alone()))

    def alone(self, head_dim: int | None = None) -> Geometry:
        """The geometry of attention without a model: what is known are the heads, and their width where the scheme needs it."""
        if self.num_heads is None:
            raise PatchError(
                f"{self.name}: how many heads there are is not known; pass it, {type(self).__name__}(num_heads), or weights="
            )
        require_count(self.name, "num_heads", self.num_heads)
        geometry = unknown_model(self.num_heads, head_dim or 1)
        self.check(geometry)
        return geometry

    def _check_query(self, query: torch.Tensor | None, queries: int) -> None:
        if not self.reads_query:
            if query is not None:
                raise PatchError(f"{self.name}: query= was given, and this bias does not depend on it; leave it out")
            return
        if query is None:
            raise PatchError(
                f"{self.name}: the bias depends on the queries; pass query= (batch, heads, {queries} tokens, head_dim)"
            )
        if query.ndim == 4 and self.num_heads not in (None, query.shape[1]):
            raise PatchError(
                f"{self.name}: query has {query.shape[1]} heads, and it was made for num_heads={self.num_heads}; expected as many"
            )
        if query.ndim != 4 or query.shape[2] != queries:
            raise PatchError(
                f"{self.name}: query has shape {tuple(query.shape)}; expected (heads, {queries} tokens, head_dim), with a batch in front or not"
            )
