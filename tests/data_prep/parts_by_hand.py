"""Parts written by the definition of their format, and what is to become of them, by plain loops."""

import hashlib
import json
import struct
import zlib
from dataclasses import dataclass, field

END_OF_TEXT = 50256
PLAN = "ab" * 32


@dataclass
class Part:
    """``documents``: (text, ids without the end of text) each."""

    documents: list[tuple[bytes, list[int]]]
    name: str = "000000-000000"
    position: int = 0
    bytes: int = 100
    dropped: dict[str, int] = field(default_factory=dict)
    runs_cut: int = 0
    backend: str = "tiktoken"
    proven_bytes: int = 0


def parts_of(documents, lengths, **counts):
    """The documents in parts of these many, one after another."""
    parts, start = [], 0
    for number, length in enumerate(lengths):
        parts.append(Part(documents[start : start + length], f"000000-{number:06d}", 100 * number, **counts))
        start += length
    assert start >= len(documents)
    return parts


def write_part(folder, part, plan=PLAN, block_documents=2):
    """Returns the record's tree."""
    folder.mkdir(parents=True, exist_ok=True)
    ids_file = docs_file = b""
    blocks = []
    for start in range(0, len(part.documents), block_documents):
        ids = rows = b""
        tokens = 0
        some = part.documents[start : start + block_documents]
        for text, document in some:
            ids += struct.pack(f"<{1 + len(document)}H", END_OF_TEXT, *document)
            rows += hashlib.sha256(text).digest() + struct.pack("<I", 1 + len(document))
            tokens += 1 + len(document)
        blocks.append({"documents": len(some), "tokens": tokens, "crc32": zlib.crc32(ids + rows)})
        ids_file += ids
        docs_file += rows
    (folder / f"{part.name}.ids").write_bytes(ids_file)
    (folder / f"{part.name}.docs").write_bytes(docs_file)
    record = {
        "name": part.name,
        "plan": plan,
        "position": part.position,
        "bytes": part.bytes,
        "documents": len(part.documents),
        "tokens": len(ids_file) // 2,
        "text_bytes": sum(len(text) for text, _ in part.documents),
        "runs_cut": part.runs_cut,
        "dropped": part.dropped,
        "backend": part.backend,
        "proven_bytes": part.proven_bytes,
        "blocks": blocks,
        "complete": True,
    }
    (folder / f"{part.name}.json").write_text(json.dumps(record))
    return record


@dataclass
class Expected:
    ids: dict[str, list[int]]
    documents: dict[str, int]
    duplicates: int
    documents_sha256: str
    limited: bool
    parts_used: int


def expected(parts, validation_fraction, deduplicate=False, limit_tokens=None):
    """One document after another, as the data set is defined."""
    ids, documents = {"train": [], "val": []}, {"train": 0, "val": 0}
    seen, digests = set(), []
    # How many documents were read, and duplicates among them, when the last one was taken.
    upto, duplicates, duplicates_upto = 0, 0, 0
    limited, parts_used = False, 0
    for part in parts:
        if limited:
            break
        parts_used += 1
        for text, document in part.documents:
            digest = hashlib.sha256(text).digest()
            if deduplicate and digest in seen:
                digests.append(digest)
                duplicates += 1
                continue
            total = len(ids["train"]) + len(ids["val"]) + 1 + len(document)
            if limit_tokens is not None and total > limit_tokens:
                limited = True
                break
            seen.add(digest)
            digests.append(digest)
            split = "val" if int(digest.hex()[:16], 16) < validation_fraction * 2**64 else "train"
            ids[split] += [END_OF_TEXT, *document]
            documents[split] += 1
            upto, duplicates_upto = len(digests), duplicates
    if limited:
        digests, duplicates = digests[:upto], duplicates_upto
    revision = hashlib.sha256(b"".join(digests)).hexdigest()
    return Expected(ids, documents, duplicates, revision, limited, parts_used)


def read_shards(folder, split):
    """Ids of each of the split's shards, in order."""
    shards = []
    for path in sorted(folder.glob(f"{split}_*.bin")):
        data = path.read_bytes()
        magic, version, tokens, *rest = struct.unpack("<256i", data[:1024])
        assert (magic, version, set(rest)) == (20240520, 1, {0})
        shards.append(list(struct.unpack(f"<{tokens}H", data[1024:])))
    return shards
