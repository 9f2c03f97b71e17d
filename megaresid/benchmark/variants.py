"""Step time and memory of residual variants beside vanilla: ``python -m megaresid.benchmark.variants``

A step is forward, backward and AdamW's update through plain PyTorch on one batch of random tokens. Every round goes
through all variants, each round beginning with another one, and vanilla's steps stand between the variant's own, so
that a machine which others use too slows both alike. Vanilla is measured against itself as well: that row shows
the noise. On a CPU every visit is a process of its own, and memory is the resident memory of one more.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any, Literal

import tyro

from megaresid.accelerator import choose_accelerator
from megaresid.benchmark.outputs import check_outputs, make_folders
from megaresid.benchmark.variant_report import draw, print_table, summarise
from megaresid.errors import UserError, exits_with_user_errors, suggestion

SCHEMA = 1


@dataclass(frozen=True)
class Request:
    """Step time and peak memory of residual variants, each beside vanilla in the same run."""

    model: str = "tiny"
    """Name of the preset."""
    variants: str | None = None
    """Specs separated by semicolons, such as "rezero; attention=value_residual"; by default all."""
    rounds: int = 5
    """How often each is visited; six or more give an interval that is 95% sure."""
    pairs: int = 3
    """Steps of the variant in a visit, each beside one of vanilla."""
    context: int | None = None
    """Tokens per sequence, instead of the preset's."""
    micro_batch: int = 2
    """Sequences per step."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where to run."""
    compile: bool = False
    """torch.compile of the whole model, anew in every visit."""
    autocast: Literal["bfloat16"] | None = None
    """Run matrix products in this dtype."""
    threads: int | None = None
    """Of PyTorch's operators, instead of its own choice."""
    json: Path | None = None
    """Write everything measured to this new file, from the first visit on."""
    plot: Path | None = None
    """Draw both ratios into this new file (.png, .svg or .pdf)."""

    def check(self) -> None:
        """Raises UserError for what cannot be measured or kept."""
        import torch

        from megaresid.model.presets import PRESETS

        if self.model not in PRESETS:
            raise UserError(f"--model {self.model}: {suggestion(self.model, PRESETS)}")
        for name in ("rounds", "pairs", "context", "micro_batch", "threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"--{name.replace('_', '-')} {value}: must be at least 1")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise UserError("--device cuda: torch finds no GPU here: leave it out, or use a machine that has one")
        check_outputs(self.json, self.plot)

    def describe(self, context: int) -> str:
        """One line, for a context of so many tokens."""
        words = [self.model, f"{self.micro_batch} x {context} tokens", self.device, self.autocast or "float32"]
        return ", ".join(words + ["compiled"] * self.compile)


def visits(entries: list[str], rounds: int) -> Iterator[tuple[int, str, bool]]:
    """(round, entry, whether its first step goes before vanilla's): all entries a round, each round from another on."""
    for index in range(rounds):
        shift = index * len(entries) // rounds
        for entry in entries[shift:] + entries[:shift]:
            yield index, entry, (index + entries.index(entry)) % 2 == 0


def compare(request: Request) -> None:
    """Measure, print and keep what was asked for; exits with 1 when a variant failed."""
    choose_accelerator()
    request.check()
    # After the options are parsed: --help must not wait for these imports.
    from megaresid.benchmark.entries import entries
    from megaresid.benchmark.steps import Setting, isolated, kept_bytes, race, weigh
    from megaresid.model.presets import PRESETS

    shape = PRESETS[request.model]
    shape = shape.model_copy(update={"context": request.context or shape.context})
    chosen = entries(request.variants, shape)
    setting = Setting(
        shape, request.micro_batch, request.device, request.compile, request.autocast, request.threads, request.pairs
    )
    make_folders(request.json, request.plot)
    described = request.describe(shape.context)
    print(f"{described}: {len(chosen)} variant(s), {request.rounds} round(s) of {request.pairs} pair(s)", flush=True)

    def run(function: Callable, *args) -> Any:
        return isolated(function, *args) if request.device == "cpu" else function(*args)

    saved, peaks = {"vanilla": kept_bytes("vanilla", setting)}, {"vanilla": run(weigh, "vanilla", setting)}
    found: dict[str, list] = {entry: [] for entry in chosen}
    failed: dict[str, str] = {}

    def rows() -> list[dict[str, Any]]:
        return [
            summarise(entry, found[entry], *((known[entry], known["vanilla"]) for known in (peaks, saved)))
            for entry in chosen
            if found[entry] and entry not in failed
        ]

    started, total = time.perf_counter(), request.rounds * len(chosen)
    for done, (index, entry, first) in enumerate(visits(chosen, request.rounds), start=1):
        if entry in failed:
            continue
        try:
            if entry not in peaks:
                saved[entry], peaks[entry] = kept_bytes(entry, setting), run(weigh, entry, setting)
            found[entry].append(pairs := run(race, entry, setting, first))
        except Exception as error:  # the others are worth measuring all the same
            failed[entry] = f"{type(error).__name__}: {error}".splitlines()[0]
            continue
        ours, vanilla = (1e3 * median(seconds) for seconds in zip(*pairs))
        spent = time.perf_counter() - started
        print(
            f"round {index + 1}/{request.rounds}  {done}/{total}  {ours:8,.1f} ms  vanilla {vanilla:8,.1f} ms  "
            f"{spent:5,.0f} s, {spent / done * (total - done):5,.0f} s left  {entry}",
            flush=True,
        )
        if request.json is not None:
            keep(request, shape.model_dump(), rows(), failed)
    print_table(rows(), failed)
    if request.plot is not None:
        draw(rows(), request.plot, described)
    if failed:
        raise SystemExit(1)


def keep(request: Request, shape: dict[str, Any], rows: list[dict[str, Any]], failed: dict[str, str]) -> None:
    """Write what was measured so far, with what it was measured on."""
    from megaresid.training.run_dir import environment, write_json

    options = {key: value for key, value in asdict(request).items() if key not in ("json", "plot")}
    tree = {"schema": SCHEMA, "options": options, "shape": shape, "environment": environment()}
    write_json(request.json, tree | {"failed": failed, "variants": rows})


if __name__ == "__main__":
    exits_with_user_errors(lambda: compare(tyro.cli(Request, prog="python -m megaresid.benchmark.variants")))()
