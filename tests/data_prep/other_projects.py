"""How other projects read and write token files, by the documented formats: llm.c, modded-nanogpt, nanoGPT, Megatron.

Nothing here is code under test, nor uses any.
"""

import glob
import os
import struct
from itertools import accumulate

import numpy as np

END_OF_TEXT = 50256
MEGATRON_DTYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 6: "<f8", 7: "<f4", 8: "<u2"}


def shard_bytes(ids, magic=20240520, version=1, tokens=None):
    """A shard of llm.c's dev/data scripts; the header counts ``tokens`` where that is not None."""
    header = struct.pack("<256i", magic, version, len(ids) if tokens is None else tokens, *[0] * 253)
    return header + struct.pack(f"<{len(ids)}H", *ids)


def documents_beginning(ids):
    """The documents of a stream with <|endoftext|> before each."""
    documents = []
    for token in ids:
        if token == END_OF_TEXT:
            documents.append([])
        else:
            documents[-1].append(token)
    return documents


def documents_ending(ids):
    """The documents of a stream with <|endoftext|> after each; the last must have it."""
    documents, document = [], []
    for token in ids:
        if token == END_OF_TEXT:
            documents.append(document)
            document = []
        else:
            document.append(token)
    assert not document
    return documents


class LlmcDataLoader:
    """llm.c's dataloader.h without shuffling: batches of B*T+1 tokens, rank by rank, within one shard after another."""

    def __init__(self, pattern, batch, context, rank=0, ranks=1):
        self.paths = sorted(glob.glob(pattern))
        self.batch, self.context, self.rank, self.ranks = batch, context, rank, ranks
        self.tokens = 0
        for shard in range(len(self.paths)):
            tokens = self.load(shard)
            assert tokens >= ranks * batch * context + 1
            self.tokens += tokens
        self.shard, self.sample = 0, -1
        self.load(0)

    def load(self, shard):
        self.file = open(self.paths[shard], "rb")
        header = struct.unpack("<256i", self.file.read(1024))
        assert header[0] == 20240520, "Bad magic in the data file"
        assert header[1] == 1, "Bad version in data file"
        tokens = header[2]
        assert tokens > 0
        assert os.path.getsize(self.paths[shard]) == 1024 + tokens * 2, "file size is not as expected"
        self.samples = (tokens * 2 - 2) // (self.ranks * self.batch * self.context * 2)
        return tokens

    def next_batch(self):
        self.sample += 1
        if self.sample >= self.samples:
            self.shard = (self.shard + 1) % len(self.paths)
            self.load(self.shard)
            self.sample = 0
        size = self.batch * self.context
        self.file.seek(1024 + self.sample * self.ranks * size * 2 + self.rank * size * 2)
        buffer = struct.unpack(f"<{size + 1}H", self.file.read(2 * (size + 1)))
        return list(buffer[:-1]), list(buffer[1:])


def modded_load_data_shard(path):
    """modded-nanogpt's _load_data_shard."""
    with open(path, "rb") as file:
        header = np.frombuffer(file.read(256 * 4), dtype=np.int32)
        assert header[0] == 20240520, "magic number mismatch in the data .bin file"
        assert header[1] == 1, "unsupported version"
        tokens = np.frombuffer(file.read(), dtype=np.uint16)
    assert len(tokens) == header[2], "number of tokens read does not match header?"
    return tokens


def nanogpt_data(folder, split):
    return np.memmap(os.path.join(folder, f"{split}.bin"), dtype=np.uint16, mode="r")


def nanogpt_get_batch(data, starts, block_size):
    """nanoGPT's get_batch, its random places given."""
    x = np.stack([data[i : i + block_size].astype(np.int64) for i in starts])
    y = np.stack([data[i + 1 : i + 1 + block_size].astype(np.int64) for i in starts])
    return x, y


class MegatronIndexedDataset:
    """Megatron's IndexedDataset with its _IndexReader and _MMapBinReader."""

    def __init__(self, prefix):
        with open(f"{prefix}.idx", "rb") as stream:
            assert stream.read(9) == b"MMIDIDX\x00\x00", "bad header"
            assert struct.unpack("<Q", stream.read(8)) == (1,), "bad version"
            (code,) = struct.unpack("<B", stream.read(1))
            self.dtype = np.dtype(MEGATRON_DTYPES[code])
            (sequences,) = struct.unpack("<Q", stream.read(8))
            (entries,) = struct.unpack("<Q", stream.read(8))
            offset = stream.tell()
        index = np.memmap(f"{prefix}.idx", mode="r", order="C")
        self.sequence_lengths = np.frombuffer(index, np.int32, sequences, offset)
        offset += self.sequence_lengths.nbytes
        self.sequence_pointers = np.frombuffer(index, np.int64, sequences, offset)
        offset += self.sequence_pointers.nbytes
        self.document_indices = np.frombuffer(index, np.int64, entries, offset)
        assert len(index) == offset + self.document_indices.nbytes
        assert len(self.sequence_lengths) == self.document_indices[-1]
        self.buffer = np.memmap(f"{prefix}.bin", mode="r", order="C")

    def __len__(self):
        return len(self.sequence_lengths)

    def get(self, idx, offset=0, length=None):
        length = self.sequence_lengths[idx] - offset if length is None else length
        pointer = self.sequence_pointers[idx] + offset * self.dtype.itemsize
        return np.frombuffer(self.buffer, self.dtype, length, pointer)


def write_megatron(prefix, documents, append_eod=True, dtype_code=8):
    """Write what IndexedDatasetBuilder does; a document is a list of sequences, each a list of ids.

    As in tools/preprocess_data.py, append_eod makes the last sequence of a document with tokens one longer.
    """
    lengths, indices, ids = [], [0], []
    for document in documents:
        sequences = [list(sequence) for sequence in document]
        if append_eod and sequences:
            sequences[-1].append(END_OF_TEXT)
        for sequence in sequences:
            lengths.append(len(sequence))
            ids += sequence
        indices.append(len(lengths))
    dtype = np.dtype(MEGATRON_DTYPES[dtype_code])
    pointers = [0, *accumulate(length * dtype.itemsize for length in lengths)][: len(lengths)]
    with open(f"{prefix}.bin", "wb") as file:
        file.write(np.array(ids, dtype).tobytes())
    with open(f"{prefix}.idx", "wb") as file:
        file.write(megatron_index(lengths, pointers, indices, dtype_code))


def megatron_index(lengths, pointers, indices, dtype_code=8, magic=b"MMIDIDX\x00\x00", version=1):
    """The bytes of an .idx."""
    return b"".join(
        [
            magic,
            struct.pack("<Q", version),
            struct.pack("<B", dtype_code),
            struct.pack("<Q", len(lengths)),
            struct.pack("<Q", len(indices)),
            struct.pack(f"<{len(lengths)}i", *lengths),
            struct.pack(f"<{len(pointers)}q", *pointers),
            struct.pack(f"<{len(indices)}q", *indices),
        ]
    )
