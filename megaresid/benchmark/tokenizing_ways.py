"""Ways to turn the text of Parquet files into tokens, each as the project that it is named after does it.

Every one is a function of the files, a new folder for what it writes, and the number of its processes; it returns its
seconds and the number of ids, with one <|endoftext|> a document.
"""

import json
import multiprocessing
import multiprocessing.connection
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from megaresid.errors import UserError

END_OF_TEXT = 50256
LLMC_CHUNK = 16
LLMC_SHARD_TOKENS = 10**8
NANOGPT_BATCHES = 1024
# Like CLOCK_MONOTONIC, the same for all processes.
clock = time.monotonic


class Measurement(NamedTuple):
    seconds: float
    tokens: int


def texts(files: list[str]) -> Iterator[str]:
    """The documents, one at a time."""
    for document in raw_texts(files):
        yield document.decode("utf-8")


def raw_texts(files: list[str]) -> Iterator[bytes]:
    """The documents in UTF-8; a row group is in memory."""
    from pyarrow import large_binary, parquet

    for file in files:
        with parquet.ParquetFile(file) as table:
            for group in range(table.num_row_groups):
                yield from table.read_row_group(group, columns=["text"])["text"].cast(large_binary()).to_pylist()


def gpt2():
    from data_prep.tokenizer import gpt2_encoding

    return gpt2_encoding()


def encoder(kind: str) -> Callable:
    """What turns one document into its ids: a str for tiktoken, bytes for gigatoken."""
    if kind == "lists":
        return gpt2().encode_ordinary
    if kind == "arrays":
        return partial(gpt2().encode_to_numpy, disallowed_special=())
    from data_prep.backends import load_gigatoken
    from data_prep.tokenizer import gpt2_ranks

    return load_gigatoken(gpt2_ranks()).encode


def encode_share(kind: str, files: list[str], number: int, of: int, ready, results) -> None:
    """One of independent processes: every ``of``-th document, in memory before the clock starts."""
    encode = encoder(kind)
    documents = [document for n, document in enumerate(raw_texts(files)) if n % of == number]
    if kind != "gigatoken":
        documents = [document.decode("utf-8") for document in documents]
    ready.wait()
    start, tokens = clock(), 0
    for document in documents:
        tokens += len(encode(document)) + 1
    results.put((start, clock(), tokens))


def raw(kind: str, files: list[str], folder: Path, workers: int) -> Measurement:
    """As many independent processes that only call the encoder; from the first's start to the last's end."""
    context = multiprocessing.get_context("spawn")
    ready, results = context.Barrier(workers), context.SimpleQueue()
    found = _finished(
        [context.Process(target=encode_share, args=(kind, files, n, workers, ready, results)) for n in range(workers)],
        results,
    )
    starts, ends, tokens = zip(*found)
    return Measurement(max(ends) - min(starts), sum(tokens))


def ours(backend: str, files: list[str], folder: Path, workers: int) -> Measurement:
    """``python -m data_prep``, which reads its shards back to verify them."""
    out = folder / "ours"
    command = [sys.executable, "-m", "data_prep"]
    job = ["--source", "parquet", "--input", *files, "--workers", str(workers), "--tokenizer-backend", backend]
    start = clock()
    done = subprocess.run([*command, *job, "--out", str(out)], capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"data_prep ended with code {done.returncode}: {done.stderr[-300:]}")
    seconds = clock() - start
    splits = json.loads((out / "manifest.json").read_bytes())["content"]["splits"]
    return Measurement(seconds, sum(counts["tokens"] for counts in splits.values()))


def llmc(files: list[str], folder: Path, workers: int) -> Measurement:
    """llm.c's: a pool, ``imap`` over documents in chunks of 16, shards written by the parent."""
    return _in_a_process(write_llmc, files, folder, workers)


def nanogpt(files: list[str], folder: Path, workers: int) -> Measurement:
    """nanoGPT's: ``datasets.map`` and then one memory-mapped file a split."""
    return _in_a_process(write_nanogpt, files, folder, workers)


def write_llmc(files: list[str], folder: Path, workers: int) -> int:
    shard, filled, shards, tokens = np.empty(LLMC_SHARD_TOKENS, np.uint16), 0, 0, 0
    with multiprocessing.get_context("fork").Pool(workers, _start_llmc) as pool:
        for ids in pool.imap(_encode_llmc, texts(files), chunksize=LLMC_CHUNK):
            tokens += len(ids)
            while len(ids) >= (room := len(shard) - filled):
                shard[filled:] = ids[:room]
                _write_shard(folder / f"{shards:06d}.bin", shard)
                ids, filled, shards = ids[room:], 0, shards + 1
            shard[filled : filled + len(ids)] = ids
            filled += len(ids)
    if filled:
        _write_shard(folder / f"{shards:06d}.bin", shard[:filled])
    return tokens


def _start_llmc() -> None:
    global _encoding
    _encoding = gpt2()


def _encode_llmc(text: str) -> np.ndarray:
    ids = np.array([END_OF_TEXT, *_encoding.encode_ordinary(text)])
    assert 0 <= ids.min() and ids.max() < 2**16
    return ids.astype(np.uint16)


def _write_shard(file: Path, ids: np.ndarray) -> None:
    header = np.zeros(256, np.int32)
    header[:3] = 20240520, 1, len(ids)
    with open(file, "wb") as out:
        out.write(header.tobytes())
        out.write(ids.tobytes())


def write_nanogpt(files: list[str], folder: Path, workers: int) -> int:
    from datasets import disable_progress_bars, load_dataset

    disable_progress_bars()
    data = load_dataset("parquet", data_files=list(files), split="train", cache_dir=str(folder), num_proc=workers)
    data = data.select_columns(["text"]).train_test_split(test_size=0.0005, seed=2357, shuffle=True)
    encoding, total = gpt2(), 0

    def process(row: dict) -> dict:
        ids = [*encoding.encode_ordinary(row["text"]), END_OF_TEXT]
        return {"ids": ids, "len": len(ids)}

    for split, rows in data.map(process, remove_columns=["text"], num_proc=workers).items():
        size, place = int(np.sum(rows["len"], dtype=np.uint64)), 0
        out = np.memmap(folder / f"{split}.bin", np.uint16, "w+", shape=(size,))
        batches = min(NANOGPT_BATCHES, len(rows))
        for n in range(batches):
            batch = rows.shard(num_shards=batches, index=n, contiguous=True).with_format("numpy")
            ids = np.concatenate(batch["ids"])
            out[place : place + len(ids)] = ids
            place += len(ids)
        out.flush()
        total += size
    return total


def _in_a_process(write: Callable, files: list[str], folder: Path, workers: int) -> Measurement:
    """From the start of a fresh Python to its end."""
    context = multiprocessing.get_context("spawn")
    results, start = context.SimpleQueue(), clock()
    (tokens,) = _finished(
        [context.Process(target=_put_result, args=(write, files, folder, workers, results))], results
    )
    return Measurement(clock() - start, tokens)


def _put_result(write: Callable, files: list[str], folder: Path, workers: int, results) -> None:
    results.put(write(files, folder, workers))


def _finished(processes: list, results) -> list:
    """Start them and wait; one result of each. Raises UserError for one that failed, having ended the others."""
    for process in processes:
        process.start()
    try:
        waiting = {process.sentinel: process for process in processes}
        while waiting:
            for sentinel in multiprocessing.connection.wait(list(waiting)):
                ended = waiting.pop(sentinel)
                # The sentinel may be ready a moment before the exit code is known.
                ended.join()
                if ended.exitcode:
                    raise UserError(f"a process of the benchmark ended with code {ended.exitcode}; its error is above")
        return [results.get() for _ in processes]
    finally:
        for process in processes:
            process.terminate()
            process.join()


WAYS: dict[str, Callable[[list[str], Path, int], Measurement]] = {
    "raw tiktoken, lists": partial(raw, "lists"),
    "raw tiktoken, arrays": partial(raw, "arrays"),
    "raw gigatoken": partial(raw, "gigatoken"),
    "megaresid, tiktoken": partial(ours, "tiktoken"),
    "megaresid, gigatoken": partial(ours, "gigatoken"),
    "llm.c": llmc,
    "nanoGPT": nanogpt,
}
