"""Kernels held against the plain form: before a run, whether they can serve; at its start, whether they are right."""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch.nn.functional import logsigmoid, normalize

from megaresid.attention.chunks import by_chunks
from megaresid.attention.kernels.routes import Kernel, Route, facts_of, route
from megaresid.attention.kind import Kind
from megaresid.errors import UserError

FORWARD, GRADIENT = 0.01, 0.02
"""The most error that is let pass, in units of the root mean square: about what fla's own tests allow in 16 bits."""

BATCH, LENGTH, DOCUMENT = 2, 65, 27
"""Rows of two chunks, of which the second is not full, and of three documents."""

PLAIN = {"form": "plain PyTorch"}


def routes_of(kinds: Iterable[Kind], device: torch.device, dtype: torch.dtype) -> dict[Kind, Route]:
    """The form of every recurrence on a device; elsewhere than on a GPU there is one. Raises UserError."""
    kinds = sorted(kinds)
    if device.type != "cuda":
        return {kind: Route(None, "") for kind in kinds}
    return {kind: route(kind, dtype, facts_of(device)) for kind in kinds}


def check_kernels(kinds: Iterable[Kind], device: torch.device, dtype: torch.dtype) -> None:
    """Raises UserError where a plan's recurrences cannot run on the device with products in ``dtype``."""
    routes_of(kinds, device, dtype)


def self_check(
    kinds: Iterable[Kind], device: torch.device, dtype: torch.dtype, documents: bool = False
) -> dict[str, Any]:
    """Run the kernel of every recurrence on a few tokens against the plain form: what each was, and its errors, for
    ``environment.json``; with ``documents`` on tokens of several, which kernels treat otherwise. Raises UserError for
    one that fails or is wrong. Elsewhere than on a GPU it runs nothing."""
    if device.type != "cuda":
        return PLAIN
    checked = []
    for kind, taken in routes_of(kinds, device, dtype).items():
        entry = {"recurrence": kind._asdict(), "form": str(taken)}
        if taken.kernel is not None:
            entry |= checked_errors(taken.kernel, kind, device, dtype, documents)
        checked.append(entry)
    return {"dtype": str(dtype).removeprefix("torch."), "recurrences": checked}


def checked_errors(
    kernel: Kernel, kind: Kind, device: torch.device, dtype: torch.dtype, documents: bool = False
) -> dict[str, float]:
    """The largest error of the results and of the gradients. Raises UserError where one is too large."""
    where = f"{kernel.name} with heads of {kind.keys} and {kind.values} in {dtype}"
    segment = (torch.arange(BATCH * LENGTH, device=device) // DOCUMENT).view(BATCH, LENGTH) if documents else None
    try:
        found = errors(kernel, kind, device, dtype, segment=segment)
    except Exception as error:  # of Triton's compiler and the driver, which have no common class
        what = str(error).partition("\n")[0]
        raise UserError(f"{where} fails on this GPU ({type(error).__name__}: {what}): {MEND}") from error
    limits = {name: FORWARD if name in ("output", "state") else GRADIENT for name in found}
    wrong = {name: error for name, error in found.items() if not error < limits[name]}  # not a number is wrong too
    if wrong:
        told = ", ".join(f"{name} by {error:.2g}" for name, error in wrong.items())
        raise UserError(
            f"{where} is wrong on this GPU: off by these parts of their size: {told}, where {FORWARD} of results and "
            f"{GRADIENT} of gradients would pass: {MEND}"
        )
    forward = max(found["output"], found["state"])
    return {"forward_error": forward, "gradient_error": max(found[name] for name in found if name.startswith("d"))}


MEND = "install other versions of triton and flash-linear-attention, or choose another attention"


def errors(
    kernel: Kernel,
    kind: Kind,
    device: torch.device,
    dtype: torch.dtype,
    *,
    reference: torch.dtype = torch.float64,
    batch: int = BATCH,
    length: int = LENGTH,
    heads: int = 2,
    segment: torch.Tensor | None = None,
    gate: float = 1.0,
    seed: int = 0,
) -> dict[str, float]:
    """||kernel - plain|| / ||plain|| of the output, the final state and the gradient of every argument, where the plain
    form computes in ``reference`` from the same numbers, which are rounded to ``dtype``. ``gate`` scales the decays."""
    from megaresid.attention.kernels.calls import run

    given = _arguments(kind, batch, length, heads, gate, seed)
    given = {
        name: x.to(device, dtype if name in ("q", "k", "v") else torch.float32).requires_grad_()
        for name, x in given.items()
    }
    if kernel.decay == "constant":  # the kernel for constant decays is for those that are not trained
        given["g"].requires_grad_(False)
    exact = {name: x.detach().to(reference).requires_grad_(x.requires_grad) for name, x in given.items()}
    found = _results(partial(run, kernel, segment=segment), given)
    expected = _results(partial(by_chunks, segment=segment), exact)
    return {name: _error(found[name], value) for name, value in expected.items()}


def _arguments(kind: Kind, batch: int, length: int, heads: int, gate: float, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    tokens = (batch, length, heads)
    given = {"q": random(*tokens, kind.keys), "k": random(*tokens, kind.keys), "v": random(*tokens, kind.values)}
    if kind.delta:  # longer keys would let the state grow without end
        given |= {"k": normalize(given["k"], dim=-1), "beta": random(*tokens).sigmoid()}
    if kind.decay == "constant":
        given["g"] = gate * torch.log1p(-(2.0 ** -(torch.arange(heads) + 5)))
    elif kind.decay != "none":
        given["g"] = gate * logsigmoid(random(*tokens, *[kind.keys] * (kind.decay == "channel")) + 2)
    return given | {"state": random(batch, heads, kind.keys, kind.values)}


def _results(form: Callable[..., tuple[torch.Tensor, torch.Tensor]], given: dict[str, torch.Tensor]):
    """Output, final state and gradients of a fixed linear function of the two, by name."""
    output, state = form(**given)
    generator = torch.Generator().manual_seed(1)
    directions = [torch.randn(x.shape, generator=generator).to(x) for x in (output, state)]
    names = [name for name, x in given.items() if x.requires_grad]
    gradients = torch.autograd.grad((output, state), [given[name] for name in names], directions)
    return {"output": output, "state": state, **{f"d{name}": x for name, x in zip(names, gradients)}}


def _error(found: torch.Tensor, expected: torch.Tensor) -> float:
    found, expected = found.detach().double(), expected.detach().double()
    return ((found - expected).norm() / expected.norm()).item()
