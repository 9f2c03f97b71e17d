"""How the recurrence runs: what a token can reach, in how many calls, in which dtype, compiled, checkpointed."""

import pytest
import torch
from recurrence_cases import KINDS, inputs, results
from torch._subclasses import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from megaresid.attention.chunks import by_chunks
from megaresid.attention.decayed_scores import _scores
from megaresid.attention.recurrence import by_steps, recurrence
from megaresid.model.measure import count_flops, saved_bytes

kinds = pytest.mark.parametrize("decay, delta", KINDS)


def call(x, **options):
    tensors = {name: None if tensor is None else tensor.detach() for name, tensor in x.items()}
    return recurrence(**tensors, **options)


def changed(x, tokens: slice, other):
    """The inputs with those tokens of another's."""
    mixed = {}
    for name, tensor in x.items():
        mixed[name] = None if tensor is None else tensor.detach().clone()
        if name in ("q", "k", "v", "beta") or (name == "g" and tensor is not None and tensor.dim() > 1):
            if tensor is not None:
                mixed[name][:, tokens] = other[name].detach()[:, tokens]
    return mixed


@kinds
@pytest.mark.parametrize("at", [1, 40, 64, 129])
def test_no_output_depends_on_a_later_token(decay, delta, at):
    x, other = (inputs(decay, delta, 130, seed=seed, dtype=torch.float32) for seed in (0, 1))
    before, after = call(x)[0], call(changed(x, slice(at, at + 1), other))[0]
    assert torch.equal(before[:, :at], after[:, :at])
    assert not torch.isclose(before[:, at], after[:, at]).any()


@kinds
@pytest.mark.parametrize("at", [1, 40, 64, 129])
def test_nothing_reaches_the_next_document(decay, delta, at):
    x, other = (inputs(decay, delta, 130, seed=seed, dtype=torch.float32) for seed in (0, 1))
    segment = (torch.arange(130) >= at).int()[None]
    mixed = changed(x, slice(0, at), other) | {"state": other["state"].detach()}
    (before, final_before), (after, final_after) = (call(y, segment=segment) for y in (x, mixed))
    assert torch.equal(before[:, at:], after[:, at:]) and torch.equal(final_before, final_after)
    assert not torch.isclose(before[:, at - 1], after[:, at - 1]).any()


@kinds
@pytest.mark.parametrize("cuts", [(70, *range(71, 80)), (64, 128), (1, 2, 66), (3, 67, 131)])
def test_any_cut_gives_the_same(decay, delta, cuts):
    """A call goes on from the state of the one before; at a cut between documents from zero."""
    x, length = inputs(decay, delta, 140, batch=2), 140
    segment = torch.stack([(torch.arange(length) >= 70).int(), torch.arange(length) // 9])
    whole, final = call(x, segment=segment)
    outputs, state = [], x["state"].detach()
    for start, end in zip((0, *cuts), (*cuts, length), strict=True):
        part = {
            name: tensor if tensor is None or tensor.dim() == 1 else tensor[:, start:end]
            for name, tensor in x.items()
            if name != "state"
        }
        if start:
            state = state * (segment[:, start] == segment[:, start - 1])[:, None, None, None]
        o, state = call(part | {"state": state}, segment=segment[:, start:end])
        outputs.append(o)
    torch.testing.assert_close(torch.cat(outputs, 1), whole, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(state, final, rtol=1e-12, atol=1e-12)


@kinds
@pytest.mark.parametrize("length", [1, 70])
def test_autocast_changes_nothing(decay, delta, length):
    x = inputs(decay, delta, length, dtype=torch.float32)
    expected = results(recurrence, x)
    with torch.autocast("cpu", torch.bfloat16):
        o, final = recurrence(**x)
    assert torch.equal(o, expected["o"]) and torch.equal(final, expected["final"])


@kinds
@pytest.mark.parametrize("length", [1, 70])
def test_half_the_bits_come_in_and_go_out_but_do_not_compute(decay, delta, length):
    x = inputs(decay, delta, length, dtype=torch.float32)
    rounded = {name: x[name].detach().bfloat16() for name in ("q", "k", "v")}
    o, final = call(x | rounded)
    wide, wide_final = call(x | {name: tensor.float() for name, tensor in rounded.items()})
    assert o.dtype == torch.bfloat16 and torch.equal(o, wide.bfloat16())
    assert final.dtype == torch.float32 and torch.equal(final, wide_final)


@kinds
@pytest.mark.parametrize("form", [by_steps, by_chunks])
@pytest.mark.parametrize("values", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("length", [2, 70])
def test_outputs_are_in_the_type_of_the_values_and_the_state_is_wide(decay, delta, form, values, length):
    """q is in the other type; all else, the state too, is rounded to bf16 before, and nothing after but the output."""
    x = {name: t if t is None else t.detach().bfloat16() for name, t in inputs(decay, delta, length).items()}
    wide = {name: t if t is None else t.float() for name, t in x.items()}
    other = torch.float32 if values is torch.bfloat16 else torch.bfloat16
    o, final = form(**x | {"q": x["q"].to(other), "v": x["v"].to(values)})
    expected, wide_final = form(**wide)
    assert o.dtype == values and torch.equal(o, expected.to(values))
    assert final.dtype == torch.float32 and torch.equal(final, wide_final)


@pytest.mark.parametrize("decay, delta", [("constant", False), ("head", True), ("channel", False), ("channel", True)])
def test_it_is_one_graph(decay, delta):
    x, segment = inputs(decay, delta, 130), (torch.arange(130) // 40)[None]
    torch._dynamo.reset()
    compiled = torch.compile(recurrence, fullgraph=True, backend="aot_eager")
    found, expected = (results(form, x, segment=segment) for form in (compiled, recurrence))
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-12, atol=1e-12)


@kinds
def test_it_may_run_again_for_the_backward_pass(decay, delta):
    x = inputs(decay, delta, 70, dtype=torch.float32)
    found = results(lambda *given, **options: checkpoint(recurrence, *given, use_reentrant=False, **options), x)
    expected = results(recurrence, x)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@kinds
def test_fake_tensors_have_the_shapes_of_real_ones(decay, delta):
    x = inputs(decay, delta, 70, batch=2, dtype=torch.float32)
    with FakeTensorMode() as mode:
        o, final = recurrence(**{name: None if t is None else mode.from_tensor(t) for name, t in x.items()})
    assert [(y.shape, y.dtype) for y in (o, final)] == [(y.shape, y.dtype) for y in recurrence(**x)]


@kinds
def test_work_and_memory_grow_with_the_length_alone(decay, delta):
    """Exactly: what a doubled length adds, doubling it again adds twice."""
    work, memory = [], []
    for length in (128, 256, 512):
        x = inputs(decay, delta, length, dtype=torch.float32)
        work.append(count_flops(lambda: call(x)))
        memory.append(saved_bytes(lambda: recurrence(**x), [t for t in x.values() if t is not None]))
    assert work[2] - work[1] == 2 * (work[1] - work[0]) > 0
    assert memory[2] - memory[1] == 2 * (memory[1] - memory[0]) > 0


@pytest.mark.parametrize("chunk, keys, count", [(2, 4, 2), (16, 3, 2), (64, 8, 1)])
def test_flops_of_the_operator_are_those_counted_in_it(chunk, keys, count):
    x = torch.rand(count + 2, 3, chunk, keys)
    arguments = list(x[2:]), x[0], -x[1]
    whole, inside = (count_flops(lambda f=f: f(*arguments)) for f in (_scores, _scores._init_fn))
    assert whole == inside


def test_a_second_derivative_is_refused_not_wrong():
    x = inputs("channel", False, 20)
    (gradient,) = torch.autograd.grad(recurrence(**x)[0].sum(), [x["k"]], create_graph=True)
    with pytest.raises(RuntimeError, match="decayed_scores_backward"):
        torch.autograd.grad(gradient.square().sum(), [x["g"]])
