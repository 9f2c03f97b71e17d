"""How the time of mixers grows with the length of a text: ``python -m megaresid.benchmark.mixers``

Forward and backward of softmax attention (PyTorch's ``scaled_dot_product_attention``) and of every recurrence, on
random inputs of one text, and of every whole mixer with its projections; on a CPU. All of them and all lengths take
turns, each round beginning with another one. Times are CPU time of the process, which others on the machine change
little.
"""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import tyro

from megaresid.accelerator import choose_accelerator
from megaresid.benchmark.mixer_report import Times, draw, print_tables, summarise
from megaresid.benchmark.outputs import check_outputs, make_folders
from megaresid.benchmark.variants import visits
from megaresid.errors import UserError, exits_with_user_errors

if TYPE_CHECKING:
    import torch

SCHEMA = 1
SEED = 42
REFERENCE = "softmax"
CORES = {
    REFERENCE: None,
    "linear attention": ("none", False),
    "retention": ("constant", False),
    "simple GLA": ("head", False),
    "GLA": ("channel", False),
    "delta rule": ("none", True),
    "gated delta rule": ("head", True),
    "KDA": ("channel", True),
}
"""What computes a mixer's core: softmax attention, or the recurrence with (decay, delta rule)."""


class Entry(NamedTuple):
    """A row: of the group "core" or "mixer", by its name or spec."""

    group: str
    name: str


@dataclass(frozen=True)
class Request:
    """CPU time of mixers by the length of the text, beside softmax attention in the same run."""

    lengths: tuple[int, ...] = (512, 1024, 2048, 4096, 8192)
    """Tokens of the text, in rising order."""
    heads: int = 4
    """Of each mixer."""
    head_width: int = 64
    """Of keys and values; the width of whole mixers is this times the heads."""
    mixers: str | None = None
    """Specs separated by semicolons, such as "gla; kda"; by default all that run on a CPU. "" for none."""
    rounds: int = 3
    """How often each is visited."""
    threads: int = 1
    """Of PyTorch's operators. With more, times are the sum over all."""
    json: Path | None = None
    """Write everything measured to this new file."""
    plot: Path | None = None
    """Draw time by length, both logarithmic, into this new file (.png, .svg or .pdf)."""

    def check(self) -> None:
        """Raises UserError for what cannot be measured or kept."""
        for name in ("heads", "head_width", "rounds", "threads"):
            if (value := getattr(self, name)) < 1:
                raise UserError(f"--{name.replace('_', '-')} {value}: must be at least 1")
        rising = sorted({length for length in self.lengths if length > 1})
        if not self.lengths or tuple(rising) != self.lengths:
            raise UserError(
                f"--lengths {' '.join(map(str, self.lengths))}: name one or more, from 2 on, each above the one before"
            )
        check_outputs(self.json, self.plot)

    def specs(self) -> list[str]:
        """Of the whole mixers; softmax is the first if there are any."""
        if self.mixers is None:
            from megaresid.benchmark.entries import mixers  # it needs torch

            specs = mixers()
        else:
            specs = [spec.strip() for spec in self.mixers.split(";") if spec.strip()]
        return list(dict.fromkeys([REFERENCE, *specs])) if specs else []


def core(name: str, length: int, request: Request) -> "Callable[[], torch.Tensor]":
    """Calls one of ``CORES`` on random q, k, v [1, T, H, D] of unit keys, with weak decays."""
    import torch
    from torch.nn.functional import logsigmoid, normalize, scaled_dot_product_attention

    from megaresid.attention.recurrence import recurrence

    generator, size = torch.Generator().manual_seed(SEED), (1, length, request.heads, request.head_width)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    q, k, v = (x.requires_grad_() for x in (normal(*size), normalize(normal(*size), dim=-1), normal(*size)))
    if CORES[name] is None:
        heads_first = [x.transpose(1, 2) for x in (q, k, v)]
        return lambda: scaled_dot_product_attention(*heads_first, is_causal=True).transpose(1, 2)
    decay, delta = CORES[name]
    beta = normal(*size[:3]).sigmoid().requires_grad_()
    gates = {"none": (0,), "constant": size[2:3], "head": size[:3], "channel": size}[decay]
    g = (logsigmoid(normal(*gates)) / 16).requires_grad_()
    return lambda: recurrence(q, k, v, None if decay == "none" else g, beta if delta else None)[0]


def mixer(spec: str, length: int, request: Request) -> "Callable[[], torch.Tensor]":
    """Calls a whole mixer, as a model has it, on a random [1, T, C]. Raises UserError."""
    import torch

    from megaresid.model.gpt import build
    from megaresid.model.layer import Layer
    from megaresid.model.plan import ModelPlan
    from megaresid.model.presets import ModelShape

    width = request.heads * request.head_width
    shape = ModelShape(layers=1, heads=request.heads, width=width, context=length, vocab_size=128)
    model = build(ModelPlan(shape, attention=spec), SEED)
    module = next(part.attention for part in model.parts if isinstance(part, Layer))
    x = torch.randn(1, length, width, generator=torch.Generator().manual_seed(SEED)).requires_grad_()
    return lambda: module(x, ())[0]


def clock(call: "Callable[[], torch.Tensor]") -> Times:
    """CPU seconds of a forward pass, and of it with its backward pass. What the first such pass does once (memory,
    caches) is not counted."""
    import torch

    y = call()
    cotangent = torch.ones_like(y)
    y.backward(cotangent)
    since = time.process_time()
    y = call()
    forward = time.process_time() - since
    y.backward(cotangent)
    return Times(forward, time.process_time() - since)


def measure(request: Request, entries: list[Entry]) -> dict[Entry, dict[int, list[Times]]]:
    """The times of every round, by entry and length; one line is printed a visit."""
    import torch

    torch.set_num_threads(request.threads)
    places = [(entry, length) for length in request.lengths for entry in entries]
    found = {entry: {length: [] for length in request.lengths} for entry in entries}
    started = time.perf_counter()
    for done, (index, (entry, length), _) in enumerate(visits(places, request.rounds), start=1):
        make = core if entry.group == "core" else mixer
        found[entry][length].append(times := clock(make(entry.name, length, request)))
        print(
            f"round {index + 1}/{request.rounds}  {done}/{request.rounds * len(places)}  {1e3 * times.both:9,.1f} ms  "
            f"{time.perf_counter() - started:5,.0f} s  {length:6} tokens  {entry.group} {entry.name}",
            flush=True,
        )
    return found


def main(request: Request) -> None:
    choose_accelerator()
    request.check()
    entries = [*(Entry("core", name) for name in CORES), *(Entry("mixer", spec) for spec in request.specs())]
    for entry in entries:
        if entry.group == "mixer":
            mixer(entry.name, request.lengths[0], request)  # before anything is measured
    make_folders(request.json, request.plot)
    described = f"1 text, {request.heads} heads of width {request.head_width}, float32, {request.threads} thread(s)"
    print(f"{described}: {len(entries)} entries, {request.rounds} round(s)", flush=True)
    rows = summarise(measure(request, entries), REFERENCE)
    print_tables(rows)
    if request.json is not None:
        keep(request, rows)
    if request.plot is not None:
        draw(rows, request.plot, described)


def keep(request: Request, rows: list[dict[str, Any]]) -> None:
    """Write what was measured, with what it was measured on."""
    from megaresid.training.run_dir import environment, write_json

    options = {key: value for key, value in asdict(request).items() if key not in ("json", "plot")}
    write_json(request.json, {"schema": SCHEMA, "options": options, "environment": environment(), "entries": rows})


if __name__ == "__main__":
    exits_with_user_errors(lambda: main(tyro.cli(Request, prog="python -m megaresid.benchmark.mixers")))()
