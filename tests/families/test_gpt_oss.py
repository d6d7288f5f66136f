"""gpt-oss and AFMoE: documents packed into a row, which the stock models let see each other, under every kind of scheme."""

import pytest
import torch

import hfpos
from tests.pairs import tokens, unpatched


FULL, SLIDING = "full_attention", "sliding_attention"


@pytest.mark.parametrize("model_type", ["gpt_oss", "afmoe"])
@pytest.mark.parametrize("scheme", ["yarn", "alibi", "xpos", "sinusoidal", "nope"])
@torch.no_grad()
def test_packed_documents_are_separate(model_type, scheme):
    kinds = {"num_hidden_layers": 2, "layer_types": [SLIDING, FULL], "sliding_window": 9}
    model = unpatched(model_type, max_position_embeddings=64, **kinds)
    hfpos.patch(model, scheme, **({"factor": 4} if scheme == "yarn" else {}))
    ids = tokens(2, 41)
    positions = torch.cat((torch.arange(24), torch.arange(17))).expand(2, -1)
    packed = model(ids, position_ids=positions).logits
    separate = torch.cat((model(ids[:, :24]).logits, model(ids[:, 24:]).logits), dim=1)
    torch.testing.assert_close(packed, separate, rtol=0, atol=1e-4)
