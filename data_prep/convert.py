"""Data sets to and from the files of other projects: the same documents, <|endoftext|> where each project has it."""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import tyro

from data_prep.formats import megatron, nanogpt
from data_prep.formats.found import ids_manifest
from data_prep.formats.ids import beginning_documents, ending_documents, read_blocks
from data_prep.manifest import write_manifest
from data_prep.progress import Report, no_report
from data_prep.tokenizer import END_OF_TEXT
from data_prep.writer import ShardWriter
from megaresid.data.manifest import MANIFEST_NAME, Counts, Manifest, ShardEntry, Split, load_manifest
from megaresid.data.shards import HEADER_BYTES, MOST_TOKENS, check_shard
from megaresid.errors import UserError

FORMATS = {"nanogpt": nanogpt, "megatron": megatron}
Format = Literal["nanogpt", "megatron"]


@dataclass(frozen=True)
class Conversion:
    """Convert a data set to the files of another project, or those to a data set; the documents stay the same."""

    folder: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="IN")]
    """With --to: a data set. With --from: a folder of train.bin and val.bin (nanogpt), or of .bin and .idx with train
    or val in their names (megatron)."""
    out: Annotated[Path, tyro.conf.arg(metavar="DIR")]
    """Folder for the result; must be empty or not exist."""
    to: Format | None = None
    """Write the files of this project: train.bin and val.bin (nanogpt), and train.idx and val.idx beside (megatron)."""
    origin: Annotated[Format | None, tyro.conf.arg(name="from")] = None
    """Read the files of this project, and write a data set. Their ids must be GPT-2's."""
    shard_tokens: int = 100_000_000
    """With --from: tokens in a shard, at most."""


@dataclass(frozen=True)
class Converted:
    """Documents and tokens that were written of each split; the data set's manifest where one was made."""

    splits: dict[Split, Counts]
    manifest: Manifest | None


def convert(conversion: Conversion, report: Report = no_report) -> Converted:
    """Do ``conversion``, calling ``report(fraction, documents, tokens)`` of what was written.

    A data set has <|endoftext|> before each document, the other formats have it after each. A split that begins within
    a document, as adopted shards may, has the rest of it as a document; a last document without <|endoftext|> gets it.
    Raises UserError for a mistake in the options, and for malformed or damaged files, after deleting what was written.
    """
    if (conversion.to is None) == (conversion.origin is None):
        raise UserError(f"convert {conversion.folder}: say either --to or --from, with nanogpt or megatron")
    if not 1 <= conversion.shard_tokens <= MOST_TOKENS:
        raise UserError(f"--shard-tokens {conversion.shard_tokens}: must be from 1 to {MOST_TOKENS}")
    if not conversion.folder.is_dir():
        raise UserError(f"{conversion.folder}: no such folder")
    try:
        return _to(conversion, report) if conversion.to else _from(conversion, report)
    except OSError as error:
        raise UserError(f"{error.filename or conversion.out}: {error.strerror}; mend that and start again") from error


class Progress:
    """Counts what was done for the report."""

    def __init__(self, total: int, end_of_text: int, report: Report):
        self.total, self.end_of_text, self.report = total, end_of_text, report
        self.read = self.documents = self.tokens = 0

    def advance(self, count: int) -> None:
        """``count`` more bytes were read."""
        self.read += count
        self.report(self.read / self.total, self.documents, self.tokens)

    def count(self, blocks: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
        """The same blocks; what went through is counted."""
        for block in blocks:
            self.documents += int(np.count_nonzero(block == self.end_of_text))
            self.tokens += len(block)
            yield block


def _to(conversion: Conversion, report: Report) -> Converted:
    manifest = load_manifest(conversion.folder)
    for shard in manifest.content.shards:
        check_shard(conversion.folder / shard.name, shard)
    end_of_text = manifest.content.tokenizer.end_of_text
    progress = Progress(sum(shard.bytes for shard in manifest.content.shards), end_of_text, report)
    form, splits = FORMATS[conversion.to], {}
    made = _claim(conversion.out)
    try:
        for split in manifest.content.splits:
            if shards := manifest.shards(split):
                ids = chain.from_iterable(_read_shard(conversion.folder, shard, progress.advance) for shard in shards)
                blocks = progress.count(ending_documents(ids, end_of_text))
                splits[split] = form.write(conversion.out, split, blocks, end_of_text)
    except BaseException:
        for split in manifest.content.splits:
            for suffix in form.SUFFIXES:
                (conversion.out / f"{split}{suffix}").unlink(missing_ok=True)
        if made:
            conversion.out.rmdir()
        raise
    return Converted(splits, None)


def _from(conversion: Conversion, report: Report) -> Converted:
    form = FORMATS[conversion.origin]
    found = form.find(conversion.folder)
    progress = Progress(sum(form.check(path) for paths in found.values() for path in paths), END_OF_TEXT, report)
    made = _claim(conversion.out)
    writers = {split: ShardWriter(conversion.out, split, conversion.shard_tokens) for split in found}
    try:
        splits, revision = {}, hashlib.sha256()
        for split, paths in found.items():
            before = progress.documents, progress.tokens
            ids = chain.from_iterable(form.read(path, progress.advance) for path in paths)
            for block in progress.count(beginning_documents(ids)):
                writers[split].append(block)
                revision.update(block)
            splits[split] = Counts(documents=progress.documents - before[0], tokens=progress.tokens - before[1])
        manifest = ids_manifest(
            kind=conversion.origin,
            revision=revision.hexdigest(),
            split_rule="as found: a split was a file",
            splits=splits,
            shards=[entry for writer in writers.values() for entry in writer.finish()],
            shard_tokens=conversion.shard_tokens,
            inputs=(str(conversion.folder),),
        )
        write_manifest(conversion.out, manifest)
    except BaseException:
        (conversion.out / MANIFEST_NAME).unlink(missing_ok=True)
        for writer in writers.values():
            writer.discard()
        if made:
            conversion.out.rmdir()
        raise
    return Converted(splits, manifest)


def _claim(out: Path) -> bool:
    """Make the folder, or see that it is empty; True when it was made here."""
    try:
        out.mkdir(parents=True)
        return True
    except FileExistsError:
        if not out.is_dir():
            raise UserError(f"--out {out}: is a file; name a folder") from None
    if any(out.iterdir()):
        raise UserError(f"--out {out}: not empty; name a new folder, or delete this one")
    return False


def _read_shard(folder: Path, entry: ShardEntry, advance: Callable[[int], None]) -> Iterator[np.ndarray]:
    """The ids of a shard as uint16[n] blocks; UserError at its end where the checksum is not the recorded one."""
    path = folder / entry.name
    with open(path, "rb") as file:
        checksum = hashlib.sha256(file.read(HEADER_BYTES))
        advance(HEADER_BYTES)
        for block in read_blocks(file):
            checksum.update(block)
            yield block
            advance(block.nbytes)
    if checksum.hexdigest() != entry.sha256:
        raise UserError(f"{path}: damaged, its sha256 is not the one in the manifest; copy it again")
