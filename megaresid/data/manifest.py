"""manifest.json: what a folder of shards is, and the identity of its content.

A folder without a manifest is not a data set: the manifest is written last.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    field_validator,
    model_serializer,
    model_validator,
)

from megaresid.data.shards import HEADER_BYTES, TOKEN_BYTES
from megaresid.errors import UserError

MANIFEST_NAME = "manifest.json"
Split = Literal["train", "val"]
Sha256 = Field(pattern="^[0-9a-f]{64}$")


class Record(BaseModel):
    """Base of the manifest's parts: immutable, and closed to keys it does not know.

    A key that is None is not written, so that a key added later leaves the identity of older data sets as it was.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True, hide_input_in_errors=True)

    @model_serializer(mode="wrap")
    def _without_none(self, dump: SerializerFunctionWrapHandler) -> dict:
        return {key: value for key, value in dump(self).items() if value is not None}


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
    """Where the text came from.

    kind      the source of data_prep (fineweb, hub, parquet, jsonl, text, python-docs; datatrove for its pipelines),
              or what the ids came as: adopted (shards used as they were found), nanogpt, megatron
    revision  changes when the text does: ``sha256:`` and the sha256 over the sha256s of the documents that were read
              (a name of the release where the source has one; over the ids where there was no text)
    dataset   name of the data set on the Hub
    config    its configuration, e.g. sample-10BT
    commit    the commit of its repository that was read
    """

    kind: str
    revision: str
    dataset: str | None = None
    config: str | None = None
    commit: str | None = None


class Tokenizer(Record):
    """``sha256`` is over the ranks, one ``base64(token) rank`` line each; ids are below ``vocab_size``."""

    name: str
    sha256: str = Sha256
    vocab_size: int
    end_of_text: int


class Options(Record):
    """The options of data_prep that shape the shards; None where an option was not given.

    shard_tokens            most tokens in a shard; None for shards that data_prep did not cut
    validation_fraction     fraction of the documents that is held out; None where the split was found, not made
    language                documents whose ``language`` is another were left out
    minimum_language_score  documents whose ``language_score`` is lower were left out
    minimum_score           documents whose ``score`` is lower were left out
    deduplicate             True: of documents with the same text only the first was kept
    limit_tokens            most tokens of both splits together
    """

    shard_tokens: int | None = None
    validation_fraction: float | None = None
    language: str | None = None
    minimum_language_score: float | None = None
    minimum_score: float | None = None
    deduplicate: Literal[True] | None = None
    limit_tokens: int | None = None


class Counts(Record):
    documents: int
    tokens: int


Dropping = Annotated[int | None, Field(default=None, ge=1)]


class Dropped(Record):
    """Documents that were left out, by reason; None where there was none.

    empty           no text, or white space only
    bad_rows        the row was malformed or its text not a text
    invalid_utf8    the text was not UTF-8
    too_long        the text was longer than one document may be
    other_language  the language was not the one asked for
    low_score       a score was below the least one asked for
    unreadable      files (or parts of large files) that could not be read and were skipped as asked
    duplicates      the text had come before

    ``of`` makes it of counts, zeros included.
    """

    empty: int = Field(ge=0)
    bad_rows: Dropping
    invalid_utf8: Dropping
    too_long: Dropping
    other_language: Dropping
    low_score: Dropping
    unreadable: Dropping
    duplicates: Dropping

    @classmethod
    def of(cls, counts: Mapping[str, int]) -> "Dropped":
        return cls(**{"empty": 0} | {reason: count for reason, count in counts.items() if count})


class Content(Record):
    """What the folder holds: the same however, wherever and whenever the folder was made.

    split_rule  how a document came to its split
    splits      documents and tokens of each split
    runs_cut    how often a text without any break was cut to be encoded
    limited     True: the limit in tokens ended the data set before the source did
    """

    source: Source
    options: Options
    tokenizer: Tokenizer
    split_rule: str
    splits: dict[Split, Counts]
    dropped: Dropped
    runs_cut: int
    limited: Literal[True] | None = None
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


class SourceFiles(Record):
    """The files that were read: how many, their bytes, and the sha256 over their lines ``name bytes stamp``.

    The stamp is a local file's time of change in ns, or the blob of a file on the Hub.
    """

    count: int
    bytes: int
    sha256: str = Sha256


class Provenance(Record):
    """How this copy was made; no part of the identity.

    created            ISO time in UTC
    inputs             the paths that were given
    text_column        the field or column with the text
    source_files       the files that were read
    workers            processes that encoded
    partitions         machines or jobs whose parts were merged
    tokenizer_backend  library that encoded; of several, joined by "+"
    proven_bytes       bytes of text that the reference tokenizer encoded too, with the same ids
    versions           of Python and the libraries
    """

    created: str
    inputs: tuple[str, ...] = ()
    text_column: str | None = None
    source_files: SourceFiles | None = None
    workers: int | None = None
    partitions: int | None = None
    tokenizer_backend: str | None = None
    proven_bytes: int | None = None
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
    if folder.is_file():
        raise UserError(f"data folder {folder}: is a file; name the folder of the data set")
    if not folder.is_dir():
        raise UserError(f"data folder {folder}: no such folder; python -m data_prep --out {folder} ... makes one")
    path = folder / MANIFEST_NAME
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        raise UserError(
            f"data folder {folder}: not a data set, it has no {MANIFEST_NAME} (was data_prep interrupted?)"
        ) from None
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; it must be a file that can be read") from None
    try:
        manifest = Manifest.model_validate_json(text)
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(str(part) for part in problem["loc"]) or "content"
        raise UserError(f"{path}: {where}: {problem['msg']}; make the data set again with data_prep") from None
    for shard in manifest.content.shards:
        if _leads_out(folder / shard.name):
            raise UserError(f"{path}: {shard.name} is a link out of the data folder; put the file itself there")
    return manifest


def _leads_out(path: Path) -> bool:
    try:
        return path.resolve().parent != path.parent.resolve()
    except (OSError, RuntimeError):  # a link to itself
        return True


def check_vocabulary(manifest: Manifest, vocab_size: int) -> None:
    """Raise UserError when a shard holds an id that a model of ``vocab_size`` ids has no embedding for."""
    for shard in manifest.content.shards:
        if shard.largest_id >= vocab_size:
            raise UserError(
                f"{shard.name}: its largest token id {shard.largest_id} is outside the vocabulary of {vocab_size}; "
                f"use a vocabulary of at least {shard.largest_id + 1} or other data"
            )
