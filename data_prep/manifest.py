"""Writes manifest.json, and compares a folder with it."""

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

from megaresid.data.manifest import MANIFEST_NAME, Manifest, ShardEntry
from megaresid.data.shards import check_shard
from megaresid.errors import UserError


def to_json(manifest: Manifest) -> str:
    """The text of manifest.json."""
    return json.dumps(manifest.model_dump(mode="json", by_alias=True), indent=2) + "\n"


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Make the folder a data set: the manifest appears whole or not at all."""
    partial = folder / f"{MANIFEST_NAME}.partial"
    try:
        with open(partial, "x", encoding="utf-8") as file:
            file.write(to_json(manifest))
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, folder / MANIFEST_NAME)
    finally:
        partial.unlink(missing_ok=True)


def verify_shards(folder: Path, manifest: Manifest) -> Iterator[tuple[ShardEntry, str | None]]:
    """Each shard with what is wrong with it, None when its checksum is the recorded one."""
    for entry in manifest.content.shards:
        path = folder / entry.name
        try:
            check_shard(path, entry)
        except UserError as error:
            yield entry, str(error)
            continue
        with open(path, "rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        wrong = f"{path}: damaged, its sha256 is {found}, the manifest says {entry.sha256}"
        yield entry, wrong if found != entry.sha256 else None
