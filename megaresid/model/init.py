"""Every initial value and every optimizer rule, in one documented place.

GPT-2's values (Radford et al. 2019; nanoGPT uses the same):

=====================================  =============================  ======
parameter                              start                          decays
=====================================  =============================  ======
embeddings of tokens and positions     N(0, 0.02), padding rows 0     yes
weight of a Linear                     N(0, 0.02)                     yes
its bias                               0                              no
weight of an output projection         N(0, 0.02 / sqrt(2 layers))    yes
weight and bias of a LayerNorm         1 and 0                        no
=====================================  =============================  ======

The linear mixers', as in flash-linear-attention's layers and Mamba-2 (Dao and Gu 2024):

=====================================  =============================  ======
weight of a short convolution          U(-1, 1) / sqrt(kernel)        yes
weight of the norm of a head's output  1                              no
``A_log``, whose exp scales a decay    log U(0, 16) or log U(1, 16)   no
``dt_bias``, in the decay's softplus   softplus in [0.001, 0.1]       no
=====================================  =============================  ======

A convolution starts as PyTorch's does, as in those layers and in the code of Mamba-2's authors. The models of
flash-linear-attention draw it from N(0, 0.02) once more: what passes it is then so small that the norm of a head's
output is all epsilon.

Output projections are those that write to the residual stream. What a residual variant or a mixer adds of its own
is declared in its file by ``parameter_rules``, which goes before this table for the module and all below it; a variant
may change the rules of the sublayers by ``sublayer_rule``. Each value is drawn on the CPU in fp32 from a generator
seeded by the run's seed and the parameter's canonical name, so what two variants share starts equal, bit for bit.
"""

import hashlib
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import nn

STD = 0.02
OUTPUT_PROJECTION = re.compile(r"(?:.+\.)?(?:attention\.(?:\w+\.)*o_proj|mlp\.proj)\.weight")
"""By a canonical name or its end; also those of mixers inside a mixer, ``attention.a.o_proj.weight``."""


@dataclass(frozen=True)
class Normal:
    """Independent N(0, std) entries; the rows from ``rows`` on, if given, are zero."""

    std: float
    rows: int | None = None

    def draw(self, shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
        values = torch.randn(shape, generator=generator) * self.std
        if self.rows is not None:
            values[self.rows :] = 0
        return values

    def __str__(self) -> str:
        return f"N(0, {self.std:.3g})"


@dataclass(frozen=True)
class XavierNormal:
    """Independent N(0, gain sqrt(2 / (inputs + outputs))) entries of a matrix [outputs, inputs].

    Glorot and Bengio 2010.
    """

    gain: float

    def draw(self, shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
        return torch.randn(shape, generator=generator) * self.gain * math.sqrt(2 / sum(shape))

    def __str__(self) -> str:
        return f"Xavier, gain {self.gain:.3g}"


@dataclass(frozen=True)
class Uniform:
    """Independent entries between -``bound`` and ``bound``."""

    bound: float

    def draw(self, shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
        return (2 * torch.rand(shape, generator=generator) - 1) * self.bound

    def __str__(self) -> str:
        return f"U(-{self.bound:.3g}, {self.bound:.3g})"


@dataclass(frozen=True)
class LogUniform:
    """The exp of an entry is uniform between ``low`` and ``high``, independently: log U(low, high)."""

    low: float
    high: float

    def draw(self, shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
        # rand may be 0 and is never 1: taken from the upper end, low = 0 is never met, whose log is infinite.
        return (self.high - (self.high - self.low) * torch.rand(shape, generator=generator)).log()

    def __str__(self) -> str:
        return f"log U({self.low:.3g}, {self.high:.3g})"


@dataclass(frozen=True)
class TimeStep:
    """The softplus of an entry is log-uniform between ``low`` and ``high``, independently.

    The step sizes of a discretised state space, as the code of Mamba draws them (Gu and Dao 2023, arXiv 2312.00752).
    """

    low: float = 0.001
    high: float = 0.1

    def draw(self, shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
        step = self.low * (self.high / self.low) ** torch.rand(shape, generator=generator)
        return step.expm1().log()  # softplus(log(e^y - 1)) = y

    def __str__(self) -> str:
        return f"softplus in [{self.low:.3g}, {self.high:.3g}]"


@dataclass(frozen=True)
class Constant:
    """Every entry is ``value``."""

    value: float

    def draw(self, shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
        return torch.full(shape, self.value)

    def __str__(self) -> str:
        return f"{self.value:.3g}"


@dataclass(frozen=True)
class Values:
    """The entries themselves, row by row: a one-hot vector, an identity matrix."""

    values: tuple[float, ...]

    def draw(self, shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
        return torch.tensor(self.values).reshape(shape)

    def __str__(self) -> str:
        shown = [f"{value:.3g}" for value in self.values[:8]]
        return ", ".join(shown + ["…"] * (len(self.values) > 8))


Start = Normal | XavierNormal | Uniform | LogUniform | TimeStep | Constant | Values


@dataclass(frozen=True)
class Rule:
    """How one parameter starts, and how the optimizer treats it.

    ``fp32``: it must not be rounded to bf16, where 1 + 0.001 is 1; DeepSpeed's ``bf16`` mode is refused with it.
    ``epsilon_multiplier`` scales the epsilon of the Adam family.
    """

    start: Start
    decay: bool
    lr_multiplier: float = 1.0
    epsilon_multiplier: float = 1.0
    fp32: bool = False


def owned_rules(module: nn.Module, layers: int, prefix: str) -> dict[str, Rule]:
    """GPT-2's rules of the parameters that ``module`` itself owns (children excluded), by local name.

    ``prefix`` is the module's canonical name; ``layers`` scales the output projections.
    """
    if isinstance(module, nn.Linear):
        scale = 1 / math.sqrt(2 * layers) if OUTPUT_PROJECTION.fullmatch(f"{prefix}.weight") else 1.0
        return {"weight": Rule(Normal(STD * scale), decay=True), "bias": Rule(Constant(0.0), decay=False)}
    if isinstance(module, nn.LayerNorm):
        return {"weight": Rule(Constant(1.0), decay=False), "bias": Rule(Constant(0.0), decay=False)}
    if isinstance(module, nn.Embedding):
        return {"weight": Rule(Normal(STD), decay=True)}
    return {}


def output_projections_at(std: float, name: str, rule: Rule) -> Rule:
    """``rule`` of a sublayer's parameter ``name``; an output projection starts at N(0, ``std``)."""
    return replace(rule, start=Normal(std)) if OUTPUT_PROJECTION.fullmatch(name) else rule


def generator_for(seed: int, name: str) -> torch.Generator:
    """A CPU generator that depends on the seed and the canonical name alone."""
    return torch.Generator().manual_seed(derived_seed(seed, name))


def derived_seed(seed: int, name: str) -> int:
    """A seed of 63 bits for one purpose of a run, unrelated to those for others."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:8], "little") >> 1


@torch.no_grad()
def fill(parameters: Mapping[str, nn.Parameter], rules: Mapping[str, Rule], seed: int) -> None:
    """Give every parameter (by canonical name) its initial value; raises KeyError for one without a rule."""
    missing = parameters.keys() - rules.keys()
    if missing:
        raise KeyError(f"no initial value is declared for: {', '.join(sorted(missing))}")
    for name, parameter in parameters.items():
        parameter.copy_(rules[name].start.draw(parameter.shape, generator_for(seed, name)))
