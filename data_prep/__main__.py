"""python -m data_prep: tokenize text into shards; inspect or verify a folder of shards.

Write GPT-2 tokens as llm.c shards (train_000000.bin, val_000000.bin, ...) with a manifest:

    python -m data_prep --source python-docs --out data/python-docs
    python -m data_prep --source jsonl --input corpus/ --out data/corpus

Print the manifest and the first document, or recompute the checksums (exit code 1 when a shard is damaged):

    python -m data_prep inspect DIR
    python -m data_prep verify DIR
"""

import sys
import time
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from data_prep.manifest import to_json, verify_shards
from data_prep.pipeline import Job, prepare
from data_prep.tokenizer import RANKS_SHA256, gpt2_encoding
from megaresid.data.manifest import load_manifest
from megaresid.data.shards import TokenStream
from megaresid.errors import UserError, exits_with_user_errors

Folder = Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DIR")]
SECONDS_BETWEEN_LINES = 10
# Of the first document, for reading.
SHOWN_TOKENS = 1000


@contextmanager
def progress_display():
    """Yields what ``prepare`` reports to: a bar on a terminal, else a line now and then, on stderr."""
    console = Console(stderr=True)
    if not console.is_terminal:
        shown = time.monotonic()

        def report(fraction: float, documents: int, tokens: int) -> None:
            nonlocal shown
            if time.monotonic() - shown >= SECONDS_BETWEEN_LINES:
                shown = time.monotonic()
                print(f"{fraction:4.0%}  {documents:,} documents  {tokens:,} tokens", file=sys.stderr, flush=True)

        yield report
        return
    columns = TextColumn("{task.percentage:3.0f}%"), BarColumn(), TextColumn("{task.description}")
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console) as progress:
        bar = progress.add_task("reading", total=1.0)

        def report(fraction: float, documents: int, tokens: int) -> None:
            progress.update(bar, completed=fraction, description=f"{documents:,} documents  {tokens:,} tokens")

        yield report


def make(job: Job) -> None:
    """Run ``prepare`` and sum it up on stdout."""
    start = time.monotonic()
    with progress_display() as report:
        manifest = prepare(job, report)
    seconds = time.monotonic() - start
    content = manifest.content
    tokens = sum(counts.tokens for counts in content.splits.values())
    for split, counts in content.splits.items():
        shards = len(manifest.shards(split))
        print(f"{split}: {counts.documents:,} documents, {counts.tokens:,} tokens, {shards} shard(s)")
    if content.dropped.empty or content.runs_cut:
        print(f"dropped {content.dropped.empty:,} empty documents; cut {content.runs_cut:,} endless unbroken runs")
    print(f"{job.out}: {tokens:,} tokens in {seconds:.1f} s ({tokens / seconds:,.0f}/s), data {manifest.identity[:16]}")


def inspect(folder: Folder, vocab_file: Path | None = None) -> None:
    """Print the manifest of the data set in DIR and decode its first training document.

    Args:
        folder: The data set.
        vocab_file: GPT-2 vocabulary, as for making a data set.
    """
    manifest = load_manifest(folder)
    tokenizer = manifest.content.tokenizer
    if tokenizer.sha256 != RANKS_SHA256:
        raise UserError(f"{folder}: tokenizer {tokenizer.name} is not GPT-2's; only that one can be decoded")
    stream = TokenStream.open(folder, manifest, "train")
    ids = stream.read(0, min(len(stream), SHOWN_TOKENS + 1))
    starts = np.flatnonzero(ids == tokenizer.end_of_text)
    ends = starts[starts > 0]
    document = ids[1 : ends[0]] if len(ends) else ids[1:]
    text = gpt2_encoding(vocab_file).decode(document.tolist())
    print(to_json(manifest), end="")
    print(f"identity {manifest.identity}")
    print(f"first document{'' if len(ends) else f', its first {len(document)} tokens'}:\n{text}")


def verify(folder: Folder) -> None:
    """Recompute the checksum of every shard in DIR; exit code 1 naming each damaged one.

    Args:
        folder: The data set.
    """
    manifest = load_manifest(folder)
    problems = [problem for _, problem in verify_shards(folder, manifest) if problem]
    for problem in problems:
        print(problem, file=sys.stderr)
    if problems:
        sys.exit(1)
    print(f"{folder}: {len(manifest.content.shards)} shard(s) as written, data {manifest.identity[:16]}")


@exits_with_user_errors
def main(arguments: list[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else arguments
    commands = {"inspect": inspect, "verify": verify}
    if arguments and arguments[0] in commands:
        tyro.cli(commands[arguments[0]], prog=f"python -m data_prep {arguments[0]}", args=arguments[1:])
    else:
        make(tyro.cli(Job, prog="python -m data_prep", description=__doc__, args=arguments))


if __name__ == "__main__":
    main()
