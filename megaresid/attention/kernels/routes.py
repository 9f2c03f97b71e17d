"""Which form a recurrence runs in on a GPU: a kernel of flash-linear-attention, or the plain one.

A pure function of facts, so that what an H200 would do can be asked, and tested, anywhere. The limits are those of
fla 0.6.0; its ``chunk_bwd_dqkwg`` with a decay that is a token's and a head's own gives wrong gradients on Hopper with
Triton 3.4.0 to below 3.7.1 (fla issue 640), and refuses. Such a decay is there broadcast over a head's channels, and
the kernel for a decay of the channels, which does not use that function, gives the same numbers.
"""

import importlib.util
from dataclasses import dataclass, field
from functools import cache
from importlib import metadata
from typing import Any, NamedTuple

import torch
from packaging.version import Version

from megaresid.attention.kind import Kind
from megaresid.errors import UserError

DECAYS = ("none", "constant", "head", "channel")
"""From the special to the general: each is a case of those after it."""

INSTALL = 'pip install "flash-linear-attention>=0.6,<0.7" "triton>=3.3"'


@dataclass(frozen=True)
class Kernel:
    """An operator of fla.

    ``decay`` is the decay that it takes, under the name ``gate``; ``options`` are given with every call; ``widest`` is
    its limit of a head's keys.
    """

    name: str
    module: str
    decay: str
    delta: bool
    gate: str = "g"
    options: dict[str, Any] = field(default_factory=dict, hash=False)
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16, torch.float16)
    widest: int | None = None
    scalar_gated: bool = False
    """Whether its backward pass is the one that Hopper and some versions of Triton get wrong."""


HALF = (torch.bfloat16, torch.float16)
DELTA = {"delta": True, "widest": 256}

KERNELS = (
    Kernel("chunk_linear_attn", "fla.ops.linear_attn", "none", delta=False, options={"normalize": False}),
    Kernel("chunk_simple_gla", "fla.ops.simple_gla", "constant", delta=False, gate="g_gamma"),
    Kernel("chunk_simple_gla", "fla.ops.simple_gla", "head", delta=False, scalar_gated=True),
    Kernel("chunk_gla", "fla.ops.gla", "channel", delta=False),
    Kernel("chunk_delta_rule", "fla.ops.delta_rule", "none", **DELTA, dtypes=HALF),
    Kernel("chunk_gated_delta_rule", "fla.ops.gated_delta_rule", "head", **DELTA, scalar_gated=True),
    Kernel("chunk_kda", "fla.ops.kda", "channel", **DELTA),
)


class Facts(NamedTuple):
    """What a route depends on beside the recurrence: the versions are None where a package is not installed;
    ``missing`` are modules that fla needs and does not bring; ``tf32`` is whether torch may round fp32 products."""

    hopper: bool
    triton: str | None
    fla: str | None
    missing: tuple[str, ...] = ()
    tf32: bool = False

    @property
    def miscompile(self) -> bool:
        """Whether Triton makes wrong code of the backward pass of kernels whose decay is a token's and a head's own."""
        return self.hopper and self.triton is not None and Version("3.4.0") <= Version(self.triton) < Version("3.7.1")


class Route(NamedTuple):
    """``kernel`` is None for the plain form; ``reason`` says why it is not the first choice, and is "" where it is."""

    kernel: Kernel | None
    reason: str

    def __str__(self) -> str:
        name = "plain PyTorch" if self.kernel is None else self.kernel.name
        return f"{name} ({self.reason})" if self.reason else name


def route(kind: Kind, dtype: torch.dtype, facts: Facts) -> Route:
    """The form that ``kind`` runs in for products in ``dtype``.

    Nothing is computed less exactly than asked for: fp64, and fp32 where torch is not allowed TF32 or the kernel does
    not take it, run in the plain form. Raises UserError where fla is missing or too old, and for heads too wide.
    """
    # A kernel's fp32 products are TF32's, of ten bits.
    if dtype == torch.float64 or (dtype == torch.float32 and not facts.tf32):
        return Route(None, f"kernels have no products in {_name(dtype)}")
    able = [kernel for kernel in KERNELS if kernel.delta == kind.delta and _covers(kernel, kind)]
    first = able[0]
    kernel = next(kernel for kernel in able if not (kernel.scalar_gated and facts.miscompile))
    if dtype not in kernel.dtypes:
        return Route(None, f"{kernel.name} does not take {_name(dtype)}")
    check_installed(facts, "attention by a recurrence on a GPU")
    if kernel.widest is not None and kind.keys > kernel.widest:
        raise UserError(
            f"a head's keys are {kind.keys} wide, and {kernel.name}, the GPU's kernel, takes at most {kernel.widest}: "
            "give attention more heads, or narrower ones"
        )
    if kernel is first:
        return Route(kernel, "")
    return Route(kernel, f"{first.name} is wrong on Hopper with Triton {facts.triton}, right from 3.7.1")


def _covers(kernel: Kernel, kind: Kind) -> bool:
    return DECAYS.index(kernel.decay) >= DECAYS.index(kind.decay)


def check_installed(facts: Facts, what: str) -> None:
    """Raises UserError where ``what``, which runs in fla's kernels, has not the versions of them that are right."""
    needs = f"{what} needs fla-core 0.6.0 and Triton 3.3 or newer"
    lacks = [name for name, version in (("fla-core", facts.fla), ("triton", facts.triton)) if version is None]
    if lacks := lacks + list(facts.missing):
        raise UserError(f"{needs}, and there is no {' and no '.join(lacks)}: {_mend(facts)}")
    if Version(facts.fla) < Version("0.6.0"):
        raise UserError(f"{needs}; fla-core {facts.fla} computes wrong gradients on some GPUs: {INSTALL}")
    if Version(facts.triton) < Version("3.3"):
        raise UserError(f"{needs}, not Triton {facts.triton}: {INSTALL}")


def _mend(facts: Facts) -> str:
    return " ".join((INSTALL, *facts.missing))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def facts_of(device: torch.device) -> Facts:
    """Of a GPU and this installation."""
    return _lasting_facts(device)._replace(tf32=torch.get_float32_matmul_precision() != "highest")


@cache
def _lasting_facts(device: torch.device) -> Facts:
    hopper = torch.version.hip is None and torch.cuda.get_device_capability(device)[0] == 9
    missing = tuple(name for name in ("einops",) if importlib.util.find_spec(name) is None)
    return Facts(hopper, triton=_version("triton", "pytorch-triton"), fla=_version("fla-core"), missing=missing)


def _version(*names: str) -> str | None:
    """The version of the first of the distributions that is installed."""
    for name in names:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            pass
    return None
