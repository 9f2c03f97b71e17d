"""Tokenize text into shards (GPT-2 tokens in llm.c's format: train_000000.bin, val_000000.bin, ..., and a manifest).

Make a data set; interrupted, the same command with --resume goes on:

    python -m data_prep --source fineweb --out data/fineweb --validation-fraction 0.001
    python -m data_prep --source jsonl --input corpus/ more/*.jsonl.zst --out data/corpus
    python -m data_prep --source python-docs --out data/python-docs

On several machines, each its share, then joined:

    python -m data_prep --source fineweb --partition 1/2 --out shares/1
    python -m data_prep --source fineweb --partition 2/2 --out shares/2
    python -m data_prep merge shares/1 shares/2 --out data/fineweb

With data sets that are there (--help after each says more):

    python -m data_prep inspect DIR      print the manifest and the first document
    python -m data_prep verify DIR       recompute the checksums; exit code 1 when a shard is damaged
    python -m data_prep adopt DIR        write the manifest of ready-made shards (llm.c, modded-nanogpt)
    python -m data_prep convert IN --to nanogpt --out DIR        and --to megatron, --from nanogpt, --from megatron
"""

import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import tyro

from data_prep.job import Job
from data_prep.progress import duration, progress_display
from megaresid.data.manifest import Manifest, load_manifest
from megaresid.errors import UserError, exits_with_user_errors

Folder = Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DIR")]
# Of the first document, for reading.
SHOWN_TOKENS = 1000
SHARES_SHOWN = 4
# What the manifest counts, in words.
LEFT_OUT = {
    "empty": "empty documents",
    "bad_rows": "bad rows",
    "invalid_utf8": "documents in invalid UTF-8",
    "too_long": "documents that were too long",
    "other_language": "documents in other languages",
    "low_score": "documents with a low score",
    "unreadable": "files (or parts of large ones) that cannot be read",
    "duplicates": "duplicates",
}


class Terminated(BaseException):
    """SIGTERM came."""


def make(job: Job) -> None:
    """Run ``prepare`` and sum it up on stdout."""
    from data_prep.pipeline import prepare

    start = time.monotonic()
    stream = sys.stdout if job.dry_run else sys.stderr
    with progress_display() as report:
        manifest = prepare(job, report, say=lambda line: print(line, file=stream, flush=True))
    seconds = time.monotonic() - start
    if manifest is not None:
        summarize(job.out, manifest, seconds)
    elif job.partition:
        others = " ".join(f"SHARE-{number}" for number in range(1, min(job.partition.of, SHARES_SHOWN) + 1))
        others += " ..." if job.partition.of > SHARES_SHOWN else ""
        print(f"{job.out}: share {job.partition} is finished, in {duration(seconds)}; when all are:")
        print(f"    python -m data_prep merge {others} --out DIR")


def merge(folders: tyro.conf.Positional[tuple[Path, ...]], out: Annotated[Path, tyro.conf.arg(metavar="DIR")]) -> None:
    """Join the finished shares of a job (--partition) into the data set that one machine would have made.

    Args:
        folders: The --out of every share, in any order. They stay as they are.
        out: Folder for the shards and the manifest; must be empty or not exist.
    """
    from data_prep.merge import merge

    start = time.monotonic()
    with progress_display() as report:
        manifest = merge(list(folders), out, report)
    summarize(out, manifest, time.monotonic() - start)


def inspect(folder: Folder, vocab_file: Path | None = None) -> None:
    """Print the manifest of the data set in DIR and decode its first training document.

    Args:
        folder: The data set.
        vocab_file: GPT-2 vocabulary, as for making a data set.
    """
    import numpy as np

    from data_prep.manifest import to_json
    from data_prep.tokenizer import RANKS_SHA256, gpt2_encoding
    from megaresid.data.shards import TokenStream

    manifest = load_manifest(folder)
    tokenizer = manifest.content.tokenizer
    if tokenizer.sha256 != RANKS_SHA256:
        raise UserError(f"{folder}: tokenizer {tokenizer.name} is not GPT-2's; only that one can be decoded")
    stream = TokenStream.open(folder, manifest, "train")
    ids = stream.read(0, min(len(stream), SHOWN_TOKENS + 1))
    # Ready-made shards may begin inside a document.
    ids = ids[int(ids[0] == tokenizer.end_of_text) :]
    ends = np.flatnonzero(ids == tokenizer.end_of_text)
    document = ids[: ends[0]] if len(ends) else ids
    text = gpt2_encoding(vocab_file).decode(document.tolist())
    print(to_json(manifest), end="")
    print(f"identity {manifest.identity}")
    print(f"first document{'' if len(ends) else f', its first {len(document)} tokens'}:\n{text}")


def verify(folder: Folder) -> None:
    """Recompute the checksum of every shard in DIR; exit code 1 naming each damaged one.

    Args:
        folder: The data set.
    """
    from data_prep.manifest import verify_shards

    manifest = load_manifest(folder)
    with progress_display() as report:
        problems = [problem for _, problem in verify_shards(folder, manifest, report) if problem]
    for problem in problems:
        print(problem, file=sys.stderr)
    if problems:
        sys.exit(1)
    listed = {entry.name for entry in manifest.content.shards}
    for path in sorted(folder.glob("*.bin")):
        if path.name not in listed:
            print(f"{path}: not of this data set, the manifest does not list it", file=sys.stderr)
    print(f"{folder}: {len(listed)} shard(s) as written, data {manifest.identity[:16]}")


def adopt(folder: Folder) -> None:
    """Write the manifest of ready-made GPT-2 shards (llm.c's, modded-nanogpt's), which are used as they are.

    Args:
        folder: The folder with the .bin files; train or val in their names says which split they are of.
    """
    from data_prep.adopt import adopt

    start = time.monotonic()
    with progress_display() as report:
        manifest = adopt(folder, report)
    summarize(folder, manifest, time.monotonic() - start)


def convert_with(arguments: list[str]) -> None:
    from data_prep.convert import Conversion, convert

    conversion = tyro.cli(Conversion, prog="python -m data_prep convert", args=arguments)
    start = time.monotonic()
    with progress_display() as report:
        converted = convert(conversion, report)
    if converted.manifest is not None:
        summarize(conversion.out, converted.manifest, time.monotonic() - start)
        return
    for split, counts in converted.splits.items():
        print(f"{split}: {counts.documents:,} documents, {counts.tokens:,} tokens")
    print(f"{conversion.out}: written for {conversion.to}")


def summarize(folder: Path, manifest: Manifest, seconds: float) -> None:
    """What the data set holds and what was left out, on stdout."""
    content = manifest.content
    for split, counts in content.splits.items():
        shards = len(manifest.shards(split))
        print(f"{split}: {counts.documents:,} documents, {counts.tokens:,} tokens, {shards} shard(s)")
    dropped = content.dropped.model_dump()
    left_out = [f"{dropped[reason]:,} {words}" for reason, words in LEFT_OUT.items() if dropped.get(reason)]
    if left_out:
        print(f"left out: {', '.join(left_out)}")
    if content.runs_cut:
        print(f"cut: {content.runs_cut:,} endless unbroken runs")
    if content.limited:
        print(f"ended by --limit-tokens {content.options.limit_tokens}")
    tokens = sum(counts.tokens for counts in content.splits.values())
    print(f"{folder}: {tokens:,} tokens in {seconds:.1f} s ({tokens / seconds:,.0f}/s), data {manifest.identity[:16]}")


COMMANDS: dict[str, Callable[..., None]] = {"inspect": inspect, "verify": verify, "merge": merge, "adopt": adopt}


@exits_with_user_errors
def main(arguments: list[str] | None = None) -> None:
    """Exit codes: 0; 1 for a damaged shard; 2 for a mistake, and for what stopped the job; 130 and 143 when it was
    interrupted or terminated."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _raise_terminated)
    try:
        _run(arguments)
    except KeyboardInterrupt:
        _end("interrupted", 128 + signal.SIGINT)
    except Terminated:
        _end("terminated", 128 + signal.SIGTERM)


def _run(arguments: list[str]) -> None:
    name = arguments[0] if arguments else ""
    if name == "convert":
        convert_with(arguments[1:])
    elif name in COMMANDS:
        tyro.cli(COMMANDS[name], prog=f"python -m data_prep {name}", args=arguments[1:])
    else:
        make(tyro.cli(Job, prog="python -m data_prep", description=__doc__, args=arguments))


def _raise_terminated(*_) -> None:
    raise Terminated


def _end(how: str, code: int) -> None:
    print(f"{how}; a job goes on with --resume", file=sys.stderr, flush=True)
    sys.exit(code)
