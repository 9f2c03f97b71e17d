"""The recurrence equals its definition: outputs, final state and all gradients, in fp64 to 1e-12."""

import pytest
import torch
from recurrence_cases import DECAYS, KINDS, assert_equal_results, definition, inputs, results, worst_error

from megaresid.attention import decayed_scores
from megaresid.attention.kind import Kind, recurrence_flops
from megaresid.attention.recurrence import by_steps, recurrence
from megaresid.model.measure import count_flops

LENGTHS = (1, 2, 63, 64, 65, 130)
kinds = pytest.mark.parametrize("decay, delta", KINDS)


def documents(length: int) -> torch.Tensor:
    """One that begins with a chunk and one within; many in a chunk, their numbers coming again; one a token."""
    at = torch.arange(length)
    generator = torch.Generator().manual_seed(length)
    several = (torch.rand(length, generator=generator) < 0.15).cumsum(0) % 2
    return torch.stack([(at >= 64).int() + (at >= 100).int() + (at >= 128).int(), several.int(), at.int()])


@kinds
@pytest.mark.parametrize("length", LENGTHS)
def test_it_equals_the_definition(decay, delta, length):
    x = inputs(decay, delta, length)
    assert_equal_results(results(recurrence, x), results(definition, x), 1e-12)


@kinds
@pytest.mark.parametrize("length", LENGTHS)
def test_documents_equal_the_definition(decay, delta, length):
    x, segment = inputs(decay, delta, length, batch=3), documents(length)
    found, expected = (results(form, x, segment=segment) for form in (recurrence, definition))
    assert_equal_results(found, expected, 1e-12)


@kinds
def test_the_steps_equal_the_definition(decay, delta):
    x, segment = inputs(decay, delta, 9, batch=3), documents(9)
    found, expected = (results(form, x, segment=segment, scale=0.7) for form in (by_steps, definition))
    assert_equal_results(found, expected, 1e-12)


@pytest.mark.parametrize("decay, delta", KINDS[2:])
@pytest.mark.parametrize("chunks", [1, 4])
def test_piece_by_piece_it_equals_the_definition(monkeypatch, decay, delta, chunks):
    """Six chunks, of which a CPU's cache is to hold so many; the last piece is smaller. In models there are many."""
    x, channels = inputs(decay, delta, 130), 5 if decay == "channel" else 1
    monkeypatch.setattr(decayed_scores, "CPU_PIECE", chunks * 64 * channels)
    assert_equal_results(results(recurrence, x), results(definition, x), 1e-12)


@kinds
def test_no_state_is_a_state_of_zeros_and_the_scale_is_free(decay, delta):
    x = inputs(decay, delta, 70) | {"state": None}
    assert_equal_results(results(recurrence, x, scale=0.3), results(definition, x, scale=0.3), 1e-12)


@pytest.mark.parametrize("delta", [False, True])
@pytest.mark.parametrize("keys, values", [(1, 4), (4, 1), (8, 8)])
def test_widths_of_heads(delta, keys, values):
    """A decay per channel of a single channel is one per head."""
    x = inputs("channel", delta, 70, keys=keys, values=values)
    assert_equal_results(results(recurrence, x), results(definition, x), 1e-12)


@pytest.mark.parametrize("decay", DECAYS[1:])
@pytest.mark.parametrize("delta", [False, True])
@pytest.mark.parametrize("strength", [0.0, -1e-30, -100.0, -1e4])
def test_no_decay_is_too_weak_or_too_strong(decay, delta, strength):
    """At every third token, or in the constant form at all."""
    x = inputs(decay, delta, 66)
    with torch.no_grad():
        x["g"][... if decay == "constant" else (slice(None), slice(0, None, 3))] = strength
    assert_equal_results(results(recurrence, x), results(definition, x), 1e-12)


@kinds
def test_in_fp32_it_is_as_exact_as_the_steps(decay, delta):
    x32 = inputs(decay, delta, 130, keys=32, values=48, dtype=torch.float32)
    x64 = {name: None if x is None else x.detach().double().requires_grad_() for name, x in x32.items()}
    expected = results(by_steps, x64)
    found, steps = results(recurrence, x32), results(by_steps, x32)
    for name, tensor in found.items():
        assert tensor.dtype == torch.float32
        bound = max(1e-6, 2 * worst_error(name, steps[name], expected[name]))
        assert worst_error(name, tensor, expected[name]) < bound, name


@pytest.mark.parametrize("decay, delta", [("none", True), ("head", False), ("channel", True)])
def test_the_gradient_is_that_of_the_function(decay, delta):
    x = {name: tensor for name, tensor in inputs(decay, delta, 6, keys=3, values=2).items() if tensor is not None}
    segment = torch.tensor([[0, 0, 0, 0, 1, 1]])
    assert torch.autograd.gradcheck(
        lambda *tensors: recurrence(**dict(zip(x, tensors, strict=True)), segment=segment), list(x.values())
    )


@kinds
def test_flops_are_those_counted_in_the_definition(decay, delta):
    x, length = inputs(decay, delta, 3, keys=8, values=6), 3
    tensors = [x[name] for name in ("q", "k", "v", "g", "beta")]
    with torch.no_grad():
        assert count_flops(lambda: by_steps(*tensors)) == length * recurrence_flops(Kind(decay, delta, 8, 6), heads=2)
