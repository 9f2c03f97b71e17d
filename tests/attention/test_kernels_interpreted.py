"""fla's own kernels, as ``kernels/calls.py`` calls them, in Triton's interpreter against the plain form in fp64.

65 tokens are two chunks, the second not full. Seen with Triton 3.9.0 and fla 0.6.0.
"""

import pytest
import torch
from interpreter import MISSING, REASON, Interpreter

from megaresid.attention.kernels.routes import DECAYS, KERNELS, Facts, route
from megaresid.attention.kernels.self_check import FORWARD, GRADIENT, checked_errors, errors
from megaresid.attention.kind import Kind

pytestmark = [pytest.mark.full, pytest.mark.skipif(bool(MISSING), reason=REASON)]

CPU = torch.device("cpu")
DOCUMENTS = torch.tensor([[0] * 30 + [1] + [2] * 34, [5] * 64 + [6]], dtype=torch.int32)
SERVED = [
    (kernel, decay)
    for kernel in KERNELS
    for decay in DECAYS[: DECAYS.index(kernel.decay) + 1]
    if decay != "none" or kernel.decay == "none"
]
SINGLE = [(kernel, decay) for kernel, decay in SERVED if torch.float32 in kernel.dtypes]
OWN = [kernel for kernel in KERNELS if torch.float32 in kernel.dtypes]


def named(value):
    return getattr(value, "name", None)


@pytest.fixture(scope="module")
def interpreter():
    started = Interpreter()
    yield started
    started.close()


def assert_close(found: dict[str, float], tolerance: float) -> None:
    """A decay's gradient is a sum whose terms cancel, a constant one's over all tokens: it is let be worse."""
    assert found.pop("dg", 0.0) < 10 * tolerance
    assert all(error < tolerance for error in found.values()), found


@pytest.mark.parametrize(("kernel", "decay"), SINGLE, ids=named)
def test_in_fp32_they_equal_the_plain_form(interpreter, kernel, decay):
    """Outputs, final states and all gradients, with a state to start from; heads of a width that a kernel does not have
    and of one that it has."""
    kind = Kind(decay, kernel.delta, 9, 32)
    assert_close(interpreter.run(errors, kernel, kind, CPU, torch.float32, batch=1), 1e-6)


@pytest.mark.parametrize("kernel", OWN, ids=named)
def test_documents_are_kept_apart(interpreter, kernel):
    kind = Kind(kernel.decay, kernel.delta, 16, 25)
    assert_close(interpreter.run(errors, kernel, kind, CPU, torch.float32, segment=DOCUMENTS), 1e-6)


@pytest.mark.parametrize("kernel", [kernel for kernel in KERNELS if kernel.decay in ("head", "channel")], ids=named)
def test_strong_decays_stay_exact(interpreter, kernel):
    """Of up to e^-100 a token: no overflow, and the gradients of what is nearly nothing stay right."""
    kind = Kind(kernel.decay, kernel.delta, 16, 16)
    assert_close(interpreter.run(errors, kernel, kind, CPU, torch.float32, batch=1, gate=30.0), 3e-6)


@pytest.mark.parametrize("kernel", KERNELS, ids=named)
def test_in_fp16_they_are_within_its_rounding(interpreter, kernel):
    """bf16, which the interpreter cannot do, has an eighth of fp16's precision: what passes here passes the self-check
    in bf16."""
    kind = Kind(kernel.decay, kernel.delta, 32, 32)
    found = interpreter.run(errors, kernel, kind, CPU, torch.float16, segment=DOCUMENTS[:1], batch=1)
    assert all(found.pop(name) < FORWARD / 8 for name in ("output", "state"))
    assert all(error < GRADIENT / 8 for error in found.values()), found


def test_the_self_check_passes_what_is_right(interpreter):
    kind = Kind("head", True, 16, 16)
    kernel = route(kind, torch.float16, Facts(hopper=False, triton="3.9.0", fla="0.6.0")).kernel
    found = interpreter.run(checked_errors, kernel, kind, CPU, torch.float16)
    assert 0 < found["forward_error"] < 1e-3 and 0 < found["gradient_error"] < 2e-3
