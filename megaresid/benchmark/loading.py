"""What reading training data costs: ``python -m megaresid.benchmark.loading``

Four questions: how long opening takes; how many tokens a second one thread makes into batches; how long a training loop
of so many tokens a second waits for them, and the CPU time that the loader's thread takes of its steps; and, of real
data, which share of the tokens an epoch of windows aligned with documents sees. The loop's steps are once slept through
and once filled with matrix products on one thread. Without ``--data`` the shards are sparse files, which take no disk
and hold token 0 only: reading them costs what reading from the page cache does. Exits with 1 when a goal is missed.
"""

import json
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, Literal

import tyro

from megaresid.accelerator import choose_accelerator
from megaresid.benchmark.outputs import check_outputs, make_folders
from megaresid.errors import UserError, exits_with_user_errors

if TYPE_CHECKING:
    from megaresid.data.aligned import AlignedStream
    from megaresid.data.mixture import RunData

SCHEMA = 1
SEED = 42
OPENING_SECONDS = 1.0  # goals: of a 10B-token folder,
STEP_SHARE = 0.01  # of waiting, and of the thread's CPU time, in a step
ALIGNED_WINDOWS = 100_000  # at most, whose beginnings are looked up


@dataclass(frozen=True)
class Request:
    """Time to open a data set, speed of reading it, and what a training loop notices of that."""

    data: tuple[Path, ...] = ()
    """Folders of shards; by default a sparse one of --sparse-tokens, which is made for the time of the benchmark."""
    data_weights: tuple[float, ...] = ()
    """Of several folders, as in training."""
    data_order: Literal["shuffled", "sequential"] = "shuffled"
    """As in training."""
    align_documents: bool = False
    """As in training."""
    sparse_tokens: int = 10_000_000_000
    """Of the sparse folder, in shards of 100 million."""
    context: int = 1024
    """Tokens per sequence."""
    micro_batch: int = 16
    """Sequences per batch."""
    global_batch: int = 512
    """Sequences per step."""
    tokens_per_second: int = 1_000_000
    """Speed of the training loop."""
    steps: int = 10
    """Of each of the two loops; one more is not counted."""
    json: Path | None = None
    """Write everything measured to this new file."""

    def check(self) -> None:
        """Raises UserError for what cannot be measured or kept."""
        names = ("sparse_tokens", "context", "micro_batch", "global_batch", "tokens_per_second", "steps")
        for name in names:
            if (value := getattr(self, name)) < 1:
                raise UserError(f"--{name.replace('_', '-')} {value}: must be at least 1")
        if self.global_batch % self.micro_batch:
            raise UserError(
                f"--global-batch {self.global_batch}: must be a multiple of --micro-batch {self.micro_batch}"
            )
        check_outputs(self.json, None)


def make_sparse(folder: Path, tokens: int, shard_tokens: int = 100_000_000) -> None:
    """Write a data set of token 0 alone, whose files take no room on most file systems."""
    from megaresid.data.manifest import MANIFEST_NAME
    from megaresid.data.shards import HEADER_BYTES, TOKEN_BYTES, pack_header

    shards = []
    for index, start in enumerate(range(0, tokens, shard_tokens)):
        count = min(shard_tokens, tokens - start)
        name, size = f"train_{index:06d}.bin", HEADER_BYTES + TOKEN_BYTES * count
        with open(folder / name, "wb") as file:
            file.write(pack_header(count))
            file.truncate(size)
        # No checksum is read when a folder is opened.
        shards.append({"name": name, "split": "train", "tokens": count, "bytes": size, "sha256": "0" * 64})
    content = {
        "source": {"kind": "sparse", "revision": "1"},
        "options": {"shard_tokens": shard_tokens},
        "tokenizer": {"name": "gpt2", "sha256": "0" * 64, "vocab_size": 50257, "end_of_text": 50256},
        "split_rule": "none",
        "splits": {"train": {"documents": 0, "tokens": tokens}},
        "dropped": {"empty": 0},
        "runs_cut": 0,
        "shards": [shard | {"largest_id": 0} for shard in shards],
    }
    provenance = {"created": "2026-01-01T00:00:00+00:00", "versions": {}}
    tree = {"schema": 1, "content": content, "provenance": provenance}
    (folder / MANIFEST_NAME).write_text(json.dumps(tree), encoding="utf-8")


def opening(open_once: Callable[[], Any], rounds: int = 5) -> list[float]:
    """Seconds of each of the rounds."""
    found = []
    for _ in range(rounds):
        since = time.perf_counter()
        open_once()
        found.append(time.perf_counter() - since)
    return found


def reading(data: "RunData", request: Request, vocab_size: int) -> dict[str, float]:
    """Tokens per second that one thread alone makes into batches, by the clock and by its CPU time."""
    import numpy as np

    from megaresid.data.loader import PERMUTED_AT_ONCE, read_batch

    stream, sampler = data.training(request.context), data.sampler(request.context, SEED)
    sizes = max(1, PERMUTED_AT_ONCE // request.micro_batch), request.micro_batch
    rounds = max(2, request.steps * request.global_batch // (sizes[0] * sizes[1]))
    for number in range(rounds):
        if number == 1:  # the first one opens the files
            since, cpu = time.perf_counter(), time.thread_time()
        first = number * sizes[0] * sizes[1]
        for windows in sampler.window_of(np.arange(first, first + sizes[0] * sizes[1]).reshape(sizes)):
            read_batch(stream, windows, request.context, vocab_size)
    tokens = (rounds - 1) * sizes[0] * sizes[1] * request.context
    seconds, cpu_seconds = time.perf_counter() - since, time.thread_time() - cpu
    return {"tokens_per_second": tokens / seconds, "tokens_per_cpu_second": tokens / cpu_seconds}


def sleep(seconds: float) -> None:
    time.sleep(seconds)


def compute(seconds: float) -> None:
    """Multiply matrices for so long, as training does: without the GIL within a product, with it in between."""
    import torch

    a = torch.ones(128, 128)
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        a @ a


def waiting(data: "RunData", request: Request, vocab_size: int, consume: Callable[[float], None]) -> dict[str, float]:
    """Run a loop of steps that take as long as they shall, the work of each micro-batch done by ``consume(seconds)``.

    Gives the time that the loop waited for batches and the CPU time of the loader's thread, both as shares of the time
    that the steps shall take, and the seconds that a step took.
    """
    from megaresid.data.loader import Loader

    per_step = request.global_batch // request.micro_batch
    seconds = request.micro_batch * request.context / request.tokens_per_second
    loader = Loader(
        data.training(request.context),
        data.sampler(request.context, SEED),
        context=request.context,
        global_batch=request.global_batch,
        micro_batch=request.micro_batch,
        ranks=1,
        rank=0,
        vocab_size=vocab_size,
        # The thread must not come to its end, and to that of its clock, before the loop does.
        last_step=request.steps + 1000,
    )
    waited = 0.0
    with loader:
        clock = time.pthread_getcpuclockid(loader._thread.ident)
        for number in range((request.steps + 1) * per_step):
            if number == per_step:
                waited, started, cpu = 0.0, time.perf_counter(), time.clock_gettime(clock)
            since = time.perf_counter()
            next(loader)
            waited += time.perf_counter() - since
            consume(seconds)
        elapsed, cpu = time.perf_counter() - started, time.clock_gettime(clock) - cpu
    wanted = request.steps * per_step * seconds
    return {"waiting": waited / wanted, "cpu": cpu / wanted, "step_seconds": elapsed / request.steps}


def distinct(stream: "AlignedStream", context: int, windows: int) -> float:
    """Of the tokens that the first windows read as inputs, the share that is not read a second time."""
    starts = [stream.start(window, context) for window in range(windows)]
    covered = context + sum(min(context, later - start) for start, later in zip(starts, starts[1:]))
    return covered / (windows * context)


@contextmanager
def folders(request: Request) -> Iterator[tuple[Path, ...]]:
    """The folders to read: those that were asked for, or a sparse one."""
    if request.data:
        yield request.data
        return
    with tempfile.TemporaryDirectory() as name:
        make_sparse(Path(name), request.sparse_tokens)
        yield (Path(name),)


def measure(request: Request, paths: tuple[Path, ...]) -> dict[str, Any]:
    """Everything, by the names that it has in the JSON; one line is printed for each."""
    from megaresid.data.aligned import AlignedStream
    from megaresid.data.mixture import open_data
    from megaresid.data.sampler import windows
    from megaresid.model.presets import ModelShape

    vocab_size = ModelShape.model_fields["vocab_size"].default

    def open_once() -> "RunData":
        options = (request.data_weights, request.data_order, request.align_documents)
        return open_data(paths, *options, vocab_size=vocab_size, validating=False)

    data = open_once()
    data.check_capacity(request.context, request.global_batch)
    seconds = opening(open_once)
    shards = sum(len(folder.training.shards) for folder in data.folders)
    found = {"training_tokens": data.training_tokens, "shards": shards, "opening_seconds": seconds}
    print(
        f"opening            {median(seconds):8.3f} s for {data.training_tokens:,} tokens in {shards} shard(s)",
        flush=True,
    )

    found["reading"] = speed = reading(data, request, vocab_size)
    print(
        f"one thread         {speed['tokens_per_second'] / 1e6:8.1f} million tokens per second, "
        f"{speed['tokens_per_cpu_second'] / 1e6:.1f} per CPU second",
        flush=True,
    )
    for name, consume in (("sleeping", sleep), ("computing", compute)):
        found[name] = loop = waiting(data, request, vocab_size, consume)
        print(
            f"{name:9} loop     {loop['waiting']:8.3%} of the step waited, {loop['cpu']:.3%} CPU time of the loader, "
            f"{1e3 * loop['step_seconds']:,.1f} ms a step",
            flush=True,
        )
    if request.data:
        found["aligned_distinct"] = {}
        for folder in data.folders:
            stream = AlignedStream(folder.training, folder.manifest.content.tokenizer.end_of_text)
            count = min(windows(len(folder.training), request.context), ALIGNED_WINDOWS)
            share = distinct(stream, request.context, count)
            found["aligned_distinct"][str(folder.path)] = {"windows": count, "share": share}
            print(f"aligned windows    {share:8.1%} of the tokens of {count:,} windows are seen: {folder.path}")
    return found


def missed(found: dict[str, Any]) -> list[str]:
    """The goals that were missed, each in a few words."""
    words = []
    if median(found["opening_seconds"]) >= OPENING_SECONDS:
        words.append(f"opening takes {OPENING_SECONDS:g} s or more")
    for loop in ("sleeping", "computing"):
        for what in ("waiting", "cpu"):
            if found[loop][what] >= STEP_SHARE:
                words.append(f"{what} takes {STEP_SHARE:.0%} or more of the {loop} loop")
    return words


def main(request: Request) -> None:
    choose_accelerator()
    request.check()
    import torch

    from megaresid.training.run_dir import environment, write_json

    torch.set_num_threads(1)
    make_folders(request.json, None)
    step = request.global_batch * request.context
    print(
        f"{step:,} tokens a step in micro-batches of {request.micro_batch} x {request.context}, "
        f"{request.tokens_per_second:,} tokens per second, {request.data_order}"
        f"{', aligned with documents' * request.align_documents}",
        flush=True,
    )
    with folders(request) as paths:
        found = measure(request, paths)
    failed = missed(found)
    if request.json is not None:
        options = {key: value for key, value in asdict(request).items() if key != "json"}
        options["data"] = [str(path) for path in request.data]
        tree = {"schema": SCHEMA, "options": options, "environment": environment()}
        write_json(request.json, tree | {"missed": failed, **found})
    print(f"goals missed: {'; '.join(failed)}" if failed else "all goals are met")
    if failed:
        raise SystemExit(1)


if __name__ == "__main__":
    exits_with_user_errors(lambda: main(tyro.cli(Request, prog="python -m megaresid.benchmark.loading")))()
