"""Training steps of a plain model, timed and weighed beside those of a reference."""

import ctypes
import gc
import multiprocessing
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch._subclasses import FakeTensorMode

from megaresid.benchmark.entries import plan_of
from megaresid.config import OptimizerOptions
from megaresid.model.compile import compile_model
from megaresid.model.gpt import GPT, build, canonical_parameters, canonical_rules, set_step
from megaresid.model.measure import saved_bytes
from megaresid.model.presets import ModelShape
from megaresid.training.optimizer import parameter_groups

SEED = 42
M_MMAP_THRESHOLD = -3  # of glibc's malloc.h


@dataclass(frozen=True)
class Setting:
    """What every variant is measured with. ``autocast`` names a dtype; ``threads`` None leaves torch's choice."""

    shape: ModelShape
    micro_batch: int
    device: str
    compile: bool
    autocast: str | None
    threads: int | None
    pairs: int

    def casts(self, device: str) -> torch.autocast:
        """The context that matrix products on ``device`` run in."""
        dtype = getattr(torch, self.autocast or "bfloat16")
        return torch.autocast(device, dtype=dtype, enabled=self.autocast is not None)


class Stepper:
    """A model with the project's optimizer groups under PyTorch's fused AdamW, and one batch that it trains on."""

    def __init__(self, entry: str, setting: Setting):
        plan = plan_of(entry, setting.shape)
        model = build(plan, SEED).to(setting.device)
        set_step(model, 1)
        groups = parameter_groups(
            canonical_parameters(model, model.prefixes),
            canonical_rules(model, model.prefixes, plan),
            options := OptimizerOptions(),
        )
        self.optimizer = torch.optim.AdamW(groups, betas=options.betas, fused=True)
        self.module = model
        if setting.compile:
            dtype = getattr(torch, setting.autocast or "float32")
            self.module = compile_model(model, fullgraph=plan.one_graph(torch.device(setting.device), dtype))
        shape, generator = setting.shape, torch.Generator().manual_seed(SEED)
        tokens = torch.randint(shape.vocab_size, (setting.micro_batch, shape.context + 1), generator=generator)
        self.idx, self.targets = (t.contiguous().to(setting.device) for t in (tokens[:, :-1], tokens[:, 1:]))
        self.autocast = setting.casts(setting.device)

    def step(self) -> None:
        with self.autocast:
            _, loss = self.module(self.idx, self.targets)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def race(entry: str, setting: Setting, variant_first: bool) -> list[tuple[float, float]]:
    """Seconds of a variant's step and of one of vanilla's beside it, for each pair. The two take turns, and each pair
    begins with the other one."""
    _begin(setting)
    steppers = [Stepper(entry, setting), Stepper("vanilla", setting)]
    order = [0, 1] if variant_first else [1, 0]
    for index in 2 * order:
        steppers[index].step()  # the first compiles and makes the optimizer's states, the second faults in memory
    pairs = []
    for _ in range(setting.pairs):
        pair = {index: seconds_of(steppers[index].step, setting.device) for index in order}
        pairs.append((pair[0], pair[1]))
        order.reverse()
    return pairs


def weigh(entry: str, setting: Setting) -> int | None:
    """The bytes that a step holds at most above what stands between steps (see ``peak_bytes``).

    On a CPU it is for a process of its own, which it gives another way of allocating: glibc would keep what was freed,
    and use it again unseen.
    """
    _begin(setting)
    if setting.device == "cpu" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(M_MMAP_THRESHOLD, 1 << 16)  # blocks from 64 KiB on come from the system and go back there
    stepper = Stepper(entry, setting)
    for _ in range(2):
        stepper.step()
    return peak_bytes(stepper.step, setting.device)


def seconds_of(call: Callable[[], Any], device: str) -> float:
    """Wall time of a call with the work that it leaves on the device."""
    _synchronize(device)
    since = time.perf_counter()
    call()
    _synchronize(device)
    return time.perf_counter() - since


def kept_bytes(entry: str, setting: Setting) -> int:
    """Activation bytes that embedding and layers keep for the backward pass, uncompiled, counted on fake tensors.

    What the loss keeps is left out: it is the same for all variants, and far more than all else in a small model.
    """

    def hidden_states() -> torch.Tensor:
        x = idx
        for part in model.parts:
            x = part(x)
        return x

    with FakeTensorMode():
        model = GPT(plan_of(entry, setting.shape))
        idx = torch.zeros(setting.micro_batch, setting.shape.context, dtype=torch.int64)
        with setting.casts("cpu"):
            return saved_bytes(hidden_states, (*model.parameters(), *model.buffers()))


def peak_bytes(call: Callable[[], Any], device: str) -> int | None:
    """The most memory that a call holds above what is held when it begins: of the GPU's allocator, or the resident
    memory of this process. None where there is no Linux to reset the high-water mark."""
    gc.collect()
    if device != "cpu":
        _synchronize(device)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        _synchronize(device)
        return torch.cuda.max_memory_allocated() - before
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # sets the mark to the resident memory of now
    except OSError:
        return None
    before = _high_water_mark()
    call()
    return _high_water_mark() - before


def isolated(function: Callable, *args) -> Any:
    """``function(*args)`` in a process of its own, whose memory nobody has used before.

    It is forked from a server that has done the imports, so that only the first start takes seconds.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, "torch._dynamo"])  # the optimizer would import the latter
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(function, *args).result()


def _begin(setting: Setting) -> None:
    """Leave nothing of earlier visits in this process, neither models nor compiled graphs."""
    if setting.threads:
        torch.set_num_threads(setting.threads)
    if setting.compile:
        torch.compiler.reset()
    gc.collect()


def _synchronize(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


def _high_water_mark() -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM:"))
