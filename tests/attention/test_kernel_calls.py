"""The calls of kernels, with fla's operators by the definition in their place, and what holds kernels to be right."""

import fla_stand_in
import pytest
import torch

from megaresid.attention.kernels import calls, self_check
from megaresid.attention.kernels.calls import documents_of, form_of, kind_of, product_dtype, run
from megaresid.attention.kernels.routes import DECAYS, KERNELS, Facts, Route
from megaresid.attention.kernels.self_check import PLAIN, checked_errors, errors
from megaresid.attention.kind import Kind
from megaresid.attention.recurrence import by_steps
from megaresid.errors import UserError

CPU, GPU = torch.device("cpu"), torch.device("cuda")
SEGMENT = torch.tensor([[0] * 5 + [1] + [2] * 3, [4] * 9], dtype=torch.int32)
SERVED = [
    (kernel, decay)
    for kernel in KERNELS
    for decay in DECAYS[: DECAYS.index(kernel.decay) + 1]
    if decay != "none" or kernel.decay == "none"
]


@pytest.mark.parametrize(("kernel", "decay"), SERVED, ids=lambda x: getattr(x, "name", x))
@pytest.mark.parametrize("segment", [None, SEGMENT], ids=["whole", "documents"])
@pytest.mark.parametrize("sizes", [(32, 16), (7, 17)], ids=str)
def test_a_kernel_gets_and_gives_what_the_recurrence_does(monkeypatch, kernel, decay, segment, sizes):
    """Outputs, the final state and the gradients of every argument and the state, for every decay that it serves: of
    widths that it has and of others, with documents and without."""
    fla_stand_in.install(monkeypatch)
    found = errors(kernel, Kind(decay, kernel.delta, *sizes), CPU, torch.float32, length=9, segment=segment)
    assert {"output", "state", "dq", "dk", "dv", "dstate"} <= found.keys()
    assert all(error < 1e-6 for error in found.values()), found


def test_without_a_state_documents_start_from_zero(monkeypatch):
    fla_stand_in.install(monkeypatch)
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 2, 9, 2, 16, generator=generator)
    found = run(KERNELS[0], q, k, v, scale=0.5, segment=SEGMENT)
    expected = by_steps(q, k, v, scale=0.5, segment=SEGMENT)
    for one, other in zip(found, expected):
        torch.testing.assert_close(one, other)


def test_a_constant_decay_that_is_trained_gets_its_gradient():
    """The kernel for constant decays has none for it."""
    q, g = torch.zeros(1, 2, 3, 16), torch.zeros(3)
    assert kind_of(q, q, g, None) == Kind("constant", False, 16, 16)
    assert kind_of(q, q, g.requires_grad_(), None) == Kind("head", False, 16, 16)
    assert kind_of(q, q, torch.zeros(1, 2, 3), q[..., 0]) == Kind("head", True, 16, 16)
    assert kind_of(q, q, torch.zeros(1, 2, 3, 16), None).decay == "channel"
    assert kind_of(q, q, None, None).decay == "none"


def test_products_are_in_the_widest_type_or_in_autocasts():
    wide, half = torch.zeros(1), torch.zeros(1, dtype=torch.bfloat16)
    assert product_dtype(half, half, half) == torch.bfloat16
    assert product_dtype(wide, half, half) == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert product_dtype(wide, half, half) == torch.bfloat16
        assert product_dtype(wide.double(), half, half) == torch.float64


def test_the_result_is_in_the_type_of_the_values_and_the_state_in_fp32(monkeypatch):
    fla_stand_in.install(monkeypatch)
    q = torch.ones(1, 4, 1, 16)
    output, state = run(KERNELS[0], q, q, q.bfloat16())
    assert (output.dtype, state.dtype) == (torch.bfloat16, torch.float32)


@pytest.mark.parametrize(("kernel", "decay"), SERVED, ids=lambda x: getattr(x, "name", x))
def test_decays_betas_and_states_are_wide_around_products_in_bf16(monkeypatch, kernel, decay):
    """Under autocast, given in whatever type; the stand-in refuses others and autocast inside."""
    seen = []
    operator = fla_stand_in._operator(kernel.name)
    fla_stand_in.install(monkeypatch, **{kernel.name: lambda **x: seen.append(x["q"].dtype) or operator(**x)})
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 2, 9, 2, 16, generator=generator)
    state = torch.randn(2, 2, 16, 16, generator=generator).bfloat16()
    shape = {"none": None, "constant": (2,), "head": (2, 9, 2), "channel": (2, 9, 2, 16)}[decay]
    g = None if shape is None else -torch.rand(shape, generator=generator).bfloat16()
    beta = torch.rand(2, 9, 2, generator=generator).bfloat16() if kernel.delta else None
    k = k / k.norm(dim=-1, keepdim=True)
    with torch.autocast("cpu", torch.bfloat16):
        found = run(kernel, q, k, v, g, beta, state=state)
    expected = by_steps(*(x.bfloat16() for x in (q, k, v)), g, beta, state=state)
    assert seen == [torch.bfloat16] and [x.dtype for x in found] == [torch.float32] * 2
    torch.testing.assert_close(found[0], expected[0].float())
    torch.testing.assert_close(found[1], expected[1])


def test_documents_in_a_row_laid_end_to_end():
    """By hand: rows of 3 + 1 and 4 tokens. The same tensor is asked once, because the answer waits for a GPU."""
    segment = torch.tensor([[7, 7, 7, 8], [8, 8, 8, 8]], dtype=torch.int32)
    offsets, first, last = documents_of(segment)
    assert (offsets.tolist(), first.tolist(), last.tolist()) == ([0, 3, 4, 8], [0, 2], [1, 2])
    assert documents_of(segment).offsets is offsets
    assert documents_of(segment.clone()).offsets is not offsets
    segment.zero_()  # in its place, as a replayed graph does
    assert documents_of(segment).offsets.tolist() == [segment.shape[1] * row for row in range(len(segment) + 1)]


def test_a_call_breaks_a_compiled_graph_once(monkeypatch):
    """And the plain form not at all."""
    monkeypatch.setattr(calls, "facts_of", lambda device: Facts(hopper=False, triton="3.9.0", fla="0.6.0"))
    fla_stand_in.install(monkeypatch)

    def layer(q):
        return (form_of(q, q, q, None, None) or by_steps)(q + 1, q, q)[0] + 1

    q = torch.randn(1, 3, 1, 16, generator=torch.Generator().manual_seed(0))
    for x, breaks in ((q.bfloat16(), 1), (q, 0)):
        assert torch._dynamo.explain(layer)(x).graph_break_count == breaks
        torch.testing.assert_close(torch.compile(layer, backend="eager", fullgraph=not breaks)(x), layer(x))


def wrong_gradient(**arguments):
    """The delta rule, whose gradient of beta is half of what it must be: the kind of fault that Hopper showed."""
    beta = arguments.pop("beta")
    arguments.pop("output_final_state"), arguments.update(state=arguments.pop("initial_state"))
    return by_steps(**arguments, beta=beta.detach() + (beta - beta.detach()) / 2)


def out_of_memory(**arguments):
    raise RuntimeError("out of resource: shared memory\nRequired: 262144")


@pytest.mark.parametrize(
    ("operator", "message"),
    [
        (wrong_gradient, r"is wrong on this GPU: .*: d\w+ by 0\.5"),
        (out_of_memory, r"fails on this GPU \(RuntimeError: out of resource: shared memory\): install other versions"),
    ],
)
def test_a_kernel_that_is_wrong_or_fails_is_refused(monkeypatch, operator, message):
    kernel = next(kernel for kernel in KERNELS if kernel.name == "chunk_delta_rule")
    fla_stand_in.install(monkeypatch)
    found = checked_errors(kernel, Kind("none", True, 16, 16), CPU, torch.float32)
    assert all(error < 1e-6 for error in found.values()), found
    fla_stand_in.install(monkeypatch, chunk_delta_rule=operator)
    with pytest.raises(UserError, match=message):
        checked_errors(kernel, Kind("none", True, 16, 16), CPU, torch.float32)


NAN = float("nan")


@pytest.mark.parametrize(
    "bad",
    [{"output": NAN}, {"state": NAN}, {"dq": NAN}, {"dk": NAN}, {"state": 0.011}, {"dk": float("inf")}, {"dk": 0.021}],
    ids=str,
)
def test_what_is_not_a_number_or_too_far_off_is_refused(monkeypatch, bad):
    found = {"output": 0.0, "state": 0.0, "dq": 0.0, "dk": 0.0} | bad
    monkeypatch.setattr(self_check, "errors", lambda *_, **__: found)
    with pytest.raises(UserError, match="is wrong on this GPU"):
        checked_errors(KERNELS[0], Kind("none", False, 16, 16), CPU, torch.float32)


def test_the_self_check_keeps_documents_apart_where_the_run_does(monkeypatch):
    """A kernel whose state crosses documents passes only where there are none."""
    kernel = next(kernel for kernel in KERNELS if kernel.name == "chunk_gla")
    fla_stand_in.install(monkeypatch, chunk_gla=deaf_to_documents)
    kind = Kind("channel", False, 16, 16)
    assert checked_errors(kernel, kind, CPU, torch.float32)["forward_error"] < 1e-6
    with pytest.raises(UserError, match="is wrong on this GPU: off by these parts of their size: output by"):
        checked_errors(kernel, kind, CPU, torch.float32, documents=True)


def deaf_to_documents(cu_seqlens=None, **arguments):
    arguments.pop("output_final_state"), arguments.update(state=arguments.pop("initial_state"))
    if cu_seqlens is None:
        return by_steps(**arguments)
    state, arguments["state"] = arguments["state"], arguments["state"][:1]
    return by_steps(**arguments)[0], state


def test_the_self_check_is_recorded(monkeypatch):
    """On a GPU an entry a recurrence; elsewhere there is one form."""
    kinds = {Kind("head", True, 64, 64), Kind("none", False, 64, 65)}
    assert self_check.self_check(kinds, CPU, torch.bfloat16) == PLAIN
    monkeypatch.setattr(self_check, "route", lambda kind, *_: Route(KERNELS[0] if kind.decay == "none" else None, "x"))
    monkeypatch.setattr(self_check, "facts_of", lambda device: None)
    found = {"output": 0.001, "state": 0.002, "dq": 0.003, "dk": 0.001}
    monkeypatch.setattr(self_check, "errors", lambda *_, **__: found)
    assert self_check.self_check(kinds, GPU, torch.bfloat16) == {
        "dtype": "bfloat16",
        "recurrences": [
            {"recurrence": {"decay": "head", "delta": True, "keys": 64, "values": 64}, "form": "plain PyTorch (x)"},
            {
                "recurrence": {"decay": "none", "delta": False, "keys": 64, "values": 65},
                "form": "chunk_linear_attn (x)",
                "forward_error": 0.002,
                "gradient_error": 0.003,
            },
        ],
    }
