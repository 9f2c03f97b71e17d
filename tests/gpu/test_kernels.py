"""flash-linear-attention's kernels on this machine's GPU, against the plain form on the same rounded numbers.

``python -m pytest tests/gpu/test_kernels.py -m gpu`` is what to run first on a new kind of GPU or Triton.
"""

import importlib.util

import pytest
import torch
from torch.nn.functional import logsigmoid

from megaresid.attention.chunks import by_chunks
from megaresid.attention.kernels.routes import DECAYS, KERNELS, Facts, Kernel, facts_of, route
from megaresid.attention.kernels.self_check import FORWARD, GRADIENT, errors, self_check
from megaresid.attention.kind import Kind
from megaresid.attention.recurrence import recurrence
from megaresid.model.gpt import build
from megaresid.model.plan import ModelPlan
from megaresid.model.presets import ModelShape

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.skipif(importlib.util.find_spec("fla") is None, reason="needs flash-linear-attention"),
]

GPU = torch.device("cuda")
BF16 = torch.bfloat16
TOLERANCE = {BF16: (FORWARD, GRADIENT), torch.float16: (FORWARD, GRADIENT), torch.float32: (0.005, 0.005)}
"""Of results and of gradients; fp32 is TF32's."""

BROADCAST = [
    (kernel, decay)
    for kernel in KERNELS
    for decay in DECAYS[1 : DECAYS.index(kernel.decay)]
    if (kernel.delta or decay == "head")  # what is constant without the delta rule has a kernel of its own everywhere
]
ALL = [Kind(decay, delta, 64, 64) for decay in DECAYS for delta in (False, True)]


def named(value):
    if isinstance(value, Kernel):
        return f"{value.name}-{value.decay}"
    return str(value).removeprefix("torch.")


def facts_here() -> Facts:
    return facts_of(GPU)._replace(tf32=True)


def assert_right(kernel: Kernel, decay: str, dtype: torch.dtype, length: int, width: int, **keywords) -> None:
    if kernel.scalar_gated and facts_here().miscompile:
        pytest.skip(f"{kernel.name} is known to be wrong on Hopper with Triton {facts_here().triton}, and never run")
    kind = Kind(decay, kernel.delta, width, width)
    found = errors(kernel, kind, GPU, dtype, reference=torch.float32, length=length, heads=4, **keywords)
    forward, gradient = TOLERANCE[dtype]
    results = {name: found.pop(name) for name in ("output", "state")}
    assert all(error < forward for error in results.values()), results
    assert all(error < gradient for error in found.values()), found


@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("length", [65, 1000, 1024])
@pytest.mark.parametrize("dtype", [BF16, torch.float32], ids=named)
@pytest.mark.parametrize("kernel", KERNELS, ids=named)
def test_a_kernel_equals_the_plain_form(kernel, dtype, length, width):
    """Output, final state, and the gradients of every argument and of the state."""
    if dtype not in kernel.dtypes:
        pytest.skip(f"{kernel.name} does not take {dtype}, and is given none: the plain form runs")
    assert_right(kernel, kernel.decay, dtype, length, width)


@pytest.mark.parametrize(("kernel", "decay"), BROADCAST, ids=named)
def test_a_detour_equals_the_plain_form(kernel, decay):
    """A decay that is broadcast to the heads or channels that a kernel has."""
    assert_right(kernel, decay, BF16, 1000, 64)


@pytest.mark.parametrize("kernel", KERNELS, ids=named)
def test_documents_are_kept_apart(kernel):
    """Of one token, of a chunk, and across chunks."""
    begins = torch.zeros(2, 1000, dtype=torch.int32, device=GPU)
    begins[0, [1, 64, 65, 500]] = 1
    begins[1, [63, 128, 999]] = 1
    assert_right(kernel, kernel.decay, BF16, 1000, 64, segment=begins.cumsum(1, dtype=torch.int32))


@pytest.mark.parametrize("widths", [(32, 65), (24, 40)], ids=named)
@pytest.mark.parametrize("kernel", KERNELS, ids=named)
def test_widths_that_kernels_do_not_have(kernel, widths):
    """Also the 65 of linear attention with its normaliser."""
    if kernel.scalar_gated and facts_here().miscompile:
        pytest.skip(f"{kernel.name} is never run here")
    found = errors(kernel, Kind(kernel.decay, kernel.delta, *widths), GPU, BF16, length=200)
    assert all(error < GRADIENT for error in found.values()), found


def test_the_self_check_passes_here_and_runs_no_kernel_that_is_known_to_be_wrong():
    entries = self_check(ALL, GPU, BF16)["recurrences"]
    assert len(entries) == len(ALL)
    for kind, entry in zip(sorted(ALL), entries):
        kernel = route(kind, BF16, facts_of(GPU)).kernel
        assert not (kernel.scalar_gated and facts_of(GPU).miscompile)
        assert entry["forward_error"] < FORWARD and entry["gradient_error"] < GRADIENT


def arguments_of(kind: Kind, length: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    generator = torch.Generator(GPU).manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(2, length, 4, *shape, generator=generator, device=GPU)

    q, k, v = (random(64).to(dtype) for _ in range(3))
    given = {"q": q, "k": k, "v": v}
    if kind.delta:
        given |= {"k": torch.nn.functional.normalize(k.float(), dim=-1).to(dtype), "beta": random().sigmoid()}
    if kind.decay == "constant":
        given["g"] = torch.log1p(-(2.0 ** -(torch.arange(4, device=GPU) + 5)))
    elif kind.decay != "none":
        given["g"] = logsigmoid(random(*[64] * (kind.decay == "channel")) + 2)
    return given


@pytest.mark.parametrize("kind", ALL, ids=lambda kind: f"{kind.decay}-{kind.delta}")
def test_the_recurrence_runs_in_the_kernel(kind):
    """It differs from the plain form, by bf16's rounding; in fp64 and fp32 it is the plain form, bit for bit."""
    given = arguments_of(kind, 100, BF16)
    output, state = recurrence(**given)
    assert (output.dtype, state.dtype) == (BF16, torch.float32)
    exact, exact_state = by_chunks(**{name: x.double() for name, x in given.items()})
    assert 0 < (output.double() - exact).norm() < FORWARD * exact.norm()
    assert 0 < (state.double() - exact_state).norm() < FORWARD * exact_state.norm()
    for dtype in (torch.float32, torch.float64):
        wide = {name: x.to(dtype) for name, x in given.items()}
        assert all(torch.equal(one, other) for one, other in zip(recurrence(**wide), by_chunks(**wide)))


@pytest.mark.parametrize("kind", ALL, ids=lambda kind: f"{kind.decay}-{kind.delta}")
def test_a_text_goes_on_where_a_kernel_ended(kind):
    """A start in one call, then token by token, which is the plain form."""
    given = arguments_of(kind, 80, BF16)
    whole, _ = by_chunks(**{name: x.double() for name, x in given.items()})

    def cut(start: int, stop: int) -> dict[str, torch.Tensor]:
        return {name: x if x.dim() == 1 else x[:, start:stop] for name, x in given.items()}

    first, state = recurrence(**cut(0, 70))
    outputs = [first]
    for t in range(70, 80):
        output, state = recurrence(**cut(t, t + 1), state=state)
        outputs.append(output)
    assert (torch.cat(outputs, 1).double() - whole).norm() < FORWARD * whole.norm()


@pytest.mark.parametrize("attention", ["gla", "gated_delta_net", "linear_attention", "retention"])
def test_a_model_on_the_gpu_is_that_on_the_cpu(attention):
    """Loss and gradients in bf16 against the CPU's fp32, eager and compiled: a call of a kernel leaves the graph."""
    shape = ModelShape(layers=2, heads=2, width=128, context=128, vocab_size=256)
    plan = ModelPlan(shape, attention)
    idx = torch.randint(256, (2, 129), generator=torch.Generator().manual_seed(0))
    model = build(plan, seed=0)
    model(idx[:, :-1], idx[:, 1:])[1].backward()
    expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.to(GPU)
    assert not plan.one_graph(GPU, BF16)
    for run in (model, torch.compile(model)):
        model.zero_grad()
        with torch.autocast("cuda", dtype=BF16):
            loss = run(idx[:, :-1].to(GPU), idx[:, 1:].to(GPU))[1]
        loss.backward()
        total = sum((expected[name] - p.grad.cpu()).square().sum() for name, p in model.named_parameters())
        assert total.sqrt() < 0.05 * sum(x.square().sum() for x in expected.values()).sqrt()
