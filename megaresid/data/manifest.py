"""manifest.json: what a folder of shards is, and the identity of its content.

A folder without a manifest is not a data set: the manifest is written last.
"""

import hashlib
import json
import re
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from megaresid.data.shards import HEADER_BYTES, TOKEN_BYTES
from megaresid.errors import UserError

MANIFEST_NAME = "manifest.json"
Split = Literal["train", "val"]
Sha256 = Field(pattern="^[0-9a-f]{64}$")


class Record(BaseModel):
    """Base of the manifest's parts: immutable, and closed to keys it does not know."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True, hide_input_in_errors=True)


class ShardEntry(Record):
    """One shard file: its size, its checksum over the whole file, and the largest token id in it."""

    name: str
    split: Split
    tokens: int = Field(ge=1)
    bytes: int
    sha256: str = Sha256
    largest_id: int = Field(ge=0, le=65535)

    @field_validator("name")
    @classmethod
    def _plain_file_name(cls, name: str) -> str:
        if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", name):
            raise ValueError(f"{name!r} is not a plain file name in the data folder")
        return name

    @model_validator(mode="after")
    def _bytes_follow_from_tokens(self):
        if self.bytes != HEADER_BYTES + TOKEN_BYTES * self.tokens:
            raise ValueError(f"{self.name}: {self.bytes} bytes cannot hold {self.tokens} tokens")
        return self


class Source(Record):
    """Where the text came from; ``revision`` changes when the text does."""

    kind: str
    revision: str


class Tokenizer(Record):
    """``sha256`` is over the ranks, one ``base64(token) rank`` line each; ids are below ``vocab_size``."""

    name: str
    sha256: str = Sha256
    vocab_size: int
    end_of_text: int


class Options(Record):
    """The options of data_prep that shape the shards."""

    shard_tokens: int
    validation_fraction: float


class Counts(Record):
    documents: int
    tokens: int


class Dropped(Record):
    """Documents that were left out."""

    empty: int


class Content(Record):
    """What the folder holds: the same however, wherever and whenever the folder was made."""

    source: Source
    options: Options
    tokenizer: Tokenizer
    split_rule: str
    splits: dict[Split, Counts]
    dropped: Dropped
    runs_cut: int
    shards: tuple[ShardEntry, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _counts_agree(self):
        names = [shard.name for shard in self.shards]
        if len(set(names)) != len(names):
            raise ValueError("a shard is listed twice")
        for split, counts in self.splits.items():
            listed = sum(shard.tokens for shard in self.shards if shard.split == split)
            if listed != counts.tokens:
                raise ValueError(f"split {split} has {counts.tokens} tokens, its shards {listed}")
        if unknown := {shard.split for shard in self.shards} - set(self.splits):
            raise ValueError(f"no counts for split {', '.join(sorted(unknown))}")
        return self


class Provenance(Record):
    """How this copy was made; no part of the identity. ``created`` is an ISO time in UTC."""

    created: str
    inputs: tuple[str, ...]
    text_column: str
    workers: int
    versions: dict[str, str]


class Manifest(Record):
    """The whole of manifest.json."""

    schema_version: Literal[1] = Field(alias="schema")
    content: Content
    provenance: Provenance

    @property
    def identity(self) -> str:
        """sha256 of ``content`` as canonical JSON (sorted keys, no spaces, ASCII)."""
        content = self.content.model_dump(mode="json", by_alias=True)
        canonical = json.dumps(content, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode("ascii")).hexdigest()

    def shards(self, split: Split) -> list[ShardEntry]:
        """The split's shards in the order of their tokens."""
        return [shard for shard in self.content.shards if shard.split == split]


def load_manifest(folder: Path) -> Manifest:
    """Read and check ``folder``'s manifest; the shards themselves are checked when they are opened.

    Raises UserError for a missing folder, a folder without a manifest, malformed or inconsistent JSON,
    another schema, and a shard name that is not a plain file in the folder.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"data folder {folder}: no such folder; python -m data_prep --out {folder} ... makes one")
    path = folder / MANIFEST_NAME
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        raise UserError(
            f"data folder {folder}: not a data set, it has no {MANIFEST_NAME} (was data_prep interrupted?)"
        ) from None
    try:
        manifest = Manifest.model_validate_json(text)
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(str(part) for part in problem["loc"]) or "content"
        raise UserError(f"{path}: {where}: {problem['msg']}; make the data set again with data_prep") from None
    for shard in manifest.content.shards:
        if (folder / shard.name).resolve().parent != folder.resolve():
            raise UserError(f"{path}: {shard.name} is a link out of the data folder; put the file itself there")
    return manifest


def check_vocabulary(manifest: Manifest, vocab_size: int) -> None:
    """Raise UserError when a shard holds an id that a model of ``vocab_size`` ids has no embedding for."""
    for shard in manifest.content.shards:
        if shard.largest_id >= vocab_size:
            raise UserError(
                f"{shard.name}: its largest token id {shard.largest_id} is outside the vocabulary of {vocab_size}; "
                f"use a vocabulary of at least {shard.largest_id + 1} or other data"
            )
