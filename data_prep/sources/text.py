"""Text files, each one document."""

import os
from collections.abc import Iterator

from data_prep.sources.batches import in_batches
from data_prep.sources.checked import refusal
from data_prep.sources.find_files import find_files
from data_prep.sources.source import MOST_BYTES, Batch, Reader, Source, Tally, Unit
from data_prep.sources.streams import COMPRESSED, open_stream


class TextReader(Reader):
    """Each file one document, as it is; one that is too long is not read to its end."""

    def read(self, unit: Unit, tally: Tally) -> Iterator[Batch]:
        return in_batches(self._documents(unit, tally))

    def _documents(self, unit: Unit, tally: Tally) -> Iterator[tuple[bytes, int]]:
        position = 0
        for segment in unit.segments:
            with open_stream(segment.path, segment.name) as (stream, file):
                size = os.fstat(file.fileno()).st_size
                plain = not segment.path.name.endswith(COMPRESSED)
                document = None if plain and size > MOST_BYTES else stream.read(MOST_BYTES + 1)
            position = min(position + size, unit.bytes)
            reason = "too_long" if document is None else refusal(document)
            if reason:
                tally[reason] += 1
            else:
                yield document, position
            del document


class TextFiles(Source):
    """Files of --input, .txt, .txt.gz or .txt.zst in folders."""

    kind = "text"
    suffixes = (".txt", ".txt.gz", ".txt.zst")

    @classmethod
    def open(cls, job) -> "TextFiles":
        return cls(find_files(job.input, cls.suffixes), TextReader())
