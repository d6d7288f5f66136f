"""ALiBi on flash-attention 2, which is played here by plain torch after its documentation: what is asked of it, and what comes out."""

import importlib.util
import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from transformers import DynamicCache

import hfpos
from tests.pairs import OWN_ATTENTION, difference, tokens, unpatched, use_backend


MODELS = ["llama", "mistral", "gpt2", *OWN_ATTENTION]
LENGTH = 40


def plain(q: Any, k: Any, v: Any, scale: float, hidden: torch.Tensor, bias: Any = 0.0) -> torch.Tensor:
    """Attention of q (B, Q, H, D) to k, v (B, K, Hkv, D) as the kernels do it: a query that sees nothing gets zeros."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    weights = (q.float() @ k.float().mT * scale + bias).masked_fill(hidden, float("-inf")).softmax(-1).nan_to_num(0.0)
    return (weights @ v.float()).transpose(1, 2).to(q.dtype)


def hidden_from(queries: int, keys: int, causal: bool, left: int, right: int) -> torch.Tensor:
    """What (Q, K) a query must not see; the last query stands at the last key."""
    ahead = torch.arange(keys) - torch.arange(queries)[:, None] - (keys - queries)
    hidden = ahead > 0 if causal else torch.zeros_like(ahead, dtype=torch.bool)
    hidden |= (ahead < -left) if left >= 0 else False
    return hidden | ((ahead > right) if right >= 0 else False)


class Flash:
    """Both of the library's functions that are used, and a note of every call: `native` or `features`."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.dtypes: set[torch.dtype] = set()

    def flash_attn_func(
        self, q: Any, k: Any, v: Any, dropout_p: float = 0.0, softmax_scale: float | None = None, causal: bool = False,
        window_size: tuple[int, int] = (-1, -1), alibi_slopes: Any = None, **more: Any,
    ) -> torch.Tensor:  # fmt: skip
        """`flash_attn.flash_attn_func`; the bias is `-slope * |i + seqlen_k - seqlen_q - j|`."""
        assert not more
        assert alibi_slopes.shape == (q.shape[2],)
        assert alibi_slopes.dtype == torch.float32
        self.calls.append("native")
        self.dtypes |= {x.dtype for x in (q, k, v)}
        queries, keys = q.shape[1], k.shape[1]
        distance = torch.arange(queries)[:, None] + keys - queries - torch.arange(keys)
        bias = -alibi_slopes[:, None, None] * distance.abs()
        hidden = hidden_from(queries, keys, causal, *window_size)
        if dropout_p:
            v = torch.nn.functional.dropout(v, dropout_p)
        return plain(q, k, v, softmax_scale, hidden, bias)

    def forward(
        self, q: Any, k: Any, v: Any, attention_mask: Any, *, query_length: int, is_causal: bool, dropout: float = 0.0,
        position_ids: Any = None, softmax_scale: float | None = None, sliding_window: int | None = None,
        attn_implementation: str, **more: Any,
    ) -> torch.Tensor:  # fmt: skip
        """`_flash_attention_forward` of Transformers: a 2-D mask hides padding, position ids that restart begin documents."""
        assert attn_implementation == "flash_attention_2"
        assert more.get("softcap") is None
        assert q.shape[-1] == k.shape[-1] == v.shape[-1] <= 256
        assert q.shape[1] == query_length
        self.calls.append("features")
        self.dtypes |= {x.dtype for x in (q, k, v)}
        left = -1 if sliding_window is None else sliding_window - 1
        hidden = hidden_from(q.shape[1], k.shape[1], is_causal, left, -1)[None, None]
        if attention_mask is not None:
            assert attention_mask.shape == (q.shape[0], k.shape[1])
            hidden = hidden | (attention_mask == 0)[:, None, None]
        elif position_ids is not None and q.shape[1] == k.shape[1]:
            document = (position_ids == 0).cumsum(-1)
            hidden = hidden | (document[:, None, :, None] != document[:, None, None])
        return plain(q, k, torch.nn.functional.dropout(v, dropout), softmax_scale, hidden)


@pytest.fixture
def flash(monkeypatch: pytest.MonkeyPatch) -> Flash:
    """The stand-in, installed."""
    found, library = Flash(), ModuleType("flash_attn")
    library.__spec__ = importlib.util.spec_from_loader("flash_attn", None)
    library.flash_attn_func = found.flash_attn_func
    monkeypatch.setitem(sys.modules, "flash_attn", library)
    monkeypatch.setattr("hfpos.attention.flash._flash_attention_forward", found.forward)
    return found


def pair_of(model_type: str, **overrides: Any) -> tuple[Any, Any]:
    """The patched model on flash-attention, and on SDPA."""
    models = [
        hfpos.patch(unpatched(model_type, **overrides), "alibi", backend=backend, factor=1.5)
        for backend in ("flash_attention_2", "sdpa")
    ]
    return models[0], models[1]


@pytest.mark.parametrize("model_type", MODELS)
@torch.no_grad()
def test_its_own_alibi_where_positions_count_up(model_type: str, flash: Flash) -> None:
    model, other = pair_of(model_type)
    ids = tokens(2, LENGTH)
    flash.calls.clear()
    assert difference(model(ids, use_cache=False).logits, other(ids, use_cache=False).logits) < 5e-5
    assert set(flash.calls) == {"native"}
    flash.calls.clear()
    shifted = torch.arange(LENGTH)[None] + 5
    assert difference(model(ids, position_ids=shifted).logits, other(ids, position_ids=shifted).logits) < 5e-5
    assert set(flash.calls) == {"native"}


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("model_type", MODELS)
@torch.no_grad()
def test_padding_goes_by_features(model_type: str, side: str, flash: Flash) -> None:
    model, other = pair_of(model_type)
    mask = torch.ones(2, LENGTH, dtype=torch.long)
    mask[1, slice(9) if side == "left" else slice(-9, None)] = 0
    flash.calls.clear()
    logits, expected = (m(tokens(2, LENGTH), attention_mask=mask).logits[mask.bool()] for m in (model, other))
    assert difference(logits, expected) < 5e-5
    assert set(flash.calls) == {"features"}


@pytest.mark.parametrize("model_type", MODELS)
@torch.no_grad()
def test_skipped_ids_go_by_features(model_type: str, flash: Flash) -> None:
    model, other = pair_of(model_type)
    positions = torch.arange(LENGTH)[None]
    positions = torch.where(positions < 20, positions, positions + 50)
    flash.calls.clear()
    logits, expected = (m(tokens(1, LENGTH), position_ids=positions).logits for m in (model, other))
    assert difference(logits, expected) < 5e-5
    assert set(flash.calls) == {"features"}


@pytest.mark.parametrize("model_type", MODELS)
@torch.no_grad()
def test_packed_documents_stay_apart_or_are_refused(model_type: str, flash: Flash) -> None:
    model, other = pair_of(model_type)
    call = {
        "input_ids": tokens(1, LENGTH),
        "position_ids": torch.cat((torch.arange(17), torch.arange(LENGTH - 17)))[None],
    }
    if model_type in ("llama", "mistral", "gpt2"):  # which hand their position ids on to attention
        assert difference(model(**call).logits, other(**call).logits) < 5e-5
        return
    with pytest.raises(hfpos.PatchError, match="packs documents without knowing where they begin.*backend='sdpa'"):
        model(**call)


@pytest.mark.parametrize("padded", [False, True], ids=["plain", "padded"])
@pytest.mark.parametrize("model_type", MODELS)
@torch.no_grad()
def test_steps_give_the_logits_of_one_forward(model_type: str, padded: bool, flash: Flash) -> None:
    model, other = pair_of(model_type)
    ids, mask = tokens(2, LENGTH), torch.ones(2, LENGTH, dtype=torch.long)
    mask[1, :5] = 1 - int(padded)
    given = {"attention_mask": mask} if padded else {}
    expected = other(ids, use_cache=False, **given).logits[mask.bool()]
    for cache in (None, DynamicCache()):  # which keeps also the keys that have left a window
        logits, start = [], 0
        for step in (13, 1, 1, 20, 1, 1, 3):
            now = {"attention_mask": mask[:, : start + step]} if padded else {}
            output = model(ids[:, start : start + step], past_key_values=cache, use_cache=True, **now)
            cache, start = output.past_key_values, start + step
            logits.append(output.logits)
        assert difference(torch.cat(logits, dim=1)[mask.bool()], expected) < 5e-5


@pytest.mark.parametrize("padded", [False, True], ids=["native", "features"])
@pytest.mark.parametrize("model_type", ["llama", "gpt2", "bloom"])
def test_gradients(model_type: str, padded: bool, flash: Flash) -> None:
    mask = torch.ones(2, LENGTH, dtype=torch.long)
    mask[1, :5] = 1 - int(padded)
    ids, results = tokens(2, LENGTH), []
    for model in pair_of(model_type):
        flash.calls.clear()
        model(ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100), use_cache=False).loss.backward()
        results.append([p.grad for p in model.parameters() if p.requires_grad])
        assert set(flash.calls) == (({"features"} if padded else {"native"}) if len(results) == 1 else set())
    for a, b in zip(*results, strict=True):
        assert difference(a, b) < 5e-5 * max(b.abs().max().item(), 1)


@torch.no_grad()
def test_sandwich_goes_by_features_always(flash: Flash) -> None:
    model, other = (
        hfpos.patch(unpatched("llama"), "sandwich", dim=12, backend=backend)
        for backend in ("flash_attention_2", "sdpa")
    )
    flash.calls.clear()
    ids = tokens(1, LENGTH)
    assert difference(model(ids).logits, other(ids).logits) < 5e-5
    assert set(flash.calls) == {"features"}


def test_dropout_reaches_the_kernel(flash: Flash) -> None:
    model = hfpos.patch(unpatched("llama", attention_dropout=0.5), "alibi", backend="flash_attention_2")
    ids, calm = tokens(1, LENGTH), []
    for position in (None, torch.where(torch.arange(LENGTH) < 20, 0, 9)[None] + torch.arange(LENGTH)):
        with torch.no_grad():
            calm = [model.eval()(ids, position_ids=position).logits for _ in range(2)]
            noisy = [model.train()(ids, position_ids=position).logits for _ in range(2)]
        assert torch.equal(*calm)
        assert difference(*noisy) > 1e-3


@torch.no_grad()
def test_autocast_hands_the_kernel_what_it_takes(flash: Flash) -> None:
    """Which is float16 and bfloat16 only."""
    model, other = pair_of("llama")
    ids = tokens(1, LENGTH)
    flash.dtypes.clear()
    for positions in (torch.arange(LENGTH)[None], torch.arange(LENGTH)[None] * 3):
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(ids, position_ids=positions).logits.float()
        exact = other(ids, position_ids=positions).logits
        assert (logits - exact).abs().mean() < 0.02 * exact.abs().mean()
    assert flash.dtypes == {torch.bfloat16}


# What it cannot do


@pytest.mark.parametrize("model_type", ["llama", "bloom"])
@pytest.mark.parametrize("prove", [True, False])
def test_without_the_library_the_patch_is_refused(model_type: str, prove: bool) -> None:
    assert importlib.util.find_spec("flash_attn") is None
    model = unpatched(model_type)
    with pytest.raises(hfpos.PatchError, match="flash-attn, which is not installed; choose backend='sdpa'"):
        hfpos.patch(model, "alibi", backend="flash_attention_2", prove=prove)
    assert not hfpos.describe(model).patched


@pytest.mark.parametrize("scheme", ["kerple", "t5", "fire", "shaw"])
def test_a_bias_that_does_not_separate_is_refused(scheme: str, flash: Flash) -> None:
    with pytest.raises(hfpos.PatchError, match="'flash_attention_2' cannot carry this scheme.*Available: "):
        hfpos.patch(unpatched("llama"), scheme, backend="flash_attention_2")


def test_a_model_that_is_not_causal_is_refused(flash: Flash) -> None:
    """Not the kernel's own `|i - j|` in silence."""
    for model_type in ("llama", "gpt2"):
        model = unpatched(model_type, is_causal=False)
        with pytest.raises(hfpos.PatchError, match="not causal.*bidirectional=True"):
            hfpos.patch(model, "alibi", backend="flash_attention_2")(tokens(1, 9))


def test_heads_wider_than_the_kernel_takes_are_refused(flash: Flash) -> None:
    model = unpatched("llama", head_dim=250)
    with pytest.raises(hfpos.PatchError, match=r"more than 256 dimensions a head .*here 250.*backend='sdpa'"):
        hfpos.patch(model, "alibi", backend="flash_attention_2")(
            tokens(1, 9), attention_mask=torch.tensor([[0] + [1] * 8])
        )
    with pytest.raises(hfpos.PatchError, match="more than 256 dimensions"):
        hfpos.patch(unpatched("llama").bfloat16(), "sandwich", backend="flash_attention_2")


def test_attention_weights_are_refused(flash: Flash) -> None:
    model, _ = pair_of("llama")
    with pytest.raises(hfpos.PatchError, match="gives no attention weights.*set_attn_implementation.'eager'"):
        model(tokens(2, LENGTH), output_attentions=True)
    use_backend(model, "eager")
    assert model(tokens(2, LENGTH), output_attentions=True).attentions[0].shape == (2, 4, LENGTH, LENGTH)


def test_a_soft_cap_is_refused(flash: Flash) -> None:
    with pytest.raises(hfpos.PatchError, match="soft cap.*backend='(sdpa|eager)'"):
        hfpos.patch(unpatched("gemma2"), "alibi", backend="flash_attention_2")


def test_describe_says_what_is_used(flash: Flash) -> None:
    found = hfpos.describe(hfpos.patch(unpatched("llama"), "alibi", backend="flash_attention_2"))
    assert found.backend == "hfpos_fa2"
    assert "own ALiBi" in found.path
    assert "extra dimensions of q" in found.path
    sandwich = hfpos.describe(hfpos.patch(unpatched("llama"), "sandwich", dim=12, backend="flash_attention_2"))
    assert "own ALiBi" not in sandwich.path
    assert "extra dimensions of q" in sandwich.path
