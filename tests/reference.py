"""A float64 LLaMA written out densely, the oracle of what a patched one must compute."""

from collections.abc import Callable

import torch
from torch.nn.functional import silu
from transformers import LlamaForCausalLM


def norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Root mean square norm of `x` (..., E)."""
    return x * (x.pow(2).mean(-1, keepdim=True) + eps).rsqrt() * weight


@torch.no_grad()
def llama_logits(
    model: LlamaForCausalLM,
    ids: torch.Tensor,
    scores: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    visible: torch.Tensor | None = None,
) -> torch.Tensor:
    """The float64 logits (1, L, V) of `ids` (1, L), using nothing of the model but its weights.

    Args:
        scores: attention logits (1, H, L, L) of queries and keys (1, H, L, D) that carry no position and are not scaled.
        visible: which keys (L) each query (L) may see; causal unless given.
    """
    config, eps = model.config, model.config.rms_norm_eps
    weights = {name: value.double() for name, value in model.state_dict().items()}
    length, heads = ids.shape[1], config.num_attention_heads
    visible = torch.ones(length, length, dtype=torch.bool).tril() if visible is None else visible
    x = weights["model.embed_tokens.weight"][ids]
    for i in range(config.num_hidden_layers):
        layer = {name.split(f"layers.{i}.")[1]: value for name, value in weights.items() if f"layers.{i}." in name}
        h = norm(x, layer["input_layernorm.weight"], eps)
        q, k, v = (
            (h @ layer[f"self_attn.{name}_proj.weight"].T).view(1, length, -1, config.head_dim).transpose(1, 2)
            for name in "qkv"
        )
        k, v = (t.repeat_interleave(heads // config.num_key_value_heads, dim=1) for t in (k, v))
        logits = scores(q, k).masked_fill(~visible, float("-inf"))
        mixed = (logits.softmax(-1) @ v).transpose(1, 2).reshape(1, length, -1)
        x = x + mixed @ layer["self_attn.o_proj.weight"].T
        h = norm(x, layer["post_attention_layernorm.weight"], eps)
        gate, up = h @ layer["mlp.gate_proj.weight"].T, h @ layer["mlp.up_proj.weight"].T
        x = x + (silu(gate) * up) @ layer["mlp.down_proj.weight"].T
    return norm(x, weights["model.norm.weight"], eps) @ weights["lm_head.weight"].T


def rotary_scores(
    q: torch.Tensor,
    k: torch.Tensor,
    q_positions: torch.Tensor,
    k_positions: torch.Tensor,
    sets: Callable[[int], tuple[torch.Tensor, float]],
    interleaved: bool = False,
) -> torch.Tensor:
    """Attention logits where the query at position p rotates itself and every key with the frequencies of length p + 1.

    Args:
        q, k: (..., Q, D) and (..., K, D); what is beyond the rotated dimensions is left as it is.
        q_positions, k_positions: (Q,) and (K,).
        sets: `length -> (inv_freq, factor on cos and sin)`.
        interleaved: dimension 2i is paired with 2i + 1 instead of i with i + R/2.
    """
    rows = []
    for i, position in enumerate(q_positions.tolist()):
        inv_freq, scale = sets(position + 1)
        inv_freq = inv_freq.double()
        turned = [
            _turn(x, p, inv_freq, scale, interleaved)
            for x, p in ((q[..., i : i + 1, :], q_positions[i : i + 1]), (k, k_positions))
        ]
        rows.append(turned[0] @ turned[1].transpose(-1, -2))
    return torch.cat(rows, dim=-2) * q.shape[-1] ** -0.5


def _turn(
    x: torch.Tensor, positions: torch.Tensor, inv_freq: torch.Tensor, scale: float, interleaved: bool
) -> torch.Tensor:
    half = len(inv_freq)
    rotated, passed = x[..., : 2 * half], x[..., 2 * half :]
    if interleaved:
        z = torch.complex(rotated[..., 0::2], rotated[..., 1::2])
    else:
        z = torch.complex(rotated[..., :half], rotated[..., half:])
    z = z * torch.polar(
        torch.full((len(positions), half), float(scale), dtype=torch.float64), positions.double()[:, None] * inv_freq
    )
    parts = torch.stack((z.real, z.imag), -1).flatten(-2) if interleaved else torch.cat((z.real, z.imag), -1)
    return torch.cat((parts, passed), dim=-1)
