"""Every mixer with every residual variant: it builds, trains three steps, and goes on from a saved state bitwise.

A tenth of the pairs run in the quick tier, so that every mixer meets a tenth of the variants and every variant a tenth
of the mixers; all of them with ``bash launch/test.sh --full tests/attention/test_mixers_with_residuals.py``.
"""

import copy

import pytest
import torch
from mixer_table import ONE_OF_EACH

from megaresid.model.check import check_states, complete_rules
from megaresid.model.gpt import GPT, build, set_step
from megaresid.model.plan import ModelPlan
from megaresid.model.presets import ModelShape
from megaresid.residual.stream import RESIDUALS

SHAPE = ModelShape(layers=3, heads=2, width=16, context=6, vocab_size=20)
STEPS, SAVED = 3, 2
IDX = torch.randint(SHAPE.vocab_size, (STEPS, 2, SHAPE.context + 1), generator=torch.Generator().manual_seed(0))

MIXERS = [row.spec for row in ONE_OF_EACH]
VARIANTS = sorted(RESIDUALS.classes())
PAIRS = [
    pytest.param(mixer, variant, marks=[] if (row + column) % 10 == 0 else [pytest.mark.full])
    for row, mixer in enumerate(MIXERS)
    for column, variant in enumerate(VARIANTS)
]


def train(model: GPT, optimizer: torch.optim.Optimizer, steps: range) -> list[float]:
    losses = []
    for step in steps:
        set_step(model, step + 1)
        loss = model(IDX[step, :, :-1], IDX[step, :, 1:])[1]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def started(plan: ModelPlan, seed: int) -> tuple[GPT, torch.optim.Optimizer]:
    model = build(plan, seed)
    return model, torch.optim.AdamW(model.parameters(), lr=1e-2)


@pytest.mark.parametrize(("mixer", "variant"), PAIRS)
def test_a_pair_trains_and_resumes(mixer, variant):
    plan = ModelPlan(SHAPE, mixer, variant)
    check_states(plan)
    model, optimizer = started(plan, seed=0)
    complete_rules(model)
    before = [parameter.clone() for parameter in model.parameters()]
    train(model, optimizer, range(SAVED))
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    losses = train(model, optimizer, range(SAVED, STEPS))
    assert torch.tensor(losses).isfinite().all()
    moved = sum(not torch.equal(old, new) for old, new in zip(before, model.parameters()))
    assert moved > 0.8 * len(before)  # some have no gradient before others have moved

    other, its_optimizer = started(plan, seed=1)
    other.load_state_dict(saved[0])
    its_optimizer.load_state_dict(saved[1])
    assert train(other, its_optimizer, range(SAVED, STEPS)) == losses
    for parameter, resumed in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(parameter, resumed)
