"""What holds for every decoder that leaves an attention of its own: BLOOM, Falcon and MPT."""

import torch

import hfpos
from tests.pairs import tokens


@torch.no_grad()
def check_other_heads(config, classes):
    """Models of other heads give the same after `alibi`, and after `unpatch` the very same."""
    for cls in classes:
        torch.manual_seed(0)
        model = cls(config).eval()
        before = model(tokens(2, 40))[0]
        hfpos.patch(model, "alibi")
        torch.testing.assert_close(model(tokens(2, 40))[0], before, rtol=0, atol=1e-5)
        hfpos.unpatch(model)
        assert torch.equal(model(tokens(2, 40))[0], before)


@torch.no_grad()
def check_mask_is_written_out_where_needed(model, layer, attention):
    """Attention gets no mask where a plain causal one is meant, a 4-D one where there is padding, and none is kept."""
    seen = []
    attention.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["attention_mask"]), with_kwargs=True
    )
    padding = torch.ones(2, 30, dtype=torch.long)
    padding[0, :7] = 0
    model(tokens(2, 30), attention_mask=torch.ones_like(padding))
    model(tokens(2, 30), attention_mask=padding)
    assert seen[0] is None
    assert seen[1].shape == (2, 1, 30, 30)
    assert layer.hfpos_source.mask is None
