"""The one list of layer specs builds DeepSpeed's PipelineModule too: the same names, values and hidden states."""

import torch

from megaresid.model.gpt import build, canonical_parameters
from megaresid.model.pipeline import pipeline_module
from megaresid.model.plan import ModelPlan
from megaresid.model.presets import ModelShape

SHAPE = ModelShape(layers=3, heads=2, width=32, context=16, vocab_size=100)


def one_stage():
    """Runs on the one rank (the number of threads orders sums): losses and gradients of a pipeline and of the plain
    module."""
    idx = torch.arange(32).reshape(2, 16)
    module, prefixes = pipeline_module(ModelPlan(SHAPE), stages=1, seed=4)
    loss = module.loss_fn(module(idx), idx + 1)
    model = build(ModelPlan(SHAPE), seed=4)
    _, expected = model(idx, idx + 1)
    found = []
    for value, parameters in (
        (loss, canonical_parameters(module, prefixes)),
        (expected, canonical_parameters(model, model.prefixes)),
    ):
        value.backward()
        found.append((value.item(), {name: p.grad for name, p in parameters.items()}))
    return found


def test_a_pipeline_of_one_stage_is_the_plain_module(ranks1):
    (((loss, gradients), (expected_loss, expected_gradients)),) = ranks1.run(one_stage)
    assert loss == expected_loss
    assert gradients.keys() == expected_gradients.keys()
    for name, gradient in gradients.items():
        assert torch.equal(gradient, expected_gradients[name]), name
        if not name.endswith("k_proj.bias"):  # a constant added to every score moves no softmax
            assert gradient.abs().max() > 0, name


def two_stages():
    module, prefixes = pipeline_module(ModelPlan(SHAPE), stages=2, seed=4)
    return {name: p.detach() for name, p in canonical_parameters(module, prefixes).items()}


def test_two_stages_share_out_the_plain_modules_parameters(ranks2):
    """Each has its own part of them, both the tied embedding, and every value is the plain module's."""
    first, second = ranks2.run(two_stages)
    model = build(ModelPlan(SHAPE), seed=4)
    parameters = canonical_parameters(model, model.prefixes)
    assert first.keys() | second.keys() == parameters.keys()
    assert first.keys() & second.keys() == {"embed.tokens.weight"}
    for name, value in (first | second).items():
        assert torch.equal(value, parameters[name]), name
