"""flash-linear-attention's own layers as mixers, on a GPU."""

import importlib.util

import pytest
import torch

from megaresid.errors import UserError
from megaresid.model.check import check_states
from megaresid.model.flops import forward_flops_per_token
from megaresid.model.gpt import build
from megaresid.model.plan import ModelPlan
from megaresid.model.presets import ModelShape

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.skipif(importlib.util.find_spec("fla") is None, reason="needs flash-linear-attention"),
]

SHAPE = ModelShape(layers=3, heads=4, width=256, context=128, vocab_size=256)
SPECS = [
    "fla(RWKV7Attention)",
    "softmax + fla(RWKV7Attention)",
    "fla(GatedSlotAttention)",
    "fla(BasedLinearAttention)",
    "fla(ReBasedLinearAttention)",
    "fla(Mamba2)",
    "fla(HGRNAttention, expand_ratio=1)",
]


def model_and_tokens(spec: str):
    plan = ModelPlan(SHAPE, spec)
    check_states(plan)  # as before every training
    assert forward_flops_per_token(plan)["attention"] > 0
    idx = torch.randint(256, (4, 129), generator=torch.Generator().manual_seed(0)).cuda()
    return build(plan, seed=0).cuda(), idx


@pytest.mark.parametrize("spec", SPECS)
def test_a_model_of_them_learns_its_batch(spec):
    """In bf16 under autocast, as trainings run."""
    model, idx = model_and_tokens(spec)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(20):
        with torch.autocast("cuda", dtype=torch.bfloat16):
            loss = model(idx[:, :-1], idx[:, 1:])[1]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    unused = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert not unused
    assert losses[-1] < losses[0] - 1, losses


@pytest.mark.parametrize("spec", SPECS)
def test_no_output_depends_on_a_later_token(spec):
    model, idx = model_and_tokens(spec)
    other = idx.clone()
    other[:, 70:] = (other[:, 70:] + 1) % 256
    with torch.no_grad(), torch.autocast("cuda", dtype=torch.bfloat16):
        one, two = (model(x[:, :-1])[0].float() for x in (idx, other))
    torch.testing.assert_close(one[:, :70], two[:, :70], rtol=1e-5, atol=1e-5)
    assert (one[:, 70:] - two[:, 70:]).abs().max() > 1e-3


def test_a_layers_own_refusal_is_one_message():
    with pytest.raises(UserError, match="cannot be built for width 256: .*: change its options"):
        ModelPlan(SHAPE, "fla(GatedSlotAttention, num_heads=3)")
    with pytest.raises(UserError, match="has no option 'slots': did you mean 'num_slots'"):
        ModelPlan(SHAPE, "fla(GatedSlotAttention, slots=16)")
