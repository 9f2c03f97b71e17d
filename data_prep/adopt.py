"""Ready-made GPT-2 shards (llm.c's and modded-nanogpt's .bin) as a data set: a manifest is written, they stay."""

import hashlib
import os
from pathlib import Path

import numpy as np
from pydantic import ValidationError

from data_prep.formats.found import ids_manifest, split_in_name
from data_prep.formats.ids import as_gpt2, read_blocks
from data_prep.manifest import write_manifest
from data_prep.plan import PARTS, PLAN
from data_prep.progress import Report, no_report
from data_prep.tokenizer import END_OF_TEXT
from megaresid.data.manifest import MANIFEST_NAME, Counts, Manifest, ShardEntry, Split
from megaresid.data.shards import HEADER_BYTES, TOKEN_BYTES, parse_header
from megaresid.errors import UserError

# What files of the same family hold that have another magic number.
OTHERS = {
    0: "an unfinished shard, its header was never written; delete it, or finish the job that wrote it",
    20240801: "a shard of Llama 3's ids; only GPT-2's can be used",
    20240522: "llm.c's multiple-choice examples, not a shard; move it out of the folder",
}


def adopt(folder: Path, report: Report = no_report) -> Manifest:
    """Write a manifest for the .bin shards in ``folder``; each is read once, and ``report`` told of what was read.

    The shards of a split are those with ``train`` or ``val`` as a word in their names, in the order of the names. A
    document is counted where its <|endoftext|> is. Raises UserError for a folder without shards, with a manifest or
    with an unfinished job, and for any .bin that is not a whole shard of GPT-2 ids in the folder itself.
    """
    folder = Path(folder)
    try:
        paths = _shards(folder)
        splits = {path: split_in_name(path) for path in paths}
        tokens = {path: _check(path) for path in paths}
        manifest = _read(folder, splits, tokens, report)
        write_manifest(folder, manifest)
    except OSError as error:
        raise UserError(f"{error.filename or folder}: {error.strerror}; mend that and start again") from error
    return manifest


def _shards(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise UserError(f"{folder}: {'is a file; name its folder' if folder.exists() else 'no such folder'}")
    if (folder / MANIFEST_NAME).exists():
        raise UserError(f"{folder}: has a {MANIFEST_NAME}, it is a data set as it is")
    if (folder / PARTS / PLAN).exists():
        raise UserError(f"{folder}: holds an unfinished job of data_prep; go on with it by --resume")
    paths = sorted(path for path in folder.iterdir() if path.suffix == ".bin")
    if not paths:
        raise UserError(f"{folder}: no .bin shards in it; name a folder with shards of GPT-2 ids")
    return paths


def _check(path: Path) -> int:
    """The tokens that a shard's header counts, which its size agrees with."""
    if path.resolve().parent != path.parent.resolve():
        raise UserError(f"{path}: a link out of the folder, which a data set may not have; put the file itself there")
    if not path.is_file():
        raise UserError(f"{path}: not a file; move it out of the folder")
    with open(path, "rb") as file:
        header = file.read(HEADER_BYTES)
        size = os.fstat(file.fileno()).st_size
    if (magic := int.from_bytes(header[:4], "little")) in OTHERS and len(header) == HEADER_BYTES:
        raise UserError(f"{path}: {OTHERS[magic]}")
    tokens = parse_header(header, str(path))
    if tokens < 1:
        raise UserError(f"{path}: its header counts {tokens} tokens; delete it or copy it again")
    if size != (needed := HEADER_BYTES + TOKEN_BYTES * tokens):
        change = "cut short" if size < needed else "too long"
        raise UserError(f"{path}: {change}, {size} bytes where {tokens} tokens need {needed}; copy it again")
    return tokens


def _read(folder: Path, splits: dict[Path, Split], tokens: dict[Path, int], report: Report) -> Manifest:
    """Read every shard once, and sum them up."""
    revision = hashlib.sha256()
    documents, done, entries = dict.fromkeys(splits.values(), 0), 0, []
    for path, split in splits.items():
        position = largest = 0
        with open(path, "rb") as file:
            checksum = hashlib.sha256(file.read(HEADER_BYTES))
            for block in read_blocks(file):
                as_gpt2(block, path, position)
                checksum.update(block)
                revision.update(block)
                documents[split] += int(np.count_nonzero(block == END_OF_TEXT))
                largest = max(largest, int(block.max()))
                position += len(block)
                done += len(block)
                report(done / sum(tokens.values()), sum(documents.values()), done)
        entries.append(_entry(path, split, position, checksum.hexdigest(), largest))
    counts = {split: sum(entry.tokens for entry in entries if entry.split == split) for split in documents}
    return ids_manifest(
        kind="adopted",
        revision=revision.hexdigest(),
        split_rule="as found: train or val in the names of the shards",
        splits={split: Counts(documents=documents[split], tokens=counts[split]) for split in sorted(counts)},
        shards=entries,
        inputs=(str(folder),),
    )


def _entry(path: Path, split: Split, tokens: int, checksum: str, largest: int) -> ShardEntry:
    try:
        return ShardEntry(
            name=path.name,
            split=split,
            tokens=tokens,
            bytes=HEADER_BYTES + TOKEN_BYTES * tokens,
            sha256=checksum,
            largest_id=largest,
        )
    except ValidationError as error:
        raise UserError(f"{path}: {error.errors()[0]['msg']}; rename it") from None
