"""A worker has 1 GiB whatever the input; what reads it may take 3/4 of that."""

import hashlib
import random
import subprocess
import sys

import pyarrow
import pytest
from pyarrow import parquet

from data_prep.sources.source import MOST_BYTES

PEAK_BYTES = 3 * 2**28
# Bytes that hardly compress, to be cut into documents.
NOISE = random.Random(0).randbytes(2**20).hex().encode()

READ = """
import hashlib, re, sys
from pathlib import Path
from reading import source_of
from data_prep.sources.source import Tally

source, dropped, found = source_of(*sys.argv[1:]), Tally(), []
for unit in source.units():
    for batch in source.reader.read(unit, dropped):
        found += [f"{len(document)}:{hashlib.sha256(document).hexdigest()}" for document in batch.documents]
        del batch
# Of this process alone: what getrusage tells may be its parent's.
peak = int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024
print(peak, dict(dropped), *found, sep="\\n")
"""


def read_elsewhere(request, kind, path):
    """(peak of resident bytes, what was left out as written, "length:sha256" of each document), in its own process."""
    done = subprocess.run(
        [sys.executable, "-c", READ, kind, str(path)],
        cwd=request.path.parent,
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONPATH": f"{request.path.parent}:{request.config.rootpath}", "OMP_NUM_THREADS": "1"},
    )
    peak, dropped, *found = done.stdout.splitlines()
    return int(peak), dropped, found


def write(path, data):
    """Compressed by the end of its name."""
    codec = {".gz": "gzip", ".zst": "zstd"}.get(path.suffix)
    with open(path, "wb") as raw, pyarrow.CompressedOutputStream(raw, codec) if codec else raw as file:
        file.write(data)


def long_document(size):
    """Text of this many bytes with one character at its end that makes four bytes of each as a str."""
    return (NOISE * (size // len(NOISE) + 1))[: size - 4] + "🙂".encode()


def named(document):
    return f"{len(document)}:{hashlib.sha256(document).hexdigest()}"


@pytest.mark.full
@pytest.mark.parametrize("size", [100 * 10**6, MOST_BYTES - 20])
@pytest.mark.parametrize("spelled", ["raw", "escaped", "half a pair"])
def test_a_long_line_of_json(request, tmp_path, size, spelled):
    document, path = long_document(size), tmp_path / "a.jsonl"
    spelling = {"raw": "🙂".encode(), "escaped": rb"\ud83d\ude42", "half a pair": rb"\ud83d"}[spelled]
    with open(path, "wb") as file:
        file.write(b'{"text": "first"}\n{"text":"' + document[:-16] + spelling + b'"}\n{"text": "last"}\n')
    document = document[:-16] + ("\ufffd" if spelled == "half a pair" else "🙂").encode()
    peak, dropped, found = read_elsewhere(request, "jsonl", path)
    assert (dropped, found) == ("{}", [named(b"first"), named(document), named(b"last")])
    assert peak < PEAK_BYTES


@pytest.mark.full
@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_a_line_without_an_end(request, tmp_path, suffix):
    path, data = tmp_path / f"a.jsonl{suffix}", b'{"text": "first"}\n{"text": "' + NOISE * 150
    assert len(data) > 300 * 10**6
    write(path, data)
    peak, dropped, found = read_elsewhere(request, "jsonl", path)
    assert (dropped, found) == ("{'too_long': 1}", [named(b"first")])
    assert peak < PEAK_BYTES


@pytest.mark.full
def test_a_line_of_very_many_values(request, tmp_path):
    path = tmp_path / "a.jsonl"
    with open(path, "wb") as file:
        file.write(b'{"text": "first"}\n{"many": [' + b"{}," * (40 * 2**20) + b'0], "text": "last"}\n')
    peak, dropped, found = read_elsewhere(request, "jsonl", path)
    assert (dropped, found) == ("{}", [named(b"first"), named(b"last")])
    assert peak < PEAK_BYTES


@pytest.mark.full
@pytest.mark.parametrize("compression", ["none", "zstd"])
@pytest.mark.parametrize("dictionary", [True, False])
def test_a_long_document_in_parquet(request, tmp_path, compression, dictionary):
    documents = [b"small" * 600] * 500 + [long_document(MOST_BYTES)] + [b"small" * 600] * 500
    path = tmp_path / "a.parquet"
    table = pyarrow.table({"text": pyarrow.array(documents, pyarrow.binary())})
    parquet.write_table(table, path, compression=compression, use_dictionary=dictionary)
    peak, dropped, found = read_elsewhere(request, "parquet", path)
    assert (dropped, found) == ("{}", [named(document) for document in documents])
    assert peak < PEAK_BYTES


@pytest.mark.full
def test_long_documents_after_one_another_among_short_ones(request, tmp_path):
    documents = [long_document(100 * 10**6)] * 4 + [b"small" * 600] * 10**4
    path, schema = tmp_path / "a.parquet", pyarrow.schema({"text": pyarrow.binary()})
    with parquet.ParquetWriter(path, schema, write_batch_size=1, use_dictionary=False, compression="none") as writer:
        writer.write_table(pyarrow.table({"text": documents}, schema=schema), row_group_size=10**6)
    peak, dropped, found = read_elsewhere(request, "parquet", path)
    assert (dropped, found) == ("{}", [named(document) for document in documents])
    assert peak < PEAK_BYTES


@pytest.mark.full
def test_one_entry_of_a_dictionary_in_very_many_rows(request, tmp_path):
    path, document = tmp_path / "a.parquet", "x" * 10**6
    places = pyarrow.array([0] * 2000 + [1] * 2000, pyarrow.int32())
    values = pyarrow.DictionaryArray.from_arrays(places, [document, "y"])
    parquet.write_table(pyarrow.table({"text": values}), path, row_group_size=10**6)
    peak, dropped, found = read_elsewhere(request, "parquet", path)
    assert (dropped, found) == ("{}", [named(document.encode())] * 2000 + [named(b"y")] * 2000)
    assert peak < PEAK_BYTES


@pytest.mark.full
@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_a_text_file_of_the_most_bytes(request, tmp_path, suffix):
    path, document = tmp_path / f"a.txt{suffix}", long_document(MOST_BYTES)
    write(path, document)
    peak, dropped, found = read_elsewhere(request, "text", path)
    assert (dropped, found) == ("{}", [named(document)])
    assert peak < PEAK_BYTES
