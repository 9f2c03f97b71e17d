"""Writes manifest.json, and compares a folder with it."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

from data_prep.progress import Report, no_report
from megaresid.data.manifest import MANIFEST_NAME, Manifest, ShardEntry
from megaresid.data.shards import HEADER_BYTES, TOKEN_BYTES, check_shard
from megaresid.durable import write_text
from megaresid.errors import UserError

# Read of a shard between two reports.
VERIFY_BYTES = 2**24


def to_json(manifest: Manifest) -> str:
    """The text of manifest.json."""
    return json.dumps(manifest.model_dump(mode="json", by_alias=True), indent=2) + "\n"


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Make the folder a data set: the manifest appears whole or not at all."""
    write_text(folder / MANIFEST_NAME, to_json(manifest))


def verify_shards(
    folder: Path, manifest: Manifest, report: Report = no_report
) -> Iterator[tuple[ShardEntry, str | None]]:
    """Each shard with what is wrong with it, None when its checksum is the recorded one. Reports no documents."""
    total = sum(entry.bytes for entry in manifest.content.shards)
    bytes_before = tokens_before = 0
    for entry in manifest.content.shards:
        path = folder / entry.name
        try:
            check_shard(path, entry)
            checksum = hashlib.sha256()
            for done in _read_into(checksum, path):
                tokens = tokens_before + max(0, done - HEADER_BYTES) // TOKEN_BYTES
                report((bytes_before + done) / total, 0, tokens)
        except UserError as error:
            problem = str(error)
        except OSError as error:
            problem = f"{path}: {error.strerror}; copy it here again"
        else:
            found = checksum.hexdigest()
            damaged = f"{path}: damaged, its sha256 is {found}, the manifest says {entry.sha256}"
            problem = damaged if found != entry.sha256 else None
        yield entry, problem
        bytes_before += entry.bytes
        tokens_before += entry.tokens


def _read_into(checksum, path: Path) -> Iterator[int]:
    """Put the file into the checksum, a piece at a time; yields the bytes read so far."""
    done = 0
    with open(path, "rb", buffering=0) as file:
        while piece := file.read(VERIFY_BYTES):
            checksum.update(piece)
            done += len(piece)
            yield done
