"""What a job will take, from a sample of its first documents: tokens, disk and time."""

import shutil
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import astuple, dataclass
from itertools import islice
from math import ceil
from pathlib import Path

from data_prep.backends import Backend
from data_prep.encoding import encode_documents
from data_prep.job import Job
from data_prep.parts import DOCUMENT, PartRecord
from data_prep.progress import duration
from data_prep.schedule import AHEAD
from data_prep.sources.source import Reader, Share, Source, Unit, Unreadable
from megaresid.data.shards import HEADER_BYTES, TOKEN_BYTES
from megaresid.errors import UserError

# Places of a source that are sampled, where it is on this machine: documents are often sorted by where they are from.
PLACES = 4
# At each place the sample ends with the first of these.
SAMPLE_BYTES = 2**20
SAMPLE_SECONDS = 0.25
# Of one document, so that a huge one does not take minutes.
SAMPLE_DOCUMENT_BYTES = 2**19
# With --deduplicate: the digests that were seen, twice while they are merged.
SEEN_BYTES = 2 * 16


@dataclass(frozen=True)
class Sample:
    """What was seen of a source: its bytes that were read, the documents and bytes of text in them; of the text that
    was encoded, the bytes and tokens; the seconds that reading and encoding took."""

    source_bytes: int = 0
    documents: int = 0
    text_bytes: int = 0
    encoded_bytes: int = 0
    tokens: int = 0
    reading_seconds: float = 0.0
    encoding_seconds: float = 0.0

    def __add__(self, other: "Sample") -> "Sample":
        return Sample(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))


@dataclass(frozen=True)
class Estimate:
    """Of a job, or a share of one: bytes of the source that it reads, documents and tokens of the data set, bytes that
    are still to be written on the disk of ``out`` and of the Hub's cache, seconds with ``workers``."""

    source_bytes: int
    documents: int
    tokens: int
    parts_bytes: int
    shards_bytes: int
    download_bytes: int
    download_folder: Path | None
    seconds: float
    workers: int

    def __str__(self) -> str:
        size = self.parts_bytes + self.shards_bytes
        # A share has no shards: its parts stay until they are merged.
        of_what = f"parts {gigabytes(self.parts_bytes)}, removed at the end, and shards {gigabytes(self.shards_bytes)}"
        text = (
            f"expected: {self.tokens:,} tokens in {self.documents:,} documents from {gigabytes(self.source_bytes)}; "
            f"{gigabytes(size)} of disk ({of_what if self.shards_bytes else 'parts, to be merged'})"
        )
        if self.download_bytes:
            text += f" and {gigabytes(self.download_bytes)} to download"
        return f"{text}; {duration(self.seconds)} with {self.workers} worker{'s' if self.workers > 1 else ''}"

    def check_disk(self, out: Path) -> None:
        """Raise UserError where the file systems have less free than what is to be written on them."""
        size = self.parts_bytes + self.shards_bytes
        if self.download_folder and _device(self.download_folder) == _device(out):
            size += self.download_bytes
        free = shutil.disk_usage(_existing(out)).free
        if size > free:
            raise UserError(
                f"--out {out}: needs about {size:,} bytes of disk (parts and shards are both there at the end), and "
                f"{free:,} are free; free some, name a folder on another disk, or use --limit-tokens"
            )


def check_download(source: Source, job: Job) -> None:
    """Raise UserError where the Hub's cache has no room for what the job has to download."""
    if size := source.download_bytes(job.share):
        free = shutil.disk_usage(_existing(source.download_folder)).free
        if size > free and job.limit_tokens is None:
            raise UserError(
                f"--source {job.source}: {size:,} bytes are to be downloaded to {source.download_folder}, and {free:,} "
                "are free there; free some, or name a folder on another disk in HF_HUB_CACHE"
            )


def sample_of(job: Job, source: Source, backend: Backend) -> Sample:
    """Of the job's source: of its first unit only where more would have to be downloaded."""
    if source.download_bytes(job.share):
        units = list(islice(source.units(job.share), 1))
    else:
        places = (source.units(Share(number, PLACES)) for number in range(1, PLACES + 1))
        units = [unit for place in places for unit in islice(place, 1)]
    samples = (take_sample(source.reader, unit, backend, job.skip_unreadable) for unit in units)
    return sum(samples, Sample())


def take_sample(reader: Reader, unit: Unit, backend: Backend, skip_unreadable: bool) -> Sample:
    """Read and encode the first documents of a unit. Raises UserError as reading does."""
    source_bytes = documents = text_bytes = encoded_bytes = tokens = 0
    reading = encoding = 0.0
    start = time.monotonic()
    try:
        for batch in reader.read(unit, Counter()):
            reading += time.monotonic() - start
            source_bytes, documents = batch.position, documents + len(batch.documents)
            text_bytes += sum(map(len, batch.documents))
            texts = [_beginning(document) for document in batch.documents]
            start = time.monotonic()
            tokens += sum(len(encoded.ids) for encoded in encode_documents(backend, texts))
            encoded_bytes += sum(map(len, texts))
            encoding += time.monotonic() - start
            if encoded_bytes >= SAMPLE_BYTES or reading + encoding >= SAMPLE_SECONDS:
                break
            start = time.monotonic()
        else:
            source_bytes = unit.bytes
    except Unreadable:
        if not skip_unreadable:
            raise
    return Sample(source_bytes, documents, text_bytes, encoded_bytes, tokens, reading, encoding)


def estimate(
    job: Job, source: Source, sample: Sample, found: Iterable[PartRecord], workers: int, unit_bytes: int
) -> Estimate:
    """What the job will take, if all of its source is like the sample; ``found`` are the parts that are there, and
    ``unit_bytes`` what a unit covers of the source: where there is a limit in tokens, parts go beyond it."""

    def ratio(a: float, b: float) -> float:
        return a / b if b else 0.0

    share_bytes = parts_bytes = source.bytes // job.share.of
    documents_per_byte = ratio(sample.documents, sample.source_bytes)
    text_per_byte = ratio(sample.text_bytes, sample.source_bytes)
    tokens_per_byte = text_per_byte * ratio(sample.tokens, sample.encoded_bytes)
    seconds_per_byte = ratio(sample.reading_seconds, sample.source_bytes) + text_per_byte * ratio(
        sample.encoding_seconds, sample.encoded_bytes
    )
    if job.limit_tokens is not None and tokens_per_byte and not job.partition:
        share_bytes = min(share_bytes, ceil(job.limit_tokens / tokens_per_byte))
        # The one with the last document, and those that workers began meanwhile.
        parts_bytes = min(parts_bytes, share_bytes + (1 + AHEAD * workers) * unit_bytes)
    documents, tokens = ceil(share_bytes * documents_per_byte), ceil(share_bytes * tokens_per_byte)
    if job.limit_tokens is not None and not job.partition:
        tokens = min(tokens, job.limit_tokens)
    kept = sum(record.bytes for record in found)
    left, left_parts = max(share_bytes - kept, 0), max(parts_bytes - kept, 0)
    shards = TOKEN_BYTES * tokens + HEADER_BYTES * (2 + tokens // job.shard_tokens)
    parts = left_parts * (TOKEN_BYTES * tokens_per_byte + DOCUMENT.itemsize * documents_per_byte)
    seen = SEEN_BYTES * documents if job.deduplicate else 0
    return Estimate(
        source_bytes=share_bytes,
        documents=documents,
        tokens=tokens,
        parts_bytes=ceil(parts) + seen,
        shards_bytes=0 if job.partition else shards,
        download_bytes=source.download_bytes(job.share),
        download_folder=source.download_folder,
        seconds=left * seconds_per_byte / workers,
        workers=workers,
    )


def gigabytes(size: float) -> str:
    return f"{size / 1e9:,.1f} GB" if size >= 1e9 else f"{size / 1e6:,.1f} MB"


def _beginning(document: bytes) -> bytes:
    """A document's first SAMPLE_DOCUMENT_BYTES, without a character that is cut there."""
    if len(document) <= SAMPLE_DOCUMENT_BYTES:
        return document
    return document[:SAMPLE_DOCUMENT_BYTES].decode("utf-8", "ignore").encode("utf-8")


def _existing(folder: Path) -> Path:
    """The folder, or what there is of the path to it."""
    return next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())


def _device(folder: Path) -> int:
    return _existing(folder).stat().st_dev
